"""Exact nearest codes, and why they are near: a dot product is a sum over shared features."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import starmap
from typing import Final, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from vsc_serve.codes import Codes
from vsc_serve.cpus import usable_cpus
from vsc_serve.errors import InputError, UsageError
from vsc_serve.index.metrics import (
    METRICS,
    OF_SUPPORTS,
    Metric,
    norms_of,
    rows_between,
    scores,
    sizes,
    supports,
)
from vsc_serve.index.rows import Rows

T = TypeVar("T")

_QUERY_BLOCK: Final = 32
"""Queries that are scored together: their dense form stays in a processor's cache."""
_SCORE_BLOCK: Final = 2**19
"""Scores that are held at a time by a thread, 4 MiB."""
_SAMPLE: Final = 1024
"""Rows, at least, that a first bound of the best scores is taken from."""


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
    """Its score by the metric of the search; the larger, the nearer."""


class Nearest(NamedTuple):
    """The best rows of several queries, best first."""

    rows: NDArray[np.int64]
    """Row numbers, shape (queries, hits)."""
    scores: NDArray[np.float64]
    """Their scores, of the same shape."""

    def hits(self, query: int) -> list[Hit]:
        """Return the hits of one query."""
        pair = self.rows[query].tolist(), self.scores[query].tolist()
        return list(starmap(Hit, zip(*pair, strict=True)))


def search(codes: Codes, query: Codes, *, top: int = 10, metric: Metric = "cosine") -> list[Hit]:
    """Find the rows most like the query, exactly: `search_many` of one query.

    Args:
        codes: What to search, shape (images, latents).
        query: One code, shape (1, latents).
        top: Hits wanted, at least 1.
        metric: One of `metrics.METRICS`.

    Returns:
        At most `top` hits, best first.

    Raises:
        InputError: As `search_many`.
        UsageError: `top` or `metric` makes no sense.
    """
    return search_many(codes, query, top=top, metric=metric).hits(0)


def search_many(
    codes: Codes, queries: Codes, *, top: int = 10, metric: Metric = "cosine"
) -> Nearest:
    """Find the rows most like each query, exactly.

    The score of query a and row z is that of `index.metrics`; by `cosine`, rows rank as by
    a . z / |z|. A row that shares no latent with the query, and any row where one of both is
    empty, scores 0 (but by `hamming`, as any other row): below every positive score and above
    every negative one. Equal scores are in row order. Query and rows need not be made alike: a
    query may keep more latents.

    All processors work, each with a few MiB of scores, whatever the number of rows and queries.

    Args:
        codes: What to search, shape (images, latents).
        queries: Codes, shape (queries, latents).
        top: Hits wanted of each query, at least 1.
        metric: One of `metrics.METRICS`.

    Returns:
        The best `top` rows of each query, or all where there are fewer.

    Raises:
        InputError: Queries have another number of latents than the codes; or one of both holds
            values that are not finite.
        UsageError: `top` or `metric` makes no sense.
    """
    check_search(queries, codes.shape[1], top, metric)
    of_rows, of_queries = sizes(codes, metric, "codes"), sizes(queries, metric, "queries")
    if metric in OF_SUPPORTS:
        codes, queries = supports(codes), supports(queries)

    def nearest(start: int) -> Nearest:
        block = slice(start, start + _QUERY_BLOCK)
        dense = np.ascontiguousarray(queries[block].toarray().T, np.float64)
        blocks = _score_blocks(codes, dense, metric, of_rows, of_queries[block])
        return _keep_best(blocks, none_found(dense.shape[1], top))

    top = min(top, codes.shape[0])
    starts = range(0, queries.shape[0], _QUERY_BLOCK)
    return stack_found([none_found(0, top), *on_all_processors(nearest, starts)])


def stack_found(found: Sequence[Nearest]) -> Nearest:
    """Put the hits of blocks of queries below one another."""
    return Nearest(*map(np.concatenate, zip(*found, strict=True)))


def explain(
    codes: Rows, row: int, query: Codes, *, metric: Metric = "cosine"
) -> list[SharedFeature]:
    """List what a row shares with the query, the largest contribution first.

    Args:
        codes: What was searched.
        row: A row of it.
        query: One code, shape (1, latents).
        metric: The metric of the search.

    Raises:
        UsageError: A score of `hamming` is no sum over shared features.
    """
    if metric == "hamming":
        raise UsageError(
            "`explain`: a score of `metric=hamming` counts what is in neither of both too, and is"
            " no sum over shared features. Use another `metric`."
        )
    hit = codes[[row]]
    latents, in_query, in_hit = np.intersect1d(query.indices, hit.indices, return_indices=True)
    query_values, hit_values = query.data[in_query], hit.data[in_hit]
    parts = _parts(metric, query, hit, query_values.astype(np.float64) * hit_values)
    order = np.argsort(-np.abs(parts), kind="stable")
    return [
        SharedFeature(
            int(latents[i]), float(query_values[i]), float(hit_values[i]), float(parts[i])
        )
        for i in order
    ]


def _parts(
    metric: Metric, query: Codes, hit: Codes, products: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Return what each shared feature adds to the score; `products` are those of the values."""
    if metric == "dot":
        return products
    if metric == "jaccard":
        return np.full(len(products), 1 / max(1, query.nnz + hit.nnz - len(products)))
    return products / (norms_of(query, "queries")[0] * norms_of(hit, "codes")[0] or 1.0)


def check_search(queries: Codes, latents: int, top: int, metric: Metric) -> None:
    """Check what is asked of rows with this number of latents.

    Raises:
        InputError: Queries have another number of latents.
        UsageError: `top` or `metric` makes no sense.
    """
    if top < 1:
        raise UsageError(f"`top` must be at least 1, not {top}")
    if metric not in METRICS:
        raise UsageError(f"`metric` must be one of {', '.join(METRICS)}, not {metric}")
    if queries.shape[1] != latents:
        raise InputError(
            f"the query has {queries.shape[1]} latents, the codes have {latents}."
            " Encode both with the same model."
        )


def _score_blocks(
    codes: Codes,
    dense: NDArray[np.float64],
    metric: Metric,
    of_rows: NDArray[np.float64],
    of_queries: NDArray[np.float64],
) -> Iterator[NDArray[np.float64]]:
    """Yield the scores of consecutive rows, shape (rows, queries).

    Each score is summed in the order of the latents, so that it does not depend on the blocks.

    Args:
        codes: All rows.
        dense: Queries, shape (latents, queries).
        metric: The metric.
        of_rows: `sizes` of the rows.
        of_queries: `sizes` of the queries.
    """
    size = max(1, _SCORE_BLOCK // dense.shape[1])
    for start in range(0, codes.shape[0], size):
        products = np.asarray(rows_between(codes, start, start + size) @ dense, np.float64)
        rows = of_rows[start : start + size, None]
        yield scores(metric, products, rows, of_queries, codes.shape[1])


def none_found(query_count: int, top: int) -> Nearest:
    """Return hits that any row is better than."""
    shape = (query_count, top)
    return Nearest(np.full(shape, -1, np.int64), np.full(shape, -np.inf))


def _keep_best(blocks: Iterator[NDArray[np.float64]], best: Nearest) -> Nearest:
    """Go through blocks of scores of consecutive rows; put the best rows of each query into `best`.

    Few rows pass once the first block is done: an equal score comes after those of earlier rows.
    """
    start = 0
    for block in blocks:
        passes = block > best.scores[:, -1] if start else block >= _bound(block, best)
        rows, queries = np.nonzero(passes)
        _merge(best, queries, rows + start, block[rows, queries])
        start += len(block)
    return best


def _bound(block: NDArray[np.float64], best: Nearest) -> NDArray[np.float64]:
    """Return a score for each query that enough of the rows reach, from a sample of them."""
    top = best.scores.shape[1]
    sample = block[: max(_SAMPLE, 8 * top)]
    if len(sample) < top:
        return np.full(block.shape[1], -np.inf)
    place = len(sample) - top
    bound: NDArray[np.float64] = np.partition(sample, place, axis=0)[place]
    return bound


def _merge(
    best: Nearest, queries: NDArray[np.intp], rows: NDArray[np.int64], found: NDArray[np.float64]
) -> None:
    """Put candidates, in row order, into the best rows of their queries."""
    changed, top = np.unique(queries), best.scores.shape[1]
    all_queries = np.concatenate([np.repeat(changed, top), queries])
    all_rows = np.concatenate([best.rows[changed].ravel(), rows])
    all_scores = np.concatenate([best.scores[changed].ravel(), found])
    order = np.lexsort((-all_scores, all_queries))  # stable: equal scores stay in row order
    grouped = all_queries[order]
    chosen = order[np.arange(len(order)) - np.searchsorted(grouped, grouped) < top]
    best.rows[changed] = all_rows[chosen].reshape(-1, top)
    best.scores[changed] = all_scores[chosen].reshape(-1, top)


def on_all_processors(work: Callable[[int], T], starts: Sequence[int]) -> list[T]:
    """Do the work of all blocks; products and comparisons of arrays release the GIL."""
    if len(starts) <= 1:
        return list(map(work, starts))
    with ThreadPoolExecutor(usable_cpus()) as threads:
        return list(threads.map(work, starts))
