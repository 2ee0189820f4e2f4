"""`codes.npz`: codes with ids and provenance, which plain `scipy.sparse.load_npz` opens.

Written here; `codes.read` reads it.
"""

import io
import json
import math
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from vsc_serve.atomic import atomic_file
from vsc_serve.codes.rows import Codes, canonical

FORMAT: Final = 1
"""Newest codes format this version reads and writes."""

_ZIP64_BYTES: Final = 2**30

_FAST: Final = 1
"""Deflate level: a quarter of the time of the usual 6, for 3 % more bytes (of ids 10 %)."""

_TEXT_BLOCK: Final = 4096
"""Rows of text that are widened at a time: one long path makes each of them as wide."""

ALIGNED: Final = ("gamma", "sigma")
"""Members with one value for each entry of `data`."""

_ZIP_EPOCH: Final = (1980, 1, 1, 0, 0, 0)


class CodeFile(NamedTuple):
    """Contents of a `codes.npz`."""

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


class Member(NamedTuple):
    """One array of the file, in blocks that may be made when they are written."""

    name: str
    dtype: Any
    shape: tuple[int, ...]
    blocks: Iterable[NDArray[Any]]
    is_deflated: bool | None = None
    """Whether it is deflated; None is as the file's numbers are."""


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


def _write(file: BinaryIO, stored: CodeFile, *, compress: bool) -> None:
    codes = canonical(stored.codes)
    for name, texts in (("ids", stored.ids), ("digests", stored.digests)):
        if texts is not None and len(texts) != codes.shape[0]:
            raise ValueError(f"{len(texts)} {name} for {codes.shape[0]} rows")
    for name, values in (("gamma", stored.gamma), ("sigma", stored.sigma)):
        if values is not None and not len(values) == codes.nnz == stored.codes.nnz:
            raise ValueError(f"{len(values)} values of {name} for {stored.codes.nnz} entries")
    write_members(file, _members(stored._replace(codes=codes)), compress=compress)


def _members(stored: CodeFile) -> Iterator[Member]:
    codes = stored.codes
    for name, part in (("indices", codes.indices), ("indptr", codes.indptr)):
        yield Member(name, part.dtype, part.shape, [part])
    yield from shape_facts(codes.shape)
    for name, values in (("data", codes.data), ("gamma", stored.gamma), ("sigma", stored.sigma)):
        if values is not None:
            yield Member(name, np.float32, values.shape, [values])
    yield meta_fact(stored.meta)
    for name, texts in (("ids", stored.ids), ("digests", stored.digests)):
        if texts is not None:
            yield text_member(name, len(texts), text_width(texts), cut_texts(texts))


def shape_facts(shape: tuple[int, ...]) -> Iterator[Member]:
    """Give what scipy wants to know before it reads the numbers."""
    for name, value in (("format", np.array(b"csr")), ("shape", np.array(shape, np.int64))):
        yield Member(name, value.dtype, value.shape, [value], is_deflated=False)


def meta_fact(meta: dict[str, Any]) -> Member:
    """Return the provenance as a member."""
    text = np.array(json.dumps({"format": FORMAT} | meta, sort_keys=True))
    return Member("meta", text.dtype, (), [text], is_deflated=False)


def text_member(name: str, count: int, width: int, blocks: Iterable[Sequence[str]]) -> Member:
    """Return texts as a member. Paths repeat themselves, so they deflate well."""
    arrays = (np.array(block, f"U{width}") for block in blocks)
    return Member(name, f"U{width}", (count,), arrays, is_deflated=True)


def cut_texts(texts: Sequence[str] | NDArray[Any]) -> Iterator[Any]:
    """Cut texts into short blocks: one long path makes every text of its block as wide."""
    for start in range(0, len(texts), _TEXT_BLOCK):
        yield texts[start : start + _TEXT_BLOCK]


def text_width(texts: Sequence[str]) -> int:
    """Return what numpy takes as the width of an array of these texts."""
    return max((1, *map(len, texts)))


def write_members(file: BinaryIO, members: Iterable[Member], *, compress: bool) -> None:
    """Write members to an open file; `compress` deflates the numbers as well."""
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED, compresslevel=_FAST) as archive:
        for member in members:
            is_deflated = compress if member.is_deflated is None else member.is_deflated
            _add(archive, member, is_deflated=is_deflated)


def _add(archive: zipfile.ZipFile, member: Member, *, is_deflated: bool) -> None:
    """Add one array, with the time of day left out so that the same array gives the same bytes."""
    dtype = np.dtype(member.dtype)
    entry = zipfile.ZipInfo(f"{member.name}.npy", _ZIP_EPOCH)
    # Only where it is needed: what Python writes otherwise differs between its versions.
    is_large = math.prod(member.shape) * dtype.itemsize >= _ZIP64_BYTES
    # A member opened by its name is deflated as the archive is, and of the same date as an entry.
    target = entry.filename if is_deflated else entry
    header = {
        "descr": np.lib.format.dtype_to_descr(dtype),
        "fortran_order": False,
        "shape": member.shape,
    }
    with archive.open(target, "w", force_zip64=is_large) as stream:
        np.lib.format.write_array_header_1_0(stream, header)
        for block in member.blocks:
            stream.write(np.ascontiguousarray(block, dtype).data)
