"""Signed codes in front of an engine that takes no negative values, with a proof of its answers.

A code z becomes [max(z, 0); max(-z, 0)]: twice the latents, as many entries, the same norm. With A
the sum of |q_j z_j| where the signs of query and row agree, and D where they disagree, the engine
scores A and the answer is wanted by q . z = A - D. So A is never below the true score: whoever
fetches more rows by A than are wanted, and scores them again by their signed codes, knows that none
was missed when the last of the wanted scores reaches the smallest A that was fetched. Otherwise
twice as many are fetched. Cosines are split alike, since the norms stay.
"""

from collections.abc import Callable
from typing import Final, Literal, NamedTuple

import numpy as np
import scipy.sparse
from numpy.typing import NDArray

from vsc_serve.codes import Codes, canonical
from vsc_serve.errors import UsageError
from vsc_serve.index.exact import (
    Nearest,
    check_search,
    none_found,
    search_many,
    stack_found,
)
from vsc_serve.index.rows import Rows

OVER_FETCH: Final = 2
"""Rows that are fetched for each one that is wanted, at first."""
_ROUNDING: Final = 1e-6
"""Relative error of an engine that computes in float32."""

Fetch = Callable[[Codes, int], Nearest]
"""Returns the best rows by A of split queries, and A: dot products, or cosines where these are
wanted; fewer than asked for only where all other rows have A = 0."""


class Certified(NamedTuple):
    """Answers, and which of them are proven."""

    nearest: Nearest
    is_certain: NDArray[np.bool_]
    """Of each query: no row that is missing can score higher, if the engine's A are right."""


def split(codes: Codes) -> Codes:
    """Return [max(z, 0); max(-z, 0)] of each code z."""
    return canonical(scipy.sparse.hstack([codes.maximum(0), (-codes).maximum(0)], format="csr"))


def unsplit(codes: Codes) -> Codes:
    """Return the codes that were split."""
    latents = codes.shape[1] // 2
    return canonical(codes[:, :latents] - codes[:, latents:])


def search_split(
    fetch: Fetch,
    rows: Rows,
    queries: Codes,
    *,
    top: int = 10,
    metric: Literal["cosine", "dot"] = "cosine",
    rounding: float = _ROUNDING,
    limit: int | None = None,
) -> Certified:
    """Find the rows most like each query through an engine that takes no negative values.

    Args:
        fetch: The engine, over split codes.
        rows: The signed codes.
        queries: Signed queries.
        top: Hits wanted of each query.
        metric: `cosine` or `dot`; what `fetch` scores by.
        rounding: Error of an engine's score relative to the largest that was fetched: of values
            stored with fewer bits, the error of those.
        limit: Rows that are fetched of a query at most; by default all, if that is what it takes.

    Raises:
        UsageError: Another metric: supports have no signs to split.
    """
    check_search(queries, rows.shape[1], top, metric)
    if metric not in ("cosine", "dot"):
        raise UsageError(f"`metric={metric}`: supports have no signs to split. Search them as such")
    most = min(rows.shape[0], limit or rows.shape[0])
    answers = [
        _certify(fetch, rows, queries[[query]], (min(top, rows.shape[0]), most), metric, rounding)
        for query in range(queries.shape[0])
    ]
    empty = Certified(none_found(0, min(top, rows.shape[0])), np.empty(0, np.bool_))
    found = [empty, *answers]
    certain = np.concatenate([one.is_certain for one in found])
    return Certified(stack_found([one.nearest for one in found]), certain)


def _certify(
    fetch: Fetch,
    rows: Rows,
    query: Codes,
    counts: tuple[int, int],
    metric: Literal["cosine", "dot"],
    rounding: float,
) -> Certified:
    """Fetch twice as many rows, until the answer is certain or no more may be fetched."""
    (top, most), asked = counts, split(query)
    depth = min(most, OVER_FETCH * top)
    while True:
        fetched, bounds = fetch(asked, depth)
        candidates = np.unique(fetched[0])
        found = search_many(rows[candidates], query, top=max(1, top), metric=metric)
        best = Nearest(candidates[found.rows[:, :top]], found.scores[:, :top])
        is_all = len(candidates) == rows.shape[0]
        is_certain = is_all or _is_certain(best.scores[0], bounds[0], depth, top, rounding)
        if is_certain or depth == most:
            return Certified(_padded(best, top), np.array([is_certain]))
        depth = min(most, 2 * depth)


def _is_certain(
    best: NDArray[np.float64], bounds: NDArray[np.float64], depth: int, top: int, rounding: float
) -> bool:
    """Tell whether the last of the best exceeds whatever a row can score that was not fetched.

    A row that ties with the last could come before it: equal is not enough.
    """
    largest_missing = bounds.min(initial=np.inf) if len(bounds) == depth else 0.0
    margin = rounding * np.abs(bounds).max(initial=0)
    return len(best) == top and bool((best > largest_missing + margin).all())


def _padded(best: Nearest, top: int) -> Nearest:
    """Fill up hits that are missing, of an answer that is not certain: row -1, score -inf."""
    padded = none_found(1, top)
    found = best.rows.shape[1]
    padded.rows[:, :found], padded.scores[:, :found] = best
    return padded
