"""Groups of near-duplicates: rows whose codes have at least a given cosine, all pairs compared.

Of two rows of length 1 with a . b >= t, no value differs by more than d = sqrt(2 - 2 t), because
|a - b|^2 = 2 - 2 a . b. So where the largest value of a is above d, its latent is active in b too,
with a value at most d away: a is compared with the rows on the list of that latent alone. Where the
second largest is above d as well, b is on both lists. Products are computed in tiles, and a row
costs 32 bytes beside its code.
"""

from collections.abc import Iterator
from threading import Lock
from typing import Final, NamedTuple, TypeAlias

import numpy as np
import scipy.sparse
from numpy.typing import NDArray
from scipy.sparse.csgraph import connected_components

from vsc_serve.codes import Codes
from vsc_serve.errors import UsageError
from vsc_serve.index.base import Searchable
from vsc_serve.index.exact import on_all_processors
from vsc_serve.index.metrics import norms_of

_TILE: Final = 2**20
"""Cosines that are held at a time by a thread, 8 MiB."""
_READ_ROWS: Final = 2**16
"""Rows that are read at a time."""
_EDGES: Final = 2**20
"""Pairs that are held before they are merged into groups."""
_ROUNDING: Final = 1e-9
"""Cosines are computed in float64: equal codes reach 1 within this."""

_Unit: TypeAlias = "scipy.sparse.csr_array[np.float64, tuple[int, int]]"


def duplicate_groups(rows: Searchable, cosine: float) -> list[list[int]]:
    """Find groups of rows of which each is near to another one of its group.

    An empty row is in no group.

    Args:
        rows: What is searched.
        cosine: How near, above 0.5 and at most 1.

    Returns:
        Row numbers, ascending in each group of two or more; groups by their first row.

    Raises:
        UsageError: `cosine` is out of range.
    """
    if not 0.5 < cosine <= 1:
        raise UsageError(f"`duplicates` is a cosine above 0.5 and at most 1, not {cosine:g}")
    lists = _Lists(rows, float(np.sqrt(2 - 2 * cosine)) + _ROUNDING)
    groups = _Groups(rows.rows.shape[0])

    def compare(latent: int) -> None:
        for tile in lists.tiles(latent):
            groups.join(*tile.near(cosine - _ROUNDING))

    on_all_processors(compare, range(-1, rows.rows.shape[1]))
    return groups.groups()


class _Tile(NamedTuple):
    """Rows to compare with others."""

    some: _Unit
    some_rows: NDArray[np.intp]
    others: _Unit
    other_rows: NDArray[np.intp]

    def near(self, cosine: float) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
        """Return the pairs of row numbers that are near."""
        cosines = np.asarray(self.others @ self.some.toarray().T)
        places, of_some = np.nonzero(cosines >= cosine)
        return self.some_rows[of_some], self.other_rows[places]


class _Lists:
    """Rows by their two strongest latents, and which rows can be near to them.

    Args:
        rows: What is searched.
        distance: How far a value of a near row can be away.
    """

    def __init__(self, rows: Searchable, distance: float) -> None:
        self._rows = rows
        self._strongest = np.full((rows.rows.shape[0], 2), -2, np.int64)
        live = rows.numbers()
        for start in range(0, len(live), _READ_ROWS):
            numbers = live[start : start + _READ_ROWS]
            self._strongest[numbers] = _strongest(_unit(rows.rows[numbers]), distance)

    def tiles(self, latent: int) -> Iterator[_Tile]:
        """Give the rows of which a latent is the strongest, with all that can be near to them.

        Args:
            latent: The latent; -1 for rows of which none is strong enough to find others by.
        """
        first = np.flatnonzero(self._strongest[:, 0] == latent)
        if not len(first):
            return
        for listed in self._listed(latent):
            codes = _unit(self._rows.rows[listed])
            columns = codes.tocsc()
            for second in np.unique(self._strongest[first, 1]).tolist():
                some = first[self._strongest[first, 1] == second]
                places = _active(columns, second) if second >= 0 else np.arange(len(listed))
                yield from self._cut(some, codes[places], listed[places])

    def _listed(self, latent: int) -> Iterator[NDArray[np.intp]]:
        """Give the rows on the list of a latent, or all, some at a time."""
        found = self._rows.having(latent) if latent >= 0 else self._rows.numbers()
        for start in range(0, len(found), _READ_ROWS):
            yield found[start : start + _READ_ROWS]

    def _cut(
        self, some: NDArray[np.intp], others: _Unit, other_rows: NDArray[np.intp]
    ) -> Iterator[_Tile]:
        size = max(1, _TILE // max(len(other_rows), others.shape[1]))
        for start in range(0, len(some) if len(other_rows) else 0, size):
            rows = some[start : start + size]
            yield _Tile(_unit(self._rows.rows[rows]), rows, others, other_rows)


def _unit(codes: Codes) -> _Unit:
    """Return codes of length 1; empty ones stay empty."""
    lengths = np.repeat(norms_of(codes, "codes"), np.diff(codes.indptr))
    parts = (codes.data / lengths, codes.indices, codes.indptr)
    return scipy.sparse.csr_array(parts, shape=codes.shape)


def _strongest(unit: _Unit, distance: float) -> NDArray[np.int64]:
    """Return the two strongest latents of each row; -1 for those that are not above a distance.

    Of an empty row both are -2: it is compared with nothing.
    """
    counts = np.diff(unit.indptr)
    of_rows = np.repeat(np.arange(len(counts)), counts)
    order = np.lexsort((-np.abs(unit.data), of_rows))
    found = np.full((len(counts), 2), -1, np.int64)
    for place in range(2):
        has = np.flatnonzero(counts > place)
        entries = order[unit.indptr[has] + place]
        is_strong = np.abs(unit.data[entries]) > distance
        found[has[is_strong], place] = unit.indices[entries[is_strong]]
    found[counts == 0] = -2
    return found


def _active(columns: "scipy.sparse.csc_array[np.float64]", latent: int) -> NDArray[np.integer]:
    """Return the rows in which a latent is active."""
    start, stop = columns.indptr[latent : latent + 2].tolist()
    return np.asarray(columns.indices[start:stop])


class _Groups:
    """Rows that are joined pair by pair.

    Args:
        count: Row numbers.
    """

    def __init__(self, count: int) -> None:
        self._labels: NDArray[np.signedinteger] = np.arange(count)
        self._pairs: list[tuple[NDArray[np.intp], NDArray[np.intp]]] = []
        self._held, self._lock = 0, Lock()

    def join(self, some: NDArray[np.intp], others: NDArray[np.intp]) -> None:
        """Put pairs of rows into one group each."""
        is_pair = some != others
        with self._lock:
            self._pairs.append((some[is_pair], others[is_pair]))
            self._held += len(self._pairs[-1][0])
            if self._held > _EDGES:
                self._merge()

    def _merge(self) -> None:
        some, others = map(np.concatenate, zip(*self._pairs, strict=True))
        ends = (self._labels[some], self._labels[others])
        count = len(self._labels)
        graph = scipy.sparse.coo_array((np.ones(len(some), np.bool_), ends), shape=(count, count))
        self._labels = connected_components(graph, directed=False)[1][self._labels]
        self._pairs, self._held = [], 0

    def groups(self) -> list[list[int]]:
        """Return the groups of two or more rows, by their first row."""
        if self._pairs:
            self._merge()
        order = np.argsort(self._labels, kind="stable")
        sizes = np.bincount(self._labels)
        ends = np.cumsum(sizes)
        large = np.flatnonzero(sizes > 1)
        return sorted(order[ends[one] - sizes[one] : ends[one]].tolist() for one in large)
