"""Budgets: thresholds of stored rows and of queries for so many bytes a row, or so much search.

Bytes follow from the rows alone, so tau does. The cost of a search is that of both sides: for each
threshold of queries there is one of rows that meets it. Among the pairs that meet the budget the
one is taken whose search finds most neighbours on the rows of the operating points.
"""

from collections.abc import Callable, Iterator
from functools import partial
from math import ceil, isfinite
from typing import Final, Literal, NamedTuple, get_args

import numpy as np
from numpy.typing import NDArray

from vsc_export.search_points import Neighbours, first_stage, search_cost
from vsc_serve.codes import threshold_logit
from vsc_serve.errors import UsageError

QUERY_TAUS: Final = (0.05, 0.1, 0.2, 0.3, 0.5)
"""Thresholds of queries that are tried."""

BYTES_PER_ENTRY: Final = 8
"""A float32 value and an int32 index."""

_Unit = Literal["bytes", "cost"]
LEAST_TAU: Final = 0.05
"""Lowest threshold of rows: below it codes are hardly sparse."""

_AS_GOOD: Final = 0.002
"""Difference of recall that decides nothing."""
_STEPS: Final = 1_000_000
"""Thresholds are multiples of its inverse."""


class Budget(NamedTuple):
    """What a row, or a search, may take."""

    unit: _Unit
    """`bytes` a stored row, or `cost`: postings a query touches per row of an index."""
    limit: float


class Thresholds(NamedTuple):
    """Thresholds that meet a budget."""

    tau: float
    """Of stored rows."""
    query_tau: float
    """Of queries."""


def parse_budget(text: str) -> Budget:
    """Read `bytes=100` or `cost=1.5`. Raises UsageError for anything else."""
    unit, _, number = text.partition("=")
    try:
        limit = float(number)
    except ValueError:
        limit = float("nan")
    if unit not in get_args(_Unit) or not (isfinite(limit) and limit > 0):
        raise UsageError(f"`budget` {text}: give bytes=NUMBER or cost=NUMBER, such as bytes=100.")
    return Budget("bytes" if unit == "bytes" else "cost", limit)


def propose_thresholds(budget: Budget, neighbours: Neighbours) -> Thresholds:
    """Return the thresholds within a budget with which most neighbours are found.

    Of pairs that find about as many, the one is taken that needs least of what the budget does not
    limit: search cost where it limits bytes, bytes where it limits the cost.

    Args:
        budget: What a row or a search may take.
        neighbours: Rows that the thresholds are chosen on.

    Raises:
        UsageError: No threshold meets the budget on these rows.
    """
    tried = [_try(pair, neighbours) for pair in _pairs(budget, neighbours.logit)]
    if not tried:
        raise UsageError(
            f"`budget` {budget.unit}={budget.limit:g}: on {len(neighbours.logit)} rows fewer than"
            " one active latent per row is left. Give more."
        )
    best = max(one.recall for one in tried)
    alike = [one for one in tried if one.recall >= best - _AS_GOOD]
    return min(alike, key=lambda one: one.cost if budget.unit == "bytes" else one.size).thresholds


class _Tried(NamedTuple):
    """What a pair of thresholds finds and takes."""

    thresholds: Thresholds
    recall: float
    cost: float
    size: int


def _try(pair: Thresholds, neighbours: Neighbours) -> _Tried:
    stored, queries = neighbours.stored(pair.tau), neighbours.queries(pair.query_tau)
    recall = neighbours.recall(first_stage(stored, queries))
    return _Tried(pair, recall, search_cost(stored, queries), int(np.count_nonzero(stored)))


def _pairs(budget: Budget, logit: NDArray[np.float32]) -> Iterator[Thresholds]:
    """Yield pairs within the budget, each with the lowest threshold of rows."""
    if budget.unit == "bytes":
        tau = _lowest_tau(logit, lambda is_on: BYTES_PER_ENTRY * _active(is_on) <= budget.limit)
        if tau is not None:
            yield from (Thresholds(tau, one) for one in {min(q, tau) for q in (*QUERY_TAUS, tau)})
        return
    for query_tau in QUERY_TAUS:
        asked = (logit > threshold_logit(query_tau)).mean(0)
        meets = partial(_costs_at_most, asked, budget.limit)
        tau = _lowest_tau(logit, meets, query_tau)
        if tau is not None:
            yield Thresholds(tau, query_tau)


def _lowest_tau(
    logit: NDArray[np.float32],
    meets: Callable[[NDArray[np.bool_]], bool],
    least: float = LEAST_TAU,
) -> float | None:
    """Return the lowest tau from `least` on that meets a limit; None where codes are empty."""
    low, high = ceil(least * _STEPS), _STEPS - 1
    while low < high:
        middle = (low + high) // 2
        is_met = meets(logit > threshold_logit(middle / _STEPS))
        low, high = (low, middle) if is_met else (middle + 1, high)
    is_on = logit > threshold_logit(low / _STEPS)
    return low / _STEPS if meets(is_on) and _active(is_on) >= 1 else None


def _active(is_on: NDArray[np.bool_]) -> float:
    return float(is_on.sum() / len(is_on))


def _costs_at_most(asked: NDArray[np.float64], limit: float, is_on: NDArray[np.bool_]) -> bool:
    return float(is_on.mean(0) @ asked) <= limit
