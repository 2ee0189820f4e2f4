"""A list of paths on standard input."""

import codecs
import os
import sys
from collections.abc import Callable, Iterator
from itertools import chain
from typing import BinaryIO, Final

from vsc_serve.errors import InputError, UsageError

_BLOCK: Final = 65_536
_UTF_8_MARK: Final = codecs.BOM_UTF8
_UTF_16_MARKS: Final = {codecs.BOM_UTF16_LE: "utf-16-le", codecs.BOM_UTF16_BE: "utf-16-be"}


def read_paths() -> Iterator[str]:
    """Give the paths on standard input: between zero bytes if it has any, else one a line.

    A list that begins with a byte order mark, as Windows writes it, is UTF-8 or UTF-16.

    Raises:
        UsageError: It is a terminal, where nobody has piped anything.
        InputError: It begins as UTF-16 and is none; while the paths come.
    """
    if sys.stdin.isatty():
        raise UsageError("-: a list of paths is read from a pipe, and this is a terminal")
    return _split(sys.stdin.buffer)


def _split(stream: BinaryIO) -> Iterator[str]:
    """Split what comes; the first block says by what."""
    first = stream.read(_BLOCK).removeprefix(_UTF_8_MARK)
    blocks = iter(lambda: stream.read(_BLOCK), b"")
    if (encoding := _UTF_16_MARKS.get(first[:2])) is not None:
        blocks = _recode(chain([first[2:]], blocks), encoding)
        first = next(blocks, b"")
    mark = b"\0" if b"\0" in first else b"\n"
    rest = b""
    for block in chain([first], blocks):
        *whole, rest = (rest + block).split(mark)
        yield from _decode(whole)
    yield from _decode([rest])


def _recode(blocks: Iterator[bytes], encoding: str) -> Iterator[bytes]:
    """Give UTF-16 as the bytes that names of files have. Raises InputError where it is none."""
    decode: Callable[..., str] = codecs.getincrementaldecoder(encoding)().decode
    try:
        for block in blocks:
            yield os.fsencode(decode(block))
        decode(b"", final=True)
    except UnicodeError as error:
        raise InputError(
            f"-: the list begins as UTF-16 text and is none ({error}). Write it as UTF-8.",
            kind="broken",
        ) from error


def _decode(paths: list[bytes]) -> Iterator[str]:
    for path in paths:
        cleaned = path.rstrip(b"\r\n")
        if cleaned:
            yield os.fsdecode(cleaned)
