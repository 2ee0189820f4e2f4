"""Draw spikes: on or off with probability gamma, with a gradient that reaches the spike logits.

A Bernoulli draw has no gradient, so each estimator here replaces it during training. Every figure
that is reported uses `hard_spike`: a relaxed mask leaks continuous information, and its bound is
none.
"""

from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor

from vsc_training.config import Recipe

_TEMPERATURE: Final = 2.0 / 3.0
"""Temperature of the hard concrete (Louizos et al. 2018, section 4)."""
_STRETCH: Final = (-0.1, 1.1)
"""Interval it is stretched to before it is clipped to [0, 1]."""


def hard_spike(spike_logit: Tensor, uniform: Tensor) -> Tensor:
    """Return 1 where the latent is on, else 0: a Bernoulli(gamma) draw, without a gradient.

    Args:
        spike_logit: Log-odds of the spike, shape (images, latents).
        uniform: Uniform noise in [0, 1), same shape.
    """
    return (uniform < torch.sigmoid(spike_logit)).to(spike_logit.dtype)


def straight_through_spike(spike_logit: Tensor, uniform: Tensor) -> Tensor:
    """Return hard spikes whose gradient is that of gamma (Bengio et al. 2013, arXiv:1308.3432).

    Args:
        spike_logit: Log-odds of the spike, shape (images, latents).
        uniform: Uniform noise in [0, 1), same shape.
    """
    spikes: Tensor = _StraightThrough.apply(torch.sigmoid(spike_logit), uniform)
    return spikes


class _StraightThrough(torch.autograd.Function):
    """1 where the noise lies below gamma; the gradient passes to gamma as it comes."""

    @staticmethod
    def forward(_ctx: Any, gamma: Tensor, uniform: Tensor) -> Tensor:
        return (uniform < gamma).to(gamma.dtype)

    @staticmethod
    def backward(_ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


def relaxed_spike(spike_logit: Tensor, uniform: Tensor, sharpness: float | Tensor) -> Tensor:
    """Return sigmoid(c (eta - 1 + gamma)), the paper's relaxation (supplement B.1).

    Args:
        spike_logit: Log-odds of the spike, shape (images, latents).
        uniform: Uniform noise eta in [0, 1), same shape.
        sharpness: Slope c; the paper raises it from 50 to 200.
    """
    return torch.sigmoid(sharpness * (uniform - 1.0 + torch.sigmoid(spike_logit)))


def hard_concrete_spike(spike_logit: Tensor, uniform: Tensor) -> Tensor:
    """Return a stretched and clipped binary concrete draw (Louizos et al. 2018, equation 10).

    Args:
        spike_logit: Log-odds of the spike, shape (images, latents).
        uniform: Uniform noise in [0, 1), same shape.
    """
    logistic = torch.logit(uniform, eps=1e-6)
    concrete = torch.sigmoid((spike_logit + logistic) / _TEMPERATURE)
    low, high = _STRETCH
    return (concrete * (high - low) + low).clamp(0.0, 1.0)


def draw_spike(
    spike_logit: Tensor, uniform: Tensor, recipe: Recipe, progress: float | Tensor
) -> Tensor:
    """Draw spikes with the recipe's estimator.

    Args:
        spike_logit: Log-odds of the spike, shape (images, latents).
        uniform: Uniform noise in [0, 1), same shape.
        recipe: Says which estimator.
        progress: Share of the training that is done, in [0, 1]; sharpens the relaxed spike.
    """
    if recipe.spike == "straight_through":
        return straight_through_spike(spike_logit, uniform)
    if recipe.spike == "hard_concrete":
        return hard_concrete_spike(spike_logit, uniform)
    start, end = recipe.sharpness_start, recipe.sharpness_end
    return relaxed_spike(spike_logit, uniform, start + (end - start) * progress)


def spike_divergence(spike_logit: Tensor, other_logit: Tensor) -> Tensor:
    """Return KL(Bernoulli(gamma) || Bernoulli(gamma')) element by element, from logits.

    gamma ln(gamma / gamma') + (1 - gamma) ln((1 - gamma) / (1 - gamma')), without the logarithm of
    a rounded probability (paper, supplement C, last two terms).
    """
    on = torch.sigmoid(spike_logit) * (F.logsigmoid(spike_logit) - F.logsigmoid(other_logit))
    off = torch.sigmoid(-spike_logit) * (F.logsigmoid(-spike_logit) - F.logsigmoid(-other_logit))
    return on + off
