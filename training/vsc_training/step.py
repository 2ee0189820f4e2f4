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
    """The objective and its terms, scalars in nats per image, and what figures are taken from."""

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

    def figures(self) -> dict[str, float]:
        """Return the scalars, with what is measured only for those who look.

        `selection` is the cost of choosing the pseudo-input by the image; `active` counts the
        latents per image whose spike is more likely on than off.
        """
        return {
            "loss": float(self.loss),
            "reconstruction": float(self.reconstruction),
            "kl": float(self.kl),
            "selection": float(selection_cost(self.weights).mean()),
            "sparsity": float(self.sparsity),
            "balance": float(self.balance),
            "active": float((self.spike_logit > 0).float().sum(1).mean()),
        }


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
        q, prior = model.encode_with_prior(examples)
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
    return Terms(loss, reconstruction, kl, sparsity, balance_term, q.spike_logit, weights)


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
