"""The objective of one batch: noise, warm-up and precision, and the terms of `objective`."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

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
from vsc_training.spike import draw_spike
from vsc_training.warmup import draw_slab, warmup_factor


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
    with autocast(examples.device, half=half):
        q = model.encode(examples)
        prior = model.prior()
        weights = model.weights(examples)
    uniform = torch.rand(q.mu.shape, generator=generator, device=examples.device)
    noise = torch.randn(q.mu.shape, generator=generator, device=examples.device)
    spike = draw_spike(q.spike_logit, uniform, recipe, step / recipe.steps)
    z = spike * draw_slab(q.mu, q.logvar, noise, lam, recipe.interpolation)
    with autocast(examples.device, half=half):
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
    with torch.no_grad():
        active = (q.spike_logit > 0).float().sum(1).mean()
        selection = selection_cost(weights).mean()
    return Terms(loss, reconstruction, kl, selection, sparsity, balance_term, active)


class Objective(nn.Module):
    """`objective_terms` as a module, which is what DistributedDataParallel wraps."""

    def __init__(self, model: VSC) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, examples: Tensor, step: int, generator: torch.Generator, *, half: bool
    ) -> Terms:
        """Compute the terms of one batch."""
        return objective_terms(self.model, examples, step, generator, half=half)
