"""Worker processes that read and encode: results in order, and a crash costs one image.

A worker that exits (killed, out of memory, a decoder that crashes) or that spends minutes on one
image takes its chunk with it. The chunk is then tried again one image at a time, so that only an
image that crashes a worker by itself is left out, with the reason; and by itself it is tried once
more, because a worker may also be killed for what the machine lacks.
"""

from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from multiprocessing.connection import wait
from typing import Any, Final, Self, cast

from vsc_serve.errors import DeviceError, VscError
from vsc_serve.executors.chunks import FIRST
from vsc_serve.executors.read import WorkerSpec, file_signature
from vsc_serve.executors.task import (
    LARGEST_CHUNK,
    Chunk,
    ChunkResult,
    Rejected,
    Task,
    merge_results,
)
from vsc_serve.executors.worker_process import Failed, Ready, WorkerProcess

IMAGE_LIMIT_S: Final = 120.0
"""Seconds a worker may spend on one image."""

TASKS_AHEAD: Final = 3
"""Tasks that a worker is given ahead, so that it never waits for the parent."""
_POLL_S: Final = 0.5
"""Seconds between checks for workers that hang."""
_MOST_EXITS: Final = 100
"""Exits in a row, without one image done between them, that end the run."""


class ProcessExecutor:
    """Worker processes; they are spawned when there is work for them, and end with the executor.

    Args:
        spec: Specification of a worker.
        workers: Processes at most.
        image_limit_s: Seconds a worker may spend on one image.
    """

    def __init__(
        self, spec: WorkerSpec, workers: int, *, image_limit_s: float = IMAGE_LIMIT_S
    ) -> None:
        self.workers = workers
        self.started = 0
        self.kind = "processes"
        self.largest_chunk = LARGEST_CHUNK
        self._spec = spec
        self._image_limit_s = image_limit_s
        self._processes: list[WorkerProcess] = []
        self._tasks: deque[Task] = deque()
        self._sizes: dict[int, int] = {}
        self._results: dict[int, list[ChunkResult]] = {}
        self._provenance: dict[str, Any] | None = None
        self._exits = 0
        self._crashed_alone: set[tuple[int, int]] = set()

    def __enter__(self) -> Self:
        """Spawn the first worker."""
        self._spawn()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """End the workers: at once after an error, else when they have nothing left."""
        for worker in self._processes:
            if kind is None and not worker.tasks:
                worker.close()
            else:
                worker.kill()
        self._processes.clear()

    def expect(self, count: int) -> None:
        """Spawn the workers that so many sources need, so that they open the model together."""
        while len(self._processes) < min(self.workers, -(-count // FIRST)):
            self._spawn()

    def provenance(self) -> dict[str, Any]:
        """Return what the codes come from, once a worker has opened the model.

        Raises:
            VscError: The model cannot be opened.
        """
        while self._provenance is None:
            self._poll()
        return self._provenance

    def run(self, chunks: Iterator[Chunk]) -> Iterator[ChunkResult]:
        """Do the chunks; give their results in order.

        Only as many chunks are taken as the workers have before them, so memory stays bounded.

        Raises:
            VscError: The model cannot be opened, a source cannot be reached, or workers keep
                crashing.
        """
        numbered = enumerate(chunks)
        following = 0
        while True:
            while len(self._sizes) < self.workers * (TASKS_AHEAD + 1):
                number, chunk = next(numbered, (-1, ()))
                if number < 0:
                    break
                self._sizes[number] = len(chunk)
                self._tasks.append(Task(number, 0, chunk))
                self._assign()
            if not self._sizes:
                return
            self._assign()
            self._poll()
            while self._is_done(following):
                yield self._take(following)
                following += 1

    def _spawn(self) -> WorkerProcess:
        worker = WorkerProcess(self._spec)
        self._processes.append(worker)
        self.started = max(self.started, len(self._processes))
        return worker

    def _is_done(self, number: int) -> bool:
        parts = self._results.get(number, ())
        done = sum(len(part.signatures) for part in parts)
        return bool(parts) and done == self._sizes[number]

    def _take(self, number: int) -> ChunkResult:
        del self._sizes[number]
        return merge_results(self._results.pop(number))

    def _assign(self) -> None:
        """Give waiting tasks to the workers with the fewest; spawn another when all are busy."""
        while self._tasks:
            with_room = [one for one in self._processes if one.has_room]
            worker = min(with_room, key=lambda one: len(one.tasks), default=None)
            if (worker is None or worker.tasks) and len(self._processes) < self.workers:
                worker = self._spawn()
            if worker is None or len(worker.tasks) >= TASKS_AHEAD:
                return
            worker.give(self._tasks.popleft())

    def _poll(self) -> None:
        """Handle the messages of half a second at most, and look for workers that hang."""
        pipes = {worker.connection: worker for worker in self._processes}
        for pipe in wait(list(pipes), _POLL_S):
            worker = pipes[cast(Any, pipe)]
            try:
                message = worker.receive()
            except EOFError:
                self._on_exit(worker, worker.exit_reason())
            else:
                self._on_message(worker, message)
        for worker in list(self._processes):
            if worker.is_ready and worker.silent_s() > self._image_limit_s:
                self._drain(worker)
                worker.kill()
                why = f"took over {self._image_limit_s:g} s"
                self._on_exit(worker, why, is_hanging=True)

    def _drain(self, worker: WorkerProcess) -> None:
        """Handle what a worker has sent before it began to hang."""
        with suppress(EOFError):
            while worker.connection.poll():
                self._on_message(worker, worker.receive())

    def _on_message(self, worker: WorkerProcess, message: Any) -> None:
        if isinstance(message, Failed):
            raise message.error or RuntimeError(f"in a worker process:\n{message.trace}")
        if isinstance(message, Ready):
            worker.is_ready = True
            self._provenance = self._provenance or message.provenance
            return
        task, result = worker.finish(message)
        self._exits = 0
        self._results.setdefault(task.number, []).append(result)

    def _on_exit(self, worker: WorkerProcess, why: str, *, is_hanging: bool = False) -> None:
        """Queue the tasks of a worker that is gone again, the one it was at as single images."""
        self._processes.remove(worker)
        worker.connection.close()
        self._exits += 1
        if self._exits >= _MOST_EXITS or self._provenance is None:
            raise self._cannot_continue(why)
        suspect = worker.tasks.popleft() if worker.is_ready and worker.tasks else None
        self._tasks.extendleft(reversed(worker.tasks))
        if suspect is not None:
            self._retry(suspect, why, is_hanging=is_hanging)
        if not self._processes:
            self._spawn()

    def _retry(self, task: Task, why: str, *, is_hanging: bool) -> None:
        """Queue a task that took its worker along, image by image, or reject its only image."""
        image = (task.number, task.offset)
        if len(task.sources) == 1 and not is_hanging and image not in self._crashed_alone:
            self._crashed_alone.add(image)
            self._tasks.appendleft(task)
        elif len(task.sources) == 1:
            rejected = Rejected(task.offset, f"crashes its reader ({why})", "crash")
            result = self._spec.rejected_result(rejected, file_signature(task.sources[0]))
            self._results.setdefault(task.number, []).append(result)
        else:
            singles = [
                Task(task.number, task.offset + place, (source,))
                for place, source in enumerate(task.sources)
            ]
            self._tasks.extendleft(reversed(singles))

    def _cannot_continue(self, why: str) -> VscError:
        if self._provenance is None:
            return DeviceError(
                f"a worker process exits while it opens the model ({why})."
                " See `vsc doctor`; `workers=0` works without processes."
            )
        return DeviceError(
            f"{self._exits} worker processes exited one after the other ({why}). Is there enough"
            " memory? Try fewer `workers`."
        )
