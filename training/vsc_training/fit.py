"""The training loop: recipe and examples in, a run folder with a checkpoint out.

Everything random comes from the recipe's seed: weights, the order of the examples (a permutation of
each epoch, derived from the seed and the epoch's number) and the noise (one generator, saved in
checkpoints). So a run that was killed and resumed ends with the same weights as one that was not.
"""

import json
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vsc_serve.errors import CheckFailed, DeviceError, UsageError
from vsc_training.checkpoint import (
    LOG,
    Checkpoint,
    RunState,
    load_checkpoint,
    optimizer_tensors,
    restore_optimizer,
    save_checkpoint,
)
from vsc_training.config import Recipe
from vsc_training.data import Examples
from vsc_training.metrics import Health, find_collapse, measure_health
from vsc_training.model import VSC
from vsc_training.objective import (
    balance,
    kl_prior,
    selection_cost,
    sparsity_global,
    sparsity_per_latent,
)
from vsc_training.spike import draw_spike
from vsc_training.warmup import draw_slab, warmup_factor

logger = logging.getLogger(__name__)

DeviceChoice = Literal["auto", "cpu", "cuda"]

_LOG_COUNT: Final = 100
"""Lines in the log of a whole run."""
_CHECK_COUNT: Final = 10
"""Health checks, each followed by a checkpoint, in a whole run."""
_CHECK_IMAGES: Final = 2048
"""Examples a health check measures."""
_CHECK_BATCH: Final = 512
_SETTLED: Final = 0.6
"""Share of the steps before which a collapse is not judged: the spikes are still moving."""


class Terms(NamedTuple):
    """The objective and its terms, in nats per image; scalars."""

    loss: Tensor
    """What is minimised."""
    reconstruction: Tensor
    """Negative log-likelihood of the training draw."""
    kl: Tensor
    """KL divergence to the prior."""
    selection: Tensor
    """Cost of choosing the pseudo-input by the image."""
    sparsity: Tensor
    """Sparsity term, before its weight."""
    balance: Tensor
    """Balance term, before its weight."""
    active: Tensor
    """Latents per image whose spike is more likely on than off."""


@dataclass(frozen=True)
class Feed:
    """Examples by row number, as the model takes them: on the device where they fit."""

    rows: Tensor | NDArray[Any]
    device: torch.device

    @classmethod
    def of(cls, rows: NDArray[Any], device: torch.device) -> "Feed":
        """Hold rows on the device; rows that are mapped from a file stay there."""
        if isinstance(rows, np.memmap):
            return cls(rows, device)
        return cls(torch.from_numpy(np.ascontiguousarray(rows)).to(device), device)

    def take(self, numbers: Tensor) -> Tensor:
        """Return rows as float32, images in [0, 1]."""
        if isinstance(self.rows, Tensor):
            taken = self.rows[numbers.to(self.device)]
        else:
            taken = torch.from_numpy(self.rows[numbers.numpy()]).to(self.device)
        return taken.float() / 255.0 if taken.dtype == torch.uint8 else taken.float()

    def batches(self, numbers: Tensor, size: int) -> Iterator[Tensor]:
        """Yield the rows in runs of `size`."""
        for start in range(0, len(numbers), size):
            yield self.take(numbers[start : start + size])


def objective_terms(
    model: VSC, examples: Tensor, step: int, generator: torch.Generator, *, half: bool
) -> Terms:
    """Compute the objective of one batch.

    Matrix products of the networks run in bfloat16 when `half` says so; spike logits, divergences
    and likelihoods are float32 always.

    Args:
        model: The model.
        examples: One batch, shape (images, *shape).
        step: Optimiser steps done; sets warm-up and sharpness.
        generator: Source of the noise.
        half: Whether matrix products may run in bfloat16.
    """
    recipe = model.recipe
    lam = warmup_factor(step, recipe)
    with _autocast(examples.device, half=half):
        q = model.encode(examples)
        prior = model.prior()
        weights = model.weights(examples)
    uniform = torch.rand(q.mu.shape, generator=generator, device=examples.device)
    noise = torch.randn(q.mu.shape, generator=generator, device=examples.device)
    spike = draw_spike(q.spike_logit, uniform, recipe, step / recipe.steps)
    z = spike * draw_slab(q.mu, q.logvar, noise, lam, recipe.interpolation)
    with _autocast(examples.device, half=half):
        reconstruction = model.nll(z, examples).mean()
    kl = kl_prior(q, prior, weights).mean()
    if recipe.sparsity == "per_latent":
        sparsity = sparsity_per_latent(torch.sigmoid(q.spike_logit).mean(0), recipe.alpha)
    else:
        sparsity = sparsity_global(prior.spike_logit, recipe.alpha)
    balance_term = balance(weights.mean(0))
    loss = (
        reconstruction
        + recipe.beta * kl
        + recipe.sparsity_weight * sparsity
        + recipe.balance_weight * balance_term
    )
    with torch.no_grad():
        active = (q.spike_logit > 0).float().sum(1).mean()
        selection = selection_cost(weights).mean()
    return Terms(loss, reconstruction, kl, selection, sparsity, balance_term, active)


class Trainer:
    """One run in progress: model, optimiser, noise and the place in the data."""

    def __init__(self, recipe: Recipe, examples: Examples, device: torch.device) -> None:
        """Start a run from its seed.

        Raises:
            UsageError: Fewer examples than a batch.
        """
        self.recipe = recipe
        self.device = device
        self.step = 0
        self.train_numbers, self.check_numbers = _split(examples, recipe)
        self.feed = Feed.of(examples.rows, device)
        self.half = uses_bfloat16(recipe, device)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(recipe.seed)
            self.model = VSC(recipe, examples.spec)
        self.model.to(device)
        self.generator = torch.Generator(device).manual_seed(recipe.seed)
        self.optimizer = torch.optim.Adam(
            self.model.parameters(), lr=recipe.learning_rate, fused=device.type in ("cpu", "cuda")
        )
        order = self._permutation(0)
        self.model.set_scaling(self.feed.take(self.train_numbers[order[:_CHECK_IMAGES]]))
        self.model.start_spikes(recipe.alpha)
        picked = order.repeat(-(-recipe.pseudo_inputs // len(order)))[: recipe.pseudo_inputs]
        self.model.start_pseudo_inputs(self.feed.take(self.train_numbers[picked]))

    def advance(self) -> Terms:
        """Do one optimiser step and return its terms."""
        examples = self.feed.take(self._batch_numbers())
        is_late = self.step >= self.recipe.learning_rate_drop_at * self.recipe.steps
        for group in self.optimizer.param_groups:
            group["lr"] = self.recipe.learning_rate * (0.1 if is_late else 1.0)
        terms = objective_terms(self.model, examples, self.step, self.generator, half=self.half)
        self.optimizer.zero_grad(set_to_none=True)
        terms.loss.backward()
        self.optimizer.step()
        self.step += 1
        return Terms(*(term.detach() for term in terms))

    def check(self) -> Health:
        """Measure the model on examples that it is not trained on."""
        generator = torch.Generator(self.device).manual_seed(self.recipe.seed)
        self.model.eval()
        health = measure_health(
            self.model, self.feed.batches(self.check_numbers, _CHECK_BATCH), generator
        )
        self.model.train()
        return health

    def checkpoint(
        self, examples: Examples, name: str, fingerprint: str, health: Health
    ) -> Checkpoint:
        """Return everything that is needed to go on from here."""
        state = RunState(
            step=self.step,
            recipe=self.recipe,
            data=examples.spec,
            data_fingerprint=fingerprint,
            figures=health.to_json(),
            name=name,
        )
        return Checkpoint(
            state,
            dict(self.model.state_dict()),
            optimizer_tensors(self.optimizer),
            {"noise": self.generator.get_state()},
        )

    def restore(self, checkpoint: Checkpoint) -> None:
        """Go back to where a checkpoint was taken."""
        self.model.load_state_dict(checkpoint.weights)
        restore_optimizer(self.optimizer, checkpoint.optimizer)
        self.generator.set_state(checkpoint.random["noise"])
        self.step = checkpoint.state.step

    def _batch_numbers(self) -> Tensor:
        steps_per_epoch = len(self.train_numbers) // self.recipe.batch_size
        epoch, position = divmod(self.step, steps_per_epoch)
        if position == 0 or not hasattr(self, "_order"):
            self._order = self.train_numbers[self._permutation(epoch)]
        start = position * self.recipe.batch_size
        return self._order[start : start + self.recipe.batch_size]

    def _permutation(self, epoch: int) -> Tensor:
        """Return an epoch's order of the training examples: a function of seed and epoch."""
        seeds = np.random.SeedSequence((self.recipe.seed, epoch)).generate_state(1, np.uint64)
        generator = torch.Generator().manual_seed(int(seeds[0] >> np.uint64(1)))
        return torch.randperm(len(self.train_numbers), generator=generator)


def fit(
    recipe: Recipe,
    examples: Examples,
    run: Path,
    *,
    device: torch.device,
    resume: bool = False,
    name: str = "model",
    report: Callable[[int, str], None] = lambda step, text: None,
) -> Health:
    """Train a model and leave a run folder.

    Args:
        recipe: Every choice of the run; with `resume` it must be the one the run began with.
        examples: The data; with `resume` it must be the same data.
        run: Folder for checkpoint and logs.
        device: Where to compute.
        resume: Go on from the checkpoint in `run`, if there is one.
        name: Name of the model.
        report: Called now and then with the steps done and a line of figures.

    Returns:
        The figures of the finished model on held-out examples.

    Raises:
        CheckFailed: The model has collapsed; the message says which figure and what to change.
        UsageError: The checkpoint belongs to another recipe or other data.
    """
    trainer = Trainer(recipe, examples, device)
    fingerprint = examples.fingerprint()
    if resume:
        _resume(trainer, run, fingerprint)
    every_check = max(1, recipe.steps // _CHECK_COUNT)
    every_log = max(1, recipe.steps // _LOG_COUNT)
    health = None
    with RunLog(run, start_step=trainer.step) as log:
        while trainer.step < recipe.steps:
            terms = trainer.advance()
            step = trainer.step
            if step % every_log == 0 or step == recipe.steps:
                log.add(step, terms, warmup_factor(step - 1, recipe))
                report(step, f"loss {float(terms.loss):.1f}  active {float(terms.active):.1f}")
            if step % every_check == 0 or step == recipe.steps:
                health = trainer.check()
                log.add_health(step, health)
                save_checkpoint(run, trainer.checkpoint(examples, name, fingerprint, health))
                _stop_on_collapse(health, recipe, step)
    return health or trainer.check()


class RunLog:
    """Writes the figures of a run as JSON lines and for TensorBoard."""

    def __init__(self, run: Path, *, start_step: int) -> None:
        """Open the logs; lines of steps that will be done again are dropped."""
        from torch.utils.tensorboard import SummaryWriter

        path = run / LOG
        kept = [line for line in _lines(path) if json.loads(line)["step"] <= start_step]
        path.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
        self._file = path.open("a", encoding="utf-8")
        self._board = SummaryWriter(str(run / "tensorboard"), purge_step=start_step)
        self._start = (time.monotonic(), start_step)

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
        self._board.close()

    def add(self, step: int, terms: Terms, lam: float) -> None:
        """Write the terms of one step."""
        began, start_step = self._start
        rate = (step - start_step) / max(time.monotonic() - began, 1e-9)
        figures = {name: float(value) for name, value in terms._asdict().items()}
        figures["elbo_paper"] = -figures["reconstruction"] - figures["kl"]
        self._write(step, "train", figures | {"lam": lam, "steps_per_s": round(rate, 2)})

    def add_health(self, step: int, health: Health) -> None:
        """Write the figures of a health check."""
        self._write(step, "check", health.to_json())

    def _write(self, step: int, kind: str, figures: dict[str, Any]) -> None:
        self._file.write(json.dumps({"step": step, "kind": kind} | figures) + "\n")
        self._file.flush()
        for name, value in figures.items():
            self._board.add_scalar(f"{kind}/{name}", value, step)


def choose_device(choice: DeviceChoice) -> torch.device:
    """Return the device. Raises DeviceError when CUDA was asked for and is not there."""
    is_there = torch.cuda.is_available()
    if choice == "cuda" and not is_there:
        raise DeviceError(
            f"--device cuda: torch {torch.__version__} sees no CUDA device."
            " Check nvidia-smi and that torch is a CUDA build, or use --device cpu."
        )
    return torch.device("cuda" if is_there and choice != "cpu" else "cpu")


def uses_bfloat16(recipe: Recipe, device: torch.device) -> bool:
    """Tell whether matrix products run in bfloat16: asked for, or `auto` where they are fast."""
    if recipe.precision != "auto":
        return recipe.precision == "bfloat16"
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported())
    return bool({"avx512_bf16", "amx_bf16"} & _processor_flags())


def _processor_flags() -> set[str]:
    """Return the feature flags of the processor, where the system lists them."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return set()
    return set(next((line.split() for line in lines if line.startswith("flags")), []))


def _autocast(device: torch.device, *, half: bool) -> AbstractContextManager[None]:
    return torch.autocast(device.type, torch.bfloat16, enabled=half)


def _split(examples: Examples, recipe: Recipe) -> tuple[Tensor, Tensor]:
    """Return the row numbers for training, and those for health checks."""
    train, validation = examples.split(recipe.validation_share)
    if len(train) < recipe.batch_size:
        raise UsageError(
            f"{len(train)} training examples are fewer than a batch of {recipe.batch_size}:"
            f" add examples, or --set batch_size={max(1, len(train) // 2)}"
        )
    checked = validation if len(validation) else train
    return torch.from_numpy(train), torch.from_numpy(checked[:_CHECK_IMAGES])


def _resume(trainer: Trainer, run: Path, fingerprint: str) -> None:
    checkpoint = load_checkpoint(run)
    if checkpoint.state.recipe != trainer.recipe:
        changed = [
            name
            for name, value in vars(checkpoint.state.recipe).items()
            if value != getattr(trainer.recipe, name)
        ]
        raise UsageError(
            f"{run}: began with another recipe (differs in {', '.join(changed)})."
            " Resume without --set and --recipe, or train into another --out."
        )
    if checkpoint.state.data_fingerprint != fingerprint:
        raise UsageError(
            f"{run}: began on other data (fingerprint {checkpoint.state.data_fingerprint}, now"
            f" {fingerprint})."
            " Give the same data, or train into another --out."
        )
    trainer.restore(checkpoint)
    logger.info("resumed %s at step %d of %d", run, trainer.step, trainer.recipe.steps)


def _stop_on_collapse(health: Health, recipe: Recipe, step: int) -> None:
    reason = find_collapse(health, recipe)
    is_last = step == recipe.steps
    if reason is None or (step < _SETTLED * recipe.steps and not is_last):
        return
    if recipe.on_collapse == "stop":
        raise CheckFailed(f"the model has collapsed at step {step}: {reason}")
    logger.warning("the model has collapsed at step %d: %s", step, reason)


def _lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
