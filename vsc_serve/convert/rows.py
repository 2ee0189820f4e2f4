"""Rows of codes for other formats: read part by part, split by sign where asked, and surveyed."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from vsc_serve.codes import CodeFile, Codes, build_csr, read_parts, stack_codes
from vsc_serve.errors import InputError

LONG_ROW: Final = 1000
"""Entries of a row that indexes of several engines stop at."""

_BLOCK_ROWS: Final = 4096
"""Rows that are turned into text together."""
_SAME_IN_ALL: Final = ("model_digest", "tau", "view", "max_active", "stored_tau", "sign")


class Block(NamedTuple):
    """Some rows of codes."""

    codes: Codes
    ids: list[str]
    start: int
    """Number of the first row."""
    gamma: NDArray[np.float32] | None
    """Spike probability of each entry, where the file has them."""
    sigma: NDArray[np.float32] | None
    """Standard deviation of each entry, where the file has them."""


class Rows:
    """Rows of one or more files or folders of shards; can be gone through again and again.

    Args:
        paths: What to read, in order.
        is_split: Write a code z of J columns as [max(z, 0); max(-z, 0)] of 2J.
    """

    def __init__(self, paths: Sequence[Path], *, is_split: bool = False) -> None:
        self.paths = list(paths)
        self.is_split = is_split

    def __iter__(self) -> Iterator[Block]:
        """Yield blocks of rows in order, of a size that text is made of."""
        return self.blocks(_BLOCK_ROWS)

    def blocks(self, row_count: int) -> Iterator[Block]:
        """Yield blocks of up to `row_count` rows in order, with one file in memory at a time."""
        start = 0
        for path in self.paths:
            for part in read_parts(path):
                for block in _cut(part, start, row_count):
                    yield _split(block) if self.is_split else block
                start += len(part.ids)


@dataclass(kw_only=True)
class Survey:
    """Statistics of all rows. What may be negative is compared by its size, without the sign."""

    meta: dict[str, Any]
    """Provenance of the first part."""
    columns: int
    aligned: list[str]
    """Which of gamma and sigma the rows have."""
    rows: int = 0
    entries: int = 0
    longest_row: int = 0
    """Entries of the row with most."""
    long_rows: int = 0
    """Rows of more than `LONG_ROW` entries."""
    empty_rows: int = 0
    negative_rows: int = 0
    not_finite_rows: int = 0
    smallest: float = float("inf")
    largest: float = 0.0
    longest_id: int = 0
    """Bytes in UTF-8."""
    shortest_id: int = 2**31
    """Bytes in UTF-8."""
    spaced_ids: int = 0
    """Ids with white space."""
    not_text_ids: list[int] = field(default_factory=list)
    """Rows whose id is no valid text: a file name of undecodable bytes."""
    repeated_id: str | None = None
    """The first id that is there twice."""

    @property
    def is_split(self) -> bool:
        """Whether columns are signs of latents, not latents."""
        return self.meta.get("sign") == "split"

    @property
    def latent_dim(self) -> int:
        """Latents J of the model."""
        return self.columns // 2 if self.is_split else self.columns

    def split(self) -> "Survey":
        """Return the statistics after a split by sign."""
        meta = self.meta | {"sign": "split"}
        return replace(self, columns=2 * self.columns, negative_rows=0, meta=meta)


def gather(rows: Rows, facts: Survey) -> CodeFile:
    """Return all rows as one, for the formats that need them so."""
    blocks = list(rows)
    return CodeFile(
        codes=stack_codes([block.codes for block in blocks], facts.columns),
        ids=list(chain.from_iterable(block.ids for block in blocks)),
        meta=facts.meta,
        gamma=_concatenate([block.gamma for block in blocks]),
        sigma=_concatenate([block.sigma for block in blocks]),
    )


def _concatenate(parts: Sequence[NDArray[np.float32] | None]) -> NDArray[np.float32] | None:
    given = [part for part in parts if part is not None]
    return np.concatenate(given) if given else None


def survey(rows: Rows) -> Survey:
    """Go through all rows once, unsplit, and return their statistics.

    Raises:
        InputError: A file cannot be read, or the files do not belong together.
    """
    found: Survey | None = None
    seen: set[str] = set()
    for path in rows.paths:
        for part in read_parts(path):
            if found is None:
                found = Survey(meta=part.meta, columns=part.codes.shape[1], aligned=_aligned(part))
            _refuse_other_kind(path, part, found)
            _add_values(found, part.codes)
            _add_ids(found, part.ids, seen)
    if found is None:
        raise ValueError("no files to convert")
    return found


def _aligned(part: CodeFile) -> list[str]:
    return [name for name in ("gamma", "sigma") if getattr(part, name) is not None]


def _refuse_other_kind(path: Path, part: CodeFile, found: Survey) -> None:
    facts: list[tuple[str, Any, Any]] = [("latents", part.codes.shape[1], found.columns)]
    facts += [(name, part.meta.get(name), found.meta.get(name)) for name in _SAME_IN_ALL]
    facts.append(("optional members", _aligned(part), found.aligned))
    for name, this, first in facts:
        if this != first:
            raise InputError(
                f"{path}: {name} is {this}, but {first} in the first file. Convert files of one"
                " model and the same options together, others by themselves."
            )


def _add_values(found: Survey, codes: Codes) -> None:
    lengths = np.diff(codes.indptr)
    found.rows += len(lengths)
    found.entries += codes.nnz
    found.longest_row = max(found.longest_row, int(lengths.max(initial=0)))
    found.long_rows += int(np.count_nonzero(lengths > LONG_ROW))
    found.empty_rows += int(np.count_nonzero(lengths == 0))
    found.negative_rows += _rows_with(codes, codes.data < 0)
    found.not_finite_rows += _rows_with(codes, ~np.isfinite(codes.data))
    size = np.abs(codes.data)
    found.smallest = min(found.smallest, float(size.min(initial=np.inf)))
    found.largest = max(found.largest, float(size.max(initial=0.0)))


def _rows_with(codes: Codes, is_so: NDArray[np.bool_]) -> int:
    """Count rows with an entry of which `is_so`."""
    if not is_so.any():
        return 0
    before = np.concatenate([[0], np.cumsum(is_so)])
    return int(np.count_nonzero(np.diff(before[codes.indptr])))


def _add_ids(found: Survey, ids: Sequence[str], seen: set[str]) -> None:
    first_row = found.rows - len(ids)
    for row, name in enumerate(ids, first_row):
        try:
            size = len(name.encode())
        except UnicodeEncodeError:
            found.not_text_ids.append(row)
            continue
        found.longest_id, found.shortest_id = (
            max(found.longest_id, size),
            min(found.shortest_id, size),
        )
        found.spaced_ids += len(name.split()) != 1 or name != name.strip()
        if name in seen and found.repeated_id is None:
            found.repeated_id = name
        seen.add(name)


def _cut(part: CodeFile, first_row: int, row_count: int) -> Iterator[Block]:
    codes = part.codes
    for start in range(0, codes.shape[0], row_count):
        bounds = codes.indptr[start : start + row_count + 1]
        entries = slice(int(bounds[0]), int(bounds[-1]))
        yield Block(
            build_csr(
                codes.data[entries], codes.indices[entries], bounds - bounds[0], codes.shape[1]
            ),
            part.ids[start : start + row_count],
            first_row + start,
            None if part.gamma is None else part.gamma[entries],
            None if part.sigma is None else part.sigma[entries],
        )


def _split(block: Block) -> Block:
    """Write z as [max(z, 0); max(-z, 0)]: column j, or j + J for a negative value."""
    codes = block.codes
    columns = codes.indices.astype(np.int64) + codes.shape[1] * (codes.data < 0)
    rows = np.repeat(np.arange(codes.shape[0]), np.diff(codes.indptr))
    order = np.lexsort((columns, rows))
    return block._replace(
        codes=build_csr(
            np.abs(codes.data[order]), columns[order], codes.indptr, 2 * codes.shape[1]
        ),
        gamma=None if block.gamma is None else block.gamma[order],
        sigma=None if block.sigma is None else block.sigma[order],
    )
