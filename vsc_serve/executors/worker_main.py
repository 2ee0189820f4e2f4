"""What a worker process does: take tasks from its line until the line closes."""

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

from vsc_serve.errors import VscError
from vsc_serve.executors.read import PixelSetup, PixelWork, Setup, Work
from vsc_serve.executors.task import PathTask, Piece, Task
from vsc_serve.executors.worker_process import PULSE_BYTES, Failed, Pulse, Ready

_Message: TypeAlias = tuple[Task | PathTask, int | None]
_Run: TypeAlias = Callable[[Task, int | None], Piece]


def main(channel: int, shared: int) -> None:
    """Run a worker.

    Args:
        channel: File descriptor of the line to the parent.
        shared: File descriptor of the memory that both see: a counter of images, then pixels.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides when to stop
    connection = Connection(channel)
    try:
        setup: Setup | PixelSetup = connection.recv()
        memory = mmap.mmap(shared, 0)
        work = setup.open(Pulse(memory).beat)
        connection.send(Ready(work.provenance))
        _work(connection, _runner(setup, work, memory))
    except VscError as error:
        connection.send(Failed(error, ""))
    except Exception:  # noqa: BLE001  # whatever it is, the parent is to show it
        connection.send(Failed(None, traceback.format_exc()))


def _runner(setup: Setup | PixelSetup, work: Work | PixelWork, memory: mmap.mmap) -> _Run:
    """Return what does a task: encodes it, or fills the slot that comes with it."""
    if isinstance(work, Work):
        encoder = work
        return lambda task, slot: encoder.run(task)
    assert isinstance(setup, PixelSetup)
    reader, slots = work, setup.slots(memoryview(memory)[PULSE_BYTES:])
    return lambda task, slot: reader.run(task, slots[slot or 0])


def _work(connection: Connection, run: _Run) -> None:
    """Answer tasks in order. They are taken off the line at once, so neither end ever blocks."""
    messages: SimpleQueue[_Message] = SimpleQueue()
    Thread(target=_receive, args=(connection, messages), daemon=True).start()
    while True:
        began = perf_counter()
        received, slot = messages.get()
        task = received.unpack() if isinstance(received, PathTask) else received
        waited = perf_counter() - began
        piece = run(task, slot)
        piece.seconds.waiting = waited
        connection.send(piece)


def _receive(connection: Connection, messages: "SimpleQueue[_Message]") -> None:
    while True:
        try:
            messages.put(connection.recv())
        except (EOFError, OSError):
            os._exit(0)  # the parent has closed the line, or is dead: nobody waits for an answer
