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
Resample = Literal["bilinear", "bicubic"]

_FITS: Final = ("crop", "stretch")
_FILTERS: Final = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
_ANTIALIAS: Final = "-antialias"
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
    resample: Resample = "bilinear"
    """Filter of Pillow's that images are resized with; antialiased, as all of Pillow's are."""
    crop_pct: float = 1.0
    """Share of each side of that part which is kept, centred, in (0, 1]: 224 / 256 resizes to 256
    and cuts 224 out of the middle."""

    def __post_init__(self) -> None:
        if self.height < 1 or self.width < 1:
            raise ValueError(f"image size must be positive, not {self.width}x{self.height}")
        if self.channels not in (1, 3):
            raise ValueError(f"channels must be 1 (grey) or 3 (RGB), not {self.channels}")
        if self.fit not in _FITS:
            raise ValueError(f"fit must be one of {', '.join(_FITS)}, not {self.fit!r}")
        if self.resample not in _FILTERS:
            raise ValueError(
                f"resample must be one of {', '.join(_FILTERS)}, not {self.resample!r}"
            )
        if isinstance(self.crop_pct, bool) or not 0.0 < self.crop_pct <= 1.0:
            raise ValueError(f"crop_pct must be above 0 and at most 1, not {self.crop_pct!r}")

    @property
    def shape(self) -> tuple[int, int, int]:
        """Shape of one image: (height, width, channels)."""
        return (self.height, self.width, self.channels)

    @property
    def mode(self) -> str:
        """Colour mode as Pillow names it."""
        return "L" if self.channels == 1 else "RGB"

    def to_json(self) -> dict[str, Any]:
        """Return the fields as a JSON object, with the fixed parts of the rule spelled out.

        `crop_pct` is left out where all is kept, so that the rule of older bundles stays as it is.
        """
        stored = asdict(self) | {"resample": self.resample + _ANTIALIAS, "background": "white"}
        if self.crop_pct == 1.0:
            del stored["crop_pct"]
        return stored

    @classmethod
    def from_json(cls, stored: dict[str, Any]) -> "PixelSpec":
        """Read what `to_json` wrote. Raises ValueError or KeyError on anything else."""
        found = {"crop_pct": 1.0} | stored_fields(stored)
        return cls(**{field.name: found[field.name] for field in fields(cls)})

    def __str__(self) -> str:
        colour = "grey" if self.channels == 1 else "RGB"
        share = "" if self.crop_pct == 1.0 else f" {self.crop_pct:g}"
        resample = "" if self.resample == "bilinear" else f", {self.resample}"
        return f"{self.width}x{self.height} {colour}, {self.fit}{share}{resample}"


def stored_fields(stored: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of a spec, unchecked, from what `to_json` wrote.

    Raises:
        ValueError: It asks for another background than white, the only one there is.
    """
    found = dict(stored)
    if found.pop("background", "white") != "white":
        raise ValueError("pixel_spec.background must be white")
    if isinstance(found.get("resample"), str):
        found["resample"] = found["resample"].removesuffix(_ANTIALIAS)
    return found


def to_pixels(image: Image.Image, spec: PixelSpec) -> NDArray[np.uint8]:
    """Turn an image of Pillow's into the pixels a model sees.

    In this order: JPEG is decoded at a reduced scale that still has at least twice the target size
    in each direction; EXIF rotation is undone; transparency is composited onto white; the colour
    mode is converted; the image is cropped or stretched and resized with an antialiased
    filter, the spec's. Of an animation the first frame counts, of 16-bit grey the upper eight bits.

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
        spec: What is wanted; of the part that is kept, twice its sides remain at least.
    """
    is_transposed = orientation in TRANSPOSED
    target = (spec.height, spec.width) if is_transposed else (spec.width, spec.height)
    kept = [int(side * spec.crop_pct) for side in size]
    largest = min(kept[0] // (2 * target[0]), kept[1] // (2 * target[1]))
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
    if image.size != size or spec.crop_pct < 1.0:
        box = _crop_box(image.size, size if spec.fit == "crop" else image.size, spec.crop_pct)
        image = image.resize(size, _FILTERS[spec.resample], box=box)
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


def _crop_box(
    size: tuple[int, int], target: tuple[int, int], share: float
) -> tuple[float, float, float, float]:
    """Return a share of the largest centred box with the shape of `target`, centred as well."""
    scale = min(size[0] / target[0], size[1] / target[1]) * share
    # Rounding may take the product just over the image's size, where Pillow refuses the box.
    width, height = min(target[0] * scale, size[0]), min(target[1] * scale, size[1])
    left, top = (size[0] - width) / 2, (size[1] - height) / 2
    return (left, top, left + width, top + height)
