"""Standard streams of a command: a result is written or its loss is an error, talk is never one.

`prepare` is for the command line, which owns its process. A stream that the caller closed, a reader
that goes away (`| head`), a full disk and an encoding that lacks a letter each have one answer.
"""

import io
import os
import select
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Final

from vsc_serve.errors import InputError

if TYPE_CHECKING:
    from typing_extensions import Buffer

_STDIN, _STDOUT, _STDERR = range(3)

# The wrong way round for the first two, so that using a stream that is closed is an error.
_CLOSED: Final = {_STDIN: os.O_WRONLY, _STDOUT: os.O_RDONLY, _STDERR: os.O_WRONLY}


class ReaderGone(Exception):
    """Nobody reads stdout any more: the command can end, and nothing has failed."""


def prepare() -> None:
    """Take over stdin, stdout and stderr of this process, unless somebody else has.

    Letters that the encoding lacks are written as escapes. On stdout a reader that went away raises
    ReaderGone and a full disk InputError; on stderr both are ignored.
    """
    if sys.stdout is not sys.__stdout__ or sys.stderr is not sys.__stderr__:
        return
    for number, mode in _CLOSED.items():
        _occupy(number, mode)
    if sys.stdin is None:
        sys.stdin = Path(os.devnull).open(encoding="utf-8")  # noqa: SIM115  # until the end
    sys.stdout = _text_stream(_Output(_STDOUT, _lose_no_result), sys.stdout)
    sys.stderr = _text_stream(_Output(_STDERR, _ignore), sys.stderr, line_buffering=True)


def _occupy(number: int, mode: int) -> None:
    """Put something in the place of a closed stream: the next file opened would take its place."""
    try:
        os.fstat(number)
    except OSError:
        file = os.open(os.devnull, mode)
        if file != number:
            os.dup2(file, number)
            os.close(file)
        os.set_inheritable(number, True)


def _text_stream(
    raw: "_Output", earlier: io.TextIOWrapper | None, *, line_buffering: bool = False
) -> io.TextIOWrapper:
    return io.TextIOWrapper(
        io.BufferedWriter(raw),
        encoding=earlier.encoding if earlier else "utf-8",
        errors="backslashreplace",
        line_buffering=line_buffering or raw.isatty(),
    )


class _Output(io.RawIOBase):
    """Bytes to a standard stream. Once something is wrong with it, they go nowhere."""

    def __init__(self, number: int, on_error: Callable[[OSError], None]) -> None:
        self._number = number
        self._on_error = on_error

    def fileno(self) -> int:
        return self._number

    def isatty(self) -> bool:
        return os.isatty(self._number)

    def writable(self) -> bool:
        return True

    def write(self, content: "Buffer") -> int:
        while True:
            try:
                return os.write(self._number, content)
            except BlockingIOError:
                select.select([], [self._number], [])
            except OSError as error:
                self._silence()
                self._on_error(error)
                return memoryview(content).nbytes

    def _silence(self) -> None:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self._number)
        os.close(nowhere)


def _lose_no_result(error: OSError) -> None:
    if isinstance(error, BrokenPipeError):
        raise ReaderGone from error
    raise InputError(
        f"stdout cannot be written ({error.strerror}). What was printed is not whole."
    ) from error


def _ignore(error: OSError) -> None:
    """Go on: what a command does matters more than what it says about it."""
