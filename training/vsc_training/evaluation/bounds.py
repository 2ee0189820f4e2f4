"""Bounds on the likelihood, with hard spikes and the prior that is fixed before the image is seen.

The paper's bound lets the image choose its pseudo-input and does not pay for the choice. The
bounds here use the prior that a model of the data would have, the mixture

    p(z) = (1/U) sum_u q(z|x_u)

and draws z from q(z|x) with spikes that are on or off, so they are bounds on ln p(x).
"""

import math
from collections.abc import Iterator
from typing import Final, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from vsc_serve.errors import UsageError
from vsc_training.model import VSC
from vsc_training.objective import Posterior
from vsc_training.spike import hard_spike

_BLOCK_IMAGES: Final = 512
_HALF_LOG_TWO_PI: Final = 0.5 * math.log(2.0 * math.pi)


class Bounds(NamedTuple):
    """Two bounds on ln p(x) of each image, in nats, shape (images,)."""

    elbo: NDArray[np.float64]
    """Mean of the K log-weights: an unbiased estimate of the bound that one sample gives."""
    iwae: NDArray[np.float64]
    """Logarithm of the mean of the K weights (Burda, Grosse, Salakhutdinov 2016, equation 8)."""


@torch.no_grad()
def iwae(model: VSC, rows: Tensor, samples: int, generator: torch.Generator) -> Bounds:
    """Bound ln p(x) of each image by importance sampling from its posterior.

    weight_k = p(x|z_k) p(z_k) / q(z_k|x) with z_k from q(z|x). The mean of the weights is an
    unbiased estimate of p(x); both bounds are its logarithm's from below, and the second one rises
    with K. An active latent has a density, an inactive one a probability, in q and in p alike; so
    the weights are ratios of the same mixed measure, computed exactly.

    Args:
        model: The model, in eval mode.
        rows: Images or vectors as `VSC.encode` takes them, shape (images, *shape).
        samples: Draws K per image, at least 1.
        generator: Source of the noise, on the device of the rows.

    Raises:
        UsageError: `samples` is less than 1.
    """
    if samples < 1:
        raise UsageError(f"samples must be at least 1, not {samples}")
    prior = model.prior()
    blocks = [
        torch.stack(list(_log_weights(model, block, prior, samples, generator)))
        for block in rows.split(_BLOCK_IMAGES)
    ]
    log_weights = torch.cat(blocks, dim=1).double()
    total = torch.logsumexp(log_weights, dim=0) - math.log(samples)
    return Bounds(log_weights.mean(0).cpu().numpy(), total.cpu().numpy())


def mixture_log_density(prior: Posterior, is_on: Tensor, value: Tensor) -> Tensor:
    """Return ln (1/U) sum_u q(z|x_u) of latents that are on with a value, or off.

    Computed as products of images and tables of the prior in float64: the squares that cancel
    would cost float32 its last digits, and images x pseudo-inputs x latents are never expanded.

    Args:
        prior: Posteriors of the pseudo-inputs, sharpened, shape (pseudo-inputs, latents).
        is_on: 1 where the latent is on, else 0, shape (images, latents).
        value: Value of each latent; counts where it is on, shape (images, latents).

    Returns:
        Shape (images,), float64.
    """
    spike_logit, mu, logvar = (part.double() for part in prior)
    precision = torch.exp(-logvar)
    log_off = F.logsigmoid(-spike_logit)
    peak = F.logsigmoid(spike_logit) - _HALF_LOG_TWO_PI - 0.5 * (logvar + mu.square() * precision)
    on, z = is_on.double(), (is_on * value).double()
    tables = torch.cat([peak - log_off, mu * precision, -0.5 * precision], dim=1)
    of_component = torch.cat([on, z, z.square()], dim=1) @ tables.T + log_off.sum(1)
    return torch.logsumexp(of_component, dim=1) - math.log(len(mu))


def _log_weights(
    model: VSC, rows: Tensor, prior: Posterior, samples: int, generator: torch.Generator
) -> Iterator[Tensor]:
    """Yield ln p(x|z) + ln p(z) - ln q(z|x) of one draw after the other, shape (images,)."""
    q = model.encode(rows)
    std = torch.exp(0.5 * q.logvar)
    log_on = F.logsigmoid(q.spike_logit) - _HALF_LOG_TWO_PI - 0.5 * q.logvar
    log_off = F.logsigmoid(-q.spike_logit)
    for _ in range(samples):
        uniform = torch.rand(q.mu.shape, generator=generator, device=rows.device)
        noise = torch.randn(q.mu.shape, generator=generator, device=rows.device)
        is_on = hard_spike(q.spike_logit, uniform)
        value = q.mu + std * noise
        log_q = torch.where(is_on > 0, log_on - 0.5 * noise.square(), log_off).sum(1)
        log_p = mixture_log_density(prior, is_on, value)
        yield log_p - log_q - model.nll(is_on * value, rows)
