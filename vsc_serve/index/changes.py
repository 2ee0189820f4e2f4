"""Changes of an index of the engine `exact`, each of which counts wholly or not at all.

A change writes new segments and new lists of rows that are gone, and then a new index.json, which
is renamed over the old one: whoever is killed before that leaves the old index whole. What no
index.json names goes with the next change.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from vsc_serve.codes import CodeRows, Codes, stack_codes, take_rows
from vsc_serve.errors import InputError, UsageError
from vsc_serve.index.base import Change, Part
from vsc_serve.index.index_file import (
    FORMAT,
    IndexFile,
    clean,
    read_exact_file,
    write_index_file,
)
from vsc_serve.index.queries import check_rows, check_same_rows
from vsc_serve.index.segment import Removed, Segment, SegmentFacts, write_array, write_segment
from vsc_serve.index.stored import Stored
from vsc_serve.locks import exclusive

_SMALL: Final = 65_536
"""Rows of a segment below which it is merged with its neighbours."""
_MAX_SMALL: Final = 16
"""Small segments at the end of an index that are left alone."""
_MAX_GONE: Final = 0.5
"""Share of the rows of a segment that may be gone before it is written again."""


@contextmanager
def changing(path: Path) -> Iterator[Stored]:
    """Hold the lock of an index, and give it as it is now; what is left behind goes at the end."""
    with exclusive(path):
        try:
            index = Stored.open(path)
            clean(path, index.file)
            yield index
        except OSError as error:
            raise InputError(f"{path}: cannot be written ({error.strerror or error}).") from error
        finally:
            with suppress(OSError, InputError):
                clean(path, read_exact_file(path))


@dataclass
class Growth:
    """Change of an index while it is prepared: nothing of it counts before index.json names it."""

    folder: Path
    index: Stored | None = None
    """The index as it is; None for a new one."""
    change: Change = field(default_factory=Change)
    new: list[SegmentFacts] = field(default_factory=list)
    gone: list[int] = field(default_factory=list)
    """Rows of the index that go."""

    def __post_init__(self) -> None:
        self._known = self.index.id_rows() if self.index else {}
        self._seen: set[str] = set()
        self._next = self.index.file.next if self.index else 1
        self._first: tuple[Path, dict[str, Any]] | None = None

    def add(self, part: Part) -> None:
        """Write the rows of a part that are new or changed."""
        check_rows(part.path, part.stored)
        self._check_kind(part)
        self._check_ids(part)
        fresh = self._fresh(part)
        self._seen.update(part.stored.ids)
        if len(fresh):
            rows = take_rows(CodeRows(codes=part.stored.codes), fresh)
            self.new.append(
                write_segment(
                    self.folder / f"segment-{self.number():06}",
                    rows.codes,
                    [part.stored.ids[row] for row in fresh.tolist()],
                )
            )

    def number(self) -> int:
        """Return a number that no file or folder of the index has had."""
        self._next += 1
        return self._next - 1

    def _check_kind(self, part: Part) -> None:
        if self.index is not None:
            old = self.index.file
            other, facts = self.folder, {"latents": old.latents, **old.meta}
        else:
            own = {"latents": part.stored.codes.shape[1], **part.stored.meta}
            self._first = other, facts = self._first or (part.path, own)
        check_same_rows(part.path, part.stored, other, facts)

    def _check_ids(self, part: Part) -> None:
        seen = set(self._seen)
        for row, name in enumerate(part.stored.ids):
            if name in seen:
                raise InputError(
                    f"{part.path}: the id {name!r} (row {row}) is there more than once, and in an"
                    " index an id has one row. Encode again so that ids differ."
                )
            seen.add(name)

    def _fresh(self, part: Part) -> NDArray[np.int64]:
        """Return the rows of a part that the index does not have; note which of its rows go."""
        ids = part.stored.ids
        at = np.array([self._known.get(name, -1) for name in ids], np.int64)
        known = np.flatnonzero(at >= 0)
        is_fresh = at < 0
        if self.index is not None and len(known):
            stored = self.index[at[known]]
            is_fresh[known] = _differ(stored, part.stored.codes[known])
        replaced = at[is_fresh & (at >= 0)]
        self.gone += replaced.tolist()
        self.change = replace(
            self.change,
            added=self.change.added + int((at < 0).sum()),
            replaced=self.change.replaced + len(replaced),
            unchanged=self.change.unchanged + int((~is_fresh).sum()),
        )
        return np.flatnonzero(is_fresh)

    def remove_unseen(self) -> None:
        """Remove the ids that no part has had."""
        self._remove([name for name in self._known if name not in self._seen])

    def remove(self, ids: Iterable[str]) -> None:
        """Remove ids. Raises UsageError where one is not there."""
        names = list(ids)
        missing = [name for name in names if name not in self._known]
        if missing:
            more = f" and {len(missing) - 1:,} more" if len(missing) > 1 else ""
            raise UsageError(
                f"{self.folder}: no row has the id {missing[0]!r}{more}. Nothing was removed."
            )
        self._remove(names)

    def _remove(self, names: list[str]) -> None:
        self.gone += [self._known[name] for name in names]
        self.change = replace(self.change, removed=self.change.removed + len(names))

    def file(self) -> IndexFile:
        """Return the index.json of the change; lists of rows that are gone are written."""
        old = self.index.file if self.index else self._new_file()
        placed = self.index.placed() if self.index else ()
        kept = [self._without(segment, start) for segment, start in placed]
        segments = [*(facts for facts in kept if facts.live), *self.new]
        return replace(old, segments=segments, next=self._next)

    def _new_file(self) -> IndexFile:
        if self._first is None:
            raise UsageError("no codes to build an index from")
        meta = dict(self._first[1])
        latents = meta.pop("latents")
        return IndexFile(
            format=FORMAT, engine="exact", latents=latents, meta=meta, segments=[], next=1
        )

    def _without(self, segment: Segment, start: int) -> SegmentFacts:
        """Return a segment without the rows that go."""
        facts, gone = segment.facts, np.array(self.gone, np.int64) - start
        gone = gone[(gone >= 0) & (gone < facts.rows)]
        if not len(gone):
            return facts
        if segment.kept is not None:
            gone = np.union1d(gone, np.flatnonzero(~segment.kept))
        rows = np.unique(gone)
        name = f"removed-{self.number():06}.npy"
        written = write_array(self.folder / facts.name / name, [rows])
        return replace(facts, removed=Removed(file=name, rows=len(rows), facts=written))


def apply(growth: Growth) -> None:
    """Make a change count, and merge what has become small."""
    if growth.new or growth.gone:
        file = growth.file()
        write_index_file(growth.folder, file)
        _merge(growth.folder, file)


def _merge(path: Path, file: IndexFile) -> None:
    """Write again the segments of which most rows are gone, and small ones at the end as one."""
    small = 0
    while small < len(file.segments) and file.segments[-1 - small].rows < _SMALL:
        small += 1
    start = len(file.segments) - small if small > _MAX_SMALL else len(file.segments)
    runs = [
        slice(place, place + 1)
        for place, facts in enumerate(file.segments[:start])
        if facts.live < _MAX_GONE * facts.rows
    ]
    runs += [slice(start, None)] if start < len(file.segments) else []
    for run in reversed(runs):
        file = _rewrite(path, file, run)


def _rewrite(path: Path, file: IndexFile, run: slice) -> IndexFile:
    """Write a run of segments again as one, without the rows that are gone."""
    segments = [Segment(path, facts, file.latents) for facts in file.segments[run]]
    ids: list[str] = []
    parts = []
    for segment in segments:
        kept = np.ones(segment.facts.rows, np.bool_) if segment.kept is None else segment.kept
        names, rows = segment.all_ids(), np.flatnonzero(kept)
        parts.append(segment.take(rows))
        ids += [names[row] for row in rows.tolist()]
    folder = path / f"segment-{file.next:06}"
    written = write_segment(folder, stack_codes(parts, file.latents), ids)
    renewed = [*file.segments]
    renewed[run] = [written]
    file = replace(file, segments=renewed, next=file.next + 1)
    write_index_file(path, file)
    return file


def _differ(some: Codes, others: Codes) -> NDArray[np.bool_]:
    """Tell of each row whether it is another than its partner."""
    lengths, other_lengths = np.diff(some.indptr), np.diff(others.indptr)
    differ = lengths != other_lengths
    same = np.flatnonzero(~differ)
    one, other = some[same], others[same]
    is_other = (one.indices != other.indices) | (one.data != other.data)
    differ[same[np.repeat(np.arange(len(same)), lengths[same])[is_other]]] = True
    return np.asarray(differ)
