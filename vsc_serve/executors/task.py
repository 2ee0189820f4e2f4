"""What goes to a worker and what comes back."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import compress
from time import perf_counter
from types import TracebackType
from typing import Any, Final, NamedTuple, Protocol, Self, TypeAlias

import numpy as np
from numpy.typing import NDArray

from vsc_serve.codes import CodeRows, stack_rows
from vsc_serve.errors import InputError
from vsc_serve.sources import FileSource, Source

CHUNK: Final = 1024
"""Sources in a chunk at most."""

Chunk: TypeAlias = Sequence[Source]
"""Sources that are read and encoded together."""


@dataclass(slots=True)
class Seconds:
    """Seconds of work in each stage, summed over the workers."""

    read: float = 0.0
    """Opening and reading files."""
    decode: float = 0.0
    """From encoded pictures to pixels of the model's size."""
    model: float = 0.0
    """The model, and compaction to sparse rows."""
    write: float = 0.0
    """Shards and the joined file."""
    waiting: float = 0.0
    """Workers without work."""

    def add(self, other: "Seconds") -> None:
        """Add the seconds of another piece of work."""
        for name in Seconds.__slots__:
            setattr(self, name, getattr(self, name) + getattr(other, name))


class Task(NamedTuple):
    """Sources that are read and encoded together: a chunk, or a part of one that is tried again."""

    number: int
    """Place of the chunk in the run, from 0."""
    offset: int
    """Place of the first source in the chunk."""
    sources: Sequence[Source]


class PathTask(NamedTuple):
    """A task of which every source is a file: the paths travel ten times faster than objects."""

    number: int
    offset: int
    paths: tuple[str, ...]

    def unpack(self) -> Task:
        """Return the task; a worker needs no ids."""
        return Task(self.number, self.offset, tuple(FileSource(path, path) for path in self.paths))


def pack(task: Task) -> Task | PathTask:
    """Return a task as it travels to another process."""
    paths = tuple(source.path for source in task.sources if type(source) is FileSource)
    return PathTask(task.number, task.offset, paths) if len(paths) == len(task.sources) else task


class Bad(NamedTuple):
    """A source that has no row, and why."""

    position: int
    """Its place in the chunk."""
    reason: str


class Piece(NamedTuple):
    """What became of a chunk, or of a part of one."""

    offset: int
    """Place of its first source in the chunk."""
    rows: CodeRows
    """Codes of the fresh ones among the kept, in order."""
    kept: list[int]
    """Place in the chunk of each source that has a row, in order."""
    bad: list[Bad]
    """The others."""
    stamps: list[str]
    """One per source: see `stamp_of`."""
    seconds: Seconds
    digests: list[str]
    """sha256 of the content of each row's picture; empty unless asked for."""
    old_rows: list[int]
    """Which earlier row each row repeats, -1 for a fresh one; empty where all are fresh."""
    pixels: NDArray[np.uint8] | None = None
    """Pixels of the fresh ones, where they are still to be encoded."""
    release: Callable[[], None] | None = None
    """To be called when the pixels are no longer needed: they lie in memory that is used again."""

    def fresh(self) -> list[int]:
        """Return the place in the chunk of each fresh row."""
        if not self.old_rows:
            return self.kept
        pairs = zip(self.kept, self.old_rows, strict=True)
        return [place for place, row in pairs if row < 0]

    def without(self, bad: Sequence[Bad]) -> "Piece":
        """Return the piece with some of its rows refused; `rows` is the caller's affair."""
        refused = {one.position for one in bad}
        keeps = [place not in refused for place in self.kept]
        return self._replace(
            kept=list(compress(self.kept, keeps)),
            bad=sorted([*self.bad, *bad]),
            digests=list(compress(self.digests, keeps)),
            old_rows=list(compress(self.old_rows, keeps)),
        )


def encode_piece(
    piece: Piece, pixels: NDArray[np.uint8], encode: Callable[[NDArray[np.uint8]], CodeRows]
) -> Piece:
    """Give a piece the codes of its fresh pictures.

    Where the model fails on a row (values that are not finite), only that row is refused.
    """
    began = perf_counter()
    bad: list[Bad] = []
    try:
        rows = encode(pixels)
    except InputError:
        parts = [encode(pixels[:0])]
        for position, row in zip(piece.fresh(), pixels, strict=True):
            try:
                parts.append(encode(row[None]))
            except InputError as error:
                bad.append(Bad(position, str(error).removeprefix("row 0: ")))
        rows = stack_rows(parts, parts[0].codes.shape[1])
    piece.seconds.model += perf_counter() - began
    return (piece.without(bad) if bad else piece)._replace(rows=rows, pixels=None, release=None)


def merge_pieces(pieces: Sequence[Piece]) -> Piece:
    """Put the pieces of one chunk together, in the order of its sources."""
    if len(pieces) == 1:
        return pieces[0]
    pieces = sorted(pieces, key=lambda piece: piece.offset)
    pixels = [piece.pixels for piece in pieces if piece.pixels is not None]
    seconds = Seconds()
    for piece in pieces:
        seconds.add(piece.seconds)
    return Piece(
        offset=0,
        rows=stack_rows([piece.rows for piece in pieces], pieces[0].rows.codes.shape[1]),
        kept=[kept for piece in pieces for kept in piece.kept],
        bad=[bad for piece in pieces for bad in piece.bad],
        stamps=[stamp for piece in pieces for stamp in piece.stamps],
        seconds=seconds,
        digests=[digest for piece in pieces for digest in piece.digests],
        old_rows=[row for piece in pieces for row in piece.old_rows],
        pixels=np.concatenate(pixels) if pixels else None,
    )


class Pool(Protocol):
    """What does chunks: processes, threads, or a plain loop."""

    workers: int
    """How many chunks are worked on at a time, at most."""
    kind: str
    """What works, in the plural, for people."""
    largest_chunk: int
    """Sources in a chunk at most."""
    counts_near: bool
    """Whether decisions near the threshold are counted."""

    def __enter__(self) -> Self:
        """Start."""

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """End."""

    @property
    def begun(self) -> int:
        """How many chunks were worked on at a time: a small job does not need all workers."""

    def expect(self, count: int) -> None:
        """Take note that at least so many sources will come: start who is needed for them."""

    def provenance(self) -> dict[str, Any]:
        """Return what a codes file says about where its codes come from."""

    def run(self, chunks: Iterator[Chunk]) -> Iterator[Piece]:
        """Do the chunks; give what became of them, in order."""
