"""Read plain small PNG files quickly.

Of the 35 us that Pillow takes for a 28x28 picture, most goes into objects for what plain files do
not have. This reads those files and nothing else: everything odd or broken gives None, and Pillow
says what it is. Pixels come from Pillow's own decoder either way.
"""

import zlib
from typing import Any, Final

from PIL import Image

_LARGEST: Final = 65_536
"""Files over this size are left to Pillow, which does not hold them up."""
_START: Final = b"\x89PNG\r\n\x1a\n\x00\x00\x00\x0dIHDR"
_MODES: Final = {b"\x08\x00\x00\x00\x00": "L", b"\x08\x02\x00\x00\x00": "RGB"}
"""Bit depth, colour type, compression, filter, interlace, as IHDR has them."""
_WITHOUT_MEANING: Final = {b"pHYs": 9, b"gAMA": 4, b"sRGB": 1, b"cHRM": 32, b"tIME": 7}
"""Chunks that change no pixel here, and their only right length."""


def read_plain_png(content: bytes, max_pixels: int) -> Image.Image | None:
    """Decode an 8-bit grey or RGB file without interlacing or transparency.

    Args:
        content: The file.
        max_pixels: Largest picture to decode.

    Returns:
        The picture; None for anything else than an intact file of this kind.
    """
    mode = _MODES.get(content[24:29])
    if mode is None or content[:16] != _START or len(content) > _LARGEST:
        return None
    size = (int.from_bytes(content[16:20]), int.from_bytes(content[20:24]))
    compressed = _compressed(content)
    if not compressed or not 0 < size[0] * size[1] <= max_pixels:
        return None
    try:
        return Image.frombytes(mode, size, compressed, "zip", mode, 0)
    except (ValueError, OSError):
        return None


def read_exact_png(content: bytes, size: tuple[int, int], mode: str) -> bytes | None:
    """Decode a plain file that has the size and mode wanted, straight to its pixels.

    Half the time of `read_plain_png` and `tobytes`: Pillow's decoder is called without the objects
    around it. That is no public interface, so whatever has changed there gives None.

    Args:
        content: The file.
        size: Width and height it must have.
        mode: `L` or `RGB`.

    Returns:
        Pixels, row by row; None for anything else than an intact file of this kind.
    """
    count = size[0] * size[1] * (1 if mode == "L" else 3)
    header = size[0].to_bytes(4) + size[1].to_bytes(4)
    is_wanted = content[:24] == _START + header and _MODES.get(content[24:29]) == mode
    if not is_wanted or count > _LARGEST or len(content) > _LARGEST:
        return None
    compressed = _compressed(content)
    try:
        return _decode(compressed, size, mode, count) if compressed else None
    except (AttributeError, KeyError, TypeError, ValueError, OSError, SystemError):
        return None


def _decode(compressed: bytes, size: tuple[int, int], mode: str, count: int) -> bytes | None:
    core: Any = vars(Image)["core"]
    box = (0, 0, *size)
    memory = core.new(mode, size)
    decoder = core.zip_decoder(mode, mode, 0)
    decoder.setimage(memory, box)
    used, error = decoder.decode(compressed)
    if used >= 0 or error:  # used is below 0 when the picture is complete
        return None
    encoder = core.raw_encoder(mode, mode, 0, 1)
    encoder.setimage(memory, box)
    _, _, pixels = encoder.encode(count)
    return bytes(pixels) if len(pixels) == count else None


def _compressed(content: bytes) -> bytes:
    """Return the pixel data of a file whose chunks are all known and intact, else nothing."""
    parts: list[bytes] = []
    position = 8
    previous = b""
    while True:
        data = position + 8
        kind = content[position + 4 : data]
        end = data + int.from_bytes(content[position : data - 4])
        if zlib.crc32(content[position + 4 : end]).to_bytes(4) != content[end : end + 4]:
            return b""
        if kind == b"IDAT" and (not parts or previous == kind):
            parts.append(content[data:end])
        elif kind == b"IEND" or not _may_be_skipped(kind, end - data, position):
            return b"".join(parts) if kind == b"IEND" else b""
        position, previous = end + 4, kind


def _may_be_skipped(kind: bytes, length: int, position: int) -> bool:
    return _WITHOUT_MEANING.get(kind) == length or (kind == b"IHDR" and position == 8)
