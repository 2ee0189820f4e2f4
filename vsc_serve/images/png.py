"""PNG beyond Pillow: a quick way for plain small files, and transparent colours.

Of the time that Pillow takes for a 28x28 image, most goes into objects for what plain files do not
have. `read_plain_png` reads those files and nothing else: everything odd or broken gives None, and
Pillow says what it is. Pixels come from Pillow's decoder either way.
"""

import threading
import zlib
from collections.abc import Iterator
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from vsc_serve.images.orientation import exif_in_text

_SIGNATURE: Final = b"\x89PNG\r\n\x1a\n"
_START: Final = _SIGNATURE + b"\x00\x00\x00\x0dIHDR"
_LARGEST: Final = 65_536
"""Files over this size are left to Pillow's parser, which does not hold them up."""
_MODES: Final = {b"\x08\x00\x00\x00\x00": "L", b"\x08\x02\x00\x00\x00": "RGB"}
"""Bit depth, colour type, compression, filter, interlace, as IHDR has them."""
_WITHOUT_MEANING: Final = {b"pHYs": 9, b"gAMA": 4, b"sRGB": 1, b"cHRM": 32, b"tIME": 7}
"""Chunks that change no pixel here, and their only right length."""

_REUSED_PIXELS: Final = 65_536
"""Larger images get memory of their own."""

_GREY, _COLOUR = 0, 2
_TEXT: Final = (b"tEXt", b"zTXt", b"iTXt")
_UNUSED: Final = (*_TEXT, b"iCCP", b"acTL", b"fcTL", b"fdAT")
_EXIF_TEXT, _XMP_TEXT = b"Raw profile type exif\0", b"XML:com.adobe.xmp\0"
_MOST_TEXT: Final = 2**20
"""Bytes of a text that are looked at."""


class Chunk(NamedTuple):
    """One chunk of a file."""

    content: bytes
    """The file."""
    kind: bytes
    start: int
    """Where the data begin."""
    length: int

    @property
    def data(self) -> bytes:
        """What is in it."""
        return self.content[self.start : self.start + self.length]

    @property
    def end(self) -> int:
        """Where the next one begins."""
        return self.start + self.length + 4


def read_plain_png(content: bytes, max_pixels: int) -> Image.Image | None:
    """Decode an 8-bit grey or RGB file without interlacing or transparency.

    Args:
        content: The file.
        max_pixels: Largest image to decode.

    Returns:
        The image, which is this thread's until its next call; None for anything else than an intact
        file of this kind.
    """
    mode = _MODES.get(content[24:29])
    if mode is None or content[:16] != _START or len(content) > _LARGEST:
        return None
    size = (int.from_bytes(content[16:20]), int.from_bytes(content[20:24]))
    compressed = _compressed(content)
    if not compressed or not 0 < size[0] * size[1] <= max_pixels:
        return None
    image = _memory.provide(mode, size)
    try:
        image.frombytes(compressed, "zip", (mode, 0))
    except (ValueError, OSError):
        return None
    return image


def copy_pixels(image: Image.Image) -> NDArray[np.uint8]:
    """Return the pixels of an image from `read_plain_png`, shape (height, width, channels)."""
    if image is _memory.image and _memory.pixels is not None:
        return _memory.pixels.copy()
    pixels = np.frombuffer(image.tobytes(), np.uint8)
    return pixels.reshape(image.height, image.width, -1)


class _Memory(threading.local):
    """An image to decode to, one a thread, kept for the next file of the same size.

    New memory and `tobytes` take as long as decoding 28x28 pixels. So the image of a grey file has
    its pixels in an array, which `frombuffer` is for; whether decoding writes there is tried once.
    """

    def __init__(self) -> None:
        self.image = Image.new("L", (1, 1))
        self.pixels: NDArray[np.uint8] | None = None

    def provide(self, mode: str, size: tuple[int, int]) -> Image.Image:
        """Return memory; larger images get some of their own."""
        if size[0] * size[1] > _REUSED_PIXELS:
            return Image.new(mode, size)
        if self.image.mode != mode or self.image.size != size:
            self.image, self.pixels = Image.new(mode, size), None
            if mode == "L":
                self._share(size)
        return self.image

    def _share(self, size: tuple[int, int]) -> None:
        pixels = np.zeros((size[1], size[0], 1), np.uint8)
        image = Image.frombuffer("L", size, pixels, "raw", "L", 0, 1)
        image.frombytes(b"\xff" * pixels.size)
        if pixels.all():
            self.image, self.pixels = image, pixels


_memory: Final = _Memory()


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


def without_extras(content: bytes) -> bytes:
    """Return a file without the chunks that Pillow need not or must not see.

    Pillow refuses a whole image for a text or a colour profile of over 1 MiB, warns of animations
    that make no sense, and does not compare transparent colours at the depth of the file.
    """
    parts: list[bytes] = [content[:8]]
    end = 8
    for chunk in _chunks(content):
        if chunk.kind not in _UNUSED and not (chunk.kind == b"tRNS" and _has_colour_key(content)):
            parts.append(content[end : chunk.end])
        end = chunk.end
    return b"".join([*parts, content[end:]])


def _has_colour_key(content: bytes) -> bool:
    """Tell whether tRNS would be one transparent colour, and not the alphas of a palette."""
    return content[25] in (_GREY, _COLOUR)


def read_rotation(content: bytes) -> tuple[bytes, bytes]:
    """Return the EXIF and the XMP data of a file, for `find_orientation`."""
    exif, exif_text, xmp = b"", b"", b""
    for chunk in _chunks(content):
        if chunk.kind == b"eXIf":
            exif = chunk.data
        elif chunk.kind in _TEXT and content.startswith(_EXIF_TEXT, chunk.start):
            exif_text = _text(chunk)
        elif chunk.kind in _TEXT and content.startswith(_XMP_TEXT, chunk.start):
            xmp = _text(chunk)
    return exif or exif_in_text(exif_text.decode("latin-1")), xmp


def _text(chunk: Chunk) -> bytes:
    """Return the beginning of a text, unpacked; nothing where it is broken."""
    text = chunk.data.partition(b"\0")[2]
    is_packed = chunk.kind == b"zTXt" or (chunk.kind == b"iTXt" and text[:1] == b"\1")
    if chunk.kind == b"iTXt":  # two flags, a language, the keyword in it
        text = text[2:].split(b"\0", 2)[-1]
    elif chunk.kind == b"zTXt":
        text = text[1:]
    try:
        return zlib.decompressobj().decompress(text, _MOST_TEXT) if is_packed else text[:_MOST_TEXT]
    except zlib.error:
        return b""


def paint_colour_key(image: Image.Image, content: bytes) -> Image.Image:
    """Make white what has the one colour that a file declares transparent.

    Args:
        image: The file decoded without its tRNS chunk.
        content: The file.
    """
    length = 2 if content[25] == _GREY else 6
    keys = [chunk.data for chunk in _chunks(content) if chunk.kind == b"tRNS"]
    if not _has_colour_key(content) or not keys or len(keys[0]) < length:
        return image
    mask = _samples(image, content) == np.frombuffer(keys[0][:length], ">u2")
    painted = np.array(image)
    painted[mask.all(axis=2)] = np.iinfo(painted.dtype).max if painted.dtype != bool else True
    return Image.fromarray(painted)


def _samples(image: Image.Image, content: bytes) -> NDArray[np.uint16]:
    """Return the numbers in a file, shape (height, width, 1 or 3)."""
    depth = content[24]
    samples: NDArray[np.uint16] = np.asarray(image).astype(np.uint16)
    samples = samples.reshape(image.height, image.width, -1)
    if depth in (2, 4):  # Pillow has spread them over 0 to 255
        samples //= 255 // (2**depth - 1)
    if depth == 16 and content[25] == _COLOUR:  # Pillow keeps the upper bytes
        data = b"".join(chunk.data for chunk in _chunks(content) if chunk.kind == b"IDAT")
        lower = Image.frombytes("RGB", image.size, data, "zip", "RGB;16L", content[28])
        samples = (samples << 8) | np.asarray(lower)
    return samples


def _chunks(content: bytes) -> Iterator[Chunk]:
    """Yield the chunks of a file up to one that is cut off."""
    position = len(_SIGNATURE)
    while position + 12 <= len(content):
        length = int.from_bytes(content[position : position + 4])
        if position + 12 + length > len(content):
            return
        yield Chunk(content, content[position + 4 : position + 8], position + 8, length)
        position += 12 + length
