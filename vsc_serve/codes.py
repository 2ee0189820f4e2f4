"""Sparse codes in memory (scipy CSR) and on disk (`codes.npz`).

In memory a set of codes is a bare `scipy.sparse.csr_array`; ids and provenance join it only in a
file. docs/formats.md describes the file, which plain `scipy.sparse.load_npz` opens. A job of many
rows leaves several such files, shards, in a folder with a list; `read_codes` and `join_codes` make
one of them.
"""

import hashlib
import io
import json
import math
import struct
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
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

SHARD_LIST: Final = "manifest.json"
"""Names the shards of a folder, in order."""
SHARD_FORMAT: Final = 1
"""Newest format of that list this version reads."""

_INT32_MAX: Final = 2**31 - 1
_ZIP64_BYTES: Final = 2**30
_FAST: Final = 1
"""Deflate level of numbers: a quarter of the time of the usual 6, for 3 % more bytes."""
_TEXT_BLOCK: Final = 4096
"""Rows of text that are widened at a time: one long path makes each of them as wide."""
_ALIGNED: Final = ("gamma", "sigma")
"""Members with one value for each entry of `data`."""
_SAME_IN_ALL_SHARDS: Final = ("format", "model_digest", "tau", "view", "max_active")
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
    gamma: NDArray[np.float32] | None = None
    """Spike probability of each entry of `codes.data`, where the file has them."""
    sigma: NDArray[np.float32] | None = None
    """Standard deviation of the slab of each entry of `codes.data`, where the file has them."""
    digests: list[str] | None = None
    """Digest of what each row was made from, where the file has them."""


@dataclass(frozen=True, kw_only=True)
class CodeRows:
    """Codes and what the model says about them."""

    codes: Codes
    """One row per image."""
    gamma: NDArray[np.float32] | None = None
    """Spike probability of each entry of `codes.data`, if asked for."""
    sigma: NDArray[np.float32] | None = None
    """Standard deviation of the slab of each entry of `codes.data`, if asked for."""
    near_threshold: int = 0
    """Spike logits, of all images and latents, that lie in the guard band around the threshold."""
    kept_energy: float = 0.0
    """Sum of squared slab means over the entries of `codes`."""
    total_energy: float = 0.0
    """The same over all active latents, before `max_active` dropped the weakest."""


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
    positions = active_positions(dense)
    return csr_at(positions, dense.ravel()[positions], dense.shape)


def active_positions(dense: NDArray[np.float32]) -> NDArray[np.intp]:
    """Return where dense codes are not zero, as positions in `dense.ravel()`, ascending.

    Searching a mask of bytes is several times faster than searching the floats.
    """
    return np.flatnonzero(dense != 0)


def csr_at(
    positions: NDArray[np.intp], values: NDArray[np.float32], shape: tuple[int, ...]
) -> Codes:
    """Build codes of `shape` from ascending positions in their dense form, and the values there."""
    image_count, latent_dim = shape
    indptr = np.searchsorted(positions, np.arange(image_count + 1) * latent_dim)
    return build_csr(values, positions % latent_dim, indptr, latent_dim)


def build_csr(
    data: NDArray[np.float32], indices: NDArray[Any], indptr: NDArray[Any], latent_dim: int
) -> Codes:
    """Put CSR parts together with int32 indices, or int64 where the number of entries needs it."""
    index_type = _index_type(len(data))
    columns = indices.astype(index_type, copy=False)
    bounds = indptr.astype(index_type, copy=False)
    return scipy.sparse.csr_array((data, columns, bounds), shape=(len(indptr) - 1, latent_dim))


def _index_type(entries: int) -> type[np.signedinteger]:
    return np.int32 if entries <= _INT32_MAX else np.int64


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


def stack_rows(parts: Sequence[CodeRows], latent_dim: int) -> CodeRows:
    """Put rows below one another, and add their counts up. An empty sequence gives no rows.

    Raises:
        ValueError: Some parts have gamma or sigma, and others have not.
    """
    if len(parts) == 1:
        return parts[0]
    return CodeRows(
        codes=stack_codes([part.codes for part in parts], latent_dim),
        gamma=_concatenate("gamma", [part.gamma for part in parts]),
        sigma=_concatenate("sigma", [part.sigma for part in parts]),
        near_threshold=sum(part.near_threshold for part in parts),
        kept_energy=sum(part.kept_energy for part in parts),
        total_energy=sum(part.total_energy for part in parts),
    )


def _concatenate(
    name: str, parts: Sequence[NDArray[np.float32] | None]
) -> NDArray[np.float32] | None:
    given = [part for part in parts if part is not None]
    if given and len(given) < len(parts):
        raise ValueError(f"{len(given)} of {len(parts)} parts have {name}: all or none must")
    return np.concatenate(given) if given else None


def codes_to_bytes(
    codes: Codes,
    ids: Sequence[str],
    meta: dict[str, Any],
    *,
    gamma: NDArray[np.float32] | None = None,
    sigma: NDArray[np.float32] | None = None,
) -> bytes:
    """Return the bytes of a `codes.npz`: what `write_codes` writes."""
    buffer = io.BytesIO()
    _write(buffer, CodeFile(codes, list(ids), meta, gamma, sigma), compress=False)
    return buffer.getvalue()


def write_codes(
    path: Path | str,
    codes: Codes,
    ids: Sequence[str],
    meta: dict[str, Any],
    *,
    gamma: NDArray[np.float32] | None = None,
    sigma: NDArray[np.float32] | None = None,
    digests: Sequence[str] | None = None,
    compress: bool = False,
) -> None:
    """Write a `codes.npz`, whole or not at all. The same codes give the same bytes.

    Args:
        path: File to write; one that is there is replaced.
        codes: One row per image.
        ids: One per row.
        meta: Provenance, any JSON object.
        gamma: Spike probabilities, one per entry of `codes.data`.
        sigma: Standard deviations of the slab, one per entry of `codes.data`.
        digests: Digest of what each row was made from, one per row.
        compress: Deflate the numbers too: smaller, and many times slower.

    Raises:
        InputError: The file cannot be written.
        ValueError: Something has not one value per row, or per entry.
    """
    listed = None if digests is None else list(digests)
    with atomic_file(Path(path)) as file:
        _write(file, CodeFile(codes, list(ids), meta, gamma, sigma, listed), compress=compress)


def read_codes(path: Path | str) -> CodeFile:
    """Read a `codes.npz`, or a folder of shards as one.

    Returns:
        Codes, ids and provenance. A matrix that plain scipy wrote gets its row numbers as ids.

    Raises:
        InputError: The file is missing, not a codes file, damaged, or of a newer format; or shards
            do not belong together.
    """
    path = Path(path)
    parts = list(read_parts(path))
    return parts[0] if len(parts) == 1 else _stack_files(path, parts)


def read_parts(path: Path) -> Iterator[CodeFile]:
    """Read a `codes.npz`, or the shards of a folder one after the other.

    Raises:
        InputError: As `read_codes`; of shards that do not belong together it knows nothing.
    """
    if path.is_dir():
        yield from map(_read_shard, list_shards(path))
    else:
        yield _from_arrays(path, _load_arrays(path))


def join_codes(
    parts: Sequence[Path], out: Path, meta: dict[str, Any], *, compress: bool = False
) -> None:
    """Join files of codes into one, in order, with no more than one of them in memory at a time.

    The bytes are those that `write_codes` writes for the stacked rows.

    Args:
        parts: Files of codes, one or more.
        out: File to write; one that is there is replaced.
        meta: Provenance of the whole.
        compress: Deflate the numbers too.

    Raises:
        InputError: A part cannot be read or has another number of latents, or only some have gamma,
            sigma or digests; or the file cannot be written.
    """
    measured = [_measure(path) for path in parts]
    _refuse_unlike(measured)
    with atomic_file(out) as file:
        _write_members(file, _joined_members(measured, meta), compress=compress)


# Reading


def _load_arrays(path: Path) -> dict[str, NDArray[Any]]:
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as stored:
            return {name: stored[name] for name in stored.files}
    except FileNotFoundError:
        raise InputError(
            f"{path}: no such file. Make it with `vsc encode images/ --out {path}`."
        ) from None
    except _NPZ_ERRORS as error:
        raise InputError(f"{path}: not a readable npz file ({error}). Encode again.") from error


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
    row_count = codes.shape[0]
    ids = _read_texts(path, arrays, "ids", row_count)
    gamma, sigma = (_read_aligned(path, arrays, name, codes) for name in _ALIGNED)
    digests = _read_texts(path, arrays, "digests", row_count)
    numbered = [str(row) for row in range(row_count)] if ids is None else ids
    return CodeFile(codes, numbered, meta, gamma, sigma, digests)


def _read_texts(
    path: Path, arrays: dict[str, NDArray[Any]], name: str, row_count: int
) -> list[str] | None:
    """Return the ids or digests; None where the file has none."""
    if name not in arrays:
        return None
    texts = np.atleast_1d(arrays[name]).tolist()
    if len(texts) != row_count:
        raise InputError(f"{path}: {len(texts)} {name} for {row_count} rows. Encode again.")
    return list(texts)


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


# Shards


def part_paths(path: Path) -> list[Path]:
    """Return the files a path stands for: itself, or the shards of a folder."""
    return [shard.path for shard in list_shards(path)] if path.is_dir() else [path]


@dataclass(frozen=True, kw_only=True)
class Shard:
    """One file of a folder of shards."""

    path: Path
    """The `.npz` file."""
    rows: int
    """Rows it must hold."""
    sha256: str | None
    """Digest it must have, where the list gives one."""


def is_shard_folder(path: Path) -> bool:
    """Tell whether a folder holds shards of codes (a bundle's manifest lists no shards)."""
    try:
        return "shards" in json.loads((path / SHARD_LIST).read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError):
        return False


def list_shards(folder: Path) -> list[Shard]:
    """Return the shards of a folder in the order of their rows.

    Raises:
        InputError: The list is missing, damaged or of a newer format, or names no shards.
    """
    path = folder / SHARD_LIST
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        found, entries = int(stored["format"]), list(stored["shards"])
    except FileNotFoundError:
        raise InputError(
            f"{folder}: a folder without {SHARD_LIST}, so no shards of codes. Give a codes.npz, or"
            " a folder that `vsc encode --out FOLDER` wrote to its end."
        ) from None
    except KeyError as error:
        raise InputError(
            f"{path}: lists no shards of codes (no {error}). Is it a model bundle? Give codes."
        ) from None
    except (OSError, ValueError, TypeError) as error:
        raise InputError(f"{path}: damaged ({error}). Encode again.") from error
    if found > SHARD_FORMAT:
        raise InputError(
            f"{path}: format {found}, but this vsc-serve reads up to {SHARD_FORMAT}."
            " Upgrade vsc-serve."
        )
    if not entries:
        raise InputError(f"{path}: lists no shard. Encode again.")
    return [_shard(path, entry) for entry in entries]


def _shard(path: Path, entry: Any) -> Shard:
    try:
        name, rows, digest = str(entry["file"]), int(entry["rows"]), entry.get("sha256")
        if not name or Path(name).name != name:
            raise ValueError(f"{name!r} is no name of a file in this folder")
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise InputError(f"{path}: damaged ({error!r}). Encode again.") from error
    return Shard(path=path.parent / name, rows=rows, sha256=digest)


def _read_shard(shard: Shard) -> CodeFile:
    """Read one shard and compare it with the list."""
    if shard.sha256 is not None and shard.path.is_file():
        with shard.path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != shard.sha256:
            raise InputError(
                f"{shard.path}: changed since it was written (sha256 {found[:12]}, but"
                f" {SHARD_LIST} says {shard.sha256[:12]}). Delete the file and encode again."
            )
    stored = read_codes(shard.path)
    if len(stored.ids) != shard.rows:
        raise InputError(
            f"{shard.path}: {len(stored.ids)} rows, but {SHARD_LIST} says {shard.rows}."
            " Delete the file and encode again."
        )
    return stored


def _stack_files(folder: Path, parts: Sequence[CodeFile]) -> CodeFile:
    """Put the shards of a folder below one another; provenance is that of the first."""
    first = parts[0]
    for part in parts[1:]:
        _refuse_other_kind(folder, part, first)
    try:
        return CodeFile(
            codes=stack_codes([part.codes for part in parts], first.codes.shape[1]),
            ids=list(chain.from_iterable(part.ids for part in parts)),
            meta=first.meta,
            gamma=_concatenate("gamma", [part.gamma for part in parts]),
            sigma=_concatenate("sigma", [part.sigma for part in parts]),
            digests=_chain_digests([part.digests for part in parts]),
        )
    except ValueError as error:
        raise InputError(f"{folder}: {error}. Encode again.") from error


def _chain_digests(parts: Sequence[list[str] | None]) -> list[str] | None:
    given = [part for part in parts if part is not None]
    if given and len(given) < len(parts):
        raise ValueError(f"{len(given)} of {len(parts)} parts have digests: all or none must")
    return list(chain.from_iterable(given)) if given else None


def _refuse_other_kind(folder: Path, part: CodeFile, first: CodeFile) -> None:
    """Raise InputError for a shard that cannot stand below the first one."""
    facts: list[tuple[str, Any, Any]] = [("latents", part.codes.shape[1], first.codes.shape[1])]
    facts += [(name, part.meta.get(name), first.meta.get(name)) for name in _SAME_IN_ALL_SHARDS]
    for name, found, expected in facts:
        if found != expected:
            raise InputError(
                f"{folder}: shards of two kinds: {name} is {expected} in the first and {found} in"
                " another. Encode all with one model and the same options."
            )


# Joining


@dataclass(frozen=True, kw_only=True)
class _Part:
    """What must be known of a file before it can be joined with others."""

    path: Path
    shape: tuple[int, int]
    entries: int
    widths: dict[str, int]
    """Length of the longest of the ids, and of the digests where there are some."""
    aligned: list[str]
    """Which of gamma and sigma it has."""
    is_canonical: bool
    """Its arrays are what `write_codes` would write."""


def _measure(path: Path) -> _Part:
    arrays = _load_arrays(path)
    stored = _from_arrays(path, arrays)
    texts = {"ids": stored.ids, "digests": stored.digests}
    return _Part(
        path=path,
        shape=stored.codes.shape,
        entries=stored.codes.nnz,
        widths={name: _width(given) for name, given in texts.items() if given is not None},
        aligned=[name for name in _ALIGNED if name in arrays],
        is_canonical="ids" in arrays and np.may_share_memory(stored.codes.data, arrays["data"]),
    )


def _refuse_unlike(parts: Sequence[_Part]) -> None:
    """Raise InputError for a part that does not go below the first one."""
    if not parts:
        raise ValueError("no parts to join")
    first = parts[0]
    for part in parts:
        for name, found, expected in (
            ("latents", part.shape[1], first.shape[1]),
            ("optional members", part.aligned, first.aligned),
            ("texts", sorted(part.widths), sorted(first.widths)),
        ):
            if found != expected:
                raise InputError(
                    f"{part.path}: has {name} {found}, but {first.path} has {expected}."
                    " Only files of one kind can be joined: encode them again alike."
                )


def _joined_members(parts: Sequence[_Part], meta: dict[str, Any]) -> Iterator["_Member"]:
    """Yield what the joined file holds. A block is read when it is written, and then let go."""
    rows, entries = sum(part.shape[0] for part in parts), sum(part.entries for part in parts)
    index_type = _index_type(entries)

    def blocks(name: str) -> Iterator[NDArray[Any]]:
        return (_part_array(part, name) for part in parts)

    yield _Member("indices", index_type, (entries,), blocks("indices"))
    yield _Member("indptr", index_type, (rows + 1,), _joined_bounds(blocks("indptr")))
    yield from _facts((rows, parts[0].shape[1]))
    for name in ("data", *parts[0].aligned):
        yield _Member(name, np.float32, (entries,), blocks(name))
    yield _meta_fact(meta)
    for name in parts[0].widths:
        width = max(part.widths[name] for part in parts)
        yield _texts(name, rows, width, chain.from_iterable(map(_cut, blocks(name))))


def _part_array(part: _Part, name: str) -> NDArray[Any]:
    """Read one array of a part; of a file that vsc did not write, as `write_codes` would have."""
    if part.is_canonical:
        with np.load(part.path, allow_pickle=False) as stored:
            found: NDArray[Any] = stored[name]
        return found
    tidy = read_codes(part.path)
    if name in ("data", "indices", "indptr"):
        return np.asarray(getattr(tidy.codes, name))
    return np.asarray(getattr(tidy, name))


def _joined_bounds(blocks: Iterable[NDArray[Any]]) -> Iterator[NDArray[np.int64]]:
    """Shift the row bounds of each part behind those of the parts before it."""
    yield np.zeros(1, np.int64)
    offset = 0
    for bounds in blocks:
        yield bounds[1:].astype(np.int64) + offset
        offset += int(bounds[-1])


# Writing


class _Member(NamedTuple):
    """One array of the file, in blocks that may be made when they are written."""

    name: str
    dtype: Any
    shape: tuple[int, ...]
    blocks: Iterable[NDArray[Any]]
    compression: int | None = None
    """How it is stored; None is as the file's numbers are."""


def _facts(shape: tuple[int, ...]) -> Iterator[_Member]:
    for name, value in (("format", np.array(b"csr")), ("shape", np.array(shape, np.int64))):
        yield _Member(name, value.dtype, value.shape, [value], zipfile.ZIP_STORED)


def _meta_fact(meta: dict[str, Any]) -> _Member:
    text = np.array(json.dumps({"format": FORMAT} | meta, sort_keys=True))
    return _Member("meta", text.dtype, (), [text], zipfile.ZIP_STORED)


def _texts(name: str, count: int, width: int, blocks: Iterable[Sequence[str]]) -> _Member:
    """Return texts as a member. Paths repeat themselves, so they deflate well."""
    arrays = (np.array(block, f"U{width}") for block in blocks)
    return _Member(name, f"U{width}", (count,), arrays, zipfile.ZIP_DEFLATED)


def _cut(texts: Sequence[str] | NDArray[Any]) -> Iterator[Any]:
    """Cut texts into short blocks: one long path makes every text of its block as wide."""
    for start in range(0, len(texts), _TEXT_BLOCK):
        yield texts[start : start + _TEXT_BLOCK]


def _width(texts: Sequence[str]) -> int:
    """Return what numpy takes as the width of an array of these texts."""
    return max((1, *map(len, texts)))


def _write(file: BinaryIO, stored: CodeFile, *, compress: bool) -> None:
    codes = canonical(stored.codes)
    for name, texts in (("ids", stored.ids), ("digests", stored.digests)):
        if texts is not None and len(texts) != codes.shape[0]:
            raise ValueError(f"{len(texts)} {name} for {codes.shape[0]} rows")
    for name, values in (("gamma", stored.gamma), ("sigma", stored.sigma)):
        if values is not None and not len(values) == codes.nnz == stored.codes.nnz:
            raise ValueError(f"{len(values)} values of {name} for {stored.codes.nnz} entries")
    _write_members(file, _members(stored._replace(codes=codes)), compress=compress)


def _members(stored: CodeFile) -> Iterator[_Member]:
    codes = stored.codes
    for name, part in (("indices", codes.indices), ("indptr", codes.indptr)):
        yield _Member(name, part.dtype, part.shape, [part])
    yield from _facts(codes.shape)
    for name, values in (("data", codes.data), ("gamma", stored.gamma), ("sigma", stored.sigma)):
        if values is not None:
            yield _Member(name, np.float32, values.shape, [values])
    yield _meta_fact(stored.meta)
    for name, texts in (("ids", stored.ids), ("digests", stored.digests)):
        if texts is not None:
            yield _texts(name, len(texts), _width(texts), _cut(texts))


def _write_members(file: BinaryIO, members: Iterable[_Member], *, compress: bool) -> None:
    kind = zipfile.ZIP_DEFLATED if compress else zipfile.ZIP_STORED
    with zipfile.ZipFile(file, "w", kind, compresslevel=_FAST if compress else None) as archive:
        for member in members:
            _add(archive, member)


def _add(archive: zipfile.ZipFile, member: _Member) -> None:
    """Add one array, with the time of day left out so that the same array gives the same bytes.

    A member opened by its name is compressed as the archive is, at 1980 like the others.
    """
    dtype = np.dtype(member.dtype)
    entry = zipfile.ZipInfo(f"{member.name}.npy", _ZIP_EPOCH)
    if member.compression is not None:
        entry.compress_type = member.compression
    # Only where it is needed: what Python writes otherwise differs between its versions.
    is_large = math.prod(member.shape) * dtype.itemsize >= _ZIP64_BYTES
    target = entry.filename if member.compression is None else entry
    header = {
        "descr": np.lib.format.dtype_to_descr(dtype),
        "fortran_order": False,
        "shape": member.shape,
    }
    with archive.open(target, "w", force_zip64=is_large) as stream:
        np.lib.format.write_array_header_1_0(stream, header)
        for block in member.blocks:
            stream.write(np.ascontiguousarray(block, dtype).data)
