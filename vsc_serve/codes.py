"""Sparse codes in memory (scipy CSR) and on disk (`codes.npz`).

In memory a set of codes is a bare `scipy.sparse.csr_array`; ids and provenance join it only in a
file. docs/formats.md describes the file, which plain `scipy.sparse.load_npz` opens.
"""

import io
import json
import struct
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO, Final, NamedTuple, TypeAlias

import numpy as np
import scipy.sparse
from numpy.typing import NDArray

from vsc_serve.atomic import atomic_file
from vsc_serve.errors import InputError, UsageError

FORMAT: Final = 1
"""Newest codes format this version reads and writes."""

Codes: TypeAlias = "scipy.sparse.csr_array[np.float32, tuple[int, int]]"
"""Sparse codes, shape (images, latents), float32, sorted indices, no stored zero."""

_INT32_MAX: Final = 2**31 - 1
_ZIP64_BYTES: Final = 2**30
_ZIP_EPOCH: Final = (1980, 1, 1, 0, 0, 0)
_NPZ_ERRORS: Final = (
    *(OSError, EOFError, ValueError, TypeError, KeyError, AttributeError, RuntimeError),
    *(MemoryError, OverflowError, SyntaxError, zipfile.BadZipFile, zlib.error, struct.error),
)
"""What numpy and zipfile raise on a file that is no npz, or a damaged one."""


class CodeFile(NamedTuple):
    """What a `codes.npz` holds."""

    codes: Codes
    """One row per image."""
    ids: list[str]
    """Id of each row."""
    meta: dict[str, Any]
    """Where the codes come from: model name and digest, tau, engine, versions."""


def threshold_logit(tau: float) -> np.float32:
    """Return the spike logit that a probability of `tau` corresponds to: ln(tau / (1 - tau)).

    Computed in float64 and rounded once, so that every program compares against the same number.

    Args:
        tau: Spike threshold in (0, 1).

    Raises:
        UsageError: `tau` is not in (0, 1).
    """
    if not 0.0 < tau < 1.0:
        raise UsageError(f"tau must be above 0 and below 1, not {tau}")
    return np.float32(np.log(np.float64(tau)) - np.log1p(-np.float64(tau)))


def threshold(
    spike_logit: NDArray[np.float32], mu: NDArray[np.float32], tau: float
) -> NDArray[np.float32]:
    """Turn spike logits and slab means into deterministic codes: the reference of the graph's rule.

    Latent j of image i is `mu[i, j]` where `spike_logit[i, j] > logit(tau)`, and 0 elsewhere.
    Nothing is sampled: the same image gives the same code.

    Args:
        spike_logit: Log-odds of the spike, shape (images, latents).
        mu: Slab means, shape (images, latents). May be negative.
        tau: Spike threshold in (0, 1).

    Returns:
        Dense codes, shape (images, latents).
    """
    return np.where(spike_logit > threshold_logit(tau), mu, np.float32(0.0))


def dense_to_csr(dense: NDArray[np.float32]) -> Codes:
    """Compact dense codes, several times faster than `csr_array(dense)` on sparse rows.

    Args:
        dense: Codes, shape (images, latents).

    Returns:
        The same codes, with sorted indices and no stored zero.
    """
    image_count, latent_dim = dense.shape
    is_active = dense != 0
    positions = np.flatnonzero(is_active)
    indptr = np.zeros(image_count + 1, np.int64)
    np.cumsum(np.count_nonzero(is_active, axis=1), out=indptr[1:])
    return build_csr(dense.ravel()[positions], positions % latent_dim, indptr, latent_dim)


def build_csr(
    data: NDArray[np.float32], indices: NDArray[Any], indptr: NDArray[Any], latent_dim: int
) -> Codes:
    """Put CSR parts together with int32 indices, or int64 where the number of entries needs it."""
    index_type: type[np.signedinteger] = np.int32 if len(data) <= _INT32_MAX else np.int64
    columns = indices.astype(index_type, copy=False)
    bounds = indptr.astype(index_type, copy=False)
    return scipy.sparse.csr_array((data, columns, bounds), shape=(len(indptr) - 1, latent_dim))


def canonical(matrix: Any) -> Codes:
    """Return a sparse matrix as codes are: float32, sorted, no stored zero, narrow indices.

    Codes that are so already are not copied. Raises ValueError for values that are no real numbers.
    """
    if matrix.dtype.kind not in "fiub":
        raise ValueError(f"values are {matrix.dtype}, not real numbers")
    codes = scipy.sparse.csr_array(matrix).astype(np.float32, copy=False)
    if not (codes.has_canonical_format and codes.data.all()):
        codes = codes.copy()
        codes.sum_duplicates()
        codes.eliminate_zeros()
    return build_csr(codes.data, codes.indices, codes.indptr, codes.shape[1])


def stack_codes(parts: Sequence[Codes], latent_dim: int) -> Codes:
    """Put codes below one another. An empty sequence gives no rows."""
    if not parts:
        return dense_to_csr(np.empty((0, latent_dim), np.float32))
    data = np.concatenate([part.data for part in parts])
    indices = np.concatenate([part.indices for part in parts])
    row_counts = np.concatenate([np.diff(part.indptr) for part in parts])
    indptr = np.zeros(len(row_counts) + 1, np.int64)
    np.cumsum(row_counts, out=indptr[1:])
    return build_csr(data, indices, indptr, latent_dim)


def codes_to_bytes(codes: Codes, ids: Sequence[str], meta: dict[str, Any]) -> bytes:
    """Return the bytes of a `codes.npz`: what `write_codes` writes."""
    buffer = io.BytesIO()
    _write(buffer, codes, ids, meta)
    return buffer.getvalue()


def write_codes(path: Path | str, codes: Codes, ids: Sequence[str], meta: dict[str, Any]) -> None:
    """Write a `codes.npz`, whole or not at all. The same codes give the same bytes.

    Args:
        path: File to write; one that is there is replaced.
        codes: One row per image.
        ids: One per row.
        meta: Provenance, any JSON object.

    Raises:
        InputError: The file cannot be written.
    """
    with atomic_file(Path(path)) as file:
        _write(file, codes, ids, meta)


def read_codes(path: Path | str) -> CodeFile:
    """Read a `codes.npz`.

    Returns:
        Codes, ids and provenance. A matrix that plain scipy wrote gets its row numbers as ids.

    Raises:
        InputError: The file is missing, not a codes file, damaged, or of a newer format.
    """
    path = Path(path)
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as stored:
            arrays = {name: stored[name] for name in stored.files}
    except FileNotFoundError:
        raise InputError(
            f"{path}: no such file. Make it with `vsc encode images/ --out {path}`."
        ) from None
    except _NPZ_ERRORS as error:
        raise InputError(f"{path}: not a readable npz file ({error}). Encode again.") from error
    return _from_arrays(path, arrays)


def _from_arrays(path: Path, arrays: dict[str, NDArray[Any]]) -> CodeFile:
    missing = [name for name in ("data", "indices", "indptr", "shape") if name not in arrays]
    if missing or arrays.get("format", np.array(b"csr")).tolist() != b"csr":
        raise InputError(
            f"{path}: not a CSR matrix (missing: {', '.join(missing) or 'format csr'})."
            " Give a file that `vsc encode` wrote."
        )
    meta = _read_meta(path, arrays.get("meta"))
    try:
        parts = (arrays["data"], arrays["indices"], arrays["indptr"])
        stored = scipy.sparse.csr_array(parts, shape=tuple(arrays["shape"].tolist()))
        stored.check_format(full_check=True)
        codes = canonical(stored)
    except (ValueError, TypeError, IndexError) as error:
        raise InputError(f"{path}: damaged ({error}). Encode again.") from error
    ids = arrays["ids"].tolist() if "ids" in arrays else [str(i) for i in range(codes.shape[0])]
    if len(ids) != codes.shape[0]:
        raise InputError(f"{path}: {len(ids)} ids for {codes.shape[0]} rows. Encode again.")
    return CodeFile(codes, ids, meta)


def _read_meta(path: Path, stored: NDArray[Any] | None) -> dict[str, Any]:
    """Return the provenance, empty for a matrix that plain scipy wrote, and check the format."""
    if stored is None:
        return {}
    try:
        meta = json.loads(str(stored.item()))
        found = int(meta["format"])
    except (ValueError, TypeError, KeyError) as error:
        raise InputError(f"{path}: damaged meta ({error!r}). Encode again.") from error
    if found > FORMAT:
        raise InputError(
            f"{path}: codes format {found}, but this vsc-serve reads up to {FORMAT}."
            " Upgrade vsc-serve."
        )
    return dict(meta)


def _write(file: BinaryIO, codes: Codes, ids: Sequence[str], meta: dict[str, Any]) -> None:
    if len(ids) != codes.shape[0]:
        raise ValueError(f"{len(ids)} ids for {codes.shape[0]} rows")
    codes = canonical(codes)
    stored: dict[str, NDArray[Any]] = {
        "indices": codes.indices,
        "indptr": codes.indptr,
        "format": np.array(b"csr"),
        "shape": np.array(codes.shape, np.int64),
        "data": codes.data,
        "meta": np.array(json.dumps({"format": FORMAT} | meta, sort_keys=True)),
    }
    with zipfile.ZipFile(file, "w") as archive:
        for name, array in stored.items():
            _add(archive, name, array, zipfile.ZIP_STORED)
        # Paths repeat themselves; numbers hardly deflate and cost forty times the time.
        _add(archive, "ids", np.array(list(ids), np.str_), zipfile.ZIP_DEFLATED)


def _add(archive: zipfile.ZipFile, name: str, array: NDArray[Any], compression: int) -> None:
    """Add one array, with the time of day left out so that the same array gives the same bytes."""
    entry = zipfile.ZipInfo(f"{name}.npy", _ZIP_EPOCH)
    entry.compress_type = compression
    # Only where it is needed: what Python writes otherwise differs between its versions.
    is_large = array.nbytes >= _ZIP64_BYTES
    with archive.open(entry, "w", force_zip64=is_large) as member:
        np.lib.format.write_array(member, np.asanyarray(array), allow_pickle=False)
