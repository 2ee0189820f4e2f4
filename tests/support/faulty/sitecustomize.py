"""Faults for processes of `vsc` at a chosen moment; Python imports this when one starts.

`VSC_TEST_FAULT` holds a `Fault` as JSON. A moment is the number of an event that Python reports to
audit hooks: a file opened, renamed or removed, a folder listed, a module imported, a result
received. `fork_vsc` runs commands with it; `test_faults.py` says what must come of them.
"""

import errno
import json
import os
import signal
import sys
import threading
import time
from dataclasses import dataclass
from typing import Any, Final

VARIABLE: Final = "VSC_TEST_FAULT"
_READS: Final = frozenset({"open", "os.listdir", "os.scandir"})
_CHANGES: Final = frozenset(
    {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "test.fsync"}
)
_FOR_WRITING: Final = os.O_WRONLY | os.O_RDWR | os.O_CREAT


@dataclass(kw_only=True)
class Fault:
    """What goes wrong, in which process, when, and for how long."""

    action: str = "none"
    """A signal; `unmount`; the name of an errno; `none` only counts."""
    role: str = "any"
    """`main` or `worker`."""
    place: str = ""
    """Folder whose events are counted and fail; empty for every event of the process."""
    only_changes: bool = False
    """Whether what only reads goes on."""
    at: int = 1
    """Number of the event at which it begins, counted in each process."""
    mark: str = ""
    """File that says that it has begun. A signal comes once; the rest lasts, in all processes."""


class Injector:
    """Counts the events of a process, and makes the fault happen."""

    def __init__(self, fault: Fault) -> None:
        self.fault = fault
        self.count = 0
        self._lock, self._acting = threading.Lock(), threading.local()
        time.sleep = lambda seconds: None  # what is tried again for a minute is over at once
        is_worker = "worker_main" in sys.orig_argv[-1]
        if fault.role in ("any", "worker" if is_worker else "main"):
            _announce_fsync()
            sys.addaudithook(self._notice)

    def _notice(self, event: str, arguments: tuple[Any, ...]) -> None:
        if getattr(self._acting, "now", False) or not self._concerns(event, arguments):
            return
        self._acting.now = True
        try:
            with self._lock:
                self.count += 1
                if self.fault.action != "none":
                    self._act()
        finally:
            self._acting.now = False

    def _concerns(self, event: str, arguments: tuple[Any, ...]) -> bool:
        place, is_change = self.fault.place, event in _CHANGES
        if not place:
            return True
        if not arguments or not isinstance(arguments[0], str | os.PathLike):
            return False
        if event == "open":
            is_change = isinstance(arguments[2], int) and bool(arguments[2] & _FOR_WRITING)
        if not (is_change or (event in _READS and not self.fault.only_changes)):
            return False
        path = os.fspath(arguments[0])
        if event in ("os.remove", "os.rmdir") and arguments[1] >= 0:  # as rmtree removes
            path = _path_of(arguments[1])
        return path.startswith(place)

    def _act(self) -> None:
        fault = self.fault
        has_begun = os.path.exists(fault.mark)  # noqa: PTH110
        if not has_begun and self.count < fault.at:
            return
        if not has_begun:
            os.close(os.open(fault.mark, os.O_CREAT | os.O_WRONLY))
        if fault.action.startswith("SIG"):
            if not has_begun:
                os.kill(os.getpid(), getattr(signal, fault.action))
        elif fault.action != "unmount":
            number = getattr(errno, fault.action)
            raise OSError(number, os.strerror(number))
        elif not has_begun:  # `umount` leaves an empty folder
            os.rename(fault.place, f"{fault.place}.gone")  # noqa: PTH104
            os.mkdir(fault.place)  # noqa: PTH102


def _path_of(file: int) -> str:
    """Return the path of an open file or folder (Linux)."""
    return os.readlink(f"/proc/self/fd/{file}")  # noqa: PTH115


def _announce_fsync() -> None:
    """Make `os.fsync` an event."""
    real = os.fsync

    def fsync(file: int) -> None:
        sys.audit("test.fsync", _path_of(file))
        real(file)

    os.fsync = fsync


if VARIABLE in os.environ:
    Injector(Fault(**json.loads(os.environ[VARIABLE])))
