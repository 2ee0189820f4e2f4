"""Decode JPEG with simplejpeg, and refuse a file whose image data are not whole.

libjpeg fills up with grey, or smears, where data are missing or damaged, and gives a warning only.
Pillow drops these warnings; simplejpeg reports the first one. So simplejpeg decodes, and it judges
the few files that Pillow has to decode. A sound file is decoded once and costs no more than before;
what follows a warning is rare and may take longer.
"""

import re
from typing import Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from vsc_serve.errors import InputError
from vsc_serve.images.jpeg_header import Header, read_header
from vsc_serve.images.jpeg_scans import (
    Scan,
    count_restarts,
    has_all_scans,
    read_scans,
    without_metadata,
)

try:
    import simplejpeg
except ImportError:  # it is required, but there may be no build of it for this machine
    simplejpeg = None

_COLORSPACES: Final = {1: "GRAY", 3: "RGB", 4: "CMYK"}
PILLOWS_MODES: Final = {1: "L", 3: "RGB", 4: "CMYK"}
_END_MARKER: Final = b"\xff\xd9"
_SMALLEST_SCALED_SIDE: Final = 64
"""Smaller images have the same size at two scales, and simplejpeg chooses by size."""
_PIXELS_A_BYTE: Final = 512
"""Pixels that a byte holds at most: Huffman codes take a bit for each block of 64."""

# libjpeg's own words (jerror.h), which are all that simplejpeg passes on.
_EXTRANEOUS: Final = re.compile(r"Corrupt JPEG data: (\d+) extraneous bytes before marker 0x(..)")
_ENDS_EARLY: Final = "Corrupt JPEG data: premature end"
_DAMAGED: Final = (
    "Corrupt JPEG data: bad Huffman code",
    "Corrupt JPEG data: bad arithmetic code",
    "Corrupt JPEG data: found marker",
)
_HARMLESS: Final = (
    "Inconsistent progression sequence",
    "Unknown Adobe color transform code",
)
"""Of these nothing is lost. Whatever else libjpeg says is an error, and ends the decoding."""
_END_OF_IMAGE: Final = "d9"
_MOST_EXTRANEOUS: Final = 16
"""Surplus bytes before a restart marker or another scan that some cameras write."""
_MOST_UNCOUNTED: Final = 8
"""Bytes that libjpeg may have taken and not used, and does not count as extraneous."""
_ZEROS: Final = bytes(64)
"""A stretch that sound image data cannot hold, unless zero bits mean flat blocks."""

_Pixels = NDArray[np.uint8]


def decode_jpeg(content: bytes, header: Header, scale: int) -> _Pixels | None:
    """Decode a JPEG at a reduced scale.

    Args:
        content: The file.
        header: Its header.
        scale: 1, 2, 4 or 8: what both sides are divided by, rounded up.

    Returns:
        Grey, RGB or CMYK (as ink), uint8, shape (height, width, 1, 3 or 4), not turned; None when
        Pillow has to decode it.

    Raises:
        InputError: The image data are not whole.
    """
    if header.is_huffman and header.size[0] * header.size[1] > _PIXELS_A_BYTE * len(content):
        raise _truncated()
    if simplejpeg is None or header.components not in _COLORSPACES:
        return None
    if header.is_lossless:  # simplejpeg 1.9 writes past its memory
        return None
    if scale > 1 and min(header.size) < _SMALLEST_SCALED_SIDE:
        _decode_whole(content, header, 1)
        return None
    pixels = _decode_whole(content, header, scale)
    return 255 - pixels if pixels is not None and header.components == 4 else pixels


def check_with_pillow(content: bytes) -> None:
    """Refuse a file that simplejpeg has not judged, as far as Pillow tells what it lacks.

    Of a sequential file without its end marker Pillow asks for more data, instead of making up what
    is missing. It has no way to tell where another scan or interval ends early.

    Args:
        content: The file, without metadata; Pillow has decoded it.
    """
    header = read_header(content)
    assert header is not None, "Pillow has decoded it"
    if header.is_lossless:  # its scans are of another kind
        return
    if not (header.has_one_scan and header.is_huffman):
        _check_scans(content, header)
        return
    data = content[: -len(_END_MARKER)]
    if _asks_for_more(data, header) or count_restarts(content, header) < header.restarts:
        raise _truncated()
    zeros = data.find(_ZEROS, header.scan)
    if zeros >= 0 and _asks_for_more(data[:zeros], header):  # else they follow the image
        _check_scans(content, header)


def _asks_for_more(data: bytes, header: Header) -> bool:
    """Tell whether Pillow wants more than these data of a sequential file."""
    mode = PILLOWS_MODES[header.components]
    width, height = (-(-side // 8) for side in header.size)
    data += bytes(_MOST_UNCOUNTED)
    try:
        Image.frombytes(mode, (width, height), data, "jpeg", mode, "", 8, 0)
    except ValueError:
        return True
    return False


def _decode_whole(content: bytes, header: Header, scale: int) -> _Pixels | None:
    """Decode what simplejpeg can decode. Raises InputError for data that are not whole."""
    try:
        pixels = _decode(content, header, scale, strict=True)
    except ValueError:
        return _decode_cleaned(without_metadata(content, header), scale)
    _check_scans(content, header)
    return pixels


def _decode(content: bytes, header: Header, scale: int, *, strict: bool) -> _Pixels:
    """Decode; ValueError for an error and, with `strict`, for the first warning."""
    width, height = (-(-side // scale) for side in header.size)
    pixels: _Pixels = simplejpeg.decode_jpeg(
        content,
        _COLORSPACES[header.components],
        min_height=height,
        min_width=width,
        min_factor=scale,
        strict=strict,
    )
    if pixels.shape[:2] != (height, width):
        raise ValueError(f"decoded to {pixels.shape}, not to {height}x{width}")
    return pixels


def _decode_cleaned(content: bytes, scale: int) -> _Pixels | None:
    """Decode a file in which libjpeg may object to nothing but the image data."""
    header = read_header(content)
    assert header is not None, "the header was read before"
    surplus = 0
    try:
        pixels = _decode(content, header, scale, strict=True)
    except ValueError as error:
        if not _is_warning(str(error)):
            return None  # Pillow decodes another kind, or gives the reason
        surplus = _count_surplus(str(error), header)
        if header.has_one_scan and count_restarts(content, header) < header.restarts:
            raise _truncated() from None
        pixels = _decode(content, header, scale, strict=False)
    _check_scans(content, header, surplus)
    return pixels


def _is_warning(message: str) -> bool:
    """Tell a warning, after which the image is decoded, from an error, after which it is not.

    Without `strict`, simplejpeg gives memory that was never written when an error follows a
    warning. The message is that of the error then.
    """
    known = (_ENDS_EARLY, *_DAMAGED, *_HARMLESS)
    return message.startswith(known) or _EXTRANEOUS.match(message) is not None


def _count_surplus(warning: str, header: Header) -> int:
    """Return how many bytes follow the data of a complete image. Raises InputError if damaged."""
    if warning.startswith(_ENDS_EARLY):
        raise _truncated()
    if warning.startswith(_DAMAGED):
        raise _damaged()
    found = _EXTRANEOUS.match(warning)
    if found is None:
        return 0
    if found[2] == _END_OF_IMAGE and header.has_one_scan:
        return int(found[1])
    if int(found[1]) > _MOST_EXTRANEOUS:
        raise _damaged()
    return 0


def _check_scans(content: bytes, header: Header, surplus: int = 0) -> None:
    """Refuse what libjpeg takes in silence: missing scans, and a stretch of zeros."""
    has_zeros = content.find(_ZEROS, header.scan) >= 0
    if header.has_one_scan and not has_zeros:
        return
    scans = read_scans(content, header)
    if not has_all_scans(header, scans):
        raise _truncated()
    if has_zeros and any(_is_zeroed(content, scan, surplus) for scan in scans):
        raise _damaged()


def _is_zeroed(content: bytes, scan: Scan, surplus: int) -> bool:
    """Tell whether part of a scan was overwritten by zeros.

    Zero bits may be flat blocks, refinements, or surplus bytes at the end. Otherwise they mean one
    coefficient of -1 after the other, which no encoder has met in an image.
    """
    end = scan.end - (surplus + _MOST_UNCOUNTED if surplus else 0)
    if content.find(_ZEROS, scan.start, end) < 0:
        return False
    has_values = any(symbol & 15 for symbol in scan.zero_runs)
    return bool(surplus) or (has_values and scan.last > 0 and scan.before == 0)


def _truncated() -> InputError:
    return InputError(
        "broken image: image file is truncated (the JPEG data end early)", kind="broken"
    )


def _damaged() -> InputError:
    return InputError("broken image: part of the JPEG data is damaged", kind="broken")
