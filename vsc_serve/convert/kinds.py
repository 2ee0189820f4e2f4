"""Kinds of files that conversions write, for `outputs.check_output`."""

import struct
from pathlib import Path
from typing import Final

from vsc_serve.outputs import FileKind, begins_with

_HEADER: Final = struct.Struct("<3q")


def _is_text(path: Path) -> bool:
    with path.open("rb") as file:
        start = file.read(4096)
    # Every line format begins a row with an object of JSON, or (COPY of PostgreSQL) holds a tab.
    return b"\0" not in start and (start.startswith((b'{"', b'"')) or b"\t{" in start)


def _is_bigann(path: Path) -> bool:
    with path.open("rb") as file:
        start = file.read(_HEADER.size)
    if len(start) < _HEADER.size:
        return False
    rows, _, entries = _HEADER.unpack(start)
    size: int = _HEADER.size + 8 * (rows + 1) + 8 * entries
    return path.stat().st_size == size


LINES: Final = FileKind(name="a file of lines of codes", recognises=_is_text)
PARQUET: Final = begins_with("a Parquet file", b"PAR1")
HDF5: Final = begins_with("an HDF5 file", b"\x89HDF\r\n\x1a\n")
BIGANN: Final = FileKind(name="a BigANN file", recognises=_is_bigann)
