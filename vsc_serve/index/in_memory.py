"""Codes that were read into memory, and are searched without an index."""

from typing import Any, final

import numpy as np
from numpy.typing import NDArray

from vsc_serve.codes import CodeFile, Codes
from vsc_serve.index.base import Searchable
from vsc_serve.index.exact import Nearest, search_many
from vsc_serve.index.metrics import Metric


@final
class InMemory(Searchable):
    """Codes of a file, searched exactly.

    Args:
        stored: The codes.
    """

    def __init__(self, stored: CodeFile) -> None:
        self._stored = stored

    @property
    def meta(self) -> dict[str, Any]:
        """Provenance of the codes."""
        return self._stored.meta

    @property
    def rows(self) -> Codes:
        """Codes by row number."""
        return self._stored.codes

    @property
    def count(self) -> int:
        """Rows that can be found."""
        return len(self._stored.ids)

    def numbers(self) -> NDArray[np.intp]:
        """Return the row numbers that can be found, ascending."""
        return np.arange(self.count)

    def id_of(self, row: int) -> str:
        """Return the id of a row."""
        return self._stored.ids[row]

    def row_of(self, name: str) -> int | None:
        """Return the first row of an id; None where there is none."""
        return self._stored.ids.index(name) if name in self._stored.ids else None

    def search(
        self,
        queries: Codes,
        *,
        top: int = 10,
        metric: Metric = "cosine",
        among: NDArray[np.bool_] | None = None,
    ) -> Nearest:
        """Find the rows most like each query; see `exact.search_many`."""
        if among is None:
            return search_many(self.rows, queries, top=top, metric=metric)
        kept = np.flatnonzero(among)
        found = search_many(self.rows[kept], queries, top=top, metric=metric)
        return Nearest(kept[found.rows], found.scores)

    def having(self, latent: int) -> NDArray[np.intp]:
        """Return the rows in which a latent is active, ascending."""
        entries = np.flatnonzero(self.rows.indices == latent)
        return np.searchsorted(self.rows.indptr, entries, side="right") - 1
