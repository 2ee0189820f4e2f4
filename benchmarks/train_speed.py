"""Speed and memory of the training step, beside a plain loop and beside its matrix products alone.

    python benchmarks/train_speed.py

The contenders take turns, so that a busy moment of the machine hits all of them; figures are
medians over the rounds, comparisons medians of the ratios within each round.

- step: `Trainer.advance`, as `vsc train` runs it.
- step, float32: the same without bfloat16 products.
- step, compiled: the same with `--compile`; where there is a C++ compiler.
- plain loop: the same objective written down directly: a DataLoader over tensors, the formula of
  the paper (supplement C, equation 9) as it is printed over images x pseudo-inputs x latents,
  float32, Adam as it comes.
- plain loop, from logits: the same with `kl_pairs`, which takes logarithms before it expands: what
  one writes who knows that logarithms are slow.
- products: the step's matrix products, forward and backward, in the precision that the step does
  them in (or all in float32), and nothing else. No step can be faster.
"""

import argparse
import multiprocessing
import os
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, TensorDataset

from vsc_serve.images import PixelSpec
from vsc_training.config import Recipe, load_recipe
from vsc_training.data import Examples
from vsc_training.device import uses_bfloat16
from vsc_training.model import VSC, DataSpec
from vsc_training.objective import Posterior, balance, kl_pairs, sparsity_per_latent
from vsc_training.smiley import generate
from vsc_training.trainer import Trainer

IMAGE_COUNT = 8192
SIDE = 28
PSEUDO_COUNTS = (16, 32, 64, 128, 256)
FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")

Step = Callable[[], object]
Clock = Callable[[], float]
Pairs = Callable[[Posterior, Posterior], torch.Tensor]


def make_examples() -> Examples:
    """Return faces cut to the size of MNIST."""
    cut = slice(2, 2 + SIDE)
    pixels = generate(IMAGE_COUNT, 0).images[:, cut, cut, None]
    spec = DataSpec(pixel_spec=PixelSpec(height=SIDE, width=SIDE, channels=1))
    ids = [str(number) for number in range(IMAGE_COUNT)]
    return Examples(np.ascontiguousarray(pixels), ids, spec)


def our_step(recipe: Recipe, *, is_compiled: bool = False) -> Step:
    """Return the step of `vsc train`."""
    return Trainer(recipe, make_examples(), torch.device("cpu"), is_compiled=is_compiled).advance


def printed_pairs(q: Posterior, p: Posterior) -> torch.Tensor:
    """Return `kl_pairs` with the formula as the paper prints it, everything expanded."""
    gamma, gamma_u = torch.sigmoid(q.spike_logit)[:, None], torch.sigmoid(p.spike_logit)
    sigma, sigma_u = torch.exp(0.5 * q.logvar)[:, None], torch.exp(0.5 * p.logvar)
    gamma = gamma.clamp(1e-6, 1 - 1e-6)
    distance = sigma**2 + (q.mu[:, None] - p.mu) ** 2
    slab = torch.log(sigma_u / sigma) + distance / (2 * sigma_u**2) - 0.5
    spike = gamma * torch.log(gamma / gamma_u)
    spike = spike + (1 - gamma) * torch.log((1 - gamma) / (1 - gamma_u))
    return (gamma * slab + spike).sum(2)


def plain_step(recipe: Recipe, pairs: Pairs) -> Step:
    """Return a step as one writes it down: easy to read, nothing measured."""
    examples = make_examples()
    images = torch.from_numpy(examples.rows).float() / 255.0
    model = VSC(recipe, examples.spec)
    model.start_pseudo_inputs(images[: recipe.pseudo_inputs])
    optimizer = torch.optim.Adam(model.parameters(), lr=recipe.learning_rate)
    loader = DataLoader(TensorDataset(images), recipe.batch_size, shuffle=True, drop_last=True)

    def batches() -> Iterator[torch.Tensor]:
        while True:
            for (batch,) in loader:
                yield batch

    stream = batches()

    def step() -> None:
        batch = next(stream)
        q, prior, weights = model.encode(batch), model.prior(), model.weights(batch)
        gamma = torch.sigmoid(q.spike_logit)
        spike = (torch.rand_like(gamma) < gamma).float() + gamma - gamma.detach()
        slab = q.mu + torch.randn_like(q.mu) * torch.exp(0.5 * q.logvar)
        raw = model.decoder(spike * slab)
        error = F.binary_cross_entropy_with_logits(raw, batch, reduction="sum") / len(batch)
        kl = (weights * pairs(q, prior)).sum(1).mean()
        sparsity = sparsity_per_latent(gamma.mean(0), recipe.alpha)
        loss = error + recipe.beta * kl
        loss = loss + recipe.sparsity_weight * sparsity
        loss = loss + recipe.balance_weight * balance(weights.mean(0))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


class Product(NamedTuple):
    """One matrix product of a step."""

    rows: int
    depth: int
    columns: int
    is_float32: bool
    """Whether the step does it in float32 even where bfloat16 is in use."""


def products_of(recipe: Recipe) -> list[Product]:
    """Return the matrix products of a step, forward and backward.

    A linear layer does one product forward and two backward (its weights, its input); the pixels of
    a batch need no gradient, those of the pseudo-inputs do.
    """
    batch, hidden, latents = recipe.batch_size, recipe.hidden, recipe.latent_dim
    pixels, pseudo = SIDE * SIDE, recipe.pseudo_inputs
    both = batch + pseudo  # one pass through the encoder
    found = _linear(both, pixels, hidden)[:2] + _linear(pseudo, pixels, hidden)[2:]
    found += _linear(batch, pixels, pseudo)[:2]
    found += _linear(both, hidden, 2 * latents)
    found += _linear(both, hidden, latents, is_float32=True)  # the spike logits
    found += _linear(batch, latents, hidden) + _linear(batch, hidden, pixels)
    # the classifier's weights times four tables of the prior
    return found + _linear(batch, pseudo, 4 * latents, is_float32=True)


def _linear(rows: int, inputs: int, outputs: int, *, is_float32: bool = False) -> list[Product]:
    """Return the products of a linear layer: forward, gradient of the weights, of the input."""
    return [
        Product(rows, inputs, outputs, is_float32),
        Product(outputs, rows, inputs, is_float32),
        Product(rows, outputs, inputs, is_float32),
    ]


def products_step(recipe: Recipe, dtype: torch.dtype) -> Step:
    """Return a step that only multiplies, into memory that is there."""
    operands = []
    for rows, depth, columns, is_float32 in products_of(recipe):
        chosen = torch.float32 if is_float32 else dtype
        left, right = torch.randn(rows, depth), torch.randn(columns, depth)
        out = torch.empty(rows, columns, dtype=chosen)
        operands.append((left.to(chosen), right.to(chosen).T, out))

    def step() -> None:
        for left, right, out in operands:
            torch.mm(left, right, out=out)

    return step


def images_per_second(
    steps: dict[str, Step], batch: int, rounds: int, seconds: float, clock: Clock
) -> None:
    """Print a table of the contenders' speeds, taking turns in every round."""
    rates: dict[str, list[float]] = {name: [] for name in steps}
    for step in steps.values():
        step()  # compiles, where there is something to compile
        _rate(step, seconds / 4, clock)
    for _ in range(rounds):
        for name, step in steps.items():
            rates[name].append(_rate(step, seconds, clock) * batch)
    ours = [name for name in ("step", "step, compiled") if name in rates]
    print(f"| contender | images/s | lowest to highest | {' is | '.join(ours)} is |")
    print("|---" * (3 + len(ours)) + "|")
    for name, found in rates.items():
        spread = f"{min(found):,.0f} to {max(found):,.0f}"
        times = [_times(rates[one], found) for one in ours]
        print(f"| {name} | {median(found):,.0f} | {spread} | {' | '.join(times)} |")


def _times(ours: list[float], others: list[float]) -> str:
    """Return how many times as fast one is as another, lowest to highest of the rounds' ratios.

    Of each round by itself: a busy moment of the machine slows both.
    """
    ratios = [one / other for one, other in zip(ours, others, strict=True)]
    return f"{median(ratios):.2f}x ({min(ratios):.2f} to {max(ratios):.2f})"


def peak_memory_mib(name: str, recipe: Recipe) -> float:
    """Return what twenty steps need above the model, optimiser and data, in this process."""
    torch.set_num_threads(1)
    step = contenders(recipe)[name]
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    before = _memory_mib("VmRSS")
    for _ in range(20):
        step()
    return _memory_mib("VmHWM") - before


def print_memory(recipe: Recipe) -> None:
    """Print the memory of our step and of the plain loop over the pseudo-inputs."""
    context = multiprocessing.get_context("spawn")
    print("| peak memory of a step, MiB | " + " | ".join(f"U = {u}" for u in PSEUDO_COUNTS) + " |")
    print("|---|" + "---|" * len(PSEUDO_COUNTS))
    for name in ("step", "step, float32", "plain loop"):
        cells = []
        for pseudo_count in PSEUDO_COUNTS:
            sized = replace(recipe, pseudo_inputs=pseudo_count)
            with ProcessPoolExecutor(1, mp_context=context) as pool:
                cells.append(f"{pool.submit(peak_memory_mib, name, sized).result():.0f}")
        print(f"| {name} | {' | '.join(cells)} |")


def contenders(recipe: Recipe) -> dict[str, Step]:
    """Return every contender, ready to step; products last."""
    plain = replace(recipe, precision="float32")
    compiled = {"step, compiled": our_step(recipe, is_compiled=True)} if shutil.which("g++") else {}
    return {
        "step": our_step(recipe),
        **compiled,
        "step, float32": our_step(plain),
        "plain loop": plain_step(plain, printed_pairs),
        "plain loop, from logits": plain_step(plain, kl_pairs),
        "products": products_step(recipe, _products_dtype(recipe)),
        "products, float32": products_step(plain, torch.float32),
    }


def _products_dtype(recipe: Recipe) -> torch.dtype:
    return torch.bfloat16 if uses_bfloat16(recipe, torch.device("cpu")) else torch.float32


def machine() -> str:
    """Return a line on the machine: cores, processor, the flags that matter, torch."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    facts = dict(
        [part.strip() for part in line.partition(":")[::2]] for line in lines if ":" in line
    )
    flags = [flag for flag in FLAGS if flag in facts.get("flags", "").split()]
    processor = facts.get("model name", "unknown processor")
    return f"{os.cpu_count()} cores, {processor} ({', '.join(flags)}), torch {torch.__version__}"


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description="Time the training step.")
    parser.add_argument("--rounds", type=int, default=9, help="turns of each (default 9)")
    parser.add_argument("--seconds", type=float, default=1.0, help="length of a turn (default 1)")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="default 1 2")
    parser.add_argument(
        "--processor-time",
        action="store_true",
        help="count processor time, for a machine that others use too (one thread only)",
    )
    given = parser.parse_args()
    clock = time.process_time if given.processor_time else time.perf_counter
    recipe = load_recipe("sparse", ["validation_share=0.0", "warmup_start=0.0", "warmup_end=0.0"])
    gigaflop = sum(2 * rows * depth * columns for rows, depth, columns, _ in products_of(recipe))
    print(f"{machine()}\n")
    print(
        f"MLP {SIDE * SIDE}-{recipe.hidden}, J = {recipe.latent_dim}, U = {recipe.pseudo_inputs},"
        f" batch {recipe.batch_size}, {gigaflop / 1e9:.2f} GFLOP of products a step"
    )
    for threads in [1] if given.processor_time else given.threads:
        torch.set_num_threads(threads)
        print(f"\n{threads} thread{'s' if threads > 1 else ''}\n")
        steps = contenders(recipe)
        images_per_second(steps, recipe.batch_size, given.rounds, given.seconds, clock)
    print()
    print_memory(recipe)


def _rate(step: Step, seconds: float, clock: Clock) -> float:
    """Return steps per second over about this long."""
    began, count = clock(), 0
    while (elapsed := clock() - began) < seconds:
        step()
        count += 1
    return count / elapsed


def _memory_mib(field: str) -> float:
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith(f"{field}:"):
            return float(line.split()[1]) / 1024
    raise RuntimeError(f"/proc/self/status has no {field}; this measurement needs Linux")


if __name__ == "__main__":
    main()
