"""A worker process and the pipe to it.

The process is started afresh, not forked (the parent may have threads) and not through
`multiprocessing` (which would import the caller's main module once more). It gets one end of a
socket pair for messages and a shared counter that it raises with every image, so that the parent
can tell a slow image from a worker that hangs. When the parent dies the socket closes, and the
worker ends.
"""

import mmap
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections import deque
from functools import partial
from multiprocessing.connection import Connection
from time import monotonic
from typing import IO, Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from vsc_serve.errors import VscError
from vsc_serve.executors.read import ReadSpec, WorkerSpec
from vsc_serve.executors.task import ChunkResult, Task
from vsc_serve.sources import FileSource
from vsc_serve.sources.roots import Root

HEARTBEAT_BYTES: Final = 8
_EXIT_S: Final = 2.0
"""Seconds a worker gets to end by itself."""
_ENVIRONMENT: Final = {
    "OMP_NUM_THREADS": "1",
    # As measured: without these, glibc gives every image's memory back and takes it again, and a
    # fresh process decodes large images at six tenths of its speed.
    "MALLOC_MMAP_THRESHOLD_": str(2**28),
    "MALLOC_TRIM_THRESHOLD_": str(2**29),
}


class PathTask(NamedTuple):
    """A task of files below one root: their paths travel ten times faster than objects."""

    number: int
    offset: int
    paths: tuple[str, ...]
    root: Root | None

    def unpack(self) -> Task:
        """Return the task; a worker needs no ids."""
        sources = tuple(FileSource(path, path, self.root) for path in self.paths)
        return Task(self.number, self.offset, sources)


def _pack(task: Task) -> Task | PathTask:
    """Return a task as it travels to another process."""
    first = task.sources[0]
    root = first.root if isinstance(first, FileSource) else None
    paths = tuple(
        source.path for source in task.sources if type(source) is FileSource and source.root is root
    )
    is_all = len(paths) == len(task.sources)
    return PathTask(task.number, task.offset, paths, root) if is_all else task


class Ready(NamedTuple):
    """A worker has opened the model."""

    provenance: dict[str, Any]


class Failed(NamedTuple):
    """Something went wrong that is not one image's fault."""

    error: VscError | None
    """What the caller may act on; None for a bug."""
    trace: str
    """Where a bug was, as text."""


class Heartbeat:
    """A counter in memory that two processes share."""

    def __init__(self, memory: mmap.mmap) -> None:
        self._memory = memory

    @property
    def count(self) -> int:
        """Images begun since the worker started."""
        return int.from_bytes(self._memory[:HEARTBEAT_BYTES], "little")

    def beat(self, count: int) -> None:
        """Say that another image is begun."""
        self._memory[:HEARTBEAT_BYTES] = count.to_bytes(HEARTBEAT_BYTES, "little")


class WorkerProcess:
    """One worker process, seen from the parent.

    Args:
        spec: Its specification, which is the first message.
    """

    def __init__(self, spec: WorkerSpec) -> None:
        self.tasks: deque[Task] = deque()
        """Sent and not yet answered, the oldest first."""
        self.is_ready = False
        self.slots: NDArray[np.uint8] | None = None
        """Pixels that lie in shared memory, by slot."""
        self.free: list[int] = []
        """Slots that no task uses and no pixels are in."""
        self._used: deque[int | None] = deque()
        ours, theirs = socket.socketpair()
        with _shared_file(HEARTBEAT_BYTES + spec.shared_bytes) as shared, theirs:
            memory = mmap.mmap(shared.fileno(), 0)
            self._heartbeat = Heartbeat(memory)
            if isinstance(spec, ReadSpec):
                self.slots = spec.slots(memoryview(memory)[HEARTBEAT_BYTES:])
                self.free = list(range(spec.slot_count))
            self.process = _start(theirs.fileno(), shared.fileno())
        self.connection = Connection(ours.detach())
        self._seen = (0, monotonic())
        self._send(spec)

    @property
    def has_room(self) -> bool:
        """Whether there is memory for the pixels of another task."""
        return self.slots is None or bool(self.free)

    def give(self, task: Task) -> None:
        """Send a task."""
        if not self.tasks:
            self._seen = (self._heartbeat.count, monotonic())
        slot = self.free.pop() if self.slots is not None else None
        self.tasks.append(task)
        self._used.append(slot)
        self._send((_pack(task), slot))

    def finish(self, result: ChunkResult) -> tuple[Task, ChunkResult]:
        """Take the oldest task off, whose result this is; give it its pixels.

        Pixels of a part of a chunk are copied: they may have to wait for the other parts.
        """
        task, slot = self.tasks.popleft(), self._used.popleft()
        if self.slots is None or slot is None:
            return task, result
        pixels = self.slots[slot, : len(result.fresh())]
        if len(task.sources) > 1:
            return task, result.replace(pixels=pixels, release=partial(self.free.append, slot))
        self.free.append(slot)
        return task, result.replace(pixels=pixels.copy())

    def receive(self) -> Any:
        """Return the next message. Raises EOFError when the worker has exited."""
        try:
            message = self.connection.recv()
        except OSError as error:  # its end of the socket was reset
            raise EOFError from error
        self._seen = (self._heartbeat.count, monotonic())
        return message

    def silent_s(self) -> float:
        """Return the seconds since it last began an image or answered; 0 without a task."""
        if not self.tasks:
            return 0.0
        count, now = self._heartbeat.count, monotonic()
        if count != self._seen[0]:
            self._seen = (count, now)
        return now - self._seen[1]

    def exit_reason(self) -> str:
        """Return how a worker ended whose pipe has closed."""
        code = self.process.wait()
        if code >= 0:
            return f"exit code {code}"
        name = signal.Signals(-code).name
        return f"{name}: out of memory?" if name == "SIGKILL" else name

    def kill(self) -> None:
        """End the process at once."""
        self.process.kill()
        self.process.wait()
        self.connection.close()

    def close(self) -> None:
        """Let the process end: it does when the pipe closes."""
        self.connection.close()
        try:
            self.process.wait(_EXIT_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def _send(self, message: object) -> None:
        try:
            self.connection.send(message)
        except OSError:
            # It has exited: the parent reads that from its end of the pipe.
            return


def _shared_file(size: int) -> IO[bytes]:
    """Return an open file without a name, for memory: on Linux it never touches a disk."""
    if sys.platform == "linux":
        file: IO[bytes] = os.fdopen(os.memfd_create("vsc"), "r+b")
    else:
        file = tempfile.TemporaryFile()  # noqa: SIM115  # the caller closes it
    file.truncate(size)
    return file


def _start(channel: int, shared: int) -> "subprocess.Popen[bytes]":
    """Start the process with the parent's import path, outside the terminal's process group."""
    path = [os.fspath(place) for place in sys.path]  # programs put Paths there
    script = (
        f"import sys; sys.path[:] = {path!r};"
        f" from vsc_serve.executors.worker_main import main; main({channel}, {shared})"
    )
    return subprocess.Popen(
        [sys.executable, "-c", script],
        env=_ENVIRONMENT | os.environ,
        pass_fds=(channel, shared),
        process_group=0,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
    )
