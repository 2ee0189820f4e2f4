"""Warm-up: the slab starts as noise and becomes the encoder's own as lambda rises from 0 to 1.

While lambda is 0 an active latent carries N(0, 1) noise, so only which latents are on can carry
information. Paper, section 4.3: slab N(lambda mu, lambda sigma^2 + 1 - lambda).
"""

import torch
from torch import Tensor

from vsc_training.config import Interpolation, Recipe


def warmup_factor(step: int, recipe: Recipe) -> float:
    """Return lambda at an optimiser step: 0, then a line, then exactly 1.

    Counted in steps, not epochs, so that a short run reaches 1 as well.

    Args:
        step: Steps that are done.
        recipe: Says where the line begins and ends, as shares of the steps.
    """
    start, end = recipe.warmup_start * recipe.steps, recipe.warmup_end * recipe.steps
    if step >= end:
        return 1.0
    return max(0.0, (step - start) / max(end - start, 1.0))


def slab_std(logvar: Tensor, lam: float | Tensor, interpolation: Interpolation) -> Tensor:
    """Return the slab's standard deviation during warm-up.

    `variance` is the paper's text, sqrt(lam sigma^2 + 1 - lam). `standard_deviation` is what a
    public snippet does, lam sigma + 1 - lam. `geometric` is the authors' code, sigma^lam. They
    agree at lam = 0 and 1 only.

    Args:
        logvar: Log-variance of the slab, shape (images, latents).
        lam: Warm-up factor in [0, 1], a number or a scalar tensor.
        interpolation: Which of the three.
    """
    if interpolation == "geometric":
        return torch.exp(0.5 * lam * logvar)
    if _is_over(lam):
        return torch.exp(0.5 * logvar)
    if interpolation == "variance":
        return torch.sqrt(lam * torch.exp(logvar) + (1.0 - lam))
    return lam * torch.exp(0.5 * logvar) + (1.0 - lam)


def draw_slab(
    mu: Tensor, logvar: Tensor, noise: Tensor, lam: float | Tensor, interpolation: Interpolation
) -> Tensor:
    """Draw the values of active latents: lam mu + standard deviation * noise.

    Args:
        mu: Slab means, shape (images, latents).
        logvar: Log-variances, same shape.
        noise: Standard normal noise, same shape.
        lam: Warm-up factor in [0, 1], a number or a scalar tensor.
        interpolation: See `slab_std`.
    """
    return torch.addcmul(
        mu if _is_over(lam) else lam * mu, noise, slab_std(logvar, lam, interpolation)
    )


def _is_over(lam: float | Tensor) -> bool:
    """Tell whether the warm-up is over, for numbers: what a tensor holds, no compiler knows."""
    return not isinstance(lam, Tensor) and lam == 1.0
