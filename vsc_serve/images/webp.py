"""Sizes in a WebP file: of its canvas, before memory is taken for it, and of its first frame."""

from collections.abc import Iterator
from io import BytesIO
from typing import Final

from vsc_serve.images.compositing import Box

_HEADER_BYTES: Final = 12
_LOSSY_START: Final = b"\x9d\x01\x2a"


class ShortReads(BytesIO):
    """A file that gives its beginning in small parts.

    Pillow holds the size in the first 30 bytes of a WebP, if it gets as many at once, against a
    limit of the whole process. `canvas_size` is checked instead.
    """

    def read(self, size: int | None = -1, /) -> bytes:
        """Return up to 16 bytes, or all that are left."""
        return super().read(size if size is None or size < 0 else min(size, 16))


def canvas_size(content: bytes) -> tuple[int, int] | None:
    """Return width and height; None in a file that does not say."""
    kind, data = next(_chunks(content), (b"", b""))
    if kind == b"VP8X" and len(data) >= 10:
        return _number(data, 4, 3) + 1, _number(data, 7, 3) + 1
    if kind == b"VP8 " and data[3:6] == _LOSSY_START:
        return _number(data, 6, 2) & 0x3FFF, _number(data, 8, 2) & 0x3FFF
    if kind == b"VP8L" and len(data) >= 5:
        bits = _number(data, 1, 4)
        return (bits & 0x3FFF) + 1, ((bits >> 14) & 0x3FFF) + 1
    return None


def find_first_frame(content: bytes) -> Box | None:
    """Return where the first frame of an animation lies on the canvas; None in a still image."""
    for kind, data in _chunks(content):
        if kind == b"ANMF" and len(data) >= 12:
            left, top = 2 * _number(data, 0, 3), 2 * _number(data, 3, 3)
            return Box(left, top, left + _number(data, 6, 3) + 1, top + _number(data, 9, 3) + 1)
    return None


def _chunks(content: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Yield names and the first bytes of chunks."""
    position = _HEADER_BYTES
    while position + 8 <= len(content):
        length = _number(content, position + 4, 4)
        yield (
            content[position : position + 4],
            content[position + 8 : position + 8 + min(length, 16)],
        )
        position += 8 + length + length % 2


def _number(data: bytes, place: int, length: int) -> int:
    return int.from_bytes(data[place : place + length], "little")
