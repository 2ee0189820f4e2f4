"""Segment of an index: rows that were written together, and never change. docs/formats.md."""

import hashlib
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

import numpy as np
import scipy.sparse
from numpy.typing import NDArray

from vsc_serve.codes import Codes, index_type
from vsc_serve.errors import InputError
from vsc_serve.index.base import damaged
from vsc_serve.index.metrics import OF_SUPPORTS, Metric, norms_of
from vsc_serve.index.postings import Postings, block_rows, invert
from vsc_serve.untrusted import inside, open_plain

_TEXT: Final = ("utf-8", "surrogatepass")
"""Ids may hold what is no valid text: names of files need not be."""

_ID_BLOCK: Final = 65_536
"""Ids that are compared at a time."""


@dataclass(frozen=True, kw_only=True)
class FileFacts:
    """Facts of a file that it must still have when it is opened."""

    bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Removed:
    """List of the rows of a segment that are gone."""

    file: str
    rows: int
    facts: FileFacts


@dataclass(frozen=True, kw_only=True)
class SegmentFacts:
    """Entry of a segment in index.json."""

    name: str
    """Its folder."""
    rows: int
    """Rows that were written, removed ones too."""
    entries: int
    files: dict[str, FileFacts]
    removed: Removed | None = None

    @property
    def live(self) -> int:
        """Rows that can be found."""
        return self.rows - (self.removed.rows if self.removed else 0)


def write_segment(folder: Path, codes: Codes, ids: list[str]) -> SegmentFacts:
    """Write the files of a segment into a new folder. Raises OSError."""
    folder.mkdir()
    blocks = list(invert(codes))
    names = [name.encode(*_TEXT) for name in ids]
    ends = np.cumsum([0, *map(len, names)], dtype=np.int64)
    bounds = np.array([block.bounds for block in blocks], np.int64)
    bounds = bounds.reshape(len(blocks), codes.shape[1] + 1)
    arrays: dict[str, list[NDArray[Any]]] = {
        "code_bounds": [codes.indptr],
        "code_latents": [codes.indices],
        "code_values": [codes.data],
        "norms": [norms_of(codes, "codes")],
        "ids": [np.frombuffer(b"".join(names), np.uint8)],
        "id_bounds": [ends],
        "posting_bounds": [bounds],
        "posting_rows": [block.rows for block in blocks],
        "posting_values": [block.values for block in blocks],
    }
    files = {f"{name}.npy": write_array(folder / f"{name}.npy", a) for name, a in arrays.items()}
    return SegmentFacts(name=folder.name, rows=len(ids), entries=codes.nnz, files=files)


def write_array(path: Path, parts: list[NDArray[Any]]) -> FileFacts:
    """Write arrays, one below the other, as one .npy file; it is on the disk when this returns."""
    shape = (sum(len(part) for part in parts), *parts[0].shape[1:])
    header = {"descr": np.lib.format.dtype_to_descr(parts[0].dtype), "fortran_order": False}
    with path.open("x+b") as file:
        np.lib.format.write_array_header_1_0(file, header | {"shape": shape})
        for part in parts:
            file.write(np.ascontiguousarray(part).data)
        file.flush()
        os.fsync(file.fileno())
        file.seek(0)
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return FileFacts(bytes=file.tell(), sha256=digest)


class Segment:
    """Segment that is open: arrays are mapped from its files, and read where they are needed.

    Args:
        index: Folder of the index.
        facts: What index.json says of the segment.
        latents: Latents J.

    Raises:
        InputError: A file is damaged.
        FileNotFoundError: A file is missing; another run may have replaced the segment.
    """

    def __init__(self, index: Path, facts: SegmentFacts, latents: int) -> None:
        self.facts = facts
        self._folder = index / facts.name
        self._checked: set[int] = set()
        try:
            self.norms = self._map("norms", np.float64, (facts.rows,))
            self._ids, self._id_bounds = self._open_ids()
            self.codes = self._open_codes(latents)
            self.postings = self._open_postings(latents)
            self.kept = self._open_kept()
        except ValueError as error:
            raise InputError(damaged(self._folder, str(error))) from error

    def _map(self, name: str, dtype: Any, shape: tuple[int | None, ...]) -> NDArray[Any]:
        """Map a file after a look at its length, type and shape. Raises ValueError."""
        return _map(self._folder, f"{name}.npy", self.facts.files, dtype, shape)

    def _open_ids(self) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
        ids = self._map("ids", np.uint8, (None,))
        bounds = self._map("id_bounds", np.int64, (self.facts.rows + 1,))
        _check_bounds("id_bounds", bounds, len(ids))
        return ids, bounds

    def _open_codes(self, latents: int) -> Codes:
        entries, rows = self.facts.entries, self.facts.rows
        integer = index_type(entries)
        bounds = self._map("code_bounds", integer, (rows + 1,))
        _check_bounds("code_bounds", bounds, entries)
        parts = (
            self._map("code_values", np.float32, (entries,)),
            self._map("code_latents", integer, (entries,)),
            bounds,
        )
        return scipy.sparse.csr_array(parts, shape=(rows, latents))

    def _open_postings(self, latents: int) -> Postings:
        entries, rows = self.facts.entries, self.facts.rows
        blocks = -(-rows // block_rows(latents))
        return Postings(
            bounds=self._map("posting_bounds", np.int64, (blocks, latents + 1)),
            rows=self._map("posting_rows", np.int32, (entries,)),
            values=self._map("posting_values", np.float32, (entries,)),
            count=rows,
        )

    def _open_kept(self) -> NDArray[np.bool_] | None:
        """Return which rows are still there; None where all are."""
        removed = self.facts.removed
        if removed is None:
            return None
        files = {removed.file: removed.facts}
        gone = _map(self._folder, removed.file, files, np.int64, (removed.rows,))
        if len(gone) and not (gone[0] >= 0 and gone[-1] < self.facts.rows):
            raise ValueError(f"{removed.file} names rows that are not there")
        kept = np.ones(self.facts.rows, np.bool_)
        kept[gone] = False
        return kept

    def sizes(self, metric: Metric) -> NDArray[np.float64]:
        """Return `metrics.sizes` of the rows."""
        return np.asarray(self._counts if metric in OF_SUPPORTS else self.norms)

    @cached_property
    def _counts(self) -> NDArray[np.float64]:
        return np.diff(self.codes.indptr).astype(np.float64)

    @cached_property
    def inverse_norms(self) -> NDArray[np.float64]:
        """1 / norm of each row, 0 where it is empty: faster to rank with than a division."""
        zeros = np.zeros(self.facts.rows)
        np.divide(1, self.norms, out=zeros, where=np.asarray(self.norms) > 0)
        return zeros

    def check_block(self, block: int) -> None:
        """Check the postings of a block, once, before they are used. Raises InputError."""
        if block in self._checked:
            return
        try:
            self.postings.check_block(block)
        except ValueError as error:
            raise InputError(damaged(self._folder / "posting_rows.npy", str(error))) from error
        self._checked.add(block)

    def take(self, rows: NDArray[np.intp]) -> Codes:
        """Return codes by row numbers. Raises InputError where they are damaged."""
        codes: Codes = self.codes[rows]
        if codes.nnz and not 0 <= codes.indices.min() <= codes.indices.max() < codes.shape[1]:
            place = self._folder / "code_latents.npy"
            raise InputError(damaged(place, "latents that are not there"))
        return codes

    def id_of(self, row: int) -> str:
        """Return the id of a row."""
        start, stop = self._id_bounds[row : row + 2].tolist()
        return self._text(self._ids[start:stop].tobytes())

    def all_ids(self) -> list[str]:
        """Return the ids of all rows."""
        letters = self._ids.tobytes()
        return [self._text(letters[start:stop]) for start, stop in pairwise(self._id_bounds)]

    def rows_of(self, name: str) -> Iterator[int]:
        """Yield the rows of an id, removed ones too."""
        letters = np.frombuffer(name.encode(*_TEXT), np.uint8)
        same_length = np.flatnonzero(np.diff(self._id_bounds) == len(letters))
        for start in range(0, len(same_length), _ID_BLOCK):
            rows = same_length[start : start + _ID_BLOCK]
            places = self._id_bounds[rows][:, None] + np.arange(len(letters))
            yield from rows[(self._ids[places] == letters).all(axis=1)].tolist()

    def _text(self, letters: bytes) -> str:
        try:
            return letters.decode(*_TEXT)
        except UnicodeDecodeError as error:
            raise InputError(damaged(self._folder / "ids.npy", str(error))) from error

    def verify(self) -> None:
        """Compare all files with their digests. Raises InputError."""
        for name, facts in self._all_files():
            with open_plain(self._folder / name) as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
            if found != facts.sha256:
                reason = f"sha256 {found[:12]}, but index.json says {facts.sha256[:12]}"
                raise InputError(damaged(self._folder / name, reason))

    def _all_files(self) -> Iterable[tuple[str, FileFacts]]:
        yield from self.facts.files.items()
        if self.facts.removed is not None:
            yield self.facts.removed.file, self.facts.removed.facts


def _map(
    folder: Path,
    name: str,
    files: dict[str, FileFacts],
    dtype: Any,
    shape: tuple[int | None, ...],
) -> NDArray[Any]:
    if name not in files:
        raise ValueError(f"{name} is not in index.json")
    path = inside(folder, name)
    with open_plain(path) as file:
        found = os.fstat(file.fileno()).st_size
    if found != files[name].bytes:
        raise ValueError(f"{name} has {found:,} bytes, not {files[name].bytes:,}")
    array = _load(path)
    fits = [want in (None, have) for want, have in zip(shape, array.shape, strict=False)]
    if array.dtype != dtype or array.ndim != len(shape) or not all(fits):
        raise ValueError(f"{name} is {array.dtype} of shape {array.shape}")
    return np.asarray(array)


def _load(path: Path) -> NDArray[Any]:
    try:
        array: NDArray[Any] = np.load(path, mmap_mode="r", allow_pickle=False)
    except OSError:
        raise
    # numpy has no common class for what it raises on a damaged header.
    except Exception as error:
        raise ValueError(f"{path.name} has no readable header") from error
    return array


def _check_bounds(name: str, bounds: NDArray[np.integer], end: int) -> None:
    if bounds[0] or bounds[-1] != end or (bounds[1:] < bounds[:-1]).any():
        raise ValueError(f"{name} are none")
