"""From the outputs of the dense encoder graph to rows: only what belongs to active latents."""

from collections.abc import Mapping
from typing import Final

import numpy as np
from numpy.typing import NDArray

from vsc_serve.codes import CodeRows, active_positions, csr_at, stack_codes
from vsc_serve.options import EncodeOptions, View

_SMALLEST: Final = np.finfo(np.float32).tiny
_LARGEST_LOGVAR: Final = 170.0
"""Beyond it sigma is no finite float32."""


def first_bad_row(found: Mapping[str, NDArray[np.float32]]) -> int | None:
    """Return the first row of which something is not finite, as NaN in a logit hides a latent."""
    is_bad = {"code": ~np.isfinite(found["code"]), "spike_logit": np.isnan(found["spike_logit"])}
    if "logvar" in found:
        is_bad["logvar"] = ~(found["logvar"] <= _LARGEST_LOGVAR)
    rows = [int(np.flatnonzero(bad.any(axis=1))[0]) for bad in is_bad.values() if bad.any()]
    return min(rows, default=None)


def compact(found: Mapping[str, NDArray[np.float32]], options: EncodeOptions) -> CodeRows:
    """Keep of what the graph gives, by name of its output, only what belongs to active latents."""
    dense = found["code"]
    active = active_positions(dense)
    total_energy = _energy(dense, active)
    if options.max_active is not None:
        active = _strongest(dense, active, options.max_active)
    gamma, sigma = None, None
    if options.uncertainty or options.view == "gamma":
        gamma = _gamma(found["spike_logit"].ravel()[active])
    if options.uncertainty:
        sigma = np.exp(found["logvar"].ravel()[active] / 2)
    return CodeRows(
        codes=csr_at(active, _view(dense, active, gamma, options.view), dense.shape),
        gamma=gamma if options.uncertainty else None,
        sigma=sigma,
        kept_energy=total_energy if options.max_active is None else _energy(dense, active),
        total_energy=total_energy,
    )


def _view(
    dense: NDArray[np.float32],
    active: NDArray[np.intp],
    gamma: NDArray[np.float32] | None,
    view: View,
) -> NDArray[np.float32]:
    if view == "spike":
        return np.ones(len(active), np.float32)
    return dense.ravel()[active] if gamma is None or view == "mean" else gamma


def _gamma(spike_logit: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return sigmoid(spike_logit), computed in float64; never 0, which a code cannot store."""
    gamma = np.exp(-np.logaddexp(0.0, -spike_logit.astype(np.float64)))
    return np.maximum(gamma.astype(np.float32), _SMALLEST)


def _strongest(
    dense: NDArray[np.float32], active: NDArray[np.intp], count: int
) -> NDArray[np.intp]:
    """Keep the positions of the `count` largest |mu| of each row; of equal ones the lower."""
    rows = active // dense.shape[1]
    order = np.lexsort((-np.abs(dense.ravel()[active]), rows))  # stable, and row by row
    place = np.arange(len(rows)) - np.searchsorted(rows, rows)
    kept: NDArray[np.intp] = active[np.sort(order[place < count])]
    return kept


def _energy(dense: NDArray[np.float32], active: NDArray[np.intp]) -> float:
    mu = dense.ravel()[active].astype(np.float64)
    return float(mu @ mu)


def no_rows(latent_dim: int, options: EncodeOptions) -> CodeRows:
    """Return the codes of no images, with gamma and sigma where the options ask for them."""
    none = np.empty(0, np.float32) if options.uncertainty else None
    return CodeRows(codes=stack_codes([], latent_dim), gamma=none, sigma=none)
