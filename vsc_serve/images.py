"""Find image files and read them; what cannot be read becomes a reason, never a shifted row."""

import os
import struct
import warnings
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from vsc_serve.errors import InputError, UsageError
from vsc_serve.preprocess import PixelSpec, to_pixels

MAX_PIXELS: Final = 89_478_485
"""Largest picture that is decoded, in pixels (256 MiB of RGB): what Pillow warns about."""

# Pillow only warns up to twice this size, and warnings cannot be caught per thread. As an error it
# reaches `read_pixels` below, which turns it into the reason for this one file.
warnings.simplefilter("error", Image.DecompressionBombWarning)

IMAGE_SUFFIXES: Final = frozenset(
    {
        *(".apng", ".avif", ".bmp", ".dib", ".gif", ".j2k", ".jfif", ".jp2", ".jpe", ".jpeg"),
        *(".jpg", ".pbm", ".pgm", ".png", ".pnm", ".ppm", ".tga", ".tif", ".tiff", ".webp"),
    }
)
"""File name endings that are looked for in folders. A file named on its own is always tried."""

# The formats behind these endings, the frequent ones first. Others stay shut: Pillow would hand an
# EPS file, which is a program, to Ghostscript, and rarely used decoders are where bugs lie.
_FORMATS: Final = (
    *("JPEG", "PNG", "GIF", "BMP", "PPM"),
    *("WEBP", "TIFF", "AVIF", "JPEG2000", "DIB", "TGA"),
)

DECODE_ERRORS: Final = (
    *(OSError, SyntaxError, ValueError, EOFError, IndexError, OverflowError, TypeError, KeyError),
    *(RuntimeError, AttributeError, ZeroDivisionError, MemoryError, struct.error, zlib.error),
)
"""What Pillow's decoders raise on broken pictures."""

_JUNK_FOLDERS: Final = frozenset({"__MACOSX", "@eaDir", "$RECYCLE.BIN", "node_modules"})


@dataclass(frozen=True)
class ImageSource:
    """One image file and the id its row gets."""

    id: str
    """Path relative to the folder it was found in, with `/`; or the path as it was given."""
    path: Path
    """Where it lies."""


@dataclass(frozen=True)
class BadImage:
    """A file that has no row, and why."""

    id: str
    reason: str


def find_images(inputs: Sequence[Path]) -> list[ImageSource]:
    """Find the images under the given folders and files.

    Folders are searched to any depth, in sorted order; hidden files and junk folders are skipped.
    Links to folders are followed, after the folders themselves, and each folder is searched once.
    The id is the path relative to the folder; with more than one input it begins with the folder as
    it was given.

    Args:
        inputs: Folders and files.

    Returns:
        The sources, in the order of the inputs; within a folder sorted by id.

    Raises:
        UsageError: An input is not there, or no input holds an image.
        InputError: A folder cannot be searched.
    """
    sources: list[ImageSource] = []
    for given in inputs:
        if given.is_dir():
            prefix = f"{given.as_posix().rstrip('/')}/" if len(inputs) > 1 else ""
            sources += [ImageSource(prefix + source.id, source.path) for source in _walk(given)]
        elif given.exists() or given.is_symlink():
            sources.append(ImageSource(given.as_posix(), given))
        else:
            raise UsageError(f"{given}: no such file or folder. Check the path.")
    if not sources:
        where = ", ".join(str(given) for given in inputs)
        endings = " ".join(sorted(IMAGE_SUFFIXES))
        raise UsageError(f"{where}: no image found. Looked for files ending in {endings}.")
    return sources


def _walk(folder: Path) -> list[ImageSource]:
    """Return the image files below a folder, sorted by id."""
    found: list[ImageSource] = []
    for parent, names in _walk_folders(folder):
        for name in names:
            path = parent / name
            if not name.startswith(".") and path.suffix.lower() in IMAGE_SUFFIXES:
                found.append(ImageSource(path.relative_to(folder).as_posix(), path))
    return sorted(found, key=lambda source: source.id)


def _walk_folders(top: Path) -> Iterator[tuple[Path, list[str]]]:
    """Give each folder below `top` once, with the names in it; links to folders come last."""
    seen: set[str] = set()
    pending = [top]
    while pending:
        for parent, folders, names in os.walk(pending.pop(0), onerror=_refuse_folder):
            real = os.path.realpath(parent)
            if real in seen:
                folders.clear()
                continue
            seen.add(real)
            folders[:] = sorted(name for name in folders if not is_junk(name))
            links = [Path(parent, name) for name in folders]
            pending += [link for link in links if link.is_symlink()]
            yield Path(parent), names


def _refuse_folder(error: OSError) -> None:
    raise InputError(
        f"{error.filename}: folder cannot be searched ({error.strerror}). Check its permissions."
    ) from error


def is_junk(name: str) -> bool:
    """Tell whether a folder is passed over: hidden, or made by a system for itself."""
    return name.startswith(".") or name in _JUNK_FOLDERS


def read_pixels(
    source: Path | bytes, spec: PixelSpec, *, max_pixels: int = MAX_PIXELS
) -> NDArray[np.uint8]:
    """Read one picture from a file or from its encoded bytes.

    Args:
        source: Path of the file, or the bytes of an encoded picture.
        spec: What the model wants.
        max_pixels: Refuse a picture with more pixels than this, before decoding it.

    Returns:
        Pixels, uint8, shape (height, width, channels).

    Raises:
        InputError: The picture cannot be used; the message is the reason, without the path.
    """
    try:
        image = open_image(source)
    except FileNotFoundError:
        raise InputError("no such file (a link that leads nowhere?)") from None
    except UnidentifiedImageError as error:
        raise InputError(_why_unidentified(source)) from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise InputError(f"too large: {error}") from error
    except DECODE_ERRORS as error:
        raise InputError(_why_broken(error)) from error
    with image:
        return decode_pixels(image, spec, max_pixels=max_pixels)


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
    _check_size(image.size, max_pixels)
    try:
        return to_pixels(image, spec)
    except DECODE_ERRORS as error:
        raise InputError(_why_broken(error)) from error


def open_image(source: Path | bytes) -> Image.Image:
    """Open a picture without decoding it. Raises what `PIL.Image.open` raises."""
    Image.preinit()  # the first formats of the list, so that Pillow loads the others when needed
    if isinstance(source, bytes):
        return Image.open(BytesIO(source), formats=_FORMATS)
    if source.exists() and not source.is_file():
        raise InputError("not a regular file")
    return Image.open(source, formats=_FORMATS)


def _check_size(size: tuple[int, int], max_pixels: int) -> None:
    if size[0] * size[1] > max_pixels:
        raise InputError(
            f"too large: {size[0]}x{size[1]} is over the limit of {max_pixels:,} pixels"
        )


def _why_broken(error: Exception) -> str:
    """Tell what the operating system refused from what a decoder stumbled over."""
    if isinstance(error, OSError) and error.strerror:
        return f"unreadable: {error.strerror}"
    return f"broken image: {str(error) or type(error).__name__}"


def _why_unidentified(source: Path | bytes) -> str:
    """Say what a file that no decoder knows looks like."""
    start = source[:8] if isinstance(source, bytes) else _first_bytes(source)
    if not start:
        return "empty file (0 bytes)"
    return f"not an image, or cut off: begins with {start!r}"


def _first_bytes(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(8)


def read_images(
    sources: Iterable[ImageSource], spec: PixelSpec, *, max_pixels: int = MAX_PIXELS
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
            rows.append(read_pixels(source.path, spec, max_pixels=max_pixels))
        except InputError as error:
            bad.append(BadImage(source.id, str(error)))
        else:
            ids.append(source.id)
    pixels = np.stack(rows) if rows else np.empty((0, *spec.shape), np.uint8)
    return pixels, ids, bad
