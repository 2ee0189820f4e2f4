"""From encoded images to the pixels that a model sees."""

from vsc_serve.images.decode import (
    DECODE_ERRORS,
    MAX_PIXELS,
    BadImage,
    decode_pixels,
    read_images,
    read_pixels,
)
from vsc_serve.images.opening import is_heif, open_image
from vsc_serve.images.preprocess import Fit, PixelSpec, Resample, fit_pixels, to_pixels

__all__ = [
    "DECODE_ERRORS",
    "MAX_PIXELS",
    "BadImage",
    "Fit",
    "PixelSpec",
    "Resample",
    "decode_pixels",
    "fit_pixels",
    "is_heif",
    "open_image",
    "read_images",
    "read_pixels",
    "to_pixels",
]
