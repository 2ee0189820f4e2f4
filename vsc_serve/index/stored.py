"""Segments of an index that is open, as one run of rows."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final, Self

import numpy as np
from numpy.typing import NDArray

from vsc_serve.codes import CodeRows, Codes, stack_codes, take_rows
from vsc_serve.errors import InputError
from vsc_serve.index.base import damaged
from vsc_serve.index.index_file import IndexFile, read_exact_file
from vsc_serve.index.segment import Segment

_TRIES: Final = 3
"""Times that an index is opened that is changed meanwhile."""


class Stored:
    """Segments of an index; rows are numbered through all of them, those that are gone too.

    Args:
        path: Folder of the index.
        file: Content of its index.json.
        segments: What it names, open.
    """

    def __init__(self, path: Path, file: IndexFile, segments: list[Segment]) -> None:
        self.path, self.file, self.segments = path, file, segments
        lengths = [segment.facts.rows for segment in segments]
        self.starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)

    @classmethod
    def open(cls, path: Path) -> Self:
        """Open all segments. Raises InputError."""
        for left in reversed(range(_TRIES)):
            file = read_exact_file(path)
            try:
                return cls(path, file, [Segment(path, one, file.latents) for one in file.segments])
            except FileNotFoundError as error:
                if not left or read_exact_file(path) == file:
                    raise InputError(damaged(Path(error.filename), "missing")) from error
            except OSError as error:
                raise InputError(f"{path}: cannot be read ({error.strerror or error}).") from error
        raise AssertionError

    @property
    def shape(self) -> tuple[int, int]:
        """Row numbers and latents."""
        return int(self.starts[-1]), self.file.latents

    def placed(self) -> Iterator[tuple[Segment, int]]:
        """Give each segment with its first row number."""
        yield from zip(self.segments, self.starts.tolist(), strict=False)

    def __getitem__(self, rows: Any, /) -> Codes:
        """Return the codes of some row numbers."""
        wanted = np.atleast_1d(np.asarray(rows, np.int64))
        homes = np.searchsorted(self.starts, wanted, side="right") - 1
        order = np.argsort(homes, kind="stable")
        parts = [
            self.segments[home].take(wanted[homes == home] - self.starts[home])
            for home in np.unique(homes).tolist()
        ]
        stacked = stack_codes(parts, self.shape[1])
        back = np.empty(len(order), np.int64)
        back[order] = np.arange(len(order))
        return stacked if len(parts) < 2 else take_rows(CodeRows(codes=stacked), back).codes

    def numbers(self) -> NDArray[np.intp]:
        """Return the row numbers that are not gone, ascending."""
        found = [np.empty(0, np.intp)]
        for segment, start in self.placed():
            rows = np.arange(segment.facts.rows)
            found.append((rows if segment.kept is None else rows[segment.kept]) + start)
        return np.concatenate(found)

    def id_of(self, row: int) -> str:
        """Return the id of a row."""
        number = int(np.searchsorted(self.starts, row, side="right")) - 1
        return self.segments[number].id_of(row - int(self.starts[number]))

    def row_of(self, name: str) -> int | None:
        """Return the row of an id; None where there is none."""
        for segment, start in self.placed():
            for row in segment.rows_of(name):
                if segment.kept is None or segment.kept[row]:
                    return start + row
        return None

    def id_rows(self) -> dict[str, int]:
        """Return the row of each id."""
        found: dict[str, int] = {}
        for segment, start in self.placed():
            ids, kept = segment.all_ids(), segment.kept
            rows = range(len(ids)) if kept is None else np.flatnonzero(kept).tolist()
            found |= {ids[row]: start + row for row in rows}
        return found

    def having(self, latent: int) -> NDArray[np.intp]:
        """Return the rows in which a latent is active, ascending."""
        found = [np.empty(0, np.intp)]
        for segment, start in self.placed():
            rows = segment.postings.having(latent)
            found.append((rows if segment.kept is None else rows[segment.kept[rows]]) + start)
        return np.concatenate(found)

    def firing(self) -> NDArray[np.int64]:
        """Return in how many rows each latent is active."""
        total = np.zeros(self.file.latents, np.int64)
        for segment in self.segments:
            rows = np.arange(segment.facts.rows)
            live = rows if segment.kept is None else rows[segment.kept]
            total += np.bincount(segment.take(live).indices, minlength=len(total))
        return total
