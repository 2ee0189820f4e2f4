"""How a camera was held: the rotation noted in EXIF or XMP data, and how it is undone.

Only this one entry is read: Pillow's own EXIF reader goes through all, and warns of odd ones.
"""

import re
from typing import Final, Literal

from PIL import Image

_TAG: Final = 0x0112
_NUMBER_BYTES: Final = {1: 1, 3: 2, 4: 4}
"""Length of a number by its TIFF type: BYTE, SHORT, LONG."""
_ENTRY_BYTES: Final = 12
_EXIF: Final = b"Exif\0\0"
_IN_XMP: Final = re.compile(rb'tiff:Orientation(?:="|>)([0-9])')
_UPRIGHT: Final = 1
_TURNS: Final = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
TRANSPOSED: Final = (5, 6, 7, 8)
"""Orientations whose stored rows are columns of the upright image."""


def find_orientation(exif: bytes, xmp: bytes) -> int:
    """Return the orientation that a file notes.

    Args:
        exif: EXIF data, empty where there are none.
        xmp: XMP data, which count where EXIF does not say; empty where there are none.

    Returns:
        1 to 8 as EXIF numbers it; 1, upright, where the file does not say or makes no sense.
    """
    noted = _find_in_exif(exif.removeprefix(_EXIF).removeprefix(_EXIF))
    if noted is None and xmp:
        found = _IN_XMP.search(xmp)
        noted = int(found[1]) if found else None
    return noted if noted in _TURNS else _UPRIGHT


def _find_in_exif(exif: bytes) -> int | None:
    """Return the value of the entry, None where it is missing."""
    if exif[:2] not in (b"II", b"MM"):
        return None
    order: Literal["little", "big"] = "little" if exif[:2] == b"II" else "big"
    start = int.from_bytes(exif[4:8], order)
    count = int.from_bytes(exif[start : start + 2], order)
    last = min(start + 2 + count * _ENTRY_BYTES, len(exif) - _ENTRY_BYTES + 1)
    for entry in range(start + 2, last, _ENTRY_BYTES):
        if int.from_bytes(exif[entry : entry + 2], order) == _TAG:
            length = _NUMBER_BYTES.get(int.from_bytes(exif[entry + 2 : entry + 4], order), 2)
            return int.from_bytes(exif[entry + 8 : entry + 8 + length], order)
    return None


def read_orientation(image: Image.Image) -> int:
    """Return how a loaded image is turned, 1 to 8 as EXIF numbers it; 1 where it does not say."""
    if image.format == "TIFF":  # Pillow turns it while it is loaded
        return _UPRIGHT
    exif = image.info.get("exif") or exif_in_text(image.info.get("Raw profile type exif", ""))
    xmp = image.info.get("XML:com.adobe.xmp") or image.info.get("xmp") or b""
    return find_orientation(exif, xmp.encode() if isinstance(xmp, str) else xmp)


def exif_in_text(text: str) -> bytes:
    """Return EXIF data from the PNG text in which ImageMagick puts them in hexadecimal."""
    try:
        return bytes.fromhex("".join(text.split("\n")[3:]))
    except ValueError:
        return b""


def turn_upright(image: Image.Image, orientation: int) -> Image.Image:
    """Undo the rotation that the camera noted."""
    turn = _TURNS.get(orientation)
    return image if turn is None else image.transpose(turn)
