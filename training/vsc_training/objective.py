"""The terms of the objective, as pure functions of posterior, prior and classifier weights.

All in nats. Notation and equations follow Tonolini, Jensen, Murray-Smith, "Variational Sparse
Coding", UAI 2019 (and its supplement, sections A to C). What training minimises is

    reconstruction + beta KL(q, p_s) + sparsity_weight * sparsity + balance_weight * balance
"""

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from vsc_training.spike import spike_divergence


class Posterior(NamedTuple):
    """Parameters of q(z|x) = prod_j gamma_j N(mu_j, sigma_j^2) + (1 - gamma_j) delta_0."""

    spike_logit: Tensor
    """Log-odds of gamma, shape (images, latents)."""
    mu: Tensor
    """Slab means, shape (images, latents)."""
    logvar: Tensor
    """Log-variances of the slab, shape (images, latents)."""


def kl_pairs(q: Posterior, p: Posterior) -> Tensor:
    """KL divergence between every posterior and every prior component, the exact closed form.

    sum_j gamma [ln(sigma_u / sigma) + (sigma^2 + (mu - mu_u)^2) / (2 sigma_u^2) - 1/2] + KL(gamma
    || gamma_u) (supplement C, equation 9; the supplement prints sigma where its own code has
    sigma^2). It expands to images x pseudo-inputs x latents: for checks and evaluation, not for
    training.

    Args:
        q: Posteriors of the images.
        p: Posteriors of the pseudo-inputs, with spike logits already sharpened.

    Returns:
        Divergences, shape (images, pseudo-inputs).
    """
    mu, logvar, spike_logit = (part[:, None] for part in (q.mu, q.logvar, q.spike_logit))
    variance_ratio = (logvar.exp() + (mu - p.mu).square()) / p.logvar.exp()
    slab = 0.5 * (p.logvar - logvar + variance_ratio - 1.0)
    return (torch.sigmoid(spike_logit) * slab + spike_divergence(spike_logit, p.spike_logit)).sum(2)


def kl_prior(q: Posterior, p: Posterior, weights: Tensor) -> Tensor:
    """KL divergence to the prior: sum_u w_u KL(q(z|x) || q(z|x_u)), without expanding the pairs.

    Every part of `kl_pairs` is a product of something of the image and something of the
    pseudo-input, so the weighted sum over u is one matrix product of the weights with four stacked
    tables of the prior.

    Args:
        q: Posteriors of the images.
        p: Posteriors of the pseudo-inputs, with spike logits already sharpened.
        weights: Classifier weights w, rows sum to 1, shape (images, pseudo-inputs).

    Returns:
        Divergences, shape (images,).
    """
    precision = torch.exp(-p.logvar)
    tables = (
        0.5 * (p.logvar + p.mu.square() * precision) - p.spike_logit,
        0.5 * precision,
        p.mu * precision,
        F.softplus(p.spike_logit),
    )
    constant, half_precision, mean_precision, prior_log_off = torch.split(
        weights @ torch.cat(tables, dim=1), q.mu.shape[1], dim=1
    )
    # KL(gamma || gamma_u) = gamma (l - l_u) + softplus(l_u) - softplus(l), since ln gamma is
    # l - softplus(l) and ln (1 - gamma) is -softplus(l).
    square = (q.logvar.exp() + q.mu.square()) * half_precision - q.mu * mean_precision
    on = constant + square + q.spike_logit - 0.5 * (q.logvar + 1.0)
    spread = prior_log_off - F.softplus(q.spike_logit)
    return (torch.sigmoid(q.spike_logit) * on + spread).sum(1)


def sharpen(prior: Posterior, sharpness: float) -> Posterior:
    """Keep the prior's spikes off 0 and 1: gamma_u becomes sigmoid(nu (gamma_u - 1/2)).

    In the authors' code only (nu = 10, so gamma_u lies in [.0067, 0.9933]); without it the
    divergence to a pseudo-input that is sure is unbounded.
    """
    return prior._replace(spike_logit=sharpness * (torch.sigmoid(prior.spike_logit) - 0.5))


def bernoulli_divergence(mean: Tensor, target: float) -> Tensor:
    """KL(Bernoulli(mean) || Bernoulli(target)), element by element; 0 where they are equal.

    Args:
        mean: Probabilities; kept within [1e-5, 1 - 1e-5].
        target: Probability in (0, 1).
    """
    mean = mean.clamp(1e-5, 1.0 - 1e-5)
    on = mean * (mean.log() - math.log(target))
    off = (1.0 - mean) * (torch.log1p(-mean) - math.log1p(-target))
    return on + off


def sparsity_per_latent(mean_gamma: Tensor, alpha: float) -> Tensor:
    """Hold each latent to its share: sum_j KL(mean over the batch of gamma_j || alpha).

    Not in the paper. Its one global average (below) is met just as well by a few latents that are
    always on and many that are dead, and that is what training finds; this term makes both
    impossible.

    Args:
        mean_gamma: Mean spike probability of each latent over the batch, shape (latents,).
        alpha: Target share.
    """
    return bernoulli_divergence(mean_gamma, alpha).sum()


def sparsity_global(prior_spike_logit: Tensor, alpha: float) -> Tensor:
    """J KL(gamma_bar || alpha), gamma_bar the mean over latents and pseudo-inputs (equation 10).

    Added once to the batch mean of the bound, as in the authors' code; the text sums the bound over
    images, so that the weight of this term would depend on their number.

    Args:
        prior_spike_logit: Spike logits of the pseudo-inputs, sharpened, shape (pseudo-inputs,
            latents).
        alpha: Target share.
    """
    latent_dim = prior_spike_logit.shape[1]
    return latent_dim * bernoulli_divergence(torch.sigmoid(prior_spike_logit).mean(), alpha)


def balance(mean_weights: Tensor) -> Tensor:
    """KL(mean weights || uniform): 0 when all pseudo-inputs are used alike. Not in the paper.

    Args:
        mean_weights: Mean over the batch of the classifier's weights, shape (pseudo-inputs,).
    """
    pseudo_count = mean_weights.shape[0]
    return (mean_weights * (mean_weights.clamp_min(1e-8) * pseudo_count).log()).sum()


def selection_cost(weights: Tensor) -> Tensor:
    """KL(w || 1/U) of each image: what the paper's bound omits for choosing the pseudo-input.

    `elbo = elbo_paper - selection_cost`; at most ln U.

    Args:
        weights: Classifier weights, shape (images, pseudo-inputs).

    Returns:
        Costs, shape (images,).
    """
    pseudo_count = weights.shape[1]
    return (weights * (weights.clamp_min(1e-12) * pseudo_count).log()).sum(1)


def bernoulli_nll(logits: Tensor, pixels: Tensor) -> Tensor:
    """Negative log-likelihood of pixels in [0, 1] under Bernoulli means, in nats an image.

    Args:
        logits: Log-odds of the means, shape (images, ...).
        pixels: Values in [0, 1], same shape.

    Returns:
        Shape (images,).
    """
    losses: Tensor = _BernoulliLoss.apply(logits, pixels)
    return losses.flatten(1).sum(1)


class _BernoulliLoss(torch.autograd.Function):
    """softplus(logit) - pixel logit, with the gradient in one step: sigmoid(logit) - pixel.

    torch's own loss takes three times as long, and this is the largest tensor of a training step.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, pixels: Tensor) -> Tensor:
        ctx.save_for_backward(logits, pixels)
        return F.softplus(logits).addcmul_(logits, pixels, value=-1.0)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        logits, pixels = ctx.saved_tensors
        return torch.sigmoid(logits).sub_(pixels).mul_(gradient), None


def gaussian_nll(mean: Tensor, logvar: Tensor, target: Tensor) -> Tensor:
    """Negative log-likelihood under independent Gaussians, in nats a row.

    Args:
        mean: Means, shape (rows, ...).
        logvar: Log-variances, broadcast to the means.
        target: Values, same shape as the means.

    Returns:
        Shape (rows,).
    """
    losses = 0.5 * ((target - mean).square() * torch.exp(-logvar) + logvar + math.log(2 * math.pi))
    return losses.flatten(1).sum(1)
