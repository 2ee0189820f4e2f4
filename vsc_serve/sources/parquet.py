"""Images in a column of a Parquet file, as Hugging Face datasets write them.

A row is called by its id column, as it is, wherever the table lies; else, or with `ids="absolute"`,
by its number. A row whose id is null or empty is called by the table and its number, `t.parquet/7`.
"""

import posixpath
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import count, islice
from os.path import basename, dirname, join, realpath
from typing import Any, Final, TypeVar

from vsc_serve.errors import InputError, SourceUnavailable, UsageError, VscError
from vsc_serve.sources.base import MAX_BYTES, Source, UnreadableSource, read_file
from vsc_serve.sources.files import PlaceFile
from vsc_serve.sources.names import Choice, Naming
from vsc_serve.sources.open_files import drop, keep_open
from vsc_serve.sources.parquet_columns import (
    Cell,
    ImageColumn,
    find_id_column,
    find_image_column,
    read_cell,
    read_ids,
)
from vsc_serve.sources.retry import RETRY, RetryPolicy
from vsc_serve.sources.roots import Root, find_root
from vsc_serve.sources.stores import fetch, is_url

_BATCH: Final = 32
"""Rows that are in memory at a time in each process."""
_ID_BATCH: Final = 4096
_BUFFER: Final = 2**20

Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class ParquetSource:
    """Image in a row of a Parquet file."""

    id: str
    """Value of the id column, else the number of the row in the file."""
    path: str
    """Path or URL of the file."""
    number: int
    """Number of the row in the file."""
    row_group: int
    row: int
    """Number of the row in its group."""
    column: str
    item: int = -1
    """Place in the row's list of images, -1 where the row has one image."""

    @property
    def where(self) -> str:
        """Where it lies, for people."""
        return f"row {self.number} of {self.path}"

    def read(self, retry: RetryPolicy = RETRY) -> bytes:
        """Return the image's bytes; see `Source.read`."""
        try:
            reader = keep_open(self.path, _Reader, retry)
            cell = reader.read(self)
        except VscError:
            drop(self.path, _Reader)
            raise
        if cell.content is not None:
            return cell.content
        if cell.path is None:
            raise InputError("no image in this row (null)", kind="empty")
        return _read_beside(self.path, cell.path, retry, reader.root)


def _read_beside(table: str, path: str, retry: RetryPolicy, root: Root | None) -> bytes:
    """Read the file that a row names in place of bytes, if it lies below the table's folder."""
    try:
        if is_url(table):
            return fetch(_below_url(table, path), MAX_BYTES, retry)
        return read_file(_below_folder(table, path), retry=retry, root=root)
    except SourceUnavailable:
        raise
    except InputError as error:
        raise InputError(f"no bytes in this row, and {path}: {error}", kind=error.kind) from error


def _below_url(table: str, path: str) -> str:
    inside = posixpath.normpath(path)
    if is_url(path) or inside.startswith(("/", "..")):
        raise InputError("does not lie below the folder of its table", kind="unreadable")
    return f"{table.rpartition('/')[0]}/{inside}"


def _below_folder(table: str, path: str) -> str:
    folder = realpath(dirname(table) or ".")  # noqa: PTH120  # strings all the way
    with suppress(ValueError):  # a zero byte inside the name
        place = realpath(join(folder, path))  # noqa: PTH118
        if place.startswith(f"{folder.rstrip('/')}/"):
            return place
    raise InputError("does not lie below the folder of its table", kind="unreadable")


class _Reader:
    """One open file, read forward in small batches; going back starts the row group again."""

    def __init__(self, place: str, retry: RetryPolicy) -> None:
        self.root = None if is_url(place) else find_root(dirname(place) or ".")  # noqa: PTH120
        self._file = PlaceFile(place, retry, was_there=True)
        self._table = _open_table(self._file)
        self._at: tuple[int, str] | None = None
        self._batches: Iterator[Any] = iter(())
        self._batch: Any = None
        self._start = 0

    def close(self) -> None:
        """Close both."""
        self._table.close()
        self._file.close()

    def read(self, source: ParquetSource) -> Cell:
        """Return what the table says of an image."""
        return _arrow(partial(self._read, source))

    def _read(self, source: ParquetSource) -> Cell:
        at = (source.row_group, source.column)
        if self._at != at or source.row < self._start:
            self._at, self._start, self._batch = at, 0, None
            self._batches = self._table.iter_batches(
                batch_size=_BATCH, row_groups=[source.row_group], columns=[source.column]
            )
        while self._batch is None or source.row >= self._start + self._batch.num_rows:
            self._start += 0 if self._batch is None else self._batch.num_rows
            self._batch = next(self._batches, None)
            if self._batch is None:
                raise InputError("its row group ends before this row", kind="broken")
        value = self._batch.column(source.column)[source.row - self._start]
        return read_cell(value if source.item < 0 else value.values[source.item])


def search_parquet(file: PlaceFile, naming: Naming, choice: Choice) -> Iterator[Source]:
    """Give the images of a Parquet file in the order of its rows.

    Damage ends the search with a source that says so; what came before it stays.

    Args:
        file: The table.
        naming: How rows are called.
        choice: What is left out.

    Raises:
        NoImages: It has no column of images; before the first source.
        UsageError: pyarrow is not installed.
    """
    import_pyarrow(file.place)
    table = _open_table(file)
    column = _arrow(lambda: find_image_column(table.schema_arrow))
    _check_counts(table.metadata)
    try:
        for source in _rows(file.place, table, column, naming):
            if choice.excludes_any(source.id):
                choice.skip(source.id, "excluded")
            else:
                yield source
    except SourceUnavailable:
        raise
    except InputError as error:
        name = naming.id_of_archive(file.place)
        yield UnreadableSource(name, f"broken table, the rest is lost: {error}", error.kind)


def _rows(place: str, table: Any, column: ImageColumn, naming: Naming) -> Iterator[Source]:
    numbers = count()
    for group in range(table.num_row_groups):
        names = _names(place, table, group, naming, numbers)
        lengths = _list_lengths(table, group, column) if column.holds_lists else None
        for row, (number, name) in enumerate(names):
            source = ParquetSource(name, place, number, group, row, column.name)
            yield from [source] if lengths is None else _items(source, lengths)


def _items(source: ParquetSource, lengths: Iterator[int | None]) -> Iterator[Source]:
    """Give the images in the list of a row."""
    where = (source.path, source.number, source.row_group, source.row, source.column)
    length = next(lengths, None)
    if not length:
        yield UnreadableSource(source.id, "no image in this row (an empty list)", "empty")
    for item in range(length or 0):
        yield ParquetSource(f"{source.id}/{item}", *where, item)


def _names(
    place: str, table: Any, group: int, naming: Naming, numbers: Iterator[int]
) -> Iterator[tuple[int, str]]:
    """Give the number and the name of each row of a group."""
    id_column = None if naming.ids == "absolute" else find_id_column(table.schema_arrow)
    row_count = int(_arrow(lambda: table.metadata.row_group(group).num_rows))
    if id_column is None:
        yield from ((number, naming.id_of(str(number))) for number in islice(numbers, row_count))
        return
    found = 0
    beside = naming.prefix.rstrip("/") or basename(place)  # noqa: PTH119
    for batch in _batches(table, group, id_column, _ID_BATCH):
        for name in _arrow(partial(read_ids, batch.column(id_column))):
            number = next(numbers)
            found += 1
            yield number, name or f"{beside}/{number}"
    if found != row_count:
        raise InputError(f"{found} ids for {row_count} rows", kind="broken")


def _check_counts(metadata: Any) -> None:
    """Raise InputError where a table and its row groups count different rows.

    The columns of a group are not asked: Arrow ends the process where their part is damaged.
    """
    groups = range(metadata.num_row_groups)
    counts = [int(_arrow(partial(metadata.row_group, group)).num_rows) for group in groups]
    if sum(counts) != metadata.num_rows or min(counts, default=0) < 0:
        raise InputError(
            f"it counts {metadata.num_rows} rows, its row groups {sum(counts)}", kind="broken"
        )


def _list_lengths(table: Any, group: int, column: ImageColumn) -> Iterator[int | None]:
    """Give the number of images in each row, from the smallest part of the column that tells it."""
    from pyarrow import compute

    schema = table.schema
    paths = [schema.column(place).path for place in range(len(schema))]
    parts = [path for path in paths if path.startswith(f"{column.name}.")]
    smallest = min(parts, key=lambda path: path.endswith(".bytes"))
    for batch in _batches(table, group, smallest, _BATCH):
        yield from _arrow(lambda: compute.list_value_length(batch.column(0)).to_pylist())  # noqa: B023  # called at once


def _batches(table: Any, group: int, column: str, size: int) -> Iterator[Any]:
    batches = _arrow(
        lambda: table.iter_batches(row_groups=[group], columns=[column], batch_size=size)
    )
    while (batch := _arrow(lambda: next(batches, None))) is not None:
        yield batch


def _arrow(action: Callable[[], Result]) -> Result:
    """Call into Arrow; whatever it raises becomes an InputError."""
    try:
        return action()
    except VscError:
        raise
    except Exception as error:  # it raises errors of many families on damaged bytes
        text = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"unreadable in its table: {text[:300]}", kind="broken") from error


def import_pyarrow(place: str) -> Any:
    """Return `pyarrow.parquet`. Raises UsageError where it is not installed."""
    try:
        from pyarrow import parquet
    except ImportError as error:
        raise UsageError(f"{place}: needs pyarrow: pip install 'vsc-serve[parquet]'") from error
    return parquet


def _open_table(file: PlaceFile) -> Any:
    """Open a Parquet file so that reading it takes no more memory than a batch and a page."""
    parquet = import_pyarrow(file.place)
    return _arrow(
        lambda: parquet.ParquetFile(
            file, pre_buffer=False, buffer_size=_BUFFER, page_checksum_verification=True
        )
    )
