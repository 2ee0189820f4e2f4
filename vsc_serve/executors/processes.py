"""Worker processes that read and encode: results in order, and a death costs one image.

A worker that dies (killed, out of memory, a decoder that crashes) or that spends minutes on one
image takes its chunk with it. The chunk is then tried again one image at a time, so that only an
image that brings a worker down by itself is left out, with the reason.
"""

from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from multiprocessing.connection import wait
from types import TracebackType
from typing import Any, Final, Self, cast

from vsc_serve.errors import DeviceError, VscError
from vsc_serve.executors.chunks import FIRST
from vsc_serve.executors.read import PixelSetup, Setup, stamp_of
from vsc_serve.executors.task import CHUNK, Bad, Chunk, Piece, Task, merge_pieces
from vsc_serve.executors.worker_process import Failed, Ready, Worker

IMAGE_LIMIT_S: Final = 120.0
"""Seconds a worker may spend on one image."""

TASKS_AHEAD: Final = 3
"""Tasks that a worker has before it, so that it never waits for the parent."""
_LOOK_S: Final = 0.5
"""Seconds between looks for workers that hang."""
_DEATHS: Final = 100
"""Deaths in a row, without one image done between them, that end the run."""


class ProcessPool:
    """Worker processes; they start when there is work for them, and end with the pool.

    Args:
        setup: How a worker opens the model.
        workers: Processes at most.
        image_limit_s: Seconds a worker may spend on one image.
    """

    def __init__(
        self, setup: Setup | PixelSetup, workers: int, *, image_limit_s: float = IMAGE_LIMIT_S
    ) -> None:
        self.workers = workers
        self.begun = 0
        self.kind = "processes"
        self.largest_chunk = CHUNK
        self.counts_near = True
        self._setup = setup
        self._image_limit_s = image_limit_s
        self._team: list[Worker] = []
        self._tasks: deque[Task] = deque()
        self._sizes: dict[int, int] = {}
        self._done: dict[int, list[Piece]] = {}
        self._provenance: dict[str, Any] | None = None
        self._deaths = 0

    def __enter__(self) -> Self:
        """Start the first worker."""
        self._hire()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """End the workers: at once after an error, else when they have nothing left."""
        for worker in self._team:
            if kind is None and not worker.tasks:
                worker.close()
            else:
                worker.kill()
        self._team.clear()

    def expect(self, count: int) -> None:
        """Start the workers that so many sources need, so that they open the model together."""
        while len(self._team) < min(self.workers, -(-count // FIRST)):
            self._hire()

    def provenance(self) -> dict[str, Any]:
        """Return what the codes come from, once a worker has opened the model.

        Raises:
            VscError: The model cannot be opened.
        """
        while self._provenance is None:
            self._listen()
        return self._provenance

    def run(self, chunks: Iterator[Chunk]) -> Iterator[Piece]:
        """Do the chunks; give what became of them, in order.

        Only as many chunks are taken as the workers have before them, so memory stays bounded.

        Raises:
            VscError: The model cannot be opened, or workers keep dying.
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
                self._hand_out()
            if not self._sizes:
                return
            self._hand_out()
            self._listen()
            while self._is_done(following):
                yield self._take(following)
                following += 1

    def _hire(self) -> Worker:
        worker = Worker(self._setup)
        self._team.append(worker)
        self.begun = max(self.begun, len(self._team))
        return worker

    def _is_done(self, number: int) -> bool:
        done = self._done.get(number, ())
        return bool(done) and sum(len(piece.stamps) for piece in done) == self._sizes[number]

    def _take(self, number: int) -> Piece:
        del self._sizes[number]
        return merge_pieces(self._done.pop(number))

    def _hand_out(self) -> None:
        """Give waiting tasks to the workers with the fewest; start another when all are busy."""
        while self._tasks:
            roomy = [one for one in self._team if one.has_room]
            worker = min(roomy, key=lambda one: len(one.tasks), default=None)
            if (worker is None or worker.tasks) and len(self._team) < self.workers:
                worker = self._hire()
            if worker is None or len(worker.tasks) >= TASKS_AHEAD:
                return
            worker.give(self._tasks.popleft())

    def _listen(self) -> None:
        """Take what the workers say, for half a second at most, and look for trouble."""
        lines = {worker.connection: worker for worker in self._team}
        for line in wait(list(lines), _LOOK_S):
            worker = lines[cast(Any, line)]
            try:
                message = worker.receive()
            except EOFError:
                self._bury(worker, worker.why_dead())
            else:
                self._hear(worker, message)
        for worker in list(self._team):
            if worker.is_ready and worker.silent_s() > self._image_limit_s:
                self._drain(worker)
                worker.kill()
                self._bury(worker, f"took over {self._image_limit_s:g} s")

    def _drain(self, worker: Worker) -> None:
        """Hear what a worker said before it began to hang."""
        with suppress(EOFError):
            while worker.connection.poll():
                self._hear(worker, worker.receive())

    def _hear(self, worker: Worker, message: Any) -> None:
        if isinstance(message, Failed):
            raise message.error or RuntimeError(f"in a worker process:\n{message.trace}")
        if isinstance(message, Ready):
            worker.is_ready = True
            self._provenance = self._provenance or message.provenance
            return
        task, piece = worker.finish(message)
        self._deaths = 0
        self._done.setdefault(task.number, []).append(piece)

    def _bury(self, worker: Worker, why: str) -> None:
        """Put a dead worker's tasks back, the one it was at as single images."""
        self._team.remove(worker)
        worker.connection.close()
        self._deaths += 1
        if self._deaths >= _DEATHS or self._provenance is None:
            raise self._cannot_go_on(why)
        had_begun = worker.is_ready and worker.tasks
        suspect = worker.tasks.popleft() if had_begun else None
        self._tasks.extendleft(reversed(worker.tasks))
        if suspect is not None:
            self._suspect(suspect, why)
        if not self._team:
            self._hire()

    def _suspect(self, task: Task, why: str) -> None:
        if len(task.sources) == 1:
            reason = f"brings its reader down ({why})"
            piece = self._setup.bad_piece(Bad(task.offset, reason), stamp_of(task.sources[0]))
            self._done.setdefault(task.number, []).append(piece)
            return
        singles = [
            Task(task.number, task.offset + place, (source,))
            for place, source in enumerate(task.sources)
        ]
        self._tasks.extendleft(reversed(singles))

    def _cannot_go_on(self, why: str) -> VscError:
        if self._provenance is None:
            return DeviceError(
                f"a worker process dies while it opens the model ({why})."
                " See `vsc doctor`; --workers 0 works without processes."
            )
        return DeviceError(
            f"{self._deaths} worker processes died one after the other ({why}). Is there enough"
            " memory? Try fewer --workers."
        )
