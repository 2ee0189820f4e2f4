"""Decode JPEG with simplejpeg where it is installed: the pixels that Pillow gives, in less time.

Both stand on libjpeg-turbo. What simplejpeg does not do the same way (other colour models than grey
and YCbCr, files with damage that Pillow reads past) gives None, and Pillow decodes it.
"""

from functools import cache
from types import ModuleType
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

_COLORSPACES: Final = {"L": "GRAY", "RGB": "RGB"}
_SMALLEST_SCALED_SIDE: Final = 64
"""Smaller pictures have the same size at two scales, and simplejpeg chooses by size."""

_START: Final = b"\xff\xd8"
_FRAMES: Final = (0xC0, 0xC1, 0xC2)
"""Baseline, extended and progressive, Huffman-coded."""
_TABLES: Final = (0xC4, 0xDB, 0xDD, 0xFE)
"""Huffman and quantisation tables, restart interval, comment: nothing that turns or recolours."""
_JFIF, _SCAN = 0xE0, 0xDA
_MODES: Final = {1: "L", 3: "RGB"}


class PlainHeader(NamedTuple):
    """What a JPEG without EXIF, colour profile and the like says of itself."""

    mode: str
    """Colour mode as Pillow gives it."""
    size: tuple[int, int]
    """Width and height."""


def read_plain_header(content: bytes) -> PlainHeader | None:
    """Read the header of a JPEG that has nothing but JFIF data, tables and one frame.

    Args:
        content: The file.

    Returns:
        Its mode and size; None for everything else, which Pillow has to look at.
    """
    if content[:2] != _START:
        return None
    position, header = 2, None
    while content[position : position + 1] == b"\xff":
        marker = content[position + 1 : position + 2]
        segment = content[position + 4 : position + 2 + _length(content, position)]
        if marker == bytes([_SCAN]):
            return header
        if marker and marker[0] in _FRAMES and header is None:
            header = _read_frame(segment)
        elif not _is_plain(marker, segment):
            return None
        position += 2 + _length(content, position)
    return None


def _length(content: bytes, position: int) -> int:
    return int.from_bytes(content[position + 2 : position + 4])


def _read_frame(segment: bytes) -> PlainHeader | None:
    """Return mode and size from a frame header with 8 bits a sample."""
    mode = _MODES.get(segment[5]) if len(segment) > 5 and segment[0] == 8 else None
    height, width = int.from_bytes(segment[1:3]), int.from_bytes(segment[3:5])
    return None if mode is None else PlainHeader(mode, (width, height))


def _is_plain(marker: bytes, segment: bytes) -> bool:
    """Tell whether a segment changes no pixel by itself."""
    if marker == bytes([_JFIF]):
        return segment.startswith(b"JFIF\0") and len(segment) >= 14
    return bool(segment) and marker[0] in _TABLES


@cache
def find_simplejpeg() -> ModuleType | None:
    """Return the module, or None where the extra `fast` is not installed."""
    try:
        import simplejpeg
    except ImportError:
        return None
    return simplejpeg  # type: ignore[no-any-return]  # it has no type information


def decode_jpeg(
    content: bytes, mode: str, size: tuple[int, int], scale: int
) -> NDArray[np.uint8] | None:
    """Decode a JPEG at a reduced scale.

    Args:
        content: The file.
        mode: Colour mode as Pillow gives it for this file.
        size: Width and height of the picture in the file.
        scale: 1, 2, 4 or 8: what both sides are divided by, rounded up.

    Returns:
        Pixels, uint8, shape (height, width, 1 or 3), not turned; None when Pillow has to decode it.
    """
    simplejpeg = find_simplejpeg()
    if simplejpeg is None or mode not in _COLORSPACES:
        return None
    if scale > 1 and min(size) < _SMALLEST_SCALED_SIDE:
        return None
    width, height = (-(-side // scale) for side in size)
    try:
        pixels: NDArray[np.uint8] = simplejpeg.decode_jpeg(
            content, _COLORSPACES[mode], min_height=height, min_width=width, min_factor=scale
        )
    except ValueError:
        return None
    return pixels if pixels.shape[:2] == (height, width) else None
