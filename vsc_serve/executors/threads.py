"""Threads of this process that read and encode with one model."""

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Final, Self

from vsc_serve.executors.read import EncodeWorker
from vsc_serve.executors.task import LARGEST_CHUNK, Chunk, ChunkResult, Task

_TASKS_AHEAD: Final = 2
"""Chunks per thread that may be read before they are wanted: bounds the memory."""


class ThreadExecutor:
    """Threads that read and encode with one model.

    A decoder that crashes takes the program with it; `ProcessExecutor` is the default.

    Args:
        worker: The model, and what is done.
        workers: Threads.
    """

    def __init__(self, worker: EncodeWorker, workers: int) -> None:
        self.workers = workers
        self.started = workers
        self.kind = "threads"
        self.largest_chunk = LARGEST_CHUNK
        self._worker = worker
        self._threads = ThreadPoolExecutor(workers, thread_name_prefix="vsc-encode")

    def __enter__(self) -> Self:
        """Do nothing: threads start with their first chunk."""
        return self

    def __exit__(self, *_: object) -> None:
        """Drop what has not begun, and wait for the rest."""
        self._threads.shutdown(cancel_futures=True)

    def expect(self, count: int) -> None:
        """Do nothing: all are there."""

    def provenance(self) -> dict[str, Any]:
        """Return what a codes file says about where its codes come from."""
        return self._worker.provenance

    def run(self, chunks: Iterator[Chunk]) -> Iterator[ChunkResult]:
        """Do the chunks; give their results in order."""
        waiting: deque[Future[ChunkResult]] = deque()
        for number, chunk in enumerate(chunks):
            waiting.append(self._threads.submit(self._worker.run, Task(number, 0, chunk)))
            if len(waiting) > self.workers * _TASKS_AHEAD:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
