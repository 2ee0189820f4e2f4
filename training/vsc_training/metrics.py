"""Metrics of a model on data: what is active, what has died, what the codes lose."""

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, Final

import torch
from torch import Tensor

from vsc_serve.codes import ALWAYS_ON_SHARE, LIVE_SHARE
from vsc_training.config import Recipe
from vsc_training.model import VSC
from vsc_training.objective import kl_prior, selection_cost
from vsc_training.spike import hard_spike

PSEUDO_USED_SHARE: Final = 0.005
"""A pseudo-input is in use when it is the nearest one of at least this share of the images."""

_MIN_ACTIVE: Final = 0.5
_MAX_EMPTY_SHARE: Final = 0.5
_MAX_ALWAYS_ON_PART: Final = 0.5
"""Largest part of an image's active latents that may be the same ones in every image."""
_FEW_LIVE: Final = 0.1
"""Part of the latents to be expected live below which a model has collapsed.

Measured with 64 latents and 1 % of the rows a hundred times as long as the others: 0 to 3 live
where the codes say nothing, 12 and more (19 %) where they say something (training/LOG.md).
"""
_MANY_DEAD: Final = 0.5
"""Part of the latents to be expected live below which there is a warning."""
_MAX_ERROR_RATIO: Final = 1.5
"""Squared error of examples that were kept out, in multiples of that of training's own.

Measured on MNIST, 5,000 steps: 1.1 with 60,000 images, 1.8 with 10,000, 7.8 with 2,000.
"""
_MIN_HELD_OUT: Final = 20
"""Fewer examples than this say too little."""
_REMEDY: Final = {"input_dropout": 0.3, "weight_decay": 1.0}
"""What helped 2,000 images of MNIST most of what was tried (training/LOG.md)."""


@dataclass(frozen=True, kw_only=True)
class Health:
    """Metrics of the deterministic codes of a set of images, and the bound beside them."""

    images: int
    """Images measured."""
    active: float
    """Active latents per image, mean."""
    empty_share: float
    """Share of images with no active latent."""
    live: int
    """Latents on for at least 0.1 % of the images."""
    always_on: int
    """Latents on for more than 99 % of the images."""
    latents: int
    """Latents J."""
    pseudo_used: int
    """Pseudo-inputs that are the nearest one for at least 0.5 % of the images."""
    elbo_paper: float
    """-(reconstruction + KL), hard spikes, nats per image."""
    elbo: float
    """elbo_paper minus the cost of choosing the pseudo-input by the image."""
    reconstruction: float
    """Negative log-likelihood, hard spikes, one sample, nats per image."""
    kl: float
    """KL divergence to the prior, nats per image."""
    squared_error: float
    """Squared error per image of the reconstruction from the deterministic code."""

    def to_json(self) -> dict[str, Any]:
        """Return the metrics, rounded to what they are worth."""
        return {
            name: round(value, 5) if isinstance(value, float) else value
            for name, value in asdict(self).items()
        }

    def __str__(self) -> str:
        return (
            f"active {self.active:.1f} per image, live {self.live}/{self.latents}, always on"
            f" {self.always_on}, squared error {self.squared_error:.2f}, elbo {self.elbo:.1f} nats"
        )


def deterministic_code(spike_logit: Tensor, mu: Tensor, limit: float = 0.0) -> Tensor:
    """Return mu where the spike logit is above the limit, else 0, shape (images, latents)."""
    return torch.where(spike_logit > limit, mu, 0.0)


@torch.no_grad()
def measure_health(model: VSC, batches: Iterator[Tensor], generator: torch.Generator) -> Health:
    """Measure a model on batches of examples.

    Args:
        model: The model; its mode is not changed.
        batches: Examples as `VSC.encode` takes them.
        generator: Noise of the one sample behind the bound.
    """
    totals = _Totals(model)
    for examples in batches:
        totals.add(examples, generator)
    counts, firing, nearest = totals.read()
    image_count = totals.image_count
    mean = {name: value / image_count for name, value in counts.items()}
    elbo_paper = -(mean["reconstruction"] + mean["kl"])
    return Health(
        images=image_count,
        active=mean["active"],
        empty_share=mean["empty"],
        live=int((firing >= LIVE_SHARE * image_count).sum()),
        always_on=int((firing > ALWAYS_ON_SHARE * image_count).sum()),
        latents=model.recipe.latent_dim,
        pseudo_used=int((nearest >= max(PSEUDO_USED_SHARE * image_count, 1)).sum()),
        elbo_paper=elbo_paper,
        elbo=elbo_paper - mean["selection"],
        reconstruction=mean["reconstruction"],
        kl=mean["kl"],
        squared_error=mean["squared_error"],
    )


class _Totals:
    """Sums over batches, kept where the model computes and read once: a GPU never waits for them.

    Args:
        model: The model that is measured.
    """

    def __init__(self, model: VSC) -> None:
        self._model, self._prior = model, model.prior()
        device = model.pseudo_logits.device
        self._sums: dict[str, Tensor] = {}
        self._firing = torch.zeros(model.recipe.latent_dim, dtype=torch.float64, device=device)
        self._nearest = torch.zeros(model.recipe.pseudo_inputs, dtype=torch.float64, device=device)
        self.image_count = 0

    def add(self, examples: Tensor, generator: torch.Generator) -> None:
        """Measure a batch."""
        model = self._model
        q = model.encode(examples)
        weights = model.weights(examples)
        uniform = torch.rand(q.mu.shape, generator=generator, device=q.mu.device)
        noise = torch.randn(q.mu.shape, generator=generator, device=q.mu.device)
        z = hard_spike(q.spike_logit, uniform) * (q.mu + noise * torch.exp(0.5 * q.logvar))
        code = deterministic_code(q.spike_logit, q.mu)
        is_on = q.spike_logit > 0
        sums = {
            "active": is_on.sum(),
            "empty": (~is_on.any(1)).sum(),
            "reconstruction": model.nll(z, examples).sum(),
            "kl": kl_prior(q, self._prior, weights).sum(),
            "selection": selection_cost(weights).sum(),
            "squared_error": (model.decode(code) - examples).square().sum(),
        }
        for name, value in sums.items():
            self._sums[name] = self._sums.get(name, 0.0) + value.double()
        self._firing += is_on.sum(0).double()
        chosen = weights.argmax(1)
        self._nearest.index_add_(0, chosen, torch.ones_like(chosen, dtype=torch.float64))
        self.image_count += len(examples)

    def read(self) -> tuple[dict[str, float], Tensor, Tensor]:
        """Return sums by name, how often each latent was on, and each pseudo-input nearest."""
        values = torch.stack(list(self._sums.values())).tolist()
        return dict(zip(self._sums, values, strict=True)), self._firing.cpu(), self._nearest.cpu()


def find_collapse(health: Health, recipe: Recipe) -> str | None:
    """Say which figure is out of range and what to change, or None for a healthy model.

    A model has collapsed when its codes are (nearly) empty, or when most of what is active is the
    same in every image: then the support says nothing about the image.
    """
    if not all(map(math.isfinite, (health.elbo, health.squared_error))):
        return (
            f"the bound is not finite (elbo {health.elbo});"
            f" lower learning_rate (now {recipe.learning_rate:g})"
        )
    if health.active < _MIN_ACTIVE or health.empty_share > _MAX_EMPTY_SHARE:
        return (
            f"codes are empty ({health.active:.2f} active latents per image,"
            f" {health.empty_share:.0%} of the images have none); raise alpha"
            f" (now {recipe.alpha:g}), lower beta (now {recipe.beta:g}), or train longer (steps)"
        )
    if health.always_on > max(_MAX_ALWAYS_ON_PART * health.active, 1):
        return (
            f"{health.always_on} latents are on in every image, of {health.active:.1f} active ones,"
            f" and {health.latents - health.live} of {health.latents} are dead; use"
            f" sparsity=per_latent and a higher sparsity_weight (now {recipe.sparsity_weight:g})"
        )
    if health.live < _FEW_LIVE * expected_live(health, recipe):
        return _why_dead(health, recipe)
    return None


def find_dead(health: Health, recipe: Recipe) -> str | None:
    """Say that many latents are dead, though not enough for a collapse, and what to change."""
    is_many = health.live < _MANY_DEAD * expected_live(health, recipe)
    return _why_dead(health, recipe) if is_many else None


def expected_live(health: Health, recipe: Recipe) -> float:
    """Return how many latents are on at least once if each has its share, independent of others.

    Few examples do not show all latents: J (1 - (1 - alpha)^images).
    """
    return float(health.latents * (1.0 - (1.0 - recipe.alpha) ** health.images))


def _why_dead(health: Health, recipe: Recipe) -> str:
    return (
        f"{health.latents - health.live} of {health.latents} latents are dead (off for more than"
        f" 99.9 % of {health.images} examples; {expected_live(health, recipe):.0f} should live);"
        f" lower beta (now {recipe.beta:g}) or latent_dim (now {recipe.latent_dim}), train longer"
        " (steps), or look for a few examples that are unlike all others"
    )


def find_overfit(held_out: Health, trained: Health, recipe: Recipe) -> str | None:
    """Say how much worse a model is on what it has not seen, and what to change, or None.

    Args:
        held_out: Metrics on examples that were kept out of training.
        trained: Metrics on examples of the training.
        recipe: What to change is said beside what it is.
    """
    limit = _MAX_ERROR_RATIO * trained.squared_error
    if held_out.images < _MIN_HELD_OUT or held_out.squared_error <= limit:
        return None
    raised = [
        f"`recipe.{name}={value:g}` (now {getattr(recipe, name):g})"
        for name, value in _REMEDY.items()
        if getattr(recipe, name) < value
    ]
    remedy = " and ".join(raised) if raised else "more examples, or fewer steps"
    return (
        f"squared error is {trained.squared_error:.3g} on the examples of the training and"
        f" {held_out.squared_error:.3g} on the {held_out.images} kept out; try {remedy}"
    )
