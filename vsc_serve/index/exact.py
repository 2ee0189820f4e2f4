"""Exact nearest codes, and why they are near: a dot product is a sum over shared features."""

from dataclasses import dataclass
from typing import Final, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from vsc_serve.codes import Codes
from vsc_serve.errors import InputError, UsageError

Metric = Literal["cosine", "dot"]
METRICS: Final = get_args(Metric)


@dataclass(frozen=True)
class SharedFeature:
    """A latent that is active in the query and in a hit."""

    latent: int
    """Number of the latent."""
    query: float
    """Its value in the query."""
    hit: float
    """Its value in the hit."""
    score: float
    """What it adds to the hit's score; the scores of all shared features sum to it."""


@dataclass(frozen=True)
class Hit:
    """One row that was found."""

    row: int
    """Row number in the codes."""
    score: float
    """Cosine or dot product with the query."""


def search(codes: Codes, query: Codes, *, top: int = 10, metric: Metric = "cosine") -> list[Hit]:
    """Find the rows most like the query, exactly.

    The cosine with an empty code is 0. Equal scores are in row order.

    Args:
        codes: What to search, shape (images, latents).
        query: One code, shape (1, latents).
        top: Hits wanted, at least 1.
        metric: `cosine` or `dot`.

    Returns:
        At most `top` hits, best first.

    Raises:
        InputError: The query has another number of latents than the codes.
        UsageError: `top` or `metric` makes no sense.
    """
    if top < 1:
        raise UsageError(f"`top` must be at least 1, not {top}")
    scores = _scores(codes, query, metric)
    top = min(top, len(scores))
    nearest = np.argpartition(-scores, top - 1)[:top] if top < len(scores) else np.arange(top)
    worst = scores[nearest].min(initial=np.inf)
    candidates = np.flatnonzero(scores >= worst)  # argpartition picks any of those that tie
    order = np.argsort(-scores[candidates], kind="stable")[:top]
    return [Hit(int(row), float(scores[row])) for row in candidates[order]]


def explain(
    codes: Codes, row: int, query: Codes, *, metric: Metric = "cosine"
) -> list[SharedFeature]:
    """List what a row shares with the query, the largest contribution first.

    Args:
        codes: What was searched.
        row: A row of it.
        query: One code, shape (1, latents).
        metric: The metric of the search.
    """
    hit = codes[[row]]
    latents, in_query, in_hit = np.intersect1d(query.indices, hit.indices, return_indices=True)
    query_values, hit_values = query.data[in_query], hit.data[in_hit]
    scale = 1.0 if metric == "dot" else _norms(query)[0] * _norms(hit)[0]
    parts = query_values.astype(np.float64) * hit_values / (scale or 1.0)
    order = np.argsort(-np.abs(parts), kind="stable")
    return [
        SharedFeature(
            int(latents[i]), float(query_values[i]), float(hit_values[i]), float(parts[i])
        )
        for i in order
    ]


def _scores(codes: Codes, query: Codes, metric: Metric) -> NDArray[np.float64]:
    if metric not in METRICS:
        raise UsageError(f"`metric` must be one of {', '.join(METRICS)}, not {metric}")
    if query.shape[1] != codes.shape[1]:
        raise InputError(
            f"the query has {query.shape[1]} latents, the codes have {codes.shape[1]}."
            " Encode both with the same model."
        )
    dense = query.toarray()[0].astype(np.float64)
    products = np.asarray(codes.astype(np.float64) @ dense, np.float64)
    if metric == "dot":
        return products.reshape(-1)
    norms = _norms(codes) * _norms(query)[0]
    cosines: NDArray[np.float64] = np.zeros_like(norms)
    np.divide(products, norms, out=cosines, where=norms > 0)
    return cosines


def _norms(codes: Codes) -> NDArray[np.float64]:
    squares: NDArray[np.float64] = np.asarray(codes.astype(np.float64).power(2).sum(axis=1))
    return np.sqrt(squares).reshape(-1)
