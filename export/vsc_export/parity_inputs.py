"""The rows on which an export is compared: real ones, noise, constants, and rows at the threshold.

Of two million spike decisions on real images some forty lie in the guard band. So rows are made
that lie there: from a real row and the latent nearest its threshold, pixels move along the gradient
of that latent's logit until it stands on the threshold, or two bands to either side of it. The
latter must not flip: a threshold that is off by a thousandth fails on them.
"""

from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vsc_export.comparison import exact_encoder
from vsc_export.graphs import EncoderGraph
from vsc_serve.codes import threshold_logit
from vsc_serve.images import PixelSpec
from vsc_serve.options import GUARD_BAND
from vsc_training.model import VSC

NOISE_COUNT: Final = 64
PUSHED_COUNT: Final = 60
_BACKBONE_NOISE_COUNT: Final = 16
OFFSETS: Final = (0.0, 2 * GUARD_BAND, -2 * GUARD_BAND)
"""Where a pushed logit shall stand, from the threshold."""

_NEWTON_STEPS: Final = 6
_LEVEL_STEPS: Final = 16
_LEVEL_CHANGES: Final = (-16.0, -4.0, -1.0, 1.0, 4.0, 16.0)
_LEVELS: Final = 255.0


def parity_inputs(
    model: VSC, examples: NDArray[Any], tau: float, rng: np.random.Generator
) -> dict[str, NDArray[Any]]:
    """Return the rows that parity is measured on, by kind.

    Args:
        model: Says what a row is, and where its thresholds are.
        examples: Real rows.
        tau: Spike threshold in (0, 1).
        rng: Source of the noise.
    """
    shape = model.data.shape
    if model.data.modality == "image":
        noise: NDArray[Any] = _noise(NOISE_COUNT, shape, rng)
        constants: NDArray[Any] = _constants(shape, (0, 1, 127, 128, 254, 255))
    else:
        std = examples.std() if len(examples) else 1.0
        noise = rng.normal(scale=std, size=(NOISE_COUNT, *shape)).astype(np.float32)
        constants = np.stack([np.full(shape, level, np.float32) for level in (0.0, 1.0, -1.0)])
    pushed = push_to_threshold(model, examples[:: max(1, len(examples) // PUSHED_COUNT)], tau)
    return {"examples": examples, "noise": noise, "constants": constants, "pushed": pushed}


def image_inputs(
    examples: NDArray[np.uint8] | None, spec: PixelSpec, rng: np.random.Generator
) -> dict[str, NDArray[Any]]:
    """Return the images that parity is measured on behind a backbone, by kind.

    None is pushed onto the threshold: a backbone has no gradient here.

    Args:
        examples: Real images; None where the run has kept none.
        spec: What an image is.
        rng: Source of the noise.
    """
    made = {
        "noise": _noise(_BACKBONE_NOISE_COUNT, spec.shape, rng),
        "constants": _constants(spec.shape, (0, 127, 255)),
    }
    return made if examples is None else {"examples": examples} | made


def _noise(count: int, shape: tuple[int, ...], rng: np.random.Generator) -> NDArray[np.uint8]:
    return rng.integers(0, 256, (count, *shape), dtype=np.uint8)


def _constants(shape: tuple[int, ...], levels: Sequence[int]) -> NDArray[np.uint8]:
    return np.stack([np.full(shape, level, np.uint8) for level in levels])


def push_to_threshold(model: VSC, examples: NDArray[Any], tau: float) -> NDArray[Any]:
    """Move up to `PUSHED_COUNT` rows so that one of their logits stands where `OFFSETS` says.

    Args:
        model: The trained model.
        examples: Real rows to start from.
        tau: Spike threshold in (0, 1).

    Returns:
        Rows of the same kind. How near they got is for the caller to measure.
    """
    examples = examples[:PUSHED_COUNT]
    goals = float(threshold_logit(tau)) + np.resize(OFFSETS, len(examples))
    push = _Push(model, examples, goals)
    rows = torch.from_numpy(examples).double()
    for _ in range(_NEWTON_STEPS):
        rows = push.newton_step(rows)
    if model.data.modality == "vector":
        return rows.numpy().astype(np.float32)
    rows = best = rows.round()
    for _ in range(_LEVEL_STEPS):
        rows = push.level_step(rows)
        best = push.nearer(rows, best)
    return best.numpy().astype(np.uint8)


class _Push:
    """Rows on their way to the threshold: which latent of each, and where it shall stand."""

    def __init__(self, model: VSC, examples: NDArray[Any], goals: NDArray[np.float64]) -> None:
        self._graph: EncoderGraph = exact_encoder(model)
        self._is_image = model.data.modality == "image"
        self._goals = torch.from_numpy(goals)
        with torch.no_grad():
            logits = self._logits(torch.from_numpy(examples).double())
        self._latents = (logits - self._goals[:, None]).abs().argmin(1)

    def newton_step(self, rows: Tensor) -> Tensor:
        """Go where a linear logit would meet its goal, as far as the pixels' range allows."""
        missing, gradient = self._missing(rows)
        if self._is_image:
            # A pixel at the end of its range cannot follow.
            is_stuck = ((rows <= 0) & (missing * gradient < 0)) | (
                (rows >= _LEVELS) & (missing * gradient > 0)
            )
            gradient = gradient.masked_fill(is_stuck, 0.0)
        square = gradient.flatten(1).square().sum(1).clamp_min(1e-30).reshape(missing.shape)
        moved = rows + missing * gradient / square
        return moved.clamp(0.0, _LEVELS) if self._is_image else moved

    def level_step(self, rows: Tensor) -> Tensor:
        """Change the one pixel, by so many grey levels, that should bring the logit to its goal."""
        missing, gradient = self._missing(rows)
        changes = torch.tensor(_LEVEL_CHANGES, dtype=rows.dtype).reshape(-1, *[1] * rows.ndim)
        left = (missing - gradient * changes).abs()
        left[(rows + changes < 0) | (rows + changes > _LEVELS)] = torch.inf
        best, place = left.transpose(0, 1).flatten(1).min(1)
        change, pixel = place // gradient[0].numel(), place % gradient[0].numel()
        is_better = best < missing.flatten().abs()
        moved = rows.flatten(1).clone()
        moved[torch.arange(len(rows)), pixel] += changes.flatten()[change] * is_better
        return moved.reshape(rows.shape)

    def nearer(self, rows: Tensor, others: Tensor) -> Tensor:
        """Return of each pair the row whose logit is nearer to its goal."""
        is_nearer = self._missing(rows)[0].abs() < self._missing(others)[0].abs()
        return torch.where(is_nearer, rows, others)

    def _missing(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Return how much each logit lacks, shape (rows, 1, ...), and its gradient by the row."""
        rows = rows.detach().requires_grad_(True)
        found = self._logits(rows).gather(1, self._latents[:, None]).squeeze(1)
        (gradient,) = torch.autograd.grad(found.sum(), rows)
        missing = (self._goals - found.detach()).reshape(-1, *[1] * (rows.ndim - 1))
        return missing, gradient

    def _logits(self, rows: Tensor) -> Tensor:
        logits: Tensor = self._graph(rows, torch.zeros((), dtype=torch.float64))[1]
        return logits
