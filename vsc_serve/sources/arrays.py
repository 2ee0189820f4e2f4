"""Rows of numpy files: pixels or vectors, with ids and labels where the files have them."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from vsc_serve.errors import InputError, UsageError
from vsc_serve.sources.array_files import find_array_files, holds_arrays
from vsc_serve.sources.array_set import ArrayFile, ArraySet, RowSource, about
from vsc_serve.sources.files import PlaceFile
from vsc_serve.sources.inputs import Input, given_names
from vsc_serve.sources.names import ARRAY_SUFFIXES, Choice, Ids
from vsc_serve.sources.npy import StoredArray, open_stored
from vsc_serve.sources.retry import RETRY, RetryPolicy
from vsc_serve.sources.stores import local_path

__all__ = [
    "SUFFIXES",
    "ArrayRows",
    "ArraySet",
    "RowSource",
    "holds_arrays",
    "open_arrays",
    "read_rows",
]

SUFFIXES: Final = ARRAY_SUFFIXES
"""Extensions of numpy files."""

_IMAGE_KEYS: Final = ("images", "train_x", "x")
_VECTOR_KEYS: Final = ("vectors", "embeddings")
_LABEL_KEYS: Final = ("labels", "train_y", "y")
_ID_KEY: Final = "ids"


def open_arrays(
    inputs: Input | Sequence[Input],
    *,
    exclude: Sequence[str] = (),
    ids: Ids = "relative",
    on_skip: Callable[[str, str], None] | None = None,
    retry: RetryPolicy = RETRY,
) -> ArraySet:
    """Open numpy files of rows.

    A file holds uint8 images (count, height, width[, 1 or 3]) or float vectors (count, dimensions):
    an `.npz` under a name such as `images` or `vectors`, or as the only array of that kind. Files
    in folders and patterns that hold neither are passed over.

    Args:
        inputs: `.npy` and `.npz` files, and folders, patterns and URLs of such.
        exclude: Shell patterns of what is left out; see `find_sources`.
        ids: Names of rows whose file has no `ids`: the number of the row; with several files, or in
            a folder, after the file's path. `absolute`: always so, after the whole path. An id that
            is empty or NaN gives way to the file's name and the number, `a.npz/7`.
        on_skip: Told the path and the reason of everything that is passed over.
        retry: How often and how long to try while an input cannot be reached.

    Raises:
        UsageError: An input is not there, or there is no row.
        InputError: A file is damaged, or two do not hold rows of one kind.
        SourceUnavailable: An input cannot be reached.
    """
    given = given_names(inputs)
    choice = Choice(exclude, on_skip)
    named = {local_path(one) for one in given}
    files: list[ArrayFile] = []
    for source in find_array_files(given, choice, ids, retry):
        place = source.where
        has_number_only = ids == "name" or (ids == "relative" and given == [place])
        name = "" if has_number_only else f"{source.id}/"
        file = _open(place, name, retry, has_own_ids=ids != "absolute", must_fit=place in named)
        if file is None:
            choice.skip(source.id, "without rows of images or vectors")
        elif file.row_count:
            files.append(file)
            _refuse_other_kind(files[0], file)
    if not files:
        raise UsageError(_no_rows(given, choice))
    is_numbered = all(file.ids is None for file in files)
    is_apart = len(files) == 1 or (ids != "name" and len({file.name for file in files}) > 1)
    return ArraySet(files, has_unique_ids=is_numbered and is_apart)


def _open(
    place: str, name: str, retry: RetryPolicy, *, has_own_ids: bool, must_fit: bool
) -> ArrayFile | None:
    """Open one file; None where it holds no rows and need not."""
    file = about(place, partial(PlaceFile, place, retry))
    arrays = about(place, partial(open_stored, file))
    chosen = _choose_rows(arrays)
    if chosen is None:
        file.close()
        if not must_fit:
            return None
        raise InputError(
            f"{place}: expected uint8 images (count, height, width[, 1 or 3]) or float vectors"
            f" (count, dimensions), under a name such as {_IMAGE_KEYS[0]} or {_VECTOR_KEYS[0]};"
            f" found {', '.join(f'{key} {array}' for key, array in arrays.items()) or 'nothing'}."
        )
    labels = next((arrays[key] for key in _LABEL_KEYS if key in arrays and key != chosen), None)
    ids = arrays.get(_ID_KEY) if has_own_ids else None
    opened = ArrayFile(name, file, arrays[chosen], ids, labels)
    _check(opened)
    file.release()
    return opened


def _check(file: ArrayFile) -> None:
    """Raise InputError where a part of a file is damaged, or does not go with its rows."""
    for what, array in (("rows", file.rows), ("ids", file.ids), ("labels", file.labels)):
        if array is None:
            continue
        if what != "rows" and array.shape != (file.row_count,):
            raise InputError(
                f"{file.file.place}: {file.row_count} rows but {what} of shape {array.shape}."
            )
        if what != "rows" and array.dtype.kind not in "USbiuf":
            raise InputError(
                f"{file.file.place}: {what} of type {array.dtype}; store text or whole numbers."
            )
        about(file.file.place, array.check)


def _choose_rows(arrays: dict[str, StoredArray]) -> str | None:
    """Choose the array that holds the rows: a known name, or the only one that fits."""
    known = [name for name in _IMAGE_KEYS + _VECTOR_KEYS if name in arrays]
    fitting = [name for name, array in arrays.items() if _is_rows(array)]
    chosen = known[:1] or (fitting if len(fitting) == 1 else [])
    return chosen[0] if chosen and _is_rows(arrays[chosen[0]]) else None


def _is_rows(array: StoredArray) -> bool:
    shape = array.shape
    is_images = array.dtype == np.uint8 and (
        len(shape) == 3 or (len(shape) == 4 and shape[3] in (1, 3))
    )
    is_vectors = array.dtype.kind == "f" and len(shape) == 2
    return (is_images or is_vectors) and 0 not in shape[1:]


def _refuse_other_kind(first: ArrayFile, file: ArrayFile) -> None:
    if file.kind != first.kind:
        raise InputError(
            f"{file.file.place} holds rows of {file.rows.dtype} {file.rows.shape[1:]}, and"
            f" {first.file.place} of {first.rows.dtype} {first.rows.shape[1:]}: encode them one"
            " after the other."
        )


def _no_rows(given: Sequence[str], choice: Choice) -> str:
    skipped = ", ".join(f"{count:,} {why}" for why, count in choice.skipped.most_common(8))
    return (
        f"{', '.join(given)}: no rows found. Looked for {' and '.join(SUFFIXES)} files with images"
        f" or vectors. Passed over: {skipped or 'nothing'}."
    )


class ArrayRows(NamedTuple):
    """Rows of one numpy file, with what belongs to them."""

    rows: NDArray[Any]
    """Pixels, uint8, (images, height, width, channels); or vectors, (rows, dimensions)."""
    ids: list[str]
    """One per row: the file's `ids`, else the numbers of the rows."""
    labels: NDArray[np.int64] | None
    """Class of each row, where the file has `labels`; text is numbered in sorted order."""


def read_rows(path: Path) -> ArrayRows:
    """Read all rows of an `.npy` or `.npz` file, for work that needs them in any order.

    An `.npy` is mapped, so it may be larger than memory, unless its byte order is another.

    Raises:
        InputError: It is not readable, holds no rows, or other numbers of ids or labels.
        UsageError: There is no such file, or no row in it.
    """
    arrays = open_arrays(path)
    if arrays.is_mappable:
        rows = np.load(path, mmap_mode="r", allow_pickle=False).reshape(-1, *arrays.row_shape)
    else:
        rows = arrays.read(0, arrays.row_count)
    found = ArrayRows(rows, [source.id for source in arrays.sources()], arrays.labels)
    arrays.close()
    return found
