"""Damaged files of every format give pixels or a reason, soon and in little memory.

`VSC_FUZZ_ROUNDS=50` makes fifty times as many files of each format, the ordinary ones first.
"""

import io
import os
import resource
from typing import Any, Final

import numpy as np
import pytest
from PIL import Image

from vsc_serve.errors import InputError
from vsc_serve.images import PixelSpec, read_pixels

SPEC: Final = PixelSpec(height=8, width=8, channels=3)
MAX_PIXELS: Final = 1_000_000
ROUNDS: Final = int(os.environ.get("VSC_FUZZ_ROUNDS", "1"))
FILES_A_ROUND: Final = 150
MOST_MEMORY_MB: Final = 400
NUMBERS: Final = (0, 1, 0x7F, 0xFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF)

FORMATS: dict[str, dict[str, Any]] = {
    "JPEG": {},
    "JPEG restarts": {"restart_marker_blocks": 3},
    "JPEG CMYK": {},
    "JPEG progressive": {"progressive": True, "exif": b"Exif\0\0II*\0\x08\0\0\0\0\0\0\0\0\0"},
    "PNG": {},
    "PNG interlaced palette": {"optimize": True},
    "PNG 16 bits, transparent": {},
    "PNG animated": {"save_all": True},
    "GIF": {"save_all": True},
    "BMP": {},
    "PPM": {},
    "TGA": {"compression": "tga_rle"},
    "TIFF": {},
    "TIFF deflated": {"compression": "tiff_adobe_deflate", "tiffinfo": {322: 16, 323: 16}},
    "TIFF 16 bits": {},
    "TIFF lzw": {"compression": "tiff_lzw"},
    "WEBP": {},
    "WEBP animated": {"save_all": True, "lossless": True},
    "AVIF": {},
    "JPEG2000": {},
    "MPO": {"save_all": True},
    "HEIF": {},
}


def valid_file(kind: str) -> bytes:
    """A small intact image."""
    if kind == "HEIF":
        return heif_file()
    rng = np.random.default_rng(0)
    smooth = np.repeat(np.repeat(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8), 4, 0), 5, 1)
    image = Image.fromarray(smooth)
    options = dict(FORMATS[kind])
    if options.get("save_all"):
        options["append_images"] = [image.rotate(180)]
    if "palette" in kind:
        image = image.convert("P")
    elif "16 bits" in kind:
        image = Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257)
        options |= {"transparency": 257} if "PNG" in kind else {}
    elif "CMYK" in kind:
        image = image.convert("CMYK")
    buffer = io.BytesIO()
    image.save(buffer, kind.split(maxsplit=1)[0], **options)
    return buffer.getvalue()


def heif_file() -> bytes:
    heif = pytest.importorskip("pillow_heif")
    buffer = io.BytesIO()
    heif.from_pillow(Image.effect_noise((40, 32), 80).convert("RGB")).save(buffer)
    return buffer.getvalue()


def damage(content: bytes, rng: np.random.Generator) -> bytes:
    """Change, cut, repeat and move bytes: more often near the beginning, where the headers are."""
    changed = bytearray(content)
    for _ in range(rng.integers(1, 5)):
        place = int(rng.beta(0.6, 1.2) * max(len(changed) - 1, 1))
        length = int(rng.integers(1, 9))
        how = rng.integers(6)
        if how == 0:
            changed[place : place + 1] = bytes([rng.integers(256)])
        elif how == 1:
            order = "big" if rng.integers(2) else "little"
            changed[place : place + 4] = int(rng.choice(NUMBERS)).to_bytes(4, order)
        elif how == 2:
            del changed[place : place + length]
        elif how == 3:
            changed[place:place] = changed[place : place + 8 * length]
        elif how == 4:
            changed[place : place + length] = rng.bytes(length)
        elif rng.integers(3) == 0:
            del changed[place:]
        changed = changed or bytearray(1)
    return bytes(changed)


def peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


@pytest.mark.timeout(20 * ROUNDS + 60)
@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's, about tags of TIFF
@pytest.mark.parametrize("kind", FORMATS)
def test_damaged_files_give_pixels_or_a_reason_and_nothing_else(kind):
    content = valid_file(kind)
    assert read_pixels(content, SPEC).shape == SPEC.shape
    before = peak_mb()
    seeds = range(FILES_A_ROUND * ROUNDS)
    rows = [outcome(damage(content, np.random.default_rng([seed, len(content)]))) for seed in seeds]
    assert {SPEC.shape, None} >= set(rows)
    assert None in rows
    assert peak_mb() - before < MOST_MEMORY_MB


def outcome(content: bytes) -> tuple[int, ...] | None:
    """Shape of the pixels, or None for a reason."""
    try:
        return read_pixels(content, SPEC, max_pixels=MAX_PIXELS).shape
    except InputError:
        return None
