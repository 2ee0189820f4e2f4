"""A list of paths on standard input."""

import os
import sys
from collections.abc import Iterator
from itertools import chain
from typing import BinaryIO, Final

from vsc_serve.errors import UsageError

_BLOCK: Final = 65_536


def read_paths() -> Iterator[str]:
    """Give the paths on standard input: between zero bytes if it has any, else one a line.

    Raises:
        UsageError: It is a terminal, where nobody has piped anything.
    """
    if sys.stdin.isatty():
        raise UsageError("-: a list of paths is read from a pipe, and this is a terminal")
    return _split(sys.stdin.buffer)


def _split(stream: BinaryIO) -> Iterator[str]:
    """Split what comes; the first block says by what."""
    first = stream.read(_BLOCK)
    mark = b"\0" if b"\0" in first else b"\n"
    rest = b""
    for block in chain([first], iter(lambda: stream.read(_BLOCK), b"")):
        *whole, rest = (rest + block).split(mark)
        yield from _decode(whole)
    yield from _decode([rest])


def _decode(paths: list[bytes]) -> Iterator[str]:
    for path in paths:
        cleaned = path.rstrip(b"\r\n")
        if cleaned:
            yield os.fsdecode(cleaned)
