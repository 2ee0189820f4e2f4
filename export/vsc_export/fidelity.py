"""How much of the codes an export keeps: supports, neighbours, counts and reconstruction.

Parity asks whether two programs compute the same. A variant of lower precision does not, and a
tolerance on numbers says little about what is lost; so variants are judged by what codes are for.
"""

from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from vsc_export.comparison import Truth
from vsc_serve.bundle import Precision

NEIGHBOURS: Final = 10
_ROWS_AT_MOST: Final = 2000
"""Rows among which neighbours are looked for: all pairs are compared."""
_TIE: Final = 1e-6
"""Similarities this close are the same: which of two copies comes first means nothing."""


@dataclass(frozen=True, kw_only=True)
class Fidelity:
    """Real rows: what the engine gives against what float64 torch gives."""

    rows: int
    """Real rows."""
    flipped_share: float
    """Share of all spike decisions that differ, near the threshold or not."""
    support_jaccard: float
    """Mean over the rows of |both active| / |either active|; 1 where both are empty."""
    neighbour_recall: float
    """Share of the ten nearest rows (cosine) that are still among the ten nearest."""
    active_truth: float
    """Active latents per row in float64."""
    active: float
    """Active latents per row of the engine."""
    squared_error_truth: float
    """Squared error per row of what is decoded from the codes in float64."""
    squared_error: float
    """The same from the engine's codes, decoded by the bundle's decoder."""


@dataclass(frozen=True, kw_only=True)
class Gate:
    """What a variant of lower precision must keep."""

    max_flipped_share: float
    min_support_jaccard: float
    min_neighbour_recall: float
    max_squared_error_rise: float
    """Relative: 0.01 allows one per cent."""

    def failures(self, found: Fidelity) -> list[str]:
        """Return what is lost beyond the limits, one line each. NaN is beyond every limit."""
        rise = found.squared_error / max(found.squared_error_truth, 1e-12) - 1.0
        checks = [
            ("share of flipped spikes", found.flipped_share, "<=", self.max_flipped_share),
            ("support Jaccard", found.support_jaccard, ">=", self.min_support_jaccard),
            ("neighbour recall@10", found.neighbour_recall, ">=", self.min_neighbour_recall),
            ("rise of the squared error", rise, "<=", self.max_squared_error_rise),
        ]
        return [
            f"{name} is {value:.4g}, must be {sign} {limit:g}"
            for name, value, sign, limit in checks
            if not (value <= limit if sign == "<=" else value >= limit)
        ]


GATES: Final[dict[Precision, Gate]] = {
    "fp16": Gate(
        max_flipped_share=1e-4,
        min_support_jaccard=0.999,
        min_neighbour_recall=0.99,
        max_squared_error_rise=0.01,
    ),
    "int8": Gate(
        max_flipped_share=2e-3,
        min_support_jaccard=0.98,
        min_neighbour_recall=0.95,
        max_squared_error_rise=0.02,
    ),
}
"""Gates of the variants; docs/export.md has the measurements behind them."""


def measure_fidelity(
    truth: Truth, code: NDArray[np.float32], errors: tuple[float, float]
) -> Fidelity:
    """Compare the codes of real rows.

    Args:
        truth: What the model says in float64 about these rows.
        code: Dense codes of the engine, shape (rows, latents).
        errors: Squared error per row of truth and engine.
    """
    is_on, was_on = code != 0, truth.is_on
    return Fidelity(
        rows=len(code),
        flipped_share=float((is_on != was_on).mean()),
        support_jaccard=_jaccard(is_on, was_on),
        neighbour_recall=neighbour_recall(truth.code, code),
        active_truth=float(was_on.sum(1).mean()),
        active=float(is_on.sum(1).mean()),
        squared_error_truth=errors[0],
        squared_error=errors[1],
    )


def neighbour_recall(truth: NDArray[Any], found: NDArray[Any], count: int = NEIGHBOURS) -> float:
    """Return the share of each row's nearest rows by `truth` that `found` keeps among its own.

    A neighbour by `found` is kept when by `truth` it is no farther than the last of the nearest.
    With fewer rows than neighbours, all the others are neighbours.

    Args:
        truth: Rows to compare by cosine, shape (rows, latents).
        found: The same rows as another program sees them.
        count: Neighbours of a row.
    """
    chosen = np.linspace(0, len(truth) - 1, min(len(truth), _ROWS_AT_MOST)).astype(np.intp)
    return kept_share(similarities(truth[chosen]), similarities(found[chosen]), count)


def kept_share(similar: NDArray[Any], found: NDArray[Any], count: int = NEIGHBOURS) -> float:
    """Return what `neighbour_recall` does, from similarities of all pairs of rows.

    Args:
        similar: By the truth, shape (rows, rows); -inf where a row is compared with itself.
        found: By another program, likewise.
        count: Neighbours of a row.
    """
    count = min(count, len(similar) - 1)
    if count < 1:
        return 1.0
    last = np.partition(similar, -count, axis=1)[:, -count]
    nearest = np.argpartition(found, -count, axis=1)[:, -count:]
    is_kept = np.take_along_axis(similar, nearest, axis=1) >= last[:, None] - _TIE
    return float(is_kept.mean())


def similarities(rows: NDArray[Any]) -> NDArray[np.float64]:
    """Return the cosine of all pairs of rows; a row is no neighbour of itself."""
    exact = np.nan_to_num(rows.astype(np.float64))
    length = np.sqrt(np.square(exact).sum(1, keepdims=True))
    unit = np.divide(exact, length, out=np.zeros_like(exact), where=length > 0)
    similar: NDArray[np.float64] = unit @ unit.T
    np.fill_diagonal(similar, -np.inf)
    return similar


def _jaccard(is_on: NDArray[np.bool_], was_on: NDArray[np.bool_]) -> float:
    both, either = (is_on & was_on).sum(1), (is_on | was_on).sum(1)
    shares = np.divide(both, either, out=np.ones(len(both)), where=either > 0)
    return float(shares.mean())
