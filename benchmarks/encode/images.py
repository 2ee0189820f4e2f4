"""Generated images with the statistics of photographs, and folders full of them."""

import io
import os
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

QUALITIES = (75, 80, 85, 90, 95)


@dataclass(frozen=True)
class ImageSet:
    """One kind of image, and how many a measurement takes."""

    name: str
    width: int
    height: int
    model: str
    """`mlp` or `conv`."""
    is_png: bool
    distinct: int
    """Images that are made; the others are further names of these."""
    count: int
    """Images of a measurement."""

    @property
    def extension(self) -> str:
        """What file names end with."""
        return ".png" if self.is_png else ".jpg"


SETS = (
    ImageSet("28x28 PNG, MLP", 28, 28, is_png=True, distinct=2000, count=60_000, model="mlp"),
    ImageSet("64x64 JPEG, conv", 64, 64, is_png=False, distinct=1000, count=12_000, model="conv"),
    ImageSet("512x512 JPEG, conv", 512, 512, is_png=False, distinct=500, count=6000, model="conv"),
    ImageSet(
        "1024x768 JPEG, conv", 1024, 768, is_png=False, distinct=250, count=3000, model="conv"
    ),
)


def make_folder(folder: Path, images: ImageSet, count: int) -> None:
    """Fill a folder with images, a thousand to a sub-folder; most are hard links."""
    paths = [
        folder / f"{number // 1000:04}" / f"{number:07}{images.extension}"
        for number in range(count)
    ]
    for parent in dict.fromkeys(path.parent for path in paths):
        parent.mkdir(parents=True)
    distinct = paths[: images.distinct]
    with ProcessPoolExecutor(mp_context=get_context("forkserver")) as pool:
        contents = pool.map(partial(encode_image, images), range(len(distinct)), chunksize=16)
        for path, content in zip(distinct, contents, strict=True):
            path.write_bytes(content)
    for number, path in enumerate(paths[len(distinct) :]):
        os.link(distinct[number % len(distinct)], path)


def encode_image(images: ImageSet, seed: int) -> bytes:
    """Return the bytes of one generated file."""
    rng = np.random.default_rng(seed)
    file = io.BytesIO()
    if images.is_png:
        Image.fromarray(draw_digit(images.width, rng)).save(file, "PNG")
    else:
        image = Image.fromarray(draw_scene(images.width, images.height, rng))
        image.save(file, "JPEG", quality=int(rng.choice(QUALITIES)))
    return file.getvalue()


def draw_digit(side: int, rng: np.random.Generator) -> NDArray[np.uint8]:
    """Draw a few thick strokes on black, as a scanned digit has."""
    y, x = np.mgrid[:side, :side] / side
    ink = np.zeros((side, side))
    points = rng.uniform(0.1, 0.9, (6, 2))
    for start, end in pairwise(points):
        for step in np.linspace(0, 1, 12):
            place = start + (end - start) * step
            ink = np.maximum(ink, 1.3 - 90 * ((x - place[0]) ** 2 + (y - place[1]) ** 2))
    return (ink.clip(0, 1) * 255).astype(np.uint8)


def draw_scene(width: int, height: int, rng: np.random.Generator) -> NDArray[np.uint8]:
    """Draw noise and a few hard edges; as JPEG they take the bytes that photographs take.

    Measured for photographs at these qualities: 2.0, 50 and 127 kB at 64, 512 and 1024x768.
    """
    frequency = np.hypot(*np.meshgrid(np.fft.rfftfreq(width), np.fft.fftfreq(height)))
    amplitude = 1 / np.maximum(frequency, 1 / max(width, height)) ** 1.6
    planes = []
    for _ in range(3):
        phase = np.exp(2j * np.pi * rng.random(frequency.shape))
        plane = np.fft.irfft2(amplitude * phase, s=(height, width))
        planes.append(plane / plane.std())
    scene = np.stack([planes[0] + 0.35 * plane for plane in planes], axis=-1)
    for _ in range(6):
        left, top = int(rng.integers(width)), int(rng.integers(height))
        scene[top : top + height // 3, left : left + width // 3] += rng.normal(0, 0.8, 3)
    return (127 + 48 * scene).clip(0, 255).astype(np.uint8)
