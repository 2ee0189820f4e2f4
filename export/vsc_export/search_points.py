"""What a search finds at each setting of tau: with the query's own threshold, and a second stage.

Measured on the rows of the operating points: each is a query, and the other rows are searched.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from vsc_export.comparison import Truth
from vsc_export.fidelity import kept_share, similarities
from vsc_serve.codes import dense_to_csr, threshold, threshold_logit
from vsc_serve.index.rerank import CANDIDATES
from vsc_serve.linear_map import LinearMap
from vsc_serve.options import QUERY_TAU

_LOWEST: Final = -np.inf


@dataclass(frozen=True, kw_only=True)
class SearchPoint:
    """What a search finds, and costs, at one setting of tau."""

    tau: float
    """Threshold of the stored rows."""
    query_tau: float
    """Threshold of the queries."""
    search_cost: float
    """Postings a query is expected to touch per row of an index: sum_j f_j of queries times f_j of
    rows."""
    recall: float
    """Share of the ten nearest rows in the data itself (cosine) among the ten that are found."""
    second_stage: float | None = None
    """The same where the best 200 are scored again; None without a linear map."""
    refitted: float | None = None
    """The same with refitted values; None without a linear map."""


class Neighbours:
    """Rows whose neighbours in the data are known.

    Args:
        data: Rows as the model draws them, flattened, shape (rows, dimensions).
        truth: What the model says about them.
    """

    def __init__(self, data: NDArray[np.float32], truth: Truth) -> None:
        self.data = data
        self.logit = truth.spike_logit.astype(np.float32)
        self.mu = truth.mu.astype(np.float32)
        self._similar = similarities(data)

    def stored(self, tau: float) -> NDArray[np.float32]:
        """Return the rows as an index stores them, dense."""
        return threshold(self.logit, self.mu, tau)

    def queries(self, tau: float) -> NDArray[np.float32]:
        """Return the rows as queries: sqrt(gamma) mu where gamma is above tau."""
        gamma = np.exp(-np.logaddexp(0.0, -self.logit.astype(np.float64)))
        is_on = self.logit > threshold_logit(tau)
        return np.where(is_on, np.sqrt(gamma) * self.mu, 0.0).astype(np.float32)

    def recall(self, scores: NDArray[Any]) -> float:
        """Return the share of nearest rows that are kept by scores of all pairs of rows."""
        np.fill_diagonal(scores, _LOWEST)
        return kept_share(self._similar, scores)


def measure_search(
    neighbours: Neighbours,
    linear_map: LinearMap | None,
    taus: Sequence[float],
    *,
    own_tau: float,
    query_tau: float | None,
) -> list[SearchPoint]:
    """Measure what a search finds at each tau.

    Args:
        neighbours: The rows.
        linear_map: Map of the bundle, if it has one.
        taus: Thresholds of the stored rows.
        own_tau: Tau of the bundle, where refitted values are measured too.
        query_tau: Threshold of queries; None is the default.
    """
    limit = QUERY_TAU if query_tau is None else query_tau
    return [
        _measure(neighbours, linear_map, tau, min(limit, tau), is_refitted=tau == own_tau)
        for tau in taus
    ]


def first_stage(stored: NDArray[np.float32], queries: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return scores of all pairs: the dot product by the length of the stored row."""
    lengths = np.linalg.norm(stored, axis=1)
    scale = np.divide(1.0, lengths, out=np.zeros_like(lengths), where=lengths > 0)
    scores: NDArray[np.float32] = (queries @ stored.T) * scale
    return scores


def search_cost(stored: NDArray[np.float32], queries: NDArray[np.float32]) -> float:
    """Return the postings a query is expected to touch, per row of an inverted file."""
    return float((stored != 0).mean(0) @ (queries != 0).mean(0))


def _measure(
    neighbours: Neighbours,
    linear_map: LinearMap | None,
    tau: float,
    query_tau: float,
    *,
    is_refitted: bool,
) -> SearchPoint:
    stored, queries = neighbours.stored(tau), neighbours.queries(query_tau)
    second, refitted = None, None
    if linear_map is not None:
        second = _second_recall(neighbours, linear_map, stored, queries)
    if linear_map is not None and is_refitted:
        values = linear_map.refit(dense_to_csr(stored), neighbours.data).toarray()
        refitted = _second_recall(neighbours, linear_map, values, queries)
    return SearchPoint(
        tau=tau,
        query_tau=query_tau,
        search_cost=search_cost(stored, queries),
        recall=neighbours.recall(first_stage(stored, queries)),
        second_stage=second,
        refitted=refitted,
    )


def _second_recall(
    neighbours: Neighbours,
    linear_map: LinearMap,
    stored: NDArray[np.float32],
    queries: NDArray[np.float32],
) -> float:
    """Return the recall of the second stage: rows that the first one does not give are out."""
    scores = first_stage(stored, queries)
    np.fill_diagonal(scores, _LOWEST)
    u, c = linear_map.project(neighbours.data)
    lengths = linear_map.norms(dense_to_csr(stored))
    again = (u @ stored.T + c[:, None]) / np.where(lengths > 0, lengths, np.inf)
    if len(stored) > CANDIDATES:
        last = np.partition(scores, -CANDIDATES, axis=1)[:, -CANDIDATES]
        again[scores < last[:, None]] = _LOWEST
    return neighbours.recall(again)
