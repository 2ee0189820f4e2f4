"""Join files of codes into one, with no more than one of them in memory."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vsc_serve.atomic import atomic_file
from vsc_serve.codes.folder import read_codes
from vsc_serve.codes.npz import (
    ALIGNED,
    Member,
    cut_texts,
    meta_fact,
    shape_facts,
    text_member,
    text_width,
    write_members,
)
from vsc_serve.codes.read import code_file, load_array, load_arrays
from vsc_serve.codes.rows import index_type
from vsc_serve.errors import InputError


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
        write_members(file, _joined_members(measured, meta), compress=compress)


@dataclass(frozen=True, kw_only=True)
class _Part:
    """Facts of a file that joining it with others depends on."""

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
    arrays = load_arrays(path)
    stored = code_file(path, arrays)
    texts = {"ids": stored.ids, "digests": stored.digests}
    return _Part(
        path=path,
        shape=stored.codes.shape,
        entries=stored.codes.nnz,
        widths={name: text_width(given) for name, given in texts.items() if given is not None},
        aligned=[name for name in ALIGNED if name in arrays],
        is_canonical=np.may_share_memory(stored.codes.data, arrays["data"])
        and all(arrays[name].dtype.kind == "U" for name in {"ids", *texts} & arrays.keys())
        and "ids" in arrays,
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


def _joined_members(parts: Sequence[_Part], meta: dict[str, Any]) -> Iterator["Member"]:
    """Yield what the joined file holds. A block is read when it is written, and then let go."""
    rows, entries = sum(part.shape[0] for part in parts), sum(part.entries for part in parts)
    integer = index_type(entries)

    def blocks(name: str) -> Iterator[NDArray[Any]]:
        return (_part_array(part, name) for part in parts)

    yield Member("indices", integer, (entries,), blocks("indices"))
    yield Member("indptr", integer, (rows + 1,), _joined_bounds(blocks("indptr")))
    yield from shape_facts((rows, parts[0].shape[1]))
    for name in ("data", *parts[0].aligned):
        yield Member(name, np.float32, (entries,), blocks(name))
    yield meta_fact(meta)
    for name in parts[0].widths:
        width = max(part.widths[name] for part in parts)
        yield text_member(name, rows, width, chain.from_iterable(map(cut_texts, blocks(name))))


def _part_array(part: _Part, name: str) -> NDArray[Any]:
    """Read one array of a part; of a file that vsc did not write, as `write_codes` would have."""
    if part.is_canonical:
        return load_array(part.path, name)
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
