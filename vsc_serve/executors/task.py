"""Tasks for workers, and their results."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import compress
from time import perf_counter
from typing import Any, Final, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from vsc_serve.codes import CodeRows, DecisionStatistics, stack_rows
from vsc_serve.compaction import EncodedBatch
from vsc_serve.errors import InputError, Kind, SourceUnavailable
from vsc_serve.sources import Source

LARGEST_CHUNK: Final = 1024
"""Sources in a chunk at most."""

Chunk: TypeAlias = Sequence[Source]
"""Sources that are read and encoded together."""


@dataclass(slots=True)
class StageSeconds:
    """Seconds of work in each stage, summed over the workers."""

    read: float = 0.0
    """Opening and reading files."""
    decode: float = 0.0
    """From encoded images to pixels of the model's size."""
    model: float = 0.0
    """The model, and compaction to sparse rows."""
    write: float = 0.0
    """Shards and the joined file."""
    waiting: float = 0.0
    """Workers without work."""

    def add(self, other: "StageSeconds") -> None:
        """Add the seconds of another piece of work."""
        for name in StageSeconds.__slots__:
            setattr(self, name, getattr(self, name) + getattr(other, name))


class Task(NamedTuple):
    """A chunk for a worker, or a part of a chunk that is tried again."""

    number: int
    """Place of the chunk in the run, from 0."""
    offset: int
    """Place of the first source in the chunk."""
    sources: Sequence[Source]


class Rejected(NamedTuple):
    """A source without a row."""

    position: int
    """Its place in the chunk."""
    reason: str
    kind: Kind
    """Kind of the reason, which runs are counted by."""


@dataclass(frozen=True, kw_only=True)
class ChunkResult:
    """Result of a task: rows of the sources that have one, reasons of the others."""

    offset: int = 0
    """Place of its first source in the chunk."""
    rows: CodeRows
    """Codes of the fresh ones among the kept, in order."""
    decisions: DecisionStatistics = field(default_factory=DecisionStatistics)
    kept: list[int] = field(default_factory=list)
    """Place in the chunk of each source that has a row, in order."""
    rejected: list[Rejected] = field(default_factory=list)
    """The others."""
    signatures: list[str] = field(default_factory=list)
    """One per source: see `file_signature`."""
    seconds: StageSeconds = field(default_factory=StageSeconds)
    digests: list[str] = field(default_factory=list)
    """sha256 of the content that each row was made from; empty unless asked for."""
    reused: list[int] = field(default_factory=list)
    """Which earlier row each row repeats, -1 for a fresh one; empty where all are fresh."""
    pixels: NDArray[np.uint8] | None = None
    """Pixels of the fresh ones, where they are still to be encoded."""
    release: Callable[[], None] | None = None
    """To be called when the pixels are no longer needed: they lie in memory that is used again."""

    def fresh(self) -> list[int]:
        """Return the place in the chunk of each fresh row."""
        if not self.reused:
            return self.kept
        return [place for place, row in zip(self.kept, self.reused, strict=True) if row < 0]

    def replace(self, **changes: Any) -> "ChunkResult":
        """Return the result with some fields changed."""
        return ChunkResult(**vars(self) | changes)

    def without(self, rejected: Sequence[Rejected]) -> "ChunkResult":
        """Return the result with some of its rows rejected; `rows` are the caller's to mend."""
        places = {one.position for one in rejected}
        keeps = [place not in places for place in self.kept]
        return self.replace(
            kept=list(compress(self.kept, keeps)),
            rejected=sorted([*self.rejected, *rejected]),
            digests=list(compress(self.digests, keeps)),
            reused=list(compress(self.reused, keeps)),
        )


Encode: TypeAlias = Callable[[NDArray[Any]], EncodedBatch]
"""From pixels or vectors to codes."""


def encode_fresh(result: ChunkResult, inputs: NDArray[Any], encode: Encode) -> ChunkResult:
    """Give a result the codes of its fresh inputs.

    Where some cannot be encoded (values that are not finite), only those are rejected.

    Args:
        result: What was read.
        inputs: Pixels or vectors of the fresh ones, in order.
        encode: The model.
    """
    began = perf_counter()
    rejected: list[Rejected] = []
    try:
        encoded = encode(inputs)
    except SourceUnavailable:
        raise
    except InputError:
        encoded, rejected = _encode_singly(result.fresh(), inputs, encode)
    result.seconds.model += perf_counter() - began
    return (result.without(rejected) if rejected else result).replace(
        rows=encoded.rows, decisions=encoded.decisions, pixels=None, release=None
    )


def _encode_singly(
    positions: Sequence[int], inputs: NDArray[Any], encode: Encode
) -> tuple[EncodedBatch, list[Rejected]]:
    """Encode row by row, so that a row that fails costs only itself."""
    none = encode(inputs[:0])
    parts, decisions, rejected = [none.rows], DecisionStatistics(), []
    for position, row in zip(positions, inputs, strict=True):
        try:
            encoded = encode(row[None])
        except InputError as error:
            rejected.append(Rejected(position, _without_row_number(error), error.kind))
        else:
            parts.append(encoded.rows)
            decisions.add(encoded.decisions)
    rows = stack_rows(parts, none.rows.codes.shape[1])
    return EncodedBatch(rows, decisions), rejected


def _without_row_number(error: InputError) -> str:
    """Return the reason alone: the row is the only one of its batch, and known by its id."""
    return str(error).removeprefix(f"row {error.row}: ").removeprefix(f"row {error.row} ")


def merge_results(results: Sequence[ChunkResult]) -> ChunkResult:
    """Put the results of the parts of one chunk together, in the order of its sources."""
    if len(results) == 1:
        return results[0]
    parts = sorted(results, key=lambda part: part.offset)
    pixels = [part.pixels for part in parts if part.pixels is not None]
    seconds, decisions = StageSeconds(), DecisionStatistics()
    for part in parts:
        seconds.add(part.seconds)
        decisions.add(part.decisions)
    return ChunkResult(
        rows=stack_rows([part.rows for part in parts], parts[0].rows.codes.shape[1]),
        decisions=decisions,
        kept=[kept for part in parts for kept in part.kept],
        rejected=[rejected for part in parts for rejected in part.rejected],
        signatures=[signature for part in parts for signature in part.signatures],
        seconds=seconds,
        digests=[digest for part in parts for digest in part.digests],
        reused=[row for part in parts for row in part.reused],
        pixels=np.concatenate(pixels) if pixels else None,
    )
