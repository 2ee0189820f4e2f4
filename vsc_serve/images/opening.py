"""Open an encoded image with Pillow's decoders, one of its plugins at a time.

`PIL.Image.open` holds every image against a limit of the whole process, and warns or raises above
it. A library may not change that limit, so the plugins are called here directly, and sizes are
checked by whoever decodes (`vsc_serve.images.decode`).
"""

import struct
from collections.abc import Callable
from importlib import import_module
from io import BytesIO
from typing import Final

from PIL.ImageFile import ImageFile

from vsc_serve.errors import InputError
from vsc_serve.images.gif import prepare_gif
from vsc_serve.images.jpeg_header import read_header
from vsc_serve.images.jpeg_scans import without_metadata
from vsc_serve.images.png import without_extras
from vsc_serve.images.webp import ShortReads

_BROKEN_HEADER: Final = (SyntaxError, IndexError, TypeError, struct.error)
"""Exceptions of a plugin on a file that it does not know."""
_HEIF_BRANDS: Final = frozenset(
    {b"heic", b"heix", b"hevc", b"hevx", b"heim", b"heis", b"hevm", b"hevs"}
)
"""Brands in the first box of a HEIF file with HEVC inside; AVIF has brands of its own."""
_AVIF_BRANDS: Final = frozenset({b"avif", b"avis"})

# Other formats stay shut: Pillow would hand an EPS file, which is a program, to Ghostscript, and
# rarely used decoders are where bugs lie.
_SIGNATURES: Final = {
    b"\xff\xd8\xff": "JPEG",
    b"\x89PNG\r\n\x1a\n": "PNG",
    b"GIF87a": "GIF",
    b"GIF89a": "GIF",
    b"BM": "BMP",
    b"II*\0": "TIFF",
    b"MM\0*": "TIFF",
    b"II+\0": "TIFF",
    b"MM\0+": "TIFF",
    b"\xff\x4f\xff\x51": "JPEG2000",
    b"\0\0\0\x0cjP  \r\n\x87\n": "JPEG2000",
    **{b"P%d" % number: "PPM" for number in range(1, 7)},
    b"Pf": "PPM",
}
_DIB_HEADERS: Final = frozenset({12, 40, 52, 56, 64, 108, 124})
"""Lengths of the header that begins a BMP without its file header."""
_PLUGINS: Final = {
    "JPEG": ("PIL.JpegImagePlugin", "JpegImageFile"),
    "PNG": ("PIL.PngImagePlugin", "PngImageFile"),
    "GIF": ("PIL.GifImagePlugin", "GifImageFile"),
    "BMP": ("PIL.BmpImagePlugin", "BmpImageFile"),
    "PPM": ("PIL.PpmImagePlugin", "PpmImageFile"),
    "WEBP": ("PIL.WebPImagePlugin", "WebPImageFile"),
    "TIFF": ("vsc_serve.images.tiff", "UnlimitedTiff"),
    "AVIF": ("PIL.AvifImagePlugin", "AvifImageFile"),
    "JPEG2000": ("PIL.Jpeg2KImagePlugin", "Jpeg2KImageFile"),
    "DIB": ("PIL.BmpImagePlugin", "DibImageFile"),
    "TGA": ("PIL.TgaImagePlugin", "TgaImageFile"),
    "HEIF": ("pillow_heif", "HeifImageFile"),
}
_MISSING: Final = {
    "HEIF": "HEIF image, which needs pillow-heif: pip install 'vsc-serve[heif]'",
    "AVIF": "AVIF image, which needs Pillow 11.3 or later: pip install --upgrade pillow",
}


def _without_metadata(content: bytes) -> bytes:
    header = read_header(content)
    return content if header is None else without_metadata(content, header)


_PREPARE: Final[dict[str, Callable[[bytes], bytes]]] = {
    "JPEG": _without_metadata,
    "PNG": without_extras,
    "GIF": prepare_gif,
}


def open_image(content: bytes) -> ImageFile:
    """Open an encoded image without decoding it.

    Args:
        content: The file.

    Returns:
        The image as Pillow opens it; `close` it or use it in a `with` statement.

    Raises:
        InputError: It is no image, its header is broken, or the package that reads it is missing.
        Exception: Whatever else the decoder raises, among `DECODE_ERRORS`.
    """
    if not content:
        raise InputError("empty file (0 bytes)", kind="empty")
    name = find_format(content)
    prepared = _PREPARE.get(name, bytes)(content)
    try:
        return _plugin(name)(ShortReads(prepared) if name == "WEBP" else BytesIO(prepared))
    except _BROKEN_HEADER as error:
        raise _refuse(name, content, error) from error


def find_format(content: bytes) -> str:
    """Return what a file is by its first bytes, as Pillow names it; TGA where they do not say."""
    for signature, name in _SIGNATURES.items():
        if content.startswith(signature):
            return name
    if content[:4] == b"RIFF" and content[8:12] == b"WEBP":
        return "WEBP"
    if is_heif(content):
        return "HEIF"
    if not _brands(content).isdisjoint(_AVIF_BRANDS):
        return "AVIF"
    return "DIB" if int.from_bytes(content[:4], "little") in _DIB_HEADERS else "TGA"


def is_heif(content: bytes) -> bool:
    """Tell whether the first box of a file says HEIF, as phones write it."""
    return not _brands(content).isdisjoint(_HEIF_BRANDS)


def _brands(content: bytes) -> frozenset[bytes]:
    """Return what the first box of a file in the family of MP4 says of its kind."""
    if content[4:8] != b"ftyp":
        return frozenset()
    box = content[8 : min(int.from_bytes(content[:4]), 256)]
    return frozenset(box[start : start + 4] for start in range(0, len(box), 4))


def _plugin(name: str) -> Callable[[BytesIO], ImageFile]:
    module, plugin = _PLUGINS[name]
    try:
        found: Callable[[BytesIO], ImageFile] = getattr(import_module(module), plugin)
    except ImportError:
        raise InputError(_MISSING[name], kind="package missing") from None
    return found


def _refuse(name: str, content: bytes, error: Exception) -> InputError:
    if name == "TGA":  # it has no signature: anything else comes here too
        return InputError(
            f"not an image, or cut off: begins with {content[:8]!r}", kind="not an image"
        )
    return InputError(
        f"broken image: the header of this {name} is damaged, cut off, or of a kind that is not"
        f" read ({describe_error(error)})",
        kind="broken",
    )


def describe_error(error: Exception) -> str:
    """Return what a decoder stumbled over, in one line."""
    return " ".join(str(error).split()) or type(error).__name__
