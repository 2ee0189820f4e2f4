"""Turn encoded images into pixels; what cannot be read becomes a reason, never a shifted row."""

import struct
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from PIL.ImageFile import ImageFile

from vsc_serve.errors import InputError, Kind
from vsc_serve.images import gif, webp
from vsc_serve.images.compositing import whiten_outside, without_clear_alpha
from vsc_serve.images.jpeg import PILLOWS_MODES, check_with_pillow, decode_jpeg
from vsc_serve.images.jpeg_header import Header, read_header
from vsc_serve.images.jpeg_scans import without_metadata
from vsc_serve.images.opening import describe_error, find_format, open_image
from vsc_serve.images.orientation import find_orientation, read_orientation, turn_upright
from vsc_serve.images.png import copy_pixels, paint_colour_key, read_plain_png, read_rotation
from vsc_serve.images.preprocess import PixelSpec, fit_pixels, jpeg_scale, to_pixels
from vsc_serve.sources import Source, read_file

MAX_PIXELS: Final = 89_478_485
"""Largest image that is decoded, in pixels: 341 MiB where Pillow keeps it, four bytes each."""
_PIXEL_BYTES: Final = 4
_TILE_TAGS: Final = (322, 323)
"""TIFF tags for the width and the height of a tile."""
_JPEG_START: Final = b"\xff\xd8\xff"

DECODE_ERRORS: Final = (
    *(OSError, SyntaxError, ValueError, EOFError, IndexError, OverflowError, TypeError, KeyError),
    *(RuntimeError, AttributeError, ZeroDivisionError, MemoryError, struct.error, zlib.error),
    AssertionError,
)
"""Exceptions of Pillow's decoders on broken images."""
_OVER_PILLOWS_LIMIT: Final = (Image.DecompressionBombError, Image.DecompressionBombWarning)
"""Exception of a release of Pillow that checks sizes where this one does not."""


@dataclass(frozen=True)
class BadImage:
    """A file that has no row, and why."""

    id: str
    reason: str
    kind: Kind = "unusable"
    """Kind of the fault."""


def read_pixels(
    image: Path | bytes, spec: PixelSpec, *, max_pixels: int = MAX_PIXELS
) -> NDArray[np.uint8]:
    """Read one image from a file or from its encoded bytes.

    Args:
        image: Path of the file, or the bytes of an encoded image.
        spec: What the model wants.
        max_pixels: Refuse an image of which more pixels than this must be decoded, before that is
            done. A JPEG may be larger: it is decoded at a reduced scale.

    Returns:
        Pixels, uint8, shape (height, width, channels).

    Raises:
        InputError: The image cannot be used; the message is the reason, without the path.
    """
    content = image if isinstance(image, bytes) else read_file(str(image))
    plain = read_plain_png(content, max_pixels)
    if plain is not None:
        is_whole = plain.size == (spec.width, spec.height) and spec.crop_pct == 1.0
        is_fitting = is_whole and plain.mode == spec.mode
        return copy_pixels(plain) if is_fitting else fit_pixels(plain, spec)
    try:
        if content.startswith(_JPEG_START):
            return _read_jpeg(content, spec, max_pixels)
        return _read_other(content, spec, max_pixels)
    except _OVER_PILLOWS_LIMIT as error:
        raise InputError(f"too large: {error}", kind="too large") from error
    except DECODE_ERRORS as error:
        raise InputError(f"broken image: {describe_error(error)}", kind="broken") from error


def _read_jpeg(content: bytes, spec: PixelSpec, max_pixels: int) -> NDArray[np.uint8]:
    header = read_header(content)
    if header is None:
        return _read_other(content, spec, max_pixels)
    scale = 1 if header.is_lossless else jpeg_scale(header.size, header.orientation, spec)
    _check_jpeg_size(header, scale, max_pixels)
    pixels = decode_jpeg(content, header, scale)
    if pixels is None:
        image = _decode_with_pillow(content, header, scale)
    elif pixels.shape == spec.shape and header.orientation == 1 and spec.crop_pct == 1.0:
        return pixels
    else:
        image = Image.frombytes(
            PILLOWS_MODES[pixels.shape[2]], pixels.shape[1::-1], pixels.tobytes()
        )
    return fit_pixels(turn_upright(image, header.orientation), spec)


def _decode_with_pillow(content: bytes, header: Header, scale: int) -> Image.Image:
    """Decode a JPEG of a kind that simplejpeg does not decode, or not to this size."""
    cleaned = without_metadata(content, header)
    with open_image(cleaned) as image:
        image.draft(None, (header.size[0] // scale, header.size[1] // scale))
        image.load()
    check_with_pillow(cleaned)
    return image


def _check_jpeg_size(header: Header, scale: int, max_pixels: int) -> None:
    """Refuse a JPEG by the memory that decoding takes."""
    width, height = header.size
    if -(-width // scale) * -(-height // scale) > max_pixels:
        reduced = f" (of which 1/{scale} is decoded)" if scale > 1 else ""
        raise _too_large(header.size, max_pixels, reduced)
    if not header.has_one_scan and header.coefficient_bytes > max_pixels * _PIXEL_BYTES:
        raise _too_large(header.size, max_pixels, ", in several scans and kept whole in memory,")


def _read_other(content: bytes, spec: PixelSpec, max_pixels: int) -> NDArray[np.uint8]:
    if find_format(content) == "WEBP":  # Pillow takes memory for it when it is opened
        _refuse_over(webp.canvas_size(content) or (0, 0), max_pixels, "")
    with open_image(content) as image:
        _refuse_over(image.size, max_pixels, "")
        _refuse_over(_tile_size(image), max_pixels, " in one tile")
        shown = _SHOW.get(image.format or "", _load)(image, content)
        turn = read_orientation(image)
    if image.format == "PNG":
        turn = find_orientation(*read_rotation(content))
    return fit_pixels(turn_upright(shown, turn), spec)


def _tile_size(image: ImageFile) -> tuple[int, int]:
    """Return width and height of the tiles of a TIFF, (1, 1) where it has none."""
    tags = getattr(image, "tag_v2", {})
    width, height = (tags.get(tag, 1) for tag in _TILE_TAGS)
    return (width, height) if isinstance(width, int) and isinstance(height, int) else (1, 1)


def _load(image: ImageFile, content: bytes) -> Image.Image:
    image.load()
    return image


def _load_png(image: ImageFile, content: bytes) -> Image.Image:
    return paint_colour_key(_load(image, content), content)


def _load_gif(image: ImageFile, content: bytes) -> Image.Image:
    box = gif.find_first_frame(content)
    loaded = _load(image, content)
    return loaded if box is None else whiten_outside(loaded, box)


def _load_webp(image: ImageFile, content: bytes) -> Image.Image:
    box = webp.find_first_frame(content)
    loaded = _load(image, content)
    return loaded if box is None else whiten_outside(loaded, box)


def _load_tiff(image: Any, content: bytes) -> Image.Image:
    from vsc_serve.images.tiff import load_tiff  # slow to import, and rarely needed

    return load_tiff(image)


def _load_bitmap(image: ImageFile, content: bytes) -> Image.Image:
    return without_clear_alpha(_load(image, content))


_SHOW: Final[dict[str, Callable[[Any, bytes], Image.Image]]] = {
    "PNG": _load_png,
    "GIF": _load_gif,
    "WEBP": _load_webp,
    "TIFF": _load_tiff,
    "BMP": _load_bitmap,
    "DIB": _load_bitmap,
    "TGA": _load_bitmap,
}
"""How an opened image becomes what a viewer shows, where loading it is not enough."""


def decode_pixels(
    image: Image.Image, spec: PixelSpec, *, max_pixels: int = MAX_PIXELS
) -> NDArray[np.uint8]:
    """Decode an opened image, like its file where it has not been loaded yet.

    Args:
        image: Image as `PIL.Image.open` returns it, or one that is in memory.
        spec: What the model wants.
        max_pixels: As for `read_pixels`.

    Returns:
        Pixels, uint8, shape (height, width, channels).

    Raises:
        InputError: The image cannot be used; the message is the reason.
    """
    try:
        content = _encoded(image)
        if content is not None:
            return read_pixels(content, spec, max_pixels=max_pixels)
        _refuse_over(image.size, max_pixels, "")
        return to_pixels(image, spec)
    except _OVER_PILLOWS_LIMIT as error:
        raise InputError(f"too large: {error}", kind="too large") from error
    except DECODE_ERRORS as error:
        raise InputError(f"broken image: {describe_error(error)}", kind="broken") from error


def _encoded(image: Image.Image) -> bytes | None:
    """Return the file behind an opened image; None where it is loaded or another frame chosen."""
    if not isinstance(image, ImageFile) or image.fp is None or not image.tile or image.tell():
        return None
    place = image.fp.tell()
    image.fp.seek(0)
    content = image.fp.read()
    image.fp.seek(place)
    return content


def _refuse_over(size: tuple[int, int], max_pixels: int, where: str) -> None:
    if size[0] * size[1] > max_pixels:
        raise _too_large(size, max_pixels, where)


def _too_large(size: tuple[int, int], max_pixels: int, where: str) -> InputError:
    return InputError(
        f"too large: {size[0]}x{size[1]}{where} is over the limit of {max_pixels:,} pixels",
        kind="too large",
    )


def read_images(
    sources: Iterable[Source], spec: PixelSpec, *, max_pixels: int = MAX_PIXELS
) -> tuple[NDArray[np.uint8], list[str], list[BadImage]]:
    """Read many images; the ones that cannot be read are left out and listed.

    Args:
        sources: What to read.
        spec: What the model wants.
        max_pixels: As for `read_pixels`.

    Returns:
        Pixels (images, height, width, channels) with the ids of their rows, and the files left out.
    """
    rows: list[NDArray[np.uint8]] = []
    ids: list[str] = []
    bad: list[BadImage] = []
    for source in sources:
        try:
            rows.append(read_pixels(source.read(), spec, max_pixels=max_pixels))
        except InputError as error:
            bad.append(BadImage(source.id, str(error), error.kind))
        else:
            ids.append(source.id)
    pixels = np.stack(rows) if rows else np.empty((0, *spec.shape), np.uint8)
    return pixels, ids, bad
