"""Inverted file: for each latent the rows in which it is active, and its value there.

A query of k active latents reads k lists of postings, in place of all rows. Rows lie in blocks of
65,536, each with lists of its own, so that the scores of a block stay in a processor's cache; in a
list, rows are numbered within their block.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, NamedTuple

import numpy as np
import scipy.sparse
from numpy.typing import NDArray

from vsc_serve.codes import Codes, index_type

BLOCK_ROWS: Final = 65_536
"""Rows of a block; more where there are more latents, so that the lists outweigh their bounds."""


class Block(NamedTuple):
    """Lists of postings of consecutive rows."""

    bounds: NDArray[np.int64]
    """Where the list of each latent begins in the lists of all blocks, and where the last ends."""
    rows: NDArray[np.int32]
    """Rows of the postings, from the first row of the block."""
    values: NDArray[np.float32]


def invert(codes: Codes) -> Iterator[Block]:
    """Give the postings of codes, block by block."""
    size, at = block_rows(codes.shape[1]), 0
    for start in range(0, codes.shape[0], size):
        columns = codes[start : start + size].tocsc()
        bounds = columns.indptr.astype(np.int64) + at
        at = int(bounds[-1])
        yield Block(bounds, columns.indices.astype(np.int32, copy=False), columns.data)


def block_rows(latents: int) -> int:
    """Return the rows of a block."""
    return max(BLOCK_ROWS, latents)


@dataclass(frozen=True)
class Postings:
    """The inverted file of a segment; arrays may be mapped from files.

    Raises:
        ValueError: Bounds that are none.
    """

    bounds: NDArray[np.int64]
    """Shape (blocks, latents + 1), as in `Block`."""
    rows: NDArray[np.int32]
    values: NDArray[np.float32]
    count: int
    """Rows of the segment."""

    def __post_init__(self) -> None:
        size, flat = self.block_rows, self.bounds.ravel()
        blocks = -(-self.count // size)
        if self.bounds.ndim != 2 or len(self.bounds) != blocks:
            raise ValueError(f"bounds of {len(self.bounds)} blocks, not {blocks}")
        ends = flat[0], flat[-1], len(self.rows), len(self.values)
        if ends[0] or len({*ends[1:]}) > 1 or (np.diff(flat) < 0).any():
            raise ValueError("bounds that are not those of the lists")

    @property
    def latents(self) -> int:
        """Latents J."""
        return int(self.bounds.shape[1]) - 1

    @property
    def block_rows(self) -> int:
        """Rows of a block but the last."""
        return block_rows(self.latents)

    def check_block(self, block: int) -> None:
        """Raise ValueError for rows that are not in the block: scipy would write beyond memory."""
        lists = self.rows[self.bounds[block, 0] : self.bounds[block, -1]]
        if len(lists) and lists.view(np.uint32).max() >= self.length(block):
            raise ValueError("postings of rows that are not there")

    def length(self, block: int) -> int:
        """Return the rows of a block."""
        return min(self.block_rows, self.count - block * self.block_rows)

    def products(
        self,
        block: int,
        latents: NDArray[np.integer],
        values: NDArray[np.float64],
        *,
        is_support: bool,
    ) -> NDArray[np.float64]:
        """Return the dot product of a query with each row of a block.

        Each is summed in the order of the latents, of products that float64 holds exactly: the same
        sum that `exact.search_many` gives.

        Args:
            block: Number of the block.
            latents: Active latents of the query, ascending.
            values: Their values, which float32 can hold.
            is_support: Take 1 for every value of a row.
        """
        starts, stops = self.bounds[block, latents], self.bounds[block, latents + 1]
        lists = [slice(*ends) for ends in zip(starts.tolist(), stops.tolist(), strict=True)]
        if not lists:
            return np.zeros(self.length(block))
        pointers = np.concatenate([[0], np.cumsum(stops - starts)])
        rows = np.concatenate([self.rows[one] for one in lists])
        if is_support:
            weights = np.ones(len(rows))
        else:
            weights = np.concatenate([self.values[one] for one in lists], dtype=np.float64)
        shape = (self.length(block), len(lists))
        parts = (weights, rows, pointers.astype(index_type(len(rows))))
        columns = scipy.sparse.csc_array(parts, shape=shape)
        return np.asarray(columns @ values, np.float64)

    def having(self, latent: int) -> NDArray[np.intp]:
        """Return the rows in which a latent is active, ascending."""
        parts = [
            self.rows[bounds[latent] : bounds[latent + 1]].astype(np.intp) + block * self.block_rows
            for block, bounds in enumerate(self.bounds)
        ]
        return np.concatenate([np.empty(0, np.intp), *parts])
