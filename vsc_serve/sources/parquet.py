"""Pictures in a column of a Parquet file, as Hugging Face datasets write them.

The column: one of bytes, or of structs with a field `bytes`. With several, the first of `image`,
`img`, `picture`, `jpg`, `png`, `image_bytes`, `bytes`. The id: the first column of text or whole
numbers among `id`, `image_id`, `__key__`, `key`, `file_name`, `filename`, taken as it is wherever
the table lies; without one, or with `--ids absolute`, the row's number.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

from vsc_serve.errors import InputError, UsageError
from vsc_serve.sources.base import Source, UnreadableSource, check_size, is_machine_failure
from vsc_serve.sources.names import Choice, Naming
from vsc_serve.sources.places import drop, keep_open, open_binary

_IMAGE_COLUMNS: Final = ("image", "img", "picture", "jpg", "png", "image_bytes", "bytes")
_ID_COLUMNS: Final = ("id", "image_id", "__key__", "key", "file_name", "filename")
_BATCH: Final = 32
"""Rows that are in memory at a time in each process."""


@dataclass(frozen=True, slots=True)
class ParquetSource:
    """A picture in a row of a Parquet file."""

    id: str
    """What the id column says, else the number of the row in the file."""
    path: str
    """Path or URL of the file."""
    row_group: int
    row: int
    """Number of the row in its group."""
    column: str

    def read(self) -> bytes:
        """Return the picture's bytes. Raises InputError with the reason."""
        try:
            content = keep_open(self.path, _Reader).read(self.row_group, self.row, self.column)
        except (OSError, ValueError, StopIteration) as error:
            drop(self.path, _Reader)
            if is_machine_failure(error):
                raise
            raise InputError(f"unreadable in its table: {error}") from error
        if content is None:
            raise InputError("no picture in this row (null)")
        return content


class _Reader:
    """One open file, read forward in small batches; going back starts the row group again."""

    def __init__(self, place: str) -> None:
        self._place = place
        self._file, self._table = _open_table(place)
        self._at: tuple[int, str] | None = None
        self._batches: Iterator[Any] = iter(())
        self._batch: Any = None
        self._start = 0

    def close(self) -> None:
        """Close both."""
        self._table.close()
        self._file.close()

    def read(self, row_group: int, row: int, column: str) -> bytes | None:
        """Return the bytes of one row, or None for null."""
        if self._at != (row_group, column) or row < self._start:
            self._at, self._start, self._batch = (row_group, column), 0, None
            self._batches = self._table.iter_batches(
                batch_size=_BATCH, row_groups=[row_group], columns=[column]
            )
        while self._batch is None or row >= self._start + self._batch.num_rows:
            self._start += 0 if self._batch is None else self._batch.num_rows
            self._batch = next(self._batches)
        value = self._batch.column(0)[row - self._start]
        return _content(value)


def _content(value: Any) -> bytes | None:
    """Return the bytes in a cell: of a column of bytes, or of structs with a field `bytes`."""
    if value.is_valid and hasattr(value, "keys"):
        value = value["bytes"]
    if not value.is_valid:
        return None
    check_size(value.as_buffer().size)
    return bytes(value.as_buffer())


def search_parquet(place: str, naming: Naming, choice: Choice) -> Iterator[Source]:
    """Give the pictures of a Parquet file in the order of its rows.

    Args:
        place: Path or URL of the file.
        naming: How rows are called.
        choice: What is left out.

    Raises:
        UsageError: pyarrow is not installed.
    """
    import_pyarrow(place)
    try:
        file, table = _open_table(place)
        try:
            yield from _rows(place, table, naming, choice)
        finally:
            table.close()
            file.close()
    except (InputError, OSError, ValueError) as error:
        yield UnreadableSource(naming.id_of_archive(place), str(error))


def _rows(place: str, table: Any, naming: Naming, choice: Choice) -> Iterator[Source]:
    column = _image_column(table.schema_arrow)
    id_column = None if naming.ids == "absolute" else _id_column(table.schema_arrow)
    number = 0
    for row_group in range(table.num_row_groups):
        for row, name in enumerate(_names(table, row_group, id_column, number)):
            number += 1
            called = naming.id_of(name) if id_column is None else name
            if choice.excludes_any(called):
                choice.skip(called, "excluded")
            else:
                yield ParquetSource(called, place, row_group, row, column)


def _names(table: Any, row_group: int, id_column: str | None, first: int) -> Iterator[str]:
    """Give a name for each row of a group: from its id column, or by number."""
    if id_column is None:
        count = table.metadata.row_group(row_group).num_rows
        yield from (str(number) for number in range(first, first + count))
        return
    for batch in table.iter_batches(row_groups=[row_group], columns=[id_column], batch_size=4096):
        yield from (str(value) for value in batch.column(0).to_pylist())


def _image_column(schema: Any) -> str:
    """Choose the column that holds pictures. Raises InputError."""
    found = [field.name for field in schema if _holds_bytes(field.type)]
    known = [name for name in _IMAGE_COLUMNS if name in found]
    chosen = known[:1] or (found if len(found) == 1 else [])
    if not chosen:
        columns = ", ".join(f"{field.name} {field.type}" for field in schema)
        raise InputError(
            "no column of pictures: expected one of bytes or of {bytes, path}, or one named"
            f" {_IMAGE_COLUMNS[0]}; found {columns}"
        )
    return str(chosen[0])


def _holds_bytes(kind: Any) -> bool:
    from pyarrow import types

    if types.is_struct(kind):
        place = kind.get_field_index("bytes")
        return place >= 0 and _holds_bytes(kind.field(place).type)
    return bool(types.is_binary(kind) or types.is_large_binary(kind))


def _id_column(schema: Any) -> str | None:
    from pyarrow import types

    for name in _ID_COLUMNS:
        place = schema.get_field_index(name)
        if place >= 0:
            kind = schema.field(place).type
            if types.is_string(kind) or types.is_large_string(kind) or types.is_integer(kind):
                return name
    return None


def import_pyarrow(place: str) -> Any:
    """Return `pyarrow.parquet`. Raises UsageError where it is not installed."""
    try:
        from pyarrow import parquet
    except ImportError as error:
        raise UsageError(f"{place}: needs pyarrow: pip install 'vsc-serve[parquet]'") from error
    return parquet


def _open_table(place: str) -> tuple[Any, Any]:
    """Open a Parquet file so that reading it takes no more memory than a batch and a page."""
    file = open_binary(place)
    try:
        return file, import_pyarrow(place).ParquetFile(file, pre_buffer=False, buffer_size=1 << 20)
    except BaseException:
        file.close()
        raise
