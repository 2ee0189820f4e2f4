"""Read a `codes.npz`, which may be damaged, or a stranger's."""

import hashlib
import sys
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path
from typing import Any, Final

import numpy as np
import scipy.sparse
from numpy.typing import NDArray

from vsc_serve.codes.npz import ALIGNED, FORMAT, CodeFile
from vsc_serve.codes.rows import Codes, canonical
from vsc_serve.errors import InputError
from vsc_serve.schema import conform, load_json
from vsc_serve.untrusted import open_plain

MAX_COLUMNS: Final = 2**24
"""Columns of codes that are read: what a file asks for must fit into memory."""

_MEMBERS: Final = frozenset(
    {"format", "shape", "data", "indices", "indptr", "ids", "meta", "digests", *ALIGNED}
)
"""Members of a file that are read; others are left alone."""

_META: Final[dict[str, Any]] = {
    **dict.fromkeys(("model", "model_digest", "view", "engine", "vsc_serve", "sign"), str | None),
    **dict.fromkeys(("tau", "stored_tau"), float | None),
    "max_active": int | None,
}
"""Types of what provenance says, where it says it."""


def load_arrays(path: Path, *, sha256: str | None = None) -> dict[str, NDArray[Any]]:
    """Read the arrays of a codes file.

    Args:
        path: An npz file.
        sha256: Digest that it must have, if any.

    Raises:
        InputError: It cannot be read, or has another digest.
    """
    with _open_members(path, sha256) as archive:
        names = [name.removesuffix(".npy") for name in archive.namelist()]
        known = [name for name in names if name in _MEMBERS]
        if len(set(known)) < len(known):
            raise ValueError("a member is there twice")
        return {name: _read_member(archive, name) for name in known}


def load_array(path: Path, name: str) -> NDArray[Any]:
    """Read one array of a codes file. Raises InputError."""
    with _open_members(path) as archive:
        return _read_member(archive, name)


@contextmanager
def _open_members(path: Path, sha256: str | None = None) -> Iterator[zipfile.ZipFile]:
    """Open an npz file; whatever goes wrong with it in the block is an InputError."""
    try:
        with open_plain(path) as file:
            if sha256 is not None:
                _check_digest(path, file, sha256)
            with zipfile.ZipFile(file) as archive:
                yield archive
    except FileNotFoundError:
        raise InputError(
            f"{path}: no such file. Make it with `vsc encode images/ --out {path}`."
        ) from None
    except InputError:
        raise
    # zipfile, zlib and numpy have no common class for what they raise on damaged bytes.
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(f"{path}: not a readable npz file ({reason}). Encode again.") from error


def _check_digest(path: Path, file: BufferedReader, expected: str) -> None:
    found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != expected:
        raise InputError(
            f"{path}: changed since it was written (sha256 {found[:12]}, but the list says"
            f" {expected[:12]}). Delete the file and encode again."
        )
    file.seek(0)


def _read_member(archive: zipfile.ZipFile, name: str) -> NDArray[Any]:
    with archive.open(f"{name}.npy") as stream:
        array: NDArray[Any] = np.lib.format.read_array(stream, allow_pickle=False)
        if stream.read(1):  # also compares the checksum, which is done at the end of a member
            raise ValueError(f"{name} is longer than its array")
    return array


def code_file(path: Path, arrays: dict[str, NDArray[Any]]) -> CodeFile:
    """Return what the arrays of a codes file say, checked. Raises InputError, naming `path`."""
    missing = [name for name in ("data", "indices", "indptr", "shape") if name not in arrays]
    if missing or arrays.get("format", np.array(b"csr")).tolist() != b"csr":
        raise InputError(
            f"{path}: not a CSR matrix (missing: {', '.join(missing) or 'format csr'})."
            " Give a file that `vsc encode` wrote."
        )
    meta = _read_meta(path, arrays.get("meta"))
    try:
        codes = _read_matrix(arrays)
        row_count = codes.shape[0]
        ids, digests = (_read_texts(arrays, name, row_count) for name in ("ids", "digests"))
    except (ValueError, TypeError, IndexError) as error:
        raise InputError(f"{path}: damaged ({error}). Encode again.") from error
    gamma, sigma = (_read_aligned(path, arrays, name, codes) for name in ALIGNED)
    numbered = [str(row) for row in range(row_count)] if ids is None else ids
    return CodeFile(codes, numbered, meta, gamma, sigma, digests)


def _read_matrix(arrays: dict[str, NDArray[Any]]) -> Codes:
    """Return the codes. Raises ValueError for arrays that are none."""
    for name in ("shape", "indices", "indptr"):
        if arrays[name].ndim != 1 or arrays[name].dtype.kind not in "iu":
            raise ValueError(f"{name} must be a list of integers")
    rows, columns = arrays["shape"].tolist()
    if not (rows >= 0 and 0 <= columns <= MAX_COLUMNS):
        raise ValueError(f"shape ({rows}, {columns}); up to {MAX_COLUMNS:,} columns are read")
    parts = (arrays["data"], arrays["indices"], arrays["indptr"])
    stored = scipy.sparse.csr_array(parts, shape=(rows, columns))
    stored.check_format(full_check=True)
    with np.errstate(over="ignore"):
        return canonical(stored)


def _read_texts(arrays: dict[str, NDArray[Any]], name: str, row_count: int) -> list[str] | None:
    """Return the ids or digests; None where the file has none. Bytes are taken for UTF-8."""
    if name not in arrays:
        return None
    stored = np.atleast_1d(arrays[name])
    if stored.ndim != 1 or stored.dtype.kind not in "USiu":
        raise ValueError(f"{name} are {stored.dtype} of shape {stored.shape}, not a list of texts")
    texts = _check_letters(stored).tolist()
    if len(texts) != row_count:
        raise ValueError(f"{len(texts)} {name} for {row_count} rows")
    if stored.dtype.kind == "S":
        return [text.decode("utf-8", "surrogateescape") for text in texts]
    return list(map(str, texts))


def _check_letters(texts: NDArray[Any]) -> NDArray[Any]:
    """Return texts as they are. Raises ValueError for a number that is no letter.

    numpy keeps a text as numbers of 32 bits and checks none; Python's own check is a SystemError.
    """
    if texts.dtype.kind == "U" and texts.size and texts.itemsize:
        letters = np.ascontiguousarray(texts).view(f"{texts.dtype.byteorder}u4")
        if letters.max() > sys.maxunicode:
            raise ValueError("a text holds what is no letter")
    return texts


def _read_aligned(
    path: Path, arrays: dict[str, NDArray[Any]], name: str, codes: Codes
) -> NDArray[np.float32] | None:
    """Return gamma or sigma; None where the file has none."""
    found = arrays.get(name)
    if found is None:
        return None
    is_as_stored = not codes.nnz or np.may_share_memory(codes.data, arrays["data"])
    if found.shape != codes.data.shape or found.dtype != np.float32 or not is_as_stored:
        raise InputError(f"{path}: damaged ({name} does not go with data). Encode again.")
    return found


def _read_meta(path: Path, stored: NDArray[Any] | None) -> dict[str, Any]:
    """Return the provenance, empty for a matrix that plain scipy wrote, and check the format."""
    if stored is None:
        return {}
    try:
        meta: dict[str, Any] = conform(
            load_json(str(_check_letters(np.atleast_1d(stored)).item())), dict[str, Any], "meta"
        )
        found = conform(meta["format"], int, "format")
        for name in _META.keys() & meta.keys():
            conform(meta[name], _META[name], name)
    except (ValueError, TypeError, KeyError) as error:
        raise InputError(f"{path}: damaged meta ({error!r}). Encode again.") from error
    if found > FORMAT:
        raise InputError(
            f"{path}: codes format {found}, but this vsc-serve reads up to {FORMAT}."
            " Upgrade vsc-serve."
        )
    return meta
