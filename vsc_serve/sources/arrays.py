"""Read rows from numpy files: pixels or vectors, with ids and labels where the file has them."""

import zipfile
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from vsc_serve.errors import InputError

SUFFIXES: Final = (".npy", ".npz")
"""File name endings of numpy files."""

_IMAGE_KEYS: Final = ("images", "train_x", "x")
_VECTOR_KEYS: Final = ("vectors", "embeddings")
_LABEL_KEYS: Final = ("labels", "train_y", "y")


class ArrayRows(NamedTuple):
    """What a numpy file holds."""

    rows: NDArray[Any]
    """Pixels, uint8, (images, height, width, channels); or vectors, float32, (rows, dimensions)."""
    ids: list[str]
    """One per row: the file's `ids`, else the numbers of the rows."""
    labels: NDArray[np.int64] | None
    """Class of each row, where the file has `labels`."""


def read_rows(path: Path) -> ArrayRows:
    """Read an `.npy` or `.npz` file. An `.npy` is mapped, so it may be larger than memory.

    Args:
        path: Holds uint8 images (count, height, width[, 1 or 3]) or float vectors (count,
            dimensions); in an `.npz` under a name such as `images` or `vectors`, or as the only
            array of that kind.

    Raises:
        InputError: It is not readable, holds nothing of these, or other numbers of ids or labels.
    """
    arrays = _read_arrays(path)
    name, rows = _pick_rows(path, arrays)
    labels = next((arrays[key] for key in _LABEL_KEYS if key in arrays and key != name), None)
    for what, one_per_row in (("labels", labels), ("ids", arrays.get("ids"))):
        if one_per_row is not None and one_per_row.shape != (len(rows),):
            raise InputError(f"{path}: {len(rows)} rows but {what} of shape {one_per_row.shape}.")
    ids = [str(identity) for identity in arrays.get("ids", range(len(rows)))]
    if rows.ndim == 2:
        rows = rows.astype(np.float32, copy=False)
    elif rows.ndim == 3:
        rows = rows[..., None]
    return ArrayRows(rows, ids, None if labels is None else labels.astype(np.int64))


def _read_arrays(path: Path) -> dict[str, NDArray[Any]]:
    try:
        if path.suffix == ".npy":
            return {"array": np.load(path, mmap_mode="r", allow_pickle=False)}
        with np.load(path, allow_pickle=False) as stored:
            return {name: stored[name] for name in stored.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise InputError(f"{path}: not readable as numpy data ({error}).") from error


def _pick_rows(path: Path, arrays: dict[str, NDArray[Any]]) -> tuple[str, NDArray[Any]]:
    """Choose the array that holds the rows: a known name, or the only one that fits."""
    known = [name for name in _IMAGE_KEYS + _VECTOR_KEYS if name in arrays]
    fitting = [name for name, array in arrays.items() if _is_rows(array)]
    chosen = known[:1] or (fitting if len(fitting) == 1 else [])
    if not chosen or not _is_rows(arrays[chosen[0]]):
        found = ", ".join(f"{name} {array.dtype} {array.shape}" for name, array in arrays.items())
        raise InputError(
            f"{path}: expected uint8 images (count, height, width[, 1 or 3]) or float vectors"
            f" (count, dimensions), under a name such as {_IMAGE_KEYS[0]} or {_VECTOR_KEYS[0]};"
            f" found {found}."
        )
    return chosen[0], arrays[chosen[0]]


def _is_rows(array: NDArray[Any]) -> bool:
    is_images = array.dtype == np.uint8 and (
        array.ndim == 3 or (array.ndim == 4 and array.shape[3] in (1, 3))
    )
    return is_images or (array.dtype.kind == "f" and array.ndim == 2)
