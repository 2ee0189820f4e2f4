"""Columns of a Parquet file: which holds images, which ids, and what a cell of each says."""

from typing import Any, Final, NamedTuple

from vsc_serve.errors import InputError
from vsc_serve.sources.base import check_size
from vsc_serve.sources.names import id_text

IMAGE_COLUMNS: Final = ("image", "img", "picture", "images", "jpg", "png", "image_bytes", "bytes")
ID_COLUMNS: Final = ("id", "image_id", "__key__", "key", "file_name", "filename")


class NoImages(InputError):
    """A without a column of images."""


class ImageColumn(NamedTuple):
    """Column that holds images."""

    name: str
    holds_lists: bool
    """Whether a row has a list of images."""


class Cell(NamedTuple):
    """Cells of a table that belong to one image."""

    content: bytes | None
    path: str | None
    """Where it lies, relative to the table, as Hugging Face datasets say it without decoding."""


def find_image_column(schema: Any) -> ImageColumn:
    """Choose the column that holds images.

    The first with one of the usual names; else the only one of bytes or of {bytes, path}; else the
    only one of a rarer kind: bytes of one length, numbers from 0 to 255, lists of images.

    Raises:
        NoImages: There is none, or several could be meant.
    """
    names = [field.name for field in schema]
    plain = [field.name for field in schema if _holds_images(field.type)]
    rare = [field.name for field in schema if _may_hold_images(field.type)]
    known = [name for name in IMAGE_COLUMNS if name in plain or name in rare]
    likely = [found for group in (plain, rare) if (found := _without_ids(group))]
    chosen = known[:1] or (likely[0] if likely and len(likely[0]) == 1 else [])
    if not chosen or names.count(chosen[0]) > 1:
        columns = ", ".join(f"{field.name} {field.type}" for field in schema)
        raise NoImages(
            "no column of images: expected one of bytes or of {bytes, path}, or one named"
            f" {IMAGE_COLUMNS[0]}; found {columns or 'none'}",
            kind="unusable",
        )
    return ImageColumn(chosen[0], _is_list_of_images(schema.field(chosen[0]).type))


def _without_ids(names: list[str]) -> list[str]:
    return [name for name in names if name not in ID_COLUMNS]


def _holds_images(kind: Any) -> bool:
    from pyarrow import types

    kind = _inner(kind)
    if types.is_struct(kind):
        place = kind.get_field_index("bytes")
        return place >= 0 and (_is_bytes(field := kind.field(place).type) or _is_numbers(field))
    return _is_bytes(kind)


def _may_hold_images(kind: Any) -> bool:
    from pyarrow import types

    kind = _inner(kind)
    return types.is_fixed_size_binary(kind) or _is_numbers(kind) or _is_list_of_images(kind)


def _is_bytes(kind: Any) -> bool:
    from pyarrow import types

    kind = _inner(kind)
    tests = (types.is_binary, types.is_large_binary, types.is_binary_view)
    return any(test(kind) for test in tests)


def _is_numbers(kind: Any) -> bool:
    from pyarrow import types

    return _is_list(kind) and bool(types.is_uint8(kind.value_type))


def _is_list_of_images(kind: Any) -> bool:
    kind = _inner(kind)
    return _is_list(kind) and (_holds_images(kind.value_type) or _is_numbers(kind.value_type))


def _is_list(kind: Any) -> bool:
    from pyarrow import types

    return bool(types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind))


def _inner(kind: Any) -> Any:
    """Return the type behind a dictionary (categories) or an extension."""
    import pyarrow

    while isinstance(kind, pyarrow.BaseExtensionType | pyarrow.DictionaryType):
        is_extension = isinstance(kind, pyarrow.BaseExtensionType)
        kind = kind.storage_type if is_extension else kind.value_type
    return kind


def find_id_column(schema: Any) -> str | None:
    """Choose the column of text, bytes or numbers that holds ids, None without one."""
    names = [field.name for field in schema]
    for name in ID_COLUMNS:
        if names.count(name) == 1 and _holds_ids(schema.field(name).type):
            return name
    return None


def _holds_ids(kind: Any) -> bool:
    from pyarrow import types

    kind = _inner(kind)
    tests = (
        *(types.is_string, types.is_large_string, types.is_string_view, types.is_binary),
        *(types.is_large_binary, types.is_binary_view, types.is_fixed_size_binary),
        *(types.is_integer, types.is_floating, types.is_decimal),
    )
    return any(test(kind) for test in tests)


def read_ids(column: Any) -> list[str | None]:
    """Return the ids in a column, None where a row has none."""
    import pyarrow

    if isinstance(column.type, pyarrow.DictionaryType):
        column = column.dictionary_decode()
    if pyarrow.types.is_string(column.type) or pyarrow.types.is_large_string(column.type):
        # As bytes: text that is not UTF-8 would take its neighbours with it.
        is_small = pyarrow.types.is_string(column.type)
        column = column.cast(pyarrow.binary() if is_small else pyarrow.large_binary())
    return [id_text(value) for value in column.to_pylist()]


def read_cell(value: Any) -> Cell:
    """Return what a cell of a column of images says."""
    value = _inner_value(value)
    if not value.is_valid:
        return Cell(None, None)
    if not hasattr(value, "keys"):
        return Cell(_bytes_in(value), None)
    path = _inner_value(value["path"]).as_py() if "path" in value else None
    return Cell(_bytes_in(_inner_value(value["bytes"])), path if isinstance(path, str) else None)


def _inner_value(value: Any) -> Any:
    """Return the value behind a dictionary (categories) or an extension."""
    while value.is_valid and hasattr(value, "value"):
        value = value.value
    return value


def _bytes_in(value: Any) -> bytes | None:
    if not value.is_valid:
        return None
    if hasattr(value, "values"):
        return _bytes_of_numbers(value.values)
    buffer = value.as_buffer()
    check_size(buffer.size)
    return bytes(buffer)


def _bytes_of_numbers(numbers: Any) -> bytes:
    check_size(len(numbers))
    if numbers.null_count:
        raise InputError("a list of bytes with nulls in it", kind="broken")
    return bytes(numbers.to_numpy(zero_copy_only=False).tobytes())
