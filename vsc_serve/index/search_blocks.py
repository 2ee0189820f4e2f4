"""Search of an inverted file: the best rows of one query after the other, block by block."""

from dataclasses import dataclass
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from vsc_serve.codes import Codes
from vsc_serve.index.exact import Nearest, none_found, on_all_processors, stack_found
from vsc_serve.index.metrics import OF_SUPPORTS, Metric, scores, sizes
from vsc_serve.index.segment import Segment

_SAMPLE: Final = 1024
"""Rows, at least, that a first bound of the best scores is taken from."""
_SLACK: Final = 1e-12
"""Rounding, relative, that separates a product with an inverse from a division."""


def search_blocks(blocks: "list[RowBlock]", queries: Codes, *, top: int, metric: Metric) -> Nearest:
    """Find the best rows of each query among those of the blocks, on all processors."""
    of_queries = sizes(queries, metric, "queries")
    top = min(top, sum(block.count() for block in blocks))
    search = _Search(metric, top, blocks, queries.shape[1])

    def nearest(query: int) -> Nearest:
        entries = slice(*queries.indptr[query : query + 2].tolist())
        values = queries.data[entries].astype(np.float64)
        return search.best(_Query(queries.indices[entries], values, float(of_queries[query])))

    found = on_all_processors(nearest, range(queries.shape[0]))
    return stack_found([none_found(0, top), *found])


class _Query(NamedTuple):
    latents: NDArray[np.integer]
    values: NDArray[np.float64]
    size: float


@dataclass(frozen=True)
class RowBlock:
    """Block of a segment, and which rows of the segment count."""

    segment: Segment
    number: int
    start: int
    """Row number of the segment's first row."""
    kept: NDArray[np.bool_] | None

    @property
    def rows(self) -> slice:
        """Rows of the block in its segment."""
        size = self.segment.postings.block_rows
        return slice(self.number * size, min((self.number + 1) * size, self.segment.facts.rows))

    def count(self) -> int:
        """Return how many of its rows count."""
        rows = self.rows
        return rows.stop - rows.start if self.kept is None else int(self.kept[rows].sum())


@dataclass(frozen=True)
class _Search:
    """Search of blocks for the best rows of one query after the other."""

    metric: Metric
    top: int
    blocks: list[RowBlock]
    latents: int

    def best(self, query: _Query) -> Nearest:
        """Return the best rows of a query, as one row of hits."""
        rows, found = np.empty(0, np.int64), np.empty(0)
        for block in self.blocks if self.top else ():
            block.segment.check_block(block.number)
            is_full = len(found) == self.top
            more, of_more = self._candidates(block, query, found[-1] if is_full else None)
            rows, found = np.concatenate([rows, more]), np.concatenate([found, of_more])
            order = np.argsort(-found, kind="stable")[: self.top]  # equal scores stay in row order
            rows, found = rows[order], found[order]
        return Nearest(rows[None], found[None])

    def _candidates(
        self, block: RowBlock, query: _Query, worst: np.float64 | None
    ) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """Return the rows of a block that may be among the best, and their scores.

        Args:
            block: The block.
            query: The query.
            worst: The last of the best scores so far, which a row of a later block must exceed;
                None while there are fewer than wanted.
        """
        is_support = self.metric in OF_SUPPORTS
        values = np.ones(len(query.values)) if is_support else query.values
        products = block.segment.postings.products(
            block.number, query.latents, values, is_support=is_support
        )
        kept = None if block.kept is None else block.kept[block.rows]
        bound = worst if worst is not None else self._bound(block, query, products, kept)
        near = self._near(block, query, products, bound)
        places = np.flatnonzero(near if kept is None else near & kept)
        found = self._scores(block, query, products, places)
        passes = found > bound if worst is not None else found >= bound
        return places[passes] + (block.start + block.rows.start), found[passes]

    def _near(
        self, block: RowBlock, query: _Query, products: NDArray[np.float64], bound: np.float64
    ) -> NDArray[np.bool_]:
        """Tell which rows may reach a bound, cheaply; some of them do not."""
        if self.metric == "dot":
            return products >= bound
        if self.metric == "cosine" and np.isfinite(bound):
            limit = bound * query.size
            scaled = products * block.segment.inverse_norms[block.rows]
            return np.asarray(scaled >= limit - _SLACK * abs(limit))
        return np.ones(len(products), np.bool_)

    def _bound(
        self,
        block: RowBlock,
        query: _Query,
        products: NDArray[np.float64],
        kept: NDArray[np.bool_] | None,
    ) -> np.float64:
        """Return a score that enough of the rows reach, from a sample of them."""
        length, size = len(products), max(_SAMPLE, 8 * self.top)
        sample = np.arange(min(size, length)) if kept is None else np.flatnonzero(kept)[:size]
        if len(sample) < self.top:
            return np.float64(-np.inf)
        place = len(sample) - self.top
        found: np.float64 = np.partition(self._scores(block, query, products, sample), place)[place]
        return found

    def _scores(
        self, block: RowBlock, query: _Query, products: NDArray[np.float64], rows: NDArray[np.intp]
    ) -> NDArray[np.float64]:
        of_rows = block.segment.sizes(self.metric)[block.rows][rows]
        return scores(self.metric, products[rows], of_rows, query.size, self.latents)
