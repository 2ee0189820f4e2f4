"""The paper's Smiley data: faces of 32x32 pixels with known factors, made from a seed.

A face is a filled disc that carries, each with probability 0.5, a bow tie, a hat, eyes and a mouth;
18 real factors place and size them (Tonolini, Jensen, Murray-Smith, UAI 2019, supplement E). As the
true factors are known, codes can be compared with them. docs/smiley.md gives the geometry and how
this program was checked against the public data set of the paper's authors.

    python -m vsc_training.smiley --out smiley --count 4000 --seed 0
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from vsc_serve.atomic import atomic_folder
from vsc_serve.errors import UsageError, VscError
from vsc_serve.outputs import check_output, marked, write_marker

SIZE: Final = 32
"""Height and width of an image in pixels."""

FACTOR_SCALE: Final = 0.5
"""Standard deviation of every factor; their mean is 0."""

ATTRIBUTE_SHARE: Final = 0.5
"""Probability that an attribute is present."""

FACTORS: Final = {
    "bow_tie": ("x", "y", "width", "height"),
    "hat": ("x", "y", "brim_width", "brim_height", "crown_width", "crown_height"),
    "eyes": ("separation", "y", "radius"),
    "mouth": ("width", "height", "x", "y", "curl"),
}
"""The attributes and their factors, in the order of the columns of `Smiley.values`."""

_KIND: Final = "smiley"

FOLDER: Final = marked("a folder of Smiley data", _KIND, "images/*.png", "factors.npz")
"""What `write_folder` writes."""

_CHUNK: Final = 512
"""Images drawn at a time: their masks stay in the processor's cache."""

_PIXELS: Final = np.arange(1, SIZE + 1)
"""Coordinates of the pixels of a row or a column. The centre of the image is 16.5."""

# Outline of a bow tie: half its height over the distance from the knot, each as a share of its
# greatest. Fitted to the public images, whose authors scaled a small drawing (docs/smiley.md).
_TIE_DISTANCE: Final = np.array([0.075, 0.213, 0.366, 0.767, 1.0])
_TIE_HEIGHT: Final = np.array([0.27, 0.403, 0.501, 0.806, 0.772])

_Mask = NDArray[np.bool_]
_Column = NDArray[np.float64]


class Smiley(NamedTuple):
    """Faces and the factors they were drawn from."""

    images: NDArray[np.uint8]
    """Pixels, 0 or 255, shape (images, 32, 32)."""
    spikes: NDArray[np.bool_]
    """Whether the attribute of a factor is present, shape (images, 18)."""
    values: NDArray[np.float32]
    """Factors, shape (images, 18); where the spike is off, the value has no effect."""


def generate(count: int, seed: int) -> Smiley:
    """Make faces. The same seed gives the same faces, and a smaller count the first of them.

    Args:
        count: Images to make, at least 1.
        seed: Any integer that is not negative.

    Returns:
        The images with their factors.

    Raises:
        UsageError: `count` or `seed` is out of range.
    """
    if count < 1:
        raise UsageError(f"count must be at least 1, not {count}. Give the images to make.")
    if seed < 0:
        raise UsageError(f"seed must not be negative, but is {seed}. Give 0 or more.")
    of_attributes, of_values = np.random.default_rng(seed).spawn(2)
    is_present = of_attributes.random((count, len(FACTORS))) < ATTRIBUTE_SHARE
    spikes = np.repeat(is_present, [len(names) for names in FACTORS.values()], axis=1)
    values = (of_values.standard_normal(spikes.shape) * FACTOR_SCALE).astype(np.float32)
    return Smiley(draw_faces(spikes, values), spikes, values)


def draw_faces(spikes: NDArray[np.bool_], values: NDArray[np.floating]) -> NDArray[np.uint8]:
    """Draw the faces that factors describe.

    Args:
        spikes: Whether the attribute of a factor is present, shape (images, 18).
        values: Factors, shape (images, 18).

    Returns:
        Pixels, 0 or 255, shape (images, 32, 32).
    """
    images = np.empty((len(values), SIZE, SIZE), np.uint8)
    for start in range(0, len(values), _CHUNK):
        rows = slice(start, start + _CHUNK)
        is_on = _draw_chunk(spikes[rows], values[rows].astype(np.float64))
        np.multiply(is_on, np.uint8(255), out=images[rows])
    return images


def factor_names() -> list[str]:
    """Return the name of each of the 18 factors: its attribute, a dot, and what it moves."""
    return [f"{attribute}.{name}" for attribute, names in FACTORS.items() for name in names]


def write_folder(smiley: Smiley, folder: Path) -> None:
    """Write faces as PNG files in `folder/images/` and their factors as `folder/factors.npz`.

    The files are `000000.png` and so on. `factors.npz` holds `ids` (the file names), `spikes`,
    `values`, and for each factor its name (`names`) and attribute (`attributes`). The folder
    appears whole or not at all; one that is there already is replaced.

    Args:
        smiley: What to write.
        folder: Where.

    Raises:
        InputError: The folder cannot be written.
    """
    ids = [f"{number:06}.png" for number in range(len(smiley.images))]
    names = factor_names()
    with atomic_folder(folder, FOLDER) as new:
        write_marker(new, _KIND)
        (new / "images").mkdir()
        for name, pixels in zip(ids, smiley.images, strict=True):
            Image.fromarray(pixels).save(new / "images" / name)
        np.savez_compressed(
            new / "factors.npz",
            ids=np.array(ids),
            spikes=smiley.spikes,
            values=smiley.values,
            names=np.array(names),
            attributes=np.array([name.split(".")[0] for name in names]),
        )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command `python -m vsc_training.smiley`.

    Args:
        arguments: What follows the command's name; None takes those of the process.

    Returns:
        The exit code.
    """
    given = _parser().parse_args(arguments)
    try:
        check_output(given.out, FOLDER, force=given.force)
        write_folder(generate(given.count, given.seed), given.out)
    except VscError as error:
        sys.stderr.write(f"{error}\n")
        return error.exit_code
    sys.stderr.write(f"{given.out}: {given.count} images, and their factors in factors.npz\n")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m vsc_training.smiley",
        description="Make the Smiley data: faces of 32x32 pixels with 18 known factors.",
    )
    parser.add_argument("--out", type=Path, required=True, help="folder to make")
    parser.add_argument("--count", type=int, default=4000, help="images (default 4000)")
    parser.add_argument("--seed", type=int, default=0, help="seed (default 0)")
    parser.add_argument("--force", action="store_true", help="replace a folder that is there")
    return parser


def _draw_chunk(spikes: NDArray[np.bool_], values: NDArray[np.float64]) -> _Mask:
    """Draw bow ties, eyes, mouths and hats over the disc, in this order, as the paper's data does.

    Args:
        spikes: Shape (images, 18).
        values: Shape (images, 18).

    Returns:
        Which pixels are on, shape (images, 32, 32).
    """
    names = factor_names()
    factor = dict(zip(names, values.T[:, :, None], strict=True))
    attributes = (name.split(".")[0] for name in names)
    is_present = dict(zip(attributes, spikes.T[:, :, None, None], strict=True))
    is_on: _Mask = _FACE | _bow_ties(factor) & is_present["bow_tie"]
    is_on &= ~(_eyes(factor) & is_present["eyes"])
    is_on &= ~(_mouths(factor) & is_present["mouth"])
    is_on |= _hats(factor) & is_present["hat"]
    return is_on


def _bow_ties(factor: dict[str, _Column]) -> _Mask:
    """Return the pixels of bow ties, shape (images, 32, 32).

    A tie is a whole number of pixels wide and high, and its outline is stretched over them.
    """
    width = 12 + 3 * factor["bow_tie.width"]
    height = 5 + 2 * factor["bow_tie.height"]
    left = _round(16.5 + 0.5 * factor["bow_tie.x"] - width / 2)
    top = _round(29 + factor["bow_tie.y"] - height / 2)
    limit = np.interp(_distance(left, width), _TIE_DISTANCE, _TIE_HEIGHT, right=-1.0)
    mask: _Mask = _distance(top, height)[:, :, None] <= limit[:, None, :]
    return mask


def _distance(start: _Column, length: _Column) -> NDArray[np.float64]:
    """Return how far each pixel lies from the middle of a run of pixels, shape (images, 32).

    Args:
        start: First pixel of the run, shape (images, 1).
        length: Distance from the first to the last, rounded down here.

    Returns:
        0 in the middle, 1 at the outer edges, more outside.
    """
    pixel_count = np.maximum(np.floor(length) + 1, 1)
    distance: NDArray[np.float64] = np.abs(2 * (_PIXELS - start) + 1 - pixel_count) / pixel_count
    return distance


def _eyes(factor: dict[str, _Column]) -> _Mask:
    """Return the pixels of both eyes, shape (images, 32, 32): those whose centre is in a disc."""
    apart = 4 + factor["eyes.separation"]
    radius = np.maximum(2 + factor["eyes.radius"], 0)
    rows = (_PIXELS - (14 + factor["eyes.y"])) ** 2
    left, right = (_PIXELS - (16.5 - apart)) ** 2, (_PIXELS - (16.5 + apart)) ** 2
    mask: _Mask = rows[:, :, None] + np.minimum(left, right)[:, None, :] <= radius[:, :, None] ** 2
    return mask


def _mouths(factor: dict[str, _Column]) -> _Mask:
    """Return the pixels of mouths, shape (images, 32, 32): a rectangle and two pixels a side."""
    x, y = 16 + 0.5 * factor["mouth.x"], 22 + 0.5 * factor["mouth.y"]
    half_width = (4 + factor["mouth.width"]) / 2
    half_height = (2 + factor["mouth.height"]) / 2
    left, right = _round(x - half_width), _round(x + half_width)
    mask = _box(left, right, _round(y - half_height), _round(y + half_height))
    for step, curl in ((1, 1.0), (2, 1.4)):
        row = _round(y + curl * factor["mouth.curl"]) == _PIXELS
        corners = (left - step == _PIXELS) | (right + step == _PIXELS)
        mask |= row[:, :, None] & corners[:, None, :]
    return mask


def _hats(factor: dict[str, _Column]) -> _Mask:
    """Return the pixels of hats, shape (images, 32, 32): a brim with a crown that stands on it."""
    x, y = 16.5 + factor["hat.x"], 6 + factor["hat.y"]
    half_brim = (15 + 3 * factor["hat.brim_width"]) / 2
    half_height = (2 + 2 * factor["hat.brim_height"]) / 2
    half_crown = (10 + 2 * factor["hat.crown_width"]) / 2
    top = _round(y - half_height)
    crown_height = _round(2 + factor["hat.crown_height"])
    brim = _box(_round(x - half_brim), _round(x + half_brim), top, _round(y + half_height))
    crown = _box(_round(x - half_crown), _round(x + half_crown), top - crown_height, top)
    return brim | crown


def _box(left: _Column, right: _Column, top: _Column, bottom: _Column) -> _Mask:
    """Return the pixels of rectangles, both ends included, shape (images, 32, 32)."""
    columns = (left <= _PIXELS) & (right >= _PIXELS)
    rows = (top <= _PIXELS) & (bottom >= _PIXELS)
    return rows[:, :, None] & columns[:, None, :]


def _round(position: _Column) -> _Column:
    """Round to pixels, halves upwards."""
    return np.floor(position + 0.5)


_FACE: Final = (_PIXELS[:, None] - 16.5) ** 2 + (_PIXELS - 16.5) ** 2 <= 10**2


if __name__ == "__main__":
    sys.exit(main())
