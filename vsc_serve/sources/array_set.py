"""Rows of several numpy files as one array, with the ids and labels that go with them."""

import hashlib
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from os.path import basename
from typing import Any, Final, NamedTuple, Never, TypeVar

import numpy as np
from numpy.typing import NDArray

from vsc_serve.errors import InputError, SourceUnavailable
from vsc_serve.sources.files import PlaceFile
from vsc_serve.sources.names import id_text
from vsc_serve.sources.npy import StoredArray
from vsc_serve.sources.retry import RETRY, RetryPolicy
from vsc_serve.sources.unique import unique_ids

BLOCK: Final = 4096
"""Rows or ids that are read at a time."""

Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class RowSource:
    """Row of an array."""

    id: str
    """Value of the file's `ids`, else the number of the row; see `open_arrays`."""
    row: int
    """Number of the row among those of all files."""
    path: str
    """Path or URL of its file."""
    number: int
    """Number of the row in its file."""

    @property
    def where(self) -> str:
        """Where it lies, for people."""
        return f"row {self.number} of {self.path}"

    def read(self, retry: RetryPolicy = RETRY) -> Never:
        """Raise TypeError: `ArraySet.read` gives the numbers."""
        raise TypeError("a row of an array has no encoded image")


class ArrayFile(NamedTuple):
    """Numpy file of an `ArraySet`."""

    name: str
    """Goes before the numbers of its rows: nothing, or the file's id and `/`."""
    file: PlaceFile
    rows: StoredArray
    ids: StoredArray | None
    labels: StoredArray | None

    @property
    def row_count(self) -> int:
        """Rows of the file."""
        return self.rows.shape[0]

    @property
    def kind(self) -> tuple[object, ...]:
        """What the rows of all files must have in common."""
        return (self.rows.dtype, self.rows.shape[1:])

    def names(self) -> Iterator[str]:
        """Give the ids of the rows."""
        beside = self.name or f"{basename(self.file.place)}/"  # noqa: PTH119
        for start in range(0, self.row_count, BLOCK):
            numbers = range(start, min(start + BLOCK, self.row_count))
            if self.ids is None:
                yield from (f"{self.name}{number}" for number in numbers)
                continue
            for text, number in zip(self._texts(self.ids, numbers), numbers, strict=True):
                yield text or f"{beside}{number}"

    def _texts(self, ids: StoredArray, numbers: range) -> list[str | None]:
        values = about(self.file.place, partial(ids.read, numbers.start, len(numbers)))
        try:
            return [id_text(value) for value in values.tolist()]
        except ValueError as error:  # no characters
            reason = f"{self.file.place}: ids that are no text ({error})"
            raise InputError(reason, kind="broken", row=numbers.start) from error


class ArraySet:
    """Rows of one or several numpy files, in their order, read when they are wanted.

    Memory holds a block of rows, one file is open at a time, and a read that fails because the disk
    or the store cannot be reached is tried again. Of arrays in Fortran order, all is in memory.

    Args:
        files: The files, alike and not empty.
        has_unique_ids: Whether ids cannot repeat.
    """

    def __init__(self, files: Sequence[ArrayFile], *, has_unique_ids: bool) -> None:
        self._files = files
        self._has_unique_ids = has_unique_ids
        self._ends = list(accumulate(file.row_count for file in files))
        self.row_count = self._ends[-1]
        """Rows of all files."""
        rows = files[0].rows
        # Grey images may lie without an axis of channels.
        channels = (1,) if rows.dtype == np.uint8 and len(rows.shape) == 3 else ()
        self.row_shape: tuple[int, ...] = (*rows.shape[1:], *channels)
        """Shape of a row: (height, width, channels) or (dimensions,)."""
        self.dtype = rows.dtype
        """uint8 for images; the vectors' own type, in the byte order of the machine."""
        self.labels, self.label_names = _read_labels(files)
        """Class of each row, int64, None where a file has none; and the names of classes 0, 1, ...
        where they are text."""

    @property
    def is_images(self) -> bool:
        """Whether rows are images, and not vectors."""
        return self.dtype == np.uint8

    @property
    def is_mappable(self) -> bool:
        """Whether the rows are those of one `.npy` file in the byte order of the machine."""
        return len(self._files) == 1 and self._files[0].rows.is_plain

    def sources(self) -> Iterator[RowSource]:
        """Give the rows as sources, in order.

        Raises:
            UsageError: Two have the same id; while they come.
        """
        return (
            self._sources() if self._has_unique_ids else unique_ids(self._sources(), self._sources)
        )

    def _sources(self) -> Iterator[RowSource]:
        row = 0
        for file in self._files:
            for number, name in enumerate(file.names()):
                yield RowSource(name, row, file.file.place, number)
                row += 1

    def read(self, start: int, count: int) -> NDArray[Any]:
        """Return rows, in the files' own type.

        Args:
            start: First row, from 0.
            count: Rows; fewer come only at the end.

        Raises:
            InputError: A file has changed.
            SourceUnavailable: A file cannot be reached.
        """
        parts = []
        count = max(min(count, self.row_count - start), 0)
        while count:
            place = bisect_right(self._ends, start)
            file = self._files[place]
            first = start - (self._ends[place] - file.row_count)
            rows = about(file.file.place, partial(file.rows.read, first, count))
            parts.append(rows)
            start, count = start + len(rows), count - len(rows)
            if first + len(rows) == file.row_count:
                file.file.release()
        found = parts[0] if len(parts) == 1 else np.concatenate([self._none(), *parts])
        return found.reshape(-1, *self.row_shape)

    def _none(self) -> NDArray[Any]:
        return np.empty((0, *self._files[0].rows.shape[1:]), self.dtype)

    def signature(self) -> str:
        """Return a digest of the names, sizes and times of all files: it changes when they do."""
        digest = hashlib.sha256()
        for file in self._files:
            digest.update(f"{file.file.place}\0{file.file.version}\0".encode("utf-8", "replace"))
        return digest.hexdigest()

    def close(self) -> None:
        """Close the files."""
        for file in self._files:
            file.file.close()


def _read_labels(
    files: Sequence[ArrayFile],
) -> tuple[NDArray[np.int64] | None, tuple[str, ...] | None]:
    """Return the class of each row, and the names of the classes where they are text."""
    parts = [found for file in files if (found := _labels_of(file)) is not None]
    if len(parts) < len(files):
        return None, None
    if len({part.dtype.kind for part in parts}) > 1:
        raise InputError(
            f"{files[0].file.place}: labels are text in some files and numbers in others."
        )
    labels = np.concatenate(parts)
    if labels.dtype.kind == "i":
        return labels, None
    names, classes = np.unique(labels, return_inverse=True)
    return classes.astype(np.int64), tuple(names.tolist())


def _labels_of(file: ArrayFile) -> NDArray[Any] | None:
    """Return the labels of one file as whole numbers, or as text."""
    if file.labels is None:
        return None
    found = about(file.file.place, partial(file.labels.read, 0, file.row_count))
    file.file.release()
    if found.dtype.kind in "US":
        return np.array([id_text(label) or "" for label in found.tolist()])
    is_whole = np.isfinite(found) & (found == np.trunc(found))
    if not is_whole.all():
        row = int(np.flatnonzero(~is_whole)[0])
        raise InputError(
            f"{file.file.place}: the label of row {row} is {found[row]}, no whole number.", row=row
        )
    return found.astype(np.int64)


def about(place: str, action: Callable[[], Result]) -> Result:
    """Do something with a file; its name goes before the reason of an InputError."""
    try:
        return action()
    except SourceUnavailable:
        raise
    except InputError as error:
        raise InputError(f"{place}: {error}", kind=error.kind) from error
