"""Engine `exact`: an inverted file in a folder that is mapped into memory, and always right."""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self, final

import numpy as np
from numpy.typing import NDArray

from vsc_serve.atomic import atomic_folder
from vsc_serve.codes import Codes
from vsc_serve.convert.limits import Limits
from vsc_serve.index.base import Change, Engine, Part
from vsc_serve.index.changes import Growth, apply, changing
from vsc_serve.index.estimate import cost
from vsc_serve.index.exact import Nearest, check_search
from vsc_serve.index.index_file import FORMAT, INDEX_FOLDER, write_index_file
from vsc_serve.index.metrics import Metric
from vsc_serve.index.rows import Rows
from vsc_serve.index.search_blocks import RowBlock, search_blocks
from vsc_serve.index.stored import Stored
from vsc_serve.locks import exclusive
from vsc_serve.outputs import FolderKind


@final
class ExactIndex(Engine):
    """Index of the engine `exact`.

    Args:
        stored: Its segments.
    """

    name: ClassVar[str] = "exact"
    limits: ClassVar[Limits] = Limits(is_signed=True, has_unique_ids=True, has_text_ids=False)
    kind: ClassVar[FolderKind] = INDEX_FOLDER

    def __init__(self, stored: Stored) -> None:
        self._stored = stored

    @classmethod
    def build(cls, parts: Iterable[Part], out: Path) -> Self:
        """Write a new index; see `Engine.build`.

        Raises:
            InputError: Codes that cannot be searched, an id that is there twice, or a folder that
                cannot be written.
            UsageError: Codes of two models; or another run is writing there.
        """
        with exclusive(out), atomic_folder(out, INDEX_FOLDER) as folder:
            growth = Growth(folder)
            for part in parts:
                growth.add(part)
            write_index_file(folder, growth.file())
        return cls.open(out)

    @classmethod
    def open(cls, path: Path) -> Self:
        """Open an index; see `Engine.open`."""
        return cls(Stored.open(path))

    @property
    def meta(self) -> dict[str, Any]:
        """Provenance of the codes."""
        return self._stored.file.meta

    @property
    def rows(self) -> Rows:
        """Codes by row number."""
        return self._stored

    @property
    def count(self) -> int:
        """Rows that can be found."""
        return sum(segment.facts.live for segment in self._stored.segments)

    def numbers(self) -> NDArray[np.intp]:
        """Return the row numbers that can be found, ascending."""
        return self._stored.numbers()

    def id_of(self, row: int) -> str:
        """Return the id of a row."""
        return self._stored.id_of(row)

    def row_of(self, name: str) -> int | None:
        """Return the row of an id; None where there is none."""
        return self._stored.row_of(name)

    def having(self, latent: int) -> NDArray[np.intp]:
        """Return the rows in which a latent is active, ascending."""
        return self._stored.having(latent)

    def search(
        self,
        queries: Codes,
        *,
        top: int = 10,
        metric: Metric = "cosine",
        among: NDArray[np.bool_] | None = None,
    ) -> Nearest:
        """Find the rows most like each query: what `exact.search_many` finds, bit for bit.

        Equal scores are in row order, and rows that share nothing with the query are ranked by
        their score as all others.

        Raises:
            InputError: Queries have another number of latents, or values that are not finite; or
                the index is damaged.
            UsageError: `top` or `metric` makes no sense.
        """
        check_search(queries, self._stored.file.latents, top, metric)
        return search_blocks(list(self._blocks(among)), queries, top=top, metric=metric)

    def _blocks(self, among: NDArray[np.bool_] | None) -> Iterator[RowBlock]:
        for segment, start in self._stored.placed():
            kept = segment.kept
            if among is not None:
                wanted = among[start : start + segment.facts.rows]
                kept = wanted if kept is None else wanted & kept
            for number in range(len(segment.postings.bounds)):
                yield RowBlock(segment, number, start, kept)

    def add(self, parts: Iterable[Part], *, update: bool = False) -> Change:
        """Add rows; see `Engine.add`. Nothing is added where one of the parts cannot be.

        Raises:
            InputError: As `build`.
            UsageError: Codes of another model, or made with other options; or another run is
                writing there.
        """
        path = self._stored.path
        with changing(path) as stored:
            growth = Growth(path, stored)
            for part in parts:
                growth.add(part)
            if update:
                growth.remove_unseen()
            apply(growth)
        self._stored = Stored.open(path)
        return growth.change

    def remove(self, ids: Sequence[str]) -> Change:
        """Remove rows by their ids; see `Engine.remove`."""
        path = self._stored.path
        with changing(path) as stored:
            growth = Growth(path, stored)
            growth.remove(dict.fromkeys(ids))
            apply(growth)
        self._stored = Stored.open(path)
        return growth.change

    def facts(self) -> dict[str, Any]:
        """Return what a person or a program wants to know: see docs/search.md."""
        firing, rows = self._stored.firing(), self.count
        files = [one for part in self._stored.file.segments for one in part.files.values()]
        meta = {name: self.meta.get(name) for name in ("model", "model_digest", "view", "tau")}
        return {
            "engine": self.name,
            "format": FORMAT,
            **meta,
            "rows": rows,
            "removed": self._stored.shape[0] - rows,
            "segments": len(self._stored.segments),
            "latents": self._stored.file.latents,
            **cost(firing, rows),
            "bytes": sum(one.bytes for one in files),
        }

    def verify(self) -> None:
        """Compare all files with their digests; see `Engine.verify`."""
        for segment in self._stored.segments:
            segment.verify()
