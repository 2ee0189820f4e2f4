"""From an opened image to the pixels a model sees.

Training, the command line, the service and the tests all call `to_pixels`, so an image cannot be
resized one way in training and another way in production. Nothing here opens a file (see `images`),
and nothing here scales pixel values (normalisation is inside the ONNX graph).
"""

from dataclasses import asdict, dataclass, fields
from typing import Any, Final, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from vsc_serve.errors import InputError
from vsc_serve.images.compositing import composite_onto_white
from vsc_serve.images.orientation import TRANSPOSED, read_orientation, turn_upright

Fit = Literal["crop", "stretch"]

_FITS: Final = ("crop", "stretch")
_JPEG_FORMATS: Final = ("JPEG", "MPO")
_UNBOUNDED_MODES: Final = ("I", "F")


@dataclass(frozen=True, kw_only=True)
class PixelSpec:
    """Preprocessing rule: how an image becomes the pixels that a model takes."""

    height: int
    """Rows of pixels."""
    width: int
    """Columns of pixels."""
    channels: int
    """1 (grey) or 3 (RGB)."""
    fit: Fit = "crop"
    """`crop` cuts the largest centred part of the right shape; `stretch` changes the shape."""

    def __post_init__(self) -> None:
        if self.height < 1 or self.width < 1:
            raise ValueError(f"image size must be positive, not {self.width}x{self.height}")
        if self.channels not in (1, 3):
            raise ValueError(f"channels must be 1 (grey) or 3 (RGB), not {self.channels}")
        if self.fit not in _FITS:
            raise ValueError(f"fit must be one of {', '.join(_FITS)}, not {self.fit!r}")

    @property
    def shape(self) -> tuple[int, int, int]:
        """Shape of one image: (height, width, channels)."""
        return (self.height, self.width, self.channels)

    @property
    def mode(self) -> str:
        """Colour mode as Pillow names it."""
        return "L" if self.channels == 1 else "RGB"

    def to_json(self) -> dict[str, Any]:
        """Return the fields as a JSON object, with the fixed parts of the rule spelled out."""
        return asdict(self) | {"resample": "bilinear-antialias", "background": "white"}

    @classmethod
    def from_json(cls, stored: dict[str, Any]) -> "PixelSpec":
        """Read what `to_json` wrote. Raises ValueError or KeyError on anything else."""
        return cls(**{field.name: stored[field.name] for field in fields(cls)})

    def __str__(self) -> str:
        colour = "grey" if self.channels == 1 else "RGB"
        return f"{self.width}x{self.height} {colour}, {self.fit}"


def to_pixels(image: Image.Image, spec: PixelSpec) -> NDArray[np.uint8]:
    """Turn an image of Pillow's into the pixels a model sees.

    In this order: JPEG is decoded at a reduced scale that still has at least twice the target size
    in each direction; EXIF rotation is undone; transparency is composited onto white; the colour
    mode is converted; the image is cropped or stretched and resized with an antialiased bilinear
    filter. Of an animation the first frame counts, of 16-bit grey the upper eight bits.

    A file is better given to `read_pixels`, which does the same and knows what Pillow does not say
    of a file.

    Args:
        image: Image as `PIL.Image.open` returns it; its pixels may not have been decoded yet.
        spec: What the model wants.

    Returns:
        Pixels, uint8, shape (height, width, channels).

    Raises:
        InputError: The colour mode has no defined range of values.
        OSError: The image is truncated or broken (raised by Pillow while decoding).
    """
    if image.format in _JPEG_FORMATS:
        scale = jpeg_scale(image.size, read_orientation(image), spec)
        image.draft(None, (image.width // scale, image.height // scale))
    image.load()  # before the rotation is asked for: a PNG may note it at its end
    return fit_pixels(turn_upright(image, read_orientation(image)), spec)


def jpeg_scale(size: tuple[int, int], orientation: int, spec: PixelSpec) -> int:
    """Return what a JPEG's sides may be divided by: 8, 4, 2 or 1.

    Args:
        size: Width and height in the file.
        orientation: How the file is turned.
        spec: What is wanted; twice its sides remain at least.
    """
    is_transposed = orientation in TRANSPOSED
    target = (spec.height, spec.width) if is_transposed else (spec.width, spec.height)
    largest = min(size[0] // (2 * target[0]), size[1] // (2 * target[1]))
    return next((scale for scale in (8, 4, 2) if scale <= largest), 1)


def fit_pixels(image: Image.Image, spec: PixelSpec) -> NDArray[np.uint8]:
    """Convert, crop and resize an upright image: the part of `to_pixels` after the decoding.

    Args:
        image: Decoded, upright image.
        spec: What the model wants.

    Returns:
        Pixels, uint8, shape (height, width, channels).
    """
    size = (spec.width, spec.height)
    image = _to_mode(image, spec.mode)
    if image.size != size:
        box = _crop_box(image.size, size) if spec.fit == "crop" else None
        image = image.resize(size, Image.Resampling.BILINEAR, box=box)
    return np.frombuffer(image.tobytes(), np.uint8).reshape(spec.shape)


def _to_mode(image: Image.Image, mode: str) -> Image.Image:
    """Convert to `L` or `RGB`: transparency onto white, 16-bit grey by its upper byte."""
    if image.mode == mode and "transparency" not in image.info:
        return image
    if image.mode.startswith("I;16") or _is_16_bit_pnm(image):
        image = _upper_byte(image)
    if image.mode in _UNBOUNDED_MODES:
        raise InputError(
            f"mode {image.mode} (32 bits a pixel) has no defined range;"
            " save as 8-bit or 16-bit PNG",
            kind="unsupported",
        )
    if image.mode == "LAB":
        raise InputError("mode LAB is not read; save as RGB", kind="unsupported")
    if image.mode == "P" and image.palette is None:
        raise InputError(
            "broken image: its colours are in a palette that is missing", kind="broken"
        )
    image = composite_onto_white(image)
    return image if image.mode == mode else image.convert(mode)


def _is_16_bit_pnm(image: Image.Image) -> bool:
    """Tell a PGM of more than 8 bits, which Pillow widens to 32 bits but keeps below 65536."""
    return image.mode == "I" and image.format == "PPM"


def _upper_byte(image: Image.Image) -> Image.Image:
    return Image.fromarray((np.asarray(image).astype(np.uint16) >> 8).astype(np.uint8))


def _crop_box(size: tuple[int, int], target: tuple[int, int]) -> tuple[float, float, float, float]:
    """Return the largest centred box with the shape of `target`: (left, top, right, bottom)."""
    scale = min(size[0] / target[0], size[1] / target[1])
    # Rounding may take the product just over the image's size, where Pillow refuses the box.
    width, height = min(target[0] * scale, size[0]), min(target[1] * scale, size[1])
    left, top = (size[0] - width) / 2, (size[1] - height) / 2
    return (left, top, left + width, top + height)
