"""Console output for people: lines and progress on stderr; stdout belongs to `cli`."""

import logging
import signal
import sys
import threading
import time
import unicodedata
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from types import TracebackType
from typing import Final, Protocol, Self

from vsc_serve.errors import UsageError

_LABEL_WIDTH: Final = 9
_PLAIN_INTERVAL_S: Final = 10.0
"""Seconds between progress lines where stderr is not a terminal."""


_ACTED_UPON: Final = ("Cc", "Cf", "Cs", "Zl", "Zp")
"""Classes of characters that a terminal acts upon, or cannot show: controls, turns of direction,
half characters, ends of lines."""

_JOINERS: Final = "\u200c\u200d"
"""Invisible, but a part of words and emoji."""


def printable(text: str) -> str:
    """Return text for a terminal: what it would act upon is written as an escape, as Python does.

    Ids and names of files may hold anything: a line that is no line, or a sequence that colours,
    deletes or answers. Whatever prints one to a person goes through here; JSON is exact.
    """
    return text if text.isprintable() else "".join(map(_shown, text))


def _shown(letter: str) -> str:
    if letter in _JOINERS or unicodedata.category(letter) not in _ACTED_UPON:
        return letter
    return letter.encode("unicode_escape").decode("ascii")


class LineFormatter(logging.Formatter):
    """A formatter of log messages, each of which is one line and printable."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        """Return the line of a record; a traceback follows it as it is."""
        record.message = printable(record.message)
        return super().formatMessage(record)


def quiet_pillow() -> None:
    """Silence what Pillow warns of an image it reads all the same, such as a damaged TIFF tag.

    For processes that are ours: the command line and its workers. A program that uses the library
    keeps its own filters.
    """
    warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")


def say(label: str, text: str) -> None:
    """Print one line of talk to stderr: a label of fixed width, then the text."""
    sys.stderr.write(f"{label:<{_LABEL_WIDTH}}{printable(text)}\n")
    sys.stderr.flush()


def require_extra(extra: str, *modules: str) -> None:
    """Raise UsageError with the install command unless all the modules can be imported."""
    missing = [module for module in modules if find_spec(module) is None]
    if missing:
        raise UsageError(f"this needs {', '.join(missing)}. Run: pip install 'vsc-serve[{extra}]'")


@contextmanager
def ending_cleanly() -> Iterator[None]:
    """Let SIGTERM end the block as Ctrl-C does: what is in hand is put away, exit code 130."""

    def stop(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread takes signals
        return
    earlier = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, earlier)


@contextmanager
def holding_signals() -> Iterator[None]:
    """Let SIGINT and SIGTERM that arrive in the block take effect at its end.

    For what is short and must not be left between two states.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread takes signals
        return
    arrived: list[int] = []
    earlier = {
        number: signal.signal(number, lambda number, frame: arrived.append(number))
        for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield
    finally:
        for number, handler in earlier.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        if arrived:
            signal.raise_signal(arrived[0])


class Progress(Protocol):
    """Takes note of work that is done."""

    def update(self, done: int, note: str = "") -> None:
        """Say how many units are done in all, and anything else worth a few words."""

    def expect(self, total: int) -> None:
        """Say how many units there are in all, once that is known."""


@contextmanager
def progress(label: str, total: int | None, unit: str) -> Iterator[Progress]:
    """Show progress on stderr: a bar on a terminal, else a line now and then.

    Args:
        label: What is being done.
        total: Units in all; None while that is not known.
        unit: What is counted, in the plural.
    """
    if sys.stderr.isatty():
        with _Bar(label, total, unit) as bar:
            yield bar
    else:
        yield _Lines(label, total, unit)


class _Lines:
    """Progress as plain lines, at most one every ten seconds, and none for short work."""

    def __init__(self, label: str, total: int | None, unit: str) -> None:
        self._label, self._total, self._unit = label, total, unit
        self._began = self._shown = time.monotonic()

    def expect(self, total: int) -> None:
        self._total = total

    def update(self, done: int, note: str = "") -> None:
        now = time.monotonic()
        if now - self._shown < _PLAIN_INTERVAL_S:
            return
        self._shown = now
        rate = done / (now - self._began)
        if self._total is None:
            say(self._label, f"{done:,} {self._unit}, {rate:,.0f}/s  {note}")
            return
        left = (self._total - done) / rate if rate else 0.0
        say(
            self._label,
            f"{done:,} of {self._total:,} {self._unit}, {rate:,.0f}/s, {left:.0f} s left  {note}",
        )


class _Bar:
    """Progress as a bar that is redrawn."""

    def __init__(self, label: str, total: int | None, unit: str) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as RichProgress

        self._unit = unit
        self._began = time.monotonic()
        self._bar = RichProgress(
            TextColumn(f"{label:<{_LABEL_WIDTH - 1}}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}", markup=False),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}", markup=False),
            console=Console(stderr=True),
            transient=True,
        )
        self._task = self._bar.add_task(label, total=total, rate="", note="")

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.stop()

    def expect(self, total: int) -> None:
        self._bar.update(self._task, total=total)

    def update(self, done: int, note: str = "") -> None:
        rate = done / max(time.monotonic() - self._began, 1e-9)
        self._bar.update(
            self._task, completed=done, rate=f"{rate:,.0f} {self._unit}/s", note=printable(note)
        )
