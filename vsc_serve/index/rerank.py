"""A second stage of search: the best rows of a first one, scored again from their stored codes.

The first stage compares codes with codes. The second compares the query itself, x, with what a
stored code z decodes to: by the linear map of the bundle, (u . z + c) / |z W + b|, at the price of
a few multiplications a row, or by the decoder. Which engine found the first rows does not matter:
all that is taken from it are row numbers.
"""

from collections.abc import Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from vsc_serve.codes import Codes
from vsc_serve.decoder import Decoder
from vsc_serve.errors import UsageError
from vsc_serve.index.exact import Hit, SharedFeature
from vsc_serve.index.rows import Rows
from vsc_serve.linear_map import LinearMap

CANDIDATES: Final = 200
"""Rows a query of which the second stage chooses."""

Candidates = Sequence[NDArray[np.intp]] | NDArray[np.intp]
"""Row numbers that a first stage found, for each query, in any order."""


def rerank(
    candidates: Candidates,
    codes: Rows,
    norms: NDArray[np.float64],
    u: NDArray[np.float64],
    c: NDArray[np.float64],
    *,
    top: int = 10,
) -> list[list[Hit]]:
    """Score candidates again: the cosine of the query and what their codes decode to.

    Of an empty code that is the bias of the map; of a row that decodes to nothing it is 0. Equal
    scores are in row order. A query without candidates, as one whose code is empty, has no hits.

    Args:
        candidates: For each query the rows to score.
        codes: What was searched, shape (rows, latents).
        norms: Length of each decoded row, as `LinearMap.norms` gives it; read at the candidates.
        u: Of each query, shape (queries, latents); with `c` from `LinearMap.project`.
        c: Of each query.
        top: Hits wanted of each query.

    Raises:
        UsageError: `top` is below 1, or larger than the candidates of a query that could be more.
    """
    check_depth(candidates, codes, top)
    return [
        _best(rows, _scores(codes[rows], norms[rows], u[query], c[query]), top)
        for query, rows in enumerate(candidates)
    ]


class LinearStage:
    """The second stage by a linear map, for one block of queries after the other.

    The length of a decoded row is computed when the row is first a candidate.

    Args:
        codes: What is searched.
        linear_map: The map of the model that made the codes.
    """

    def __init__(self, codes: Rows, linear_map: LinearMap) -> None:
        self._codes, self._map = codes, linear_map
        self._norms = np.full(codes.shape[0], np.nan)

    def rerank(
        self, candidates: Candidates, queries: NDArray[np.float32], top: int
    ) -> list[list[Hit]]:
        """Score candidates again; see `rerank`.

        Args:
            candidates: For each query the rows to score.
            queries: What was asked, as `Encoder.targets` gives it, shape (queries, dimensions).
            top: Hits wanted of each query.
        """
        self._measure(candidates)
        u, c = self._map.project(queries)
        return rerank(candidates, self._codes, self._norms, u, c, top=top)

    def explain(
        self, hits: Sequence[Hit], query: NDArray[np.float32]
    ) -> list[tuple[list[SharedFeature], float]]:
        """Say what features and bias add to the scores of hits; see `explain_linear`."""
        u, c = self._map.project(query[None])
        return [
            explain_linear(self._codes, hit.row, float(self._norms[hit.row]), u[0], float(c[0]))
            for hit in hits
        ]

    def _measure(self, candidates: Candidates) -> None:
        rows = np.unique(np.concatenate([np.empty(0, np.intp), *candidates]))
        new = rows[np.isnan(self._norms[rows])]
        self._norms[new] = self._map.norms(self._codes[new])


def rerank_decoded(
    candidates: Candidates,
    codes: Rows,
    decoder: Decoder,
    queries: NDArray[Any],
    *,
    top: int = 10,
) -> list[list[Hit]]:
    """Score candidates again by the cosine of the query and what the decoder makes of their codes.

    A decode costs far more than a product: for large indexes, where the first stage costs more.
    Equal scores are in row order.

    Args:
        candidates: For each query the rows to score.
        codes: What was searched.
        decoder: The decoder of the model that made the codes.
        queries: What was asked, in the units of the data, shape (queries, dimensions).
        top: Hits wanted of each query.

    Raises:
        UsageError: As `rerank`.
        InputError: Codes and decoder do not go together.
    """
    check_depth(candidates, codes, top)
    hits = []
    for query, rows in zip(queries.astype(np.float64), candidates, strict=True):
        drawn = decoder.decode(codes[rows]).reshape(len(rows), -1).astype(np.float64)
        lengths = np.linalg.norm(drawn, axis=1) * np.linalg.norm(query)
        hits.append(_best(rows, _ratio(drawn @ query, lengths), top))
    return hits


class DecodedStage:
    """The second stage by the decoder; see `rerank_decoded`.

    Args:
        codes: What is searched.
        decoder: The decoder of the model that made the codes.
    """

    def __init__(self, codes: Rows, decoder: Decoder) -> None:
        self._codes, self._decoder = codes, decoder

    def rerank(
        self, candidates: Candidates, queries: NDArray[np.float32], top: int
    ) -> list[list[Hit]]:
        """Score candidates again; arguments as `LinearStage.rerank` has them."""
        return rerank_decoded(candidates, self._codes, self._decoder, queries, top=top)

    def explain(
        self, hits: Sequence[Hit], query: NDArray[np.float32]
    ) -> list[tuple[list[SharedFeature], float]]:
        """Raise UsageError: the score is no sum over features."""
        raise UsageError("a score of the decoder is no sum over features")


def explain_linear(
    codes: Rows, row: int, norm: float, u: NDArray[np.float64], c: float
) -> tuple[list[SharedFeature], float]:
    """List what the features of a hit add to its score of the second stage, the largest first.

    Args:
        codes: What was searched.
        row: A row of it.
        norm: Length of the decoded row.
        u: Of the query, shape (latents,).
        c: Of the query.

    Returns:
        The features; and what the bias of the map adds, which belongs to none. Both together are
        the score.
    """
    hit, scale = codes[[row]], norm or 1.0
    parts = u[hit.indices] * hit.data / scale
    order = np.argsort(-np.abs(parts), kind="stable")
    features = [
        SharedFeature(
            int(hit.indices[i]), float(u[hit.indices[i]]), float(hit.data[i]), float(parts[i])
        )
        for i in order
    ]
    return features, float(c / scale)


def check_depth(candidates: Candidates, codes: Rows, top: int) -> None:
    """Raise UsageError where a query has candidates, and fewer than hits are wanted of it.

    All rows of a small index are enough, however few they are.
    """
    if top < 1:
        raise UsageError(f"`top` must be at least 1, not {top}")
    fewest = min((len(rows) for rows in candidates if len(rows)), default=top)
    if fewest < min(top, codes.shape[0]):
        raise UsageError(
            f"`candidates`: {fewest} rows of a query, and `top` asks for {top}. The second stage"
            " chooses among the candidates: give more of them, or ask for fewer hits."
        )


def _scores(
    codes: Codes, norms: NDArray[np.float64], u: NDArray[np.float64], c: np.float64
) -> NDArray[np.float64]:
    return _ratio(np.asarray(codes @ u).reshape(-1) + c, norms)


def _ratio(products: NDArray[np.float64], lengths: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return products / lengths, 0 where the length is."""
    return np.divide(products, lengths, out=np.zeros_like(products), where=lengths > 0)


def _best(rows: NDArray[np.intp], scores: NDArray[np.float64], top: int) -> list[Hit]:
    order = np.lexsort((rows, -scores))[:top]
    return [Hit(int(rows[i]), float(scores[i])) for i in order]
