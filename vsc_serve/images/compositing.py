"""White behind an image: transparency, and canvas that no frame covers."""

from typing import NamedTuple

import numpy as np
from PIL import Image

_WHITE = (255, 255, 255, 255)


class Box(NamedTuple):
    """Part of a canvas, in pixels."""

    left: int
    top: int
    right: int
    bottom: int


def composite_onto_white(image: Image.Image) -> Image.Image:
    """Return an image without transparency; one that has none stays as it is."""
    if image.mode in ("La", "RGBa"):  # colours are multiplied by alpha
        image = image.convert("LA" if image.mode == "La" else "RGBA")
    if not image.has_transparency_data:
        return image
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, _WHITE), image)


def whiten_outside(image: Image.Image, box: Box) -> Image.Image:
    """Make white what a frame leaves uncovered, whatever the file has there."""
    if box.left <= 0 and box.top <= 0 and box.right >= image.width and box.bottom >= image.height:
        return image
    pixels = np.asarray(composite_onto_white(image).convert("RGB"))
    inside = (slice(box.top, box.bottom), slice(box.left, box.right))
    canvas = np.full_like(pixels, 255)
    canvas[inside] = pixels[inside]
    return Image.fromarray(canvas)


def without_clear_alpha(image: Image.Image) -> Image.Image:
    """Return an image whose alpha is 0 everywhere as opaque: its writer left the byte unused."""
    if image.mode not in ("LA", "RGBA") or image.getchannel("A").getextrema() != (0, 0):
        return image
    return image.convert("L" if image.mode == "LA" else "RGB")
