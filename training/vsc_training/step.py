"""The objective of one batch: noise, warm-up and precision, and the terms of `objective`."""

import os
import shutil
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vsc_serve.errors import UsageError
from vsc_training.config import Recipe
from vsc_training.device import autocast
from vsc_training.distributed import mean_over_ranks
from vsc_training.model import VSC
from vsc_training.objective import (
    balance,
    kl_prior,
    selection_cost,
    sparsity_global,
    sparsity_per_latent,
)
from vsc_training.pairs import info_nce
from vsc_training.schedule import ScheduleTable, progress
from vsc_training.spike import draw_spike
from vsc_training.warmup import draw_slab, warmup_factor


class Terms(NamedTuple):
    """The objective and its terms, scalars in nats per image, and what metrics are taken from."""

    loss: Tensor
    """What is minimised."""
    reconstruction: Tensor
    """Negative log-likelihood of the training draw."""
    kl: Tensor
    """KL divergence to the prior."""
    sparsity: Tensor
    """Sparsity term, before its weight."""
    balance: Tensor
    """Balance term, before its weight."""
    spike_logit: Tensor
    """Log-odds of the spikes, shape (images, latents)."""
    weights: Tensor
    """Classifier weights, shape (images, pseudo-inputs)."""
    neighbour: Tensor | None = None
    """Neighbour term, before its weight; None where the recipe has none."""

    def metrics(self) -> dict[str, float]:
        """Return the scalars, with what is measured only for those who look.

        `selection` is the cost of choosing the pseudo-input by the image; `active` counts the
        latents per image whose spike is more likely on than off.
        """
        named = {
            "loss": self.loss,
            "reconstruction": self.reconstruction,
            "kl": self.kl,
            "selection": selection_cost(self.weights).mean(),
            "sparsity": self.sparsity,
            "balance": self.balance,
            **({} if self.neighbour is None else {"neighbour": self.neighbour}),
            "active": (self.spike_logit > 0).float().sum(1).mean(),
        }
        # One transfer: each number that is asked of a GPU waits for all that it has to do.
        return dict(zip(named, torch.stack(list(named.values())).tolist(), strict=True))

    def kept(self) -> "Terms":
        """Return the terms without gradients, in memory that no later step writes to."""
        scalars = (self.loss, self.reconstruction, self.kl, self.sparsity, self.balance)
        tables = (self.spike_logit, self.weights)
        copies = (table.detach().clone() for table in tables)
        neighbour = None if self.neighbour is None else self.neighbour.detach().clone()
        spike_logit, weights = copies
        loss, reconstruction, kl, sparsity, balance = torch.stack(scalars).detach().unbind()
        terms = (loss, reconstruction, kl, sparsity, balance)
        return Terms(*terms, spike_logit, weights, neighbour)


class Draw(NamedTuple):
    """Random draws of a step and its place in the schedule.

    Given these, the terms are a function of tensors.
    """

    uniform: Tensor
    """Uniform noise in [0, 1) for the spikes, shape (images, latents)."""
    noise: Tensor
    """Standard normal noise for the slabs, same shape."""
    lam: float | Tensor
    """Warm-up factor."""
    progress: float | Tensor
    """Share of the steps that is done."""
    input_mask: Tensor | None
    """Factors of what the encoder sees, shape of the batch; None: it sees everything."""


def draw_noise(
    recipe: Recipe,
    batch: torch.Size,
    step: int,
    generator: torch.Generator,
    table: ScheduleTable | None = None,
) -> Draw:
    """Draw what a step needs.

    Args:
        recipe: Says what is drawn.
        batch: Shape of the batch, (images, *shape).
        step: Optimiser steps done; sets warm-up and sharpness.
        generator: Source of the noise; its device is where everything lies.
        table: Gives numbers that change from step to step as scalar tensors: a compiled step would
            be compiled again for every new number. None gives numbers.
    """
    shape, device = (batch[0], recipe.latent_dim), generator.device
    uniform = torch.rand(shape, generator=generator, device=device)
    noise = torch.randn(shape, generator=generator, device=device)
    input_mask = (
        draw_input_mask(batch, recipe.input_dropout, generator) if recipe.input_dropout else None
    )
    if table is None:
        return Draw(uniform, noise, warmup_factor(step, recipe), progress(step, recipe), input_mask)
    return Draw(uniform, noise, *table.at(step), input_mask)


def draw_input_mask(batch: torch.Size, hidden_share: float, generator: torch.Generator) -> Tensor:
    """Draw which values the encoder sees, as factors: 0, or what keeps the mean as it is.

    Dropout of the input (Srivastava et al. 2014, section 4); as a change of the bound, the
    denoising criterion of Im et al. 2017 (arXiv:1511.06406).

    Args:
        batch: Shape of the batch.
        hidden_share: Share of the values to hide; taken to the nearest 256th, but not to 0.
        generator: Source of the noise; its device is where the factors lie.
    """
    # A byte a value: a float a value would take a thirtieth of a step.
    hidden_bytes = min(max(round(256 * hidden_share), 1), 255)
    words = torch.empty(-(-batch.numel() // 8), dtype=torch.int64, device=generator.device)
    drawn = words.random_(-(2**63), None, generator=generator).view(torch.uint8)
    input_mask = (drawn[: batch.numel()] >= hidden_bytes).view(batch)
    return input_mask.float() * (256 / (256 - hidden_bytes))


def objective_terms(
    model: VSC, examples: Tensor, draw: Draw, *, bf16: bool, partners: Tensor | None = None
) -> Terms:
    """Compute the objective of one batch.

    Matrix products of the networks run in bfloat16 when `bf16` says so; spike logits, divergences
    and likelihoods are float32 always.

    Args:
        model: The model.
        examples: One batch, shape (images, *shape).
        draw: Noise and the place in the run.
        bf16: Whether matrix products may run in bfloat16.
        partners: One for each example, for the neighbour term; None: there is no such term.
    """
    recipe = model.recipe
    with autocast(examples.device, bf16=bf16):
        q, prior = model.encode_with_prior(examples, draw.input_mask)
        weights = model.weights(examples)
    spike = draw_spike(q.spike_logit, draw.uniform, recipe, draw.progress)
    z = spike * draw_slab(q.mu, q.logvar, draw.noise, draw.lam, recipe.interpolation)
    with autocast(examples.device, bf16=bf16):
        reconstruction = model.nll(z, examples).mean()
    kl = kl_prior(q, prior, weights).mean()
    if recipe.sparsity == "per_latent":
        mean_gamma = mean_over_ranks(torch.sigmoid(q.spike_logit).mean(0))
        sparsity = sparsity_per_latent(mean_gamma, recipe.alpha)
    else:
        sparsity = sparsity_global(prior.spike_logit, recipe.alpha)
    balance_term = balance(mean_over_ranks(weights.mean(0)))
    loss = (
        reconstruction
        + recipe.beta * kl
        + recipe.sparsity_weight * sparsity
        + recipe.balance_weight * balance_term
    )
    neighbour = None
    if partners is not None:
        with autocast(examples.device, bf16=bf16):
            other = model.encode(partners)
        neighbour = info_nce(q, other, recipe.neighbour_temperature)
        # Like the slabs it waits until the spikes have found their places.
        loss = loss + draw.lam * recipe.neighbour_weight * neighbour
    terms = (reconstruction, kl, sparsity, balance_term)
    return Terms(loss, *terms, q.spike_logit, weights, neighbour)


class Objective(nn.Module):
    """`objective_terms` as a module, which is what DistributedDataParallel wraps.

    Args:
        model: The model, on its device.
        is_compiled: Let torch compile the terms and their gradient into few kernels: some tens of
            seconds at the first step, faster steps after it. Rounding differs a little.
    """

    def __init__(self, model: VSC, *, is_compiled: bool = False) -> None:
        super().__init__()
        self.model = model
        device = model.pseudo_logits.device
        self._table = ScheduleTable(model.recipe, device) if is_compiled else None
        self._terms = compiled_terms(device) if is_compiled else objective_terms

    def forward(
        self,
        examples: Tensor,
        step: int,
        generator: torch.Generator,
        *,
        bf16: bool,
        partners: Tensor | None = None,
    ) -> Terms:
        """Draw the noise of a step and compute the terms of one batch.

        A compiled step on a GPU writes its terms and gradients to the same memory every time: those
        of the step before must not be needed any more, and `Terms.kept` copies what is.

        Args:
            examples: One batch, shape (images, *shape).
            step: Optimiser steps done.
            generator: Source of the noise.
            bf16: Whether matrix products may run in bfloat16.
            partners: As in `objective_terms`.
        """
        draw = draw_noise(self.model.recipe, examples.shape, step, generator, self._table)
        return self._terms(self.model, examples, draw, bf16=bf16, partners=partners)


def compiled_terms(device: torch.device) -> Callable[..., Terms]:
    """Return `objective_terms`, compiled when it is first called.

    Raises:
        UsageError: There is no compiler, or, at the first call, it fails.
    """
    on_cuda = device.type == "cuda"
    if not on_cuda and not shutil.which(os.environ.get("CXX", "g++")):
        raise UsageError(
            "`is_compiled` needs a C++ compiler (apt install g++). Without `is_compiled`, none is"
            " needed."
        )
    from torch._dynamo.exc import BackendCompilerFailed  # a second of imports

    # CUDA graphs: a step of a small model is hundreds of kernels that cost more to start than to do
    mode = "reduce-overhead" if on_cuda else "default"
    compiled = torch.compile(objective_terms, mode=mode, dynamic=False)

    def terms(*arguments: Any, **named: Any) -> Terms:
        if on_cuda:
            torch.compiler.cudagraph_mark_step_begin()
        try:
            return compiled(*arguments, **named)
        except BackendCompilerFailed as error:
            raise UsageError(
                f"`is_compiled`: the compiler failed ({str(error).splitlines()[0]}). Leave"
                " `is_compiled` away, or install what it misses (g++, and the headers of"
                " Python: python3-dev)."
            ) from error

    return terms
