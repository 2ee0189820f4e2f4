"""Main loop of a worker process: take tasks from the pipe until it closes."""

import mmap
import os
import signal
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from queue import SimpleQueue
from threading import Thread
from time import perf_counter
from typing import TypeAlias

from vsc_serve.console import quiet_pillow
from vsc_serve.errors import VscError
from vsc_serve.executors.read import EncodeWorker, ReadSpec, ReadWorker, WorkerSpec
from vsc_serve.executors.task import ChunkResult, Task
from vsc_serve.executors.worker_process import (
    HEARTBEAT_BYTES,
    Failed,
    Heartbeat,
    PathTask,
    Ready,
)

_Message: TypeAlias = tuple[Task | PathTask, int | None]
_Run: TypeAlias = Callable[[Task, int | None], ChunkResult]


def main(channel: int, shared: int) -> None:
    """Run a worker.

    Args:
        channel: File descriptor of the pipe to the parent.
        shared: File descriptor of the memory that both see: a counter of images, then pixels.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides when to stop
    quiet_pillow()
    connection = Connection(channel)
    try:
        spec: WorkerSpec = connection.recv()
        memory = mmap.mmap(shared, 0)
        worker = spec.open(Heartbeat(memory).beat)
        connection.send(Ready(worker.provenance))
        _work(connection, _runner(spec, worker, memory))
    except VscError as error:
        connection.send(Failed(error, ""))
    except Exception:  # noqa: BLE001  # whatever it is, the parent is to show it
        connection.send(Failed(None, traceback.format_exc()))


def _runner(spec: WorkerSpec, worker: EncodeWorker | ReadWorker, memory: mmap.mmap) -> _Run:
    """Return what does a task: encodes it, or fills the slot that comes with it."""
    if isinstance(worker, EncodeWorker):
        encoder = worker
        return lambda task, slot: encoder.run(task)
    assert isinstance(spec, ReadSpec)
    reader, slots = worker, spec.slots(memoryview(memory)[HEARTBEAT_BYTES:])
    return lambda task, slot: reader.run(task, slots[slot or 0])


def _work(connection: Connection, run: _Run) -> None:
    """Answer tasks in order. They leave the pipe at once, so that neither end ever blocks."""
    messages: SimpleQueue[_Message] = SimpleQueue()
    Thread(target=_receive, args=(connection, messages), daemon=True).start()
    while True:
        began = perf_counter()
        received, slot = messages.get()
        task = received.unpack() if isinstance(received, PathTask) else received
        waited = perf_counter() - began
        result = run(task, slot)
        result.seconds.waiting = waited
        connection.send(result)


def _receive(connection: Connection, messages: "SimpleQueue[_Message]") -> None:
    while True:
        try:
            messages.put(connection.recv())
        except (EOFError, OSError):
            os._exit(0)  # the parent has closed the pipe, or has exited: nobody waits
