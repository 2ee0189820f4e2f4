"""The linear map of a bundle: a linear decoder as it is, or a regression on what another one draws.

A decoder with hidden layers is not linear, and the examples that a run keeps are too few to regress
the data on hundreds of latents (docs/decisions/0009). What the decoder draws of a code is an
example too, and there are as many as anybody wants: the codes of the kept examples, each with a
fifth of its latents as another example has them.
"""

from math import prod
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from vsc_serve.linear_map import LinearMap
from vsc_training.model import VSC

LARGEST_BYTES: Final = 2**26
"""A map that takes more is left out: it would be most of the bundle."""

_MIXED: Final = 8192
"""Mixed codes that are drawn."""
_OWN_SHARE: Final = 0.8
"""Share of its latents that a mixed code has from its first parent."""
_RIDGE: Final = 1e-2
"""Ridge in units of the mean variance of a latent."""
_CHUNK: Final = 512


def make_linear_map(model: VSC, code: NDArray[np.float32]) -> LinearMap | None:
    """Return the linear map of a model; None where it would be too large.

    Args:
        model: The trained model.
        code: Codes of real rows at the bundle's tau, shape (rows, latents).
    """
    dimensions = prod(model.data.shape)
    if 4 * model.recipe.latent_dim * dimensions > LARGEST_BYTES:
        return None
    return decoder_map(model) or _fitted_map(model, code)


def decoder_map(model: VSC) -> LinearMap | None:
    """Return a linear decoder of vectors as a map, in the units of the data; None for others."""
    layers = [layer for layer in model.decoder.modules() if not list(layer.children())]
    linear = [layer for layer in layers if not isinstance(layer, nn.Unflatten | nn.Flatten)]
    if model.data.modality == "image" or len(linear) != 1 or not isinstance(linear[0], nn.Linear):
        return None
    weights, bias = linear[0].weight.detach(), linear[0].bias.detach()
    return _map(
        (weights.T * model.scale).double().numpy(),
        (bias * model.scale + model.center).double().numpy(),
    )


def _fitted_map(model: VSC, code: NDArray[np.float32]) -> LinearMap:
    """Regress what the decoder draws on mixtures of the codes."""
    codes = np.concatenate([_mixtures(code, np.random.default_rng(0)), code])
    latents = codes - codes.mean(0, dtype=np.float64)
    drawn = _draw(model, codes)
    gram = latents.T @ latents
    gram[np.diag_indices_from(gram)] += _RIDGE * max(np.trace(gram) / len(gram), 1e-12)
    weights = np.linalg.solve(gram, latents.T @ (drawn - drawn.mean(0)))
    return _map(weights, drawn.mean(0) - codes.mean(0, dtype=np.float64) @ weights)


def _mixtures(code: NDArray[np.float32], rng: np.random.Generator) -> NDArray[np.float32]:
    """Return codes that are mostly one example's, and for the rest another's."""
    first, second = (code[rng.integers(0, len(code), _MIXED)] for _ in range(2))
    return np.where(rng.random(first.shape) < _OWN_SHARE, first, second)


def _draw(model: VSC, codes: NDArray[np.float32]) -> NDArray[np.float64]:
    with torch.no_grad():
        parts = [model.decode(part).flatten(1) for part in torch.from_numpy(codes).split(_CHUNK)]
    return torch.cat(parts).double().numpy()


def _map(weights: NDArray[np.float64], bias: NDArray[np.float64]) -> LinearMap:
    return LinearMap(
        weights.astype(np.float32), bias.astype(np.float32), np.zeros(len(bias), np.float32)
    )
