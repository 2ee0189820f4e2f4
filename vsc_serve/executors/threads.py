"""Work without other processes: in threads of this one, or row by row of an array."""

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from time import perf_counter
from types import TracebackType
from typing import Any, Final, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from vsc_serve.encoder import Encoder
from vsc_serve.executors.read import Work
from vsc_serve.executors.task import CHUNK, Chunk, Piece, Seconds, Task
from vsc_serve.options import EncodeOptions

_TASKS_AHEAD: Final = 2
"""Chunks per thread that may be read before they are wanted: bounds the memory."""


class ThreadPool:
    """Threads that read and encode with one model.

    A decoder that crashes takes the program with it; `ProcessPool` is the default.

    Args:
        work: The model, and what is done.
        workers: Threads.
    """

    def __init__(self, work: Work, workers: int) -> None:
        self.workers = workers
        self.begun = workers
        self.kind = "threads"
        self.largest_chunk = CHUNK
        self.counts_near = True
        self._work = work
        self._threads = ThreadPoolExecutor(workers, thread_name_prefix="vsc-encode")

    def __enter__(self) -> Self:
        """Do nothing: threads start with their first chunk."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Drop what has not begun, and wait for the rest."""
        self._threads.shutdown(cancel_futures=True)

    def expect(self, count: int) -> None:
        """Do nothing: all are there."""

    def provenance(self) -> dict[str, Any]:
        """Return what a codes file says about where its codes come from."""
        return self._work.provenance

    def run(self, chunks: Iterator[Chunk]) -> Iterator[Piece]:
        """Do the chunks; give what became of them, in order."""
        waiting: deque[Future[Piece]] = deque()
        for number, chunk in enumerate(chunks):
            waiting.append(self._threads.submit(self._work.run, Task(number, 0, chunk)))
            if len(waiting) > self.workers * _TASKS_AHEAD:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


class Row(NamedTuple):
    """A row of an array, as a source."""

    id: str
    number: int

    def read(self) -> bytes:
        """Raise TypeError: a row is not an encoded picture."""
        raise TypeError("a row of an array has no encoded picture")


class ArrayLoop:
    """Encodes the rows of an array, block by block, with a model that uses all processors itself.

    Args:
        encoder: The model.
        rows: Pixels or vectors; may be mapped from a file that is larger than memory.
        options: How it encodes.
    """

    def __init__(self, encoder: Encoder, rows: NDArray[Any], options: EncodeOptions) -> None:
        self.workers = 1
        self.begun = 1
        self.kind = "loop"
        self.largest_chunk = CHUNK
        self.counts_near = True
        self._encoder, self._rows, self._options = encoder, rows, options

    def __enter__(self) -> Self:
        """Do nothing."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Do nothing."""

    def expect(self, count: int) -> None:
        """Do nothing: all are there."""

    def provenance(self) -> dict[str, Any]:
        """Return what a codes file says about where its codes come from."""
        return self._encoder.provenance(self._options)

    def run(self, chunks: Iterator[Chunk]) -> Iterator[Piece]:
        """Encode chunks of consecutive `Row`s.

        Raises:
            InputError: Rows of another kind or shape than the model takes, or not finite.
        """
        start = 0
        for chunk in chunks:
            began = perf_counter()
            block = np.ascontiguousarray(self._rows[start : start + len(chunk)])
            seconds = Seconds(read=perf_counter() - began)
            began = perf_counter()
            rows = self._encoder.encode_rows(block, self._options)
            seconds.model = perf_counter() - began
            kept = list(range(len(chunk)))
            yield Piece(0, rows, kept, [], [""] * len(chunk), seconds, [], [])
            start += len(chunk)
