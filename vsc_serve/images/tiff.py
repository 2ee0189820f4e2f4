"""TIFF beyond Pillow: depths, palettes and white-is-zero, and no limit of its own."""

from functools import cache
from io import BytesIO
from typing import Any, Final

import numpy as np
from PIL import Image
from PIL.TiffImagePlugin import TiffImageFile

from vsc_serve.errors import InputError

_WIDTH, _HEIGHT, _BITS, _PHOTOMETRIC, _PALETTE, _SAMPLE_FORMAT = 256, 257, 258, 262, 320, 339
_STRIP_OFFSETS, _SAMPLES, _ROWS, _PLANES = 273, 277, 278, 284
_TILE_WIDTH, _TILE_HEIGHT, _TILE_OFFSETS = 322, 323, 324
_SEPARATE: Final = 2
_WHITE_IS_ZERO: Final = 0
_SIGNED: Final = 2
_PIXEL: Final = 86
"""Where the only pixel of the file below lies: behind a header and six entries."""


class UnlimitedTiff(TiffImageFile):
    """A TIFF file whose size Pillow does not hold against a limit of the whole process."""

    def load_prepare(self) -> None:
        """Provide the memory that pixels are decoded to, as Pillow would after its check."""
        size = self.tag_v2[_WIDTH], self.tag_v2[_HEIGHT]
        self.im = Image.new(self.mode, size, None).im  # None: not filled
        super().load_prepare()


def load_tiff(image: TiffImageFile) -> Image.Image:
    """Decode an opened TIFF to what a viewer shows of it.

    Raises:
        InputError: Its numbers are signed.
    """
    tags = dict(image.tag_v2)  # decoding may close the file
    if _SIGNED in _tuple(tags.get(_SAMPLE_FORMAT)):
        raise InputError(
            "signed numbers have no defined range; save as 8-bit or 16-bit PNG", kind="unsupported"
        )
    _check_strips(tags)
    image.load()
    if image.mode.startswith("I;16"):
        return _eight_bits(image, tags)
    palette = _tuple(tags.get(_PALETTE))
    if image.mode in ("P", "PA") and palette and max(palette) <= 0xFF:  # 8 bits instead of 16
        image.putpalette(bytes(palette), "RGB;L")
    return image


def _check_strips(tags: dict[int, Any]) -> None:
    """Refuse a file with fewer strips or tiles than its image has: Pillow leaves the rest black."""
    is_tiled = _TILE_OFFSETS in tags
    width = tags.get(_TILE_WIDTH) if is_tiled else tags[_WIDTH]
    height = tags.get(_TILE_HEIGHT) if is_tiled else tags.get(_ROWS, tags[_HEIGHT])
    if not (isinstance(width, int) and isinstance(height, int) and width > 0 and height > 0):
        return  # Pillow says what is wrong
    needed = -(-tags[_WIDTH] // width) * -(-tags[_HEIGHT] // height)
    if tags.get(_PLANES) == _SEPARATE:
        needed *= tags.get(_SAMPLES, 1)
    if len(_tuple(tags.get(_TILE_OFFSETS if is_tiled else _STRIP_OFFSETS))) < needed:
        raise InputError("broken image: part of its strips or tiles are missing", kind="broken")


def _tuple(value: object) -> tuple[int, ...]:
    return value if isinstance(value, tuple) else ()


def _eight_bits(image: Image.Image, tags: dict[int, Any]) -> Image.Image:
    """Return the upper eight bits of a grey image that has more."""
    bits = (*_tuple(tags.get(_BITS)), 16)[0]
    values = np.asarray(image).astype(np.uint16) >> (bits - 8)
    if tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO and not _pillow_inverts():
        values = 0xFF - values
    return Image.fromarray(values.astype(np.uint8))


@cache
def _pillow_inverts() -> bool:
    """Tell whether this release of Pillow inverts 16-bit white-is-zero; up to 13.0 none does."""
    tags = {_WIDTH: 1, _HEIGHT: 1, _BITS: 16, _PHOTOMETRIC: 0, _STRIP_OFFSETS: _PIXEL, _ROWS: 1}
    entries = b"".join(
        tag.to_bytes(2, "little") + b"\3\0\1\0\0\0" + value.to_bytes(4, "little")
        for tag, value in tags.items()
    )
    content = b"II*\0\x08\0\0\0" + len(tags).to_bytes(2, "little") + entries
    with TiffImageFile(BytesIO(content.ljust(_PIXEL, b"\0") + b"\0\0")) as image:
        return image.getpixel((0, 0)) != 0
