"""Plain PNG files take a short way, and come to the same pixels."""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vsc_serve.images.png import read_exact_png


def encoded(pixels: np.ndarray, **options: object) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG", **options)
    return file.getvalue()


@pytest.mark.parametrize("shape", [(28, 28), (5, 9), (7, 3, 3), (1, 1), (64, 64, 3), (200, 300)])
def test_a_plain_file_of_the_right_size_gives_its_pixels(shape: tuple[int, ...]) -> None:
    mode = "L" if len(shape) == 2 else "RGB"
    for seed in range(5):
        rng = np.random.default_rng(seed)
        pixels = rng.integers(0, 256 if seed % 2 else 4, shape, np.uint8)
        found = read_exact_png(encoded(pixels), (shape[1], shape[0]), mode)
        assert found == pixels.tobytes()


def test_anything_else_is_left_to_others() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (28, 28), np.uint8)
    plain = encoded(pixels)
    assert read_exact_png(plain, (28, 28), "L") is not None
    assert read_exact_png(plain, (28, 29), "L") is None
    assert read_exact_png(plain, (28, 28), "RGB") is None
    assert read_exact_png(b"", (28, 28), "L") is None
    assert read_exact_png(encoded(np.zeros((400, 400), np.uint8)), (400, 400), "L") is None
    palette = io.BytesIO()
    Image.fromarray(pixels).convert("P").save(palette, "PNG")
    assert read_exact_png(palette.getvalue(), (28, 28), "L") is None


def test_no_damaged_file_is_taken_for_a_whole_one(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    pixels = rng.integers(0, 256, (12, 12), np.uint8)
    plain = encoded(pixels)
    for end in range(len(plain) - 12):
        assert read_exact_png(plain[:end], (12, 12), "L") is None
    for place in range(len(plain) - 12):
        damaged = bytearray(plain)
        damaged[place] ^= 1 << int(rng.integers(8))
        found = read_exact_png(bytes(damaged), (12, 12), "L")
        assert found is None or found == pixels.tobytes()


def test_a_pillow_without_the_short_way_is_no_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = encoded(np.zeros((4, 4), np.uint8))

    class Core:
        pass

    monkeypatch.setattr(Image, "core", Core)
    assert read_exact_png(plain, (4, 4), "L") is None
