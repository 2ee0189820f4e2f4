"""From an opened picture to the pixels a model sees.

Training, the command line, the service and the tests all call `to_pixels`, so a picture cannot be
resized one way in training and another way in production. Nothing here opens a file (see `images`),
and nothing here scales pixel values (normalisation is inside the ONNX graph).
"""

from dataclasses import asdict, dataclass, fields
from typing import Any, Final, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from vsc_serve.errors import InputError

Fit = Literal["crop", "stretch"]

_FITS: Final = ("crop", "stretch")
_ORIENTATION_TAG: Final = 0x0112
_TRANSPOSED_ORIENTATIONS: Final = (5, 6, 7, 8)
_UNBOUNDED_MODES: Final = ("I", "F")


@dataclass(frozen=True, kw_only=True)
class PixelSpec:
    """What a picture is turned into before a model sees it."""

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
    """Turn an opened picture into the pixels a model sees.

    In this order: JPEG is decoded at a reduced scale that still has at least twice the target size
    in each direction; EXIF rotation is applied; transparency is laid over white; the colour mode is
    converted; the picture is cropped or stretched and resized with an antialiased bilinear filter.
    Of an animation the first frame counts, of 16-bit grey the upper eight bits.

    Args:
        image: Picture as `PIL.Image.open` returns it; its pixels may not have been decoded yet.
        spec: What the model wants.

    Returns:
        Pixels, uint8, shape (height, width, channels).

    Raises:
        InputError: The colour mode has no defined range of values.
        OSError: The picture is truncated or broken (raised by Pillow while decoding).
    """
    orientation = image.getexif().get(_ORIENTATION_TAG, 1)
    is_transposed = orientation in _TRANSPOSED_ORIENTATIONS
    target = (spec.height, spec.width) if is_transposed else (spec.width, spec.height)
    image.draft(None, (2 * target[0], 2 * target[1]))
    if orientation != 1:
        image = ImageOps.exif_transpose(image)
    image = _to_mode(image, "L" if spec.channels == 1 else "RGB")
    box = _crop_box(image.size, (spec.width, spec.height)) if spec.fit == "crop" else None
    if image.size != (spec.width, spec.height):
        image = image.resize((spec.width, spec.height), Image.Resampling.BILINEAR, box=box)
    return np.asarray(image, dtype=np.uint8).reshape(spec.shape)


def _to_mode(image: Image.Image, mode: str) -> Image.Image:
    """Convert to `L` or `RGB`: transparency over white, 16-bit grey by its upper byte."""
    if image.mode in _UNBOUNDED_MODES:
        raise InputError(
            f"mode {image.mode} (32 bits a pixel) has no defined range; save as 8-bit or 16-bit PNG"
        )
    if image.mode.startswith("I;16"):
        upper = np.asarray(image).astype(np.uint16) >> 8
        image = Image.fromarray(upper.astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, image)
    return image if image.mode == mode else image.convert(mode)


def _crop_box(size: tuple[int, int], target: tuple[int, int]) -> tuple[float, float, float, float]:
    """Return the largest centred box with the shape of `target`: (left, top, right, bottom)."""
    scale = min(size[0] / target[0], size[1] / target[1])
    # Rounding may take the product just over the picture's size, where Pillow refuses the box.
    width, height = min(target[0] * scale, size[0]), min(target[1] * scale, size[1])
    left, top = (size[0] - width) / 2, (size[1] - height) / 2
    return (left, top, left + width, top + height)
