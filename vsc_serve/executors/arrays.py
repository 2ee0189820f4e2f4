"""Rows of numpy files, encoded block by block in this process."""

from collections.abc import Iterator
from time import perf_counter
from typing import Any, Protocol, Self, cast

import numpy as np
from numpy.typing import NDArray

from vsc_serve.compaction import EncodedBatch
from vsc_serve.encoder import Encoder
from vsc_serve.executors.task import (
    LARGEST_CHUNK,
    Chunk,
    ChunkResult,
    StageSeconds,
    encode_fresh,
)
from vsc_serve.options import EncodeOptions
from vsc_serve.sources import RowSource


class Rows(Protocol):
    """Rows that are read when they are wanted, such as an `ArraySet`."""

    def read(self, start: int, count: int) -> NDArray[Any]:
        """Return rows in their own type. Raises InputError or SourceUnavailable."""


class ArrayExecutor:
    """Encodes rows with a model that uses all processors itself.

    Args:
        encoder: The model.
        rows: Pixels or vectors.
        options: How it encodes.
    """

    def __init__(self, encoder: Encoder, rows: Rows, options: EncodeOptions) -> None:
        self.workers = 1
        self.started = 1
        self.kind = "loop"
        self.largest_chunk = LARGEST_CHUNK
        self._encoder, self._rows, self._options = encoder, rows, options

    def __enter__(self) -> Self:
        """Do nothing."""
        return self

    def __exit__(self, *_: object) -> None:
        """Do nothing."""

    def expect(self, count: int) -> None:
        """Do nothing: all are there."""

    def provenance(self) -> dict[str, Any]:
        """Return what a codes file says about where its codes come from."""
        return self._encoder.provenance(self._options)

    def run(self, chunks: Iterator[Chunk]) -> Iterator[ChunkResult]:
        """Encode chunks of `RowSource`s. A row that is not finite is rejected.

        Raises:
            InputError: Rows of another kind or shape than the model takes.
        """
        none = self._encode(_as_the_model_takes(self._rows.read(0, 0))).rows
        for chunk in chunks:
            began = perf_counter()
            block = self._block(chunk)
            seconds = StageSeconds(read=perf_counter() - began)
            kept = list(range(len(chunk)))
            read = ChunkResult(rows=none, kept=kept, signatures=[""] * len(chunk), seconds=seconds)
            yield encode_fresh(read, block, self._encode)

    def _encode(self, rows: NDArray[Any]) -> EncodedBatch:
        return self._encoder.encode_counted(rows, self._options)

    def _block(self, chunk: Chunk) -> NDArray[Any]:
        """Copy the rows of a chunk: runs of consecutive ones, mostly a single run."""
        numbers = np.array([cast("RowSource", source).row for source in chunk])
        runs = np.split(numbers, np.flatnonzero(np.diff(numbers) != 1) + 1)
        blocks = [self._rows.read(int(run[0]), len(run)) for run in runs]
        return _as_the_model_takes(blocks[0] if len(blocks) == 1 else np.concatenate(blocks))


def _as_the_model_takes(rows: NDArray[Any]) -> NDArray[Any]:
    """Return a copy: pixels as they are, vectors in float32, whatever the file holds."""
    kind = np.dtype(np.float32) if rows.dtype.kind == "f" else rows.dtype
    with np.errstate(over="ignore"):  # what float32 cannot hold is not finite, and rejected
        return np.array(rows, kind, order="C")
