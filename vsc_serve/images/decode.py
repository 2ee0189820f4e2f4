"""Turn encoded pictures into pixels; what cannot be read becomes a reason, never a shifted row."""

import struct
import warnings
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from vsc_serve.errors import InputError
from vsc_serve.images.jpeg import decode_jpeg, read_plain_header
from vsc_serve.images.png import read_exact_png, read_plain_png
from vsc_serve.images.preprocess import (
    PixelSpec,
    fit_pixels,
    is_jpeg,
    jpeg_scale,
    read_orientation,
    to_pixels,
    turn_upright,
)
from vsc_serve.sources import Source, read_file

MAX_PIXELS: Final = 89_478_485
"""Largest picture that is decoded, in pixels (256 MiB of RGB): what Pillow warns about."""

# Pillow only warns up to twice this size, and warnings cannot be caught per thread. As an error it
# reaches `read_pixels` below, which turns it into the reason for this one file.
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")  # odd metadata
warnings.simplefilter("error", Image.DecompressionBombWarning)

# Others stay shut: Pillow would hand an EPS file, which is a program, to Ghostscript, and rarely
# used decoders are where bugs lie. The frequent ones first.
_FORMATS: Final = (
    *("JPEG", "PNG", "GIF", "BMP", "PPM"),
    *("WEBP", "TIFF", "AVIF", "JPEG2000", "DIB", "TGA"),
)

_HEIF_BRANDS: Final = frozenset(
    {b"heic", b"heix", b"hevc", b"hevx", b"heim", b"heis", b"hevm", b"hevs"}
)
"""What the first box of a HEIF file is called when HEVC is inside; AVIF has names of its own."""

_TILE_TAGS: Final = (322, 323)
"""TIFF tags for the width and the height of a tile."""

_SIGNATURES: Final = {
    b"\xff\xd8\xff": "a JPEG",
    b"\x89PNG\r\n\x1a\n": "a PNG",
    b"GIF87a": "a GIF",
    b"GIF89a": "a GIF",
    b"RIFF": "a WebP",
    b"II*\0": "a TIFF",
    b"MM\0*": "a TIFF",
}

DECODE_ERRORS: Final = (
    *(OSError, SyntaxError, ValueError, EOFError, IndexError, OverflowError, TypeError, KeyError),
    *(RuntimeError, AttributeError, ZeroDivisionError, MemoryError, struct.error, zlib.error),
    AssertionError,
)
"""What Pillow's decoders raise on broken pictures."""


@dataclass(frozen=True)
class BadImage:
    """A file that has no row, and why."""

    id: str
    reason: str


def read_pixels(
    picture: Path | bytes, spec: PixelSpec, *, max_pixels: int = MAX_PIXELS
) -> NDArray[np.uint8]:
    """Read one picture from a file or from its encoded bytes.

    Args:
        picture: Path of the file, or the bytes of an encoded picture.
        spec: What the model wants.
        max_pixels: Refuse a picture with more pixels than this, before decoding it.

    Returns:
        Pixels, uint8, shape (height, width, channels).

    Raises:
        InputError: The picture cannot be used; the message is the reason, without the path.
    """
    content = picture if isinstance(picture, bytes) else read_file(str(picture))
    plain = _read_plain(content, spec, max_pixels)
    if plain is not None:
        return plain
    with _open_or_refuse(content) as image:
        _check_size(image, max_pixels)
        fast = None
        if is_jpeg(image):
            fast = _decode_fast(content, image.mode, image.size, read_orientation(image), spec)
        return decode_pixels(image, spec, max_pixels=max_pixels) if fast is None else fast


def _read_plain(content: bytes, spec: PixelSpec, max_pixels: int) -> NDArray[np.uint8] | None:
    """Read the frequent simple files without Pillow's parsers; None for everything else."""
    exact = read_exact_png(content, (spec.width, spec.height), _mode(spec))
    if exact is not None and spec.width * spec.height <= max_pixels:
        return np.frombuffer(exact, np.uint8).reshape(spec.shape)
    png = read_plain_png(content, max_pixels)
    if png is not None:
        return fit_pixels(png, spec)
    header = read_plain_header(content)
    if header is None or not 0 < header.size[0] * header.size[1] <= max_pixels:
        return None
    return _decode_fast(content, header.mode, header.size, 1, spec)


def _mode(spec: PixelSpec) -> str:
    return "L" if spec.channels == 1 else "RGB"


def _open_or_refuse(content: bytes) -> Image.Image:
    try:
        return open_image(content)
    except UnidentifiedImageError as error:
        raise InputError(_why_unidentified(content)) from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise InputError(f"too large: {error}") from error
    except DECODE_ERRORS as error:
        raise InputError(_why_broken(error)) from error


def _decode_fast(
    content: bytes, mode: str, size: tuple[int, int], orientation: int, spec: PixelSpec
) -> NDArray[np.uint8] | None:
    """Decode with simplejpeg what it decodes like Pillow; None for everything else."""
    scale = jpeg_scale(size, orientation, spec)
    decoded = decode_jpeg(content, mode, size, scale)
    if decoded is None or (orientation == 1 and decoded.shape == spec.shape):
        return decoded
    image = Image.fromarray(decoded[..., 0] if mode == "L" else decoded)
    return fit_pixels(turn_upright(image, orientation), spec)


def decode_pixels(
    image: Image.Image, spec: PixelSpec, *, max_pixels: int = MAX_PIXELS
) -> NDArray[np.uint8]:
    """Decode an opened picture: `to_pixels` with every failure as an InputError.

    Args:
        image: Picture as `PIL.Image.open` returns it.
        spec: What the model wants.
        max_pixels: Refuse a picture with more pixels than this, before decoding it.

    Returns:
        Pixels, uint8, shape (height, width, channels).

    Raises:
        InputError: The picture cannot be used; the message is the reason.
    """
    _check_size(image, max_pixels)
    try:
        return to_pixels(image, spec)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise InputError(f"too large: {error}") from error
    except DECODE_ERRORS as error:
        raise InputError(_why_broken(error)) from error


def open_image(content: bytes) -> Image.Image:
    """Open an encoded picture without decoding it.

    Raises:
        InputError: It is a HEIF file and the package that reads them is not installed.
        Exception: What `PIL.Image.open` raises.
    """
    formats: tuple[str, ...] = _FORMATS
    if is_heif(content):
        _register_heif()
        formats = ("HEIF",)
    Image.preinit()  # the first formats of the list, so that Pillow loads the others when needed
    return Image.open(BytesIO(content), formats=formats)


def is_heif(content: bytes) -> bool:
    """Tell whether the first box of a file says HEIF, as phones write it."""
    if content[4:8] != b"ftyp":
        return False
    box = content[8 : min(int.from_bytes(content[:4]), 256)]
    brands = {box[start : start + 4] for start in range(0, len(box), 4)}
    return not brands.isdisjoint(_HEIF_BRANDS)


@cache
def _register_heif() -> None:
    """Make Pillow read HEIF, once in a process."""
    try:
        from pillow_heif import register_heif_opener
    except ImportError:
        raise InputError(
            "HEIF picture, which needs pillow-heif: pip install 'vsc-serve[heif]'"
        ) from None
    register_heif_opener()


def _check_size(image: Image.Image, max_pixels: int) -> None:
    """Refuse a picture by what its header says it unpacks to."""
    _refuse_over(image.size, max_pixels, "")
    tile = [getattr(image, "tag_v2", {}).get(tag, 1) for tag in _TILE_TAGS]
    if all(isinstance(side, int) for side in tile):
        _refuse_over((tile[0], tile[1]), max_pixels, " in one tile")


def _refuse_over(size: tuple[int, int], max_pixels: int, where: str) -> None:
    if size[0] * size[1] > max_pixels:
        raise InputError(
            f"too large: {size[0]}x{size[1]}{where} is over the limit of {max_pixels:,} pixels"
        )


def _why_broken(error: Exception) -> str:
    """Say what a decoder stumbled over."""
    text = " ".join(str(error).split())
    return f"broken image: {text or type(error).__name__}"


def _why_unidentified(content: bytes) -> str:
    """Say what a file that no decoder takes looks like."""
    if not content:
        return "empty file (0 bytes)"
    for start, name in _SIGNATURES.items():
        if content.startswith(start):
            return f"broken image: {name} whose header is damaged or cut off"
    return f"not an image, or cut off: begins with {content[:8]!r}"


def read_images(
    sources: Iterable[Source], spec: PixelSpec, *, max_pixels: int = MAX_PIXELS
) -> tuple[NDArray[np.uint8], list[str], list[BadImage]]:
    """Read many pictures; the ones that cannot be read are left out and listed.

    Args:
        sources: What to read.
        spec: What the model wants.
        max_pixels: Refuse larger pictures.

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
            bad.append(BadImage(source.id, str(error)))
        else:
            ids.append(source.id)
    pixels = np.stack(rows) if rows else np.empty((0, *spec.shape), np.uint8)
    return pixels, ids, bad
