"""Encoded pictures to pixels: what is refused and why, and that the fast ways change nothing."""

import io
import itertools
import os
import struct
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageCms

from vsc_serve.errors import InputError
from vsc_serve.images import MAX_PIXELS, PixelSpec, decode_pixels, read_images, read_pixels
from vsc_serve.images import decode as images
from vsc_serve.images.jpeg import find_simplejpeg
from vsc_serve.sources import find_sources

SPEC = PixelSpec(height=8, width=8, channels=3)


def picture_bytes(file_format: str = "PNG", *, size_px: int = 16) -> bytes:
    pixels = np.random.default_rng(0).integers(0, 256, (size_px, size_px, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, file_format)
    return buffer.getvalue()


def png_header(width: int, height: int) -> bytes:
    """A PNG that only declares its size: it fails to decode, unless it is refused before."""
    fields = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + struct.pack(">I", 13)
        + fields
        + struct.pack(">I", zlib.crc32(fields))
        + b"\0\0\0\0IDAT"
    )


def fill(folder: Path, *names: str) -> Path:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture_bytes())
    return folder


def reason(source: Path | bytes, **limits: int) -> str:
    """Why a picture has no row. Fails when it has one."""
    with pytest.raises(InputError) as caught:
        read_pixels(source, SPEC, **limits)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_picture_is_read_the_same_from_its_file_and_from_its_bytes(tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(picture_bytes())
    np.testing.assert_array_equal(read_pixels(path, SPEC), read_pixels(picture_bytes(), SPEC))


def test_broken_files_are_refused_with_a_reason_that_fits(tmp_path):
    png, jpeg = picture_bytes("PNG", size_px=64), picture_bytes("JPEG", size_px=64)
    assert reason(b"") == "empty file (0 bytes)"
    assert reason(b"hello, world") == "not an image, or cut off: begins with b'hello, w'"
    assert reason(png[:7]) == "not an image, or cut off: begins with b'\\x89PNG\\r\\n\\x1a'"
    assert reason(jpeg[:10]) == "broken image: Truncated File Read"
    assert reason(png[: len(png) // 2]).startswith("broken image: ")
    assert reason(jpeg[: len(jpeg) // 2]).startswith("broken image: image file is truncated")
    for name, content in {"a.jpg": b"", "b.jpg": b"text\n", "c.png": png[:500]}.items():
        (tmp_path / name).write_bytes(content)
        assert reason(tmp_path / name) == reason(content)


def test_what_is_no_file_is_refused_with_a_reason_that_fits(tmp_path):
    (tmp_path / "dangling.png").symlink_to(tmp_path / "gone.png")
    (tmp_path / "loop.png").symlink_to("loop.png")
    os.mkfifo(tmp_path / "pipe.png")
    assert reason(tmp_path / "dangling.png") == "no such file (a link that leads nowhere?)"
    assert reason(tmp_path / "loop.png") == "unreadable: Too many levels of symbolic links"
    assert reason(tmp_path / "pipe.png") == "not a regular file"
    assert reason(tmp_path) == "not a regular file"
    _, rows, bad = read_images(find_sources([str(tmp_path)]), SPEC)
    assert rows == []
    assert [entry.id for entry in bad] == ["dangling.png", "loop.png", "pipe.png"]


@pytest.mark.parametrize(("width", "height"), [(10_000, 9_000), (100_000, 100_000)])
def test_a_bomb_is_refused_from_its_header(width, height):
    assert width * height > MAX_PIXELS
    assert reason(png_header(width, height)).startswith("too large: ")


def test_the_limit_on_pixels_can_be_lowered_and_counts_from_the_header():
    assert reason(png_header(100, 100), max_pixels=9_999) == (
        "too large: 100x100 is over the limit of 9,999 pixels"
    )
    assert reason(png_header(100, 100), max_pixels=10_000).startswith("broken image: ")


def test_a_program_that_draws_a_picture_is_not_run():
    assert reason(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EOF\n").startswith("not an")


@pytest.mark.parametrize(
    "error",
    [
        *(OSError, SyntaxError, ValueError, EOFError, IndexError, OverflowError, TypeError),
        *(KeyError, RuntimeError, AttributeError, ZeroDivisionError, MemoryError),
        *(struct.error, zlib.error, AssertionError),
    ],
)
def test_whatever_a_decoder_raises_becomes_a_reason(error, monkeypatch):
    def fail(self):
        raise error("the reason")

    monkeypatch.setattr(Image.Image, "load", fail)
    with pytest.raises(InputError, match=r"^broken image: '?the reason"):
        decode_pixels(Image.new("RGB", (8, 8)), SPEC)


def test_an_error_without_a_text_gives_its_name(monkeypatch):
    def fail(self):
        raise MemoryError

    monkeypatch.setattr(Image.Image, "load", fail)
    with pytest.raises(InputError, match=r"^broken image: MemoryError$"):
        decode_pixels(Image.new("RGB", (8, 8)), SPEC)


def test_an_opened_picture_that_is_cut_off_is_refused_too():
    png = picture_bytes("PNG", size_px=64)
    with pytest.raises(InputError, match=r"^broken image: "):
        decode_pixels(Image.open(io.BytesIO(png[:500])), SPEC)


@pytest.mark.parametrize(
    "file_format", ["PNG", "JPEG", "GIF", "BMP", "PPM", "WEBP", "TIFF", "AVIF", "JPEG2000", "TGA"]
)
def test_every_format_behind_a_known_ending_is_read(file_format):
    assert read_pixels(picture_bytes(file_format), SPEC).shape == SPEC.shape


def test_bad_files_among_good_ones_shift_no_row(tmp_path):
    fill(tmp_path, *(f"{number:02}.png" for number in range(20)))
    for number in range(20):
        Image.new("RGB", (8, 8), (number, 0, 0)).save(tmp_path / f"{number:02}.png")
    for number in (0, 7, 8, 19):
        (tmp_path / f"{number:02}.png").write_bytes(b"not a picture")
    pixels, rows, bad = read_images(find_sources([str(tmp_path)]), SPEC)
    assert [entry.id for entry in bad] == ["00.png", "07.png", "08.png", "19.png"]
    assert all(entry.reason.startswith("not an image") for entry in bad)
    assert pixels.shape == (16, 8, 8, 3)
    assert [f"{row[0, 0, 0]:02}.png" for row in pixels] == rows


def test_no_readable_picture_gives_no_row_and_keeps_the_shape(tmp_path):
    (tmp_path / "a.png").write_bytes(b"")
    pixels, rows, bad = read_images(find_sources([str(tmp_path)]), SPEC)
    assert pixels.shape == (0, 8, 8, 3)
    assert rows == []
    assert len(bad) == 1


# The fast ways


def photo(height: int, width: int, seed: int = 0) -> NDArray[np.uint8]:
    """Waves at several scales and noise: as many details as a photograph has."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width] / max(height, width, 2)
    a, b, c, d, e = rng.uniform(2, 40, 5)
    waves = [np.sin(a * x + b * y), np.sin(c * x * y + 1), np.cos(d * y - e * x)]
    noisy = 127 + 90 * np.stack(waves, axis=2) + rng.normal(0, 12, (height, width, 3))
    return noisy.clip(0, 255).astype(np.uint8)


def saved(image: Image.Image, file_format: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def outcome(content: bytes, spec: PixelSpec) -> bytes | str:
    """The pixels or the reason."""
    try:
        return read_pixels(content, spec).tobytes()
    except InputError as error:
        return str(error)


FAST_WAYS = ("decode_jpeg", "read_plain_png", "read_exact_png")


@pytest.fixture
def both(monkeypatch: pytest.MonkeyPatch) -> Callable[[bytes, PixelSpec], bool]:
    """Assert that the fast ways and Pillow give the same; say whether a fast way was taken."""
    pytest.importorskip("simplejpeg")
    taken: list[bool] = []
    ways = {name: getattr(images, name) for name in FAST_WAYS}

    def note(decode: Callable[..., Any]) -> Callable[..., Any]:
        def noting(*arguments: Any) -> Any:
            found = decode(*arguments)
            taken.append(found is not None)
            return found

        return noting

    def compare(content: bytes, spec: PixelSpec) -> bool:
        taken.clear()
        for name, decode in ways.items():
            monkeypatch.setattr(images, name, note(decode))
        fast = outcome(content, spec)
        for name in ways:
            monkeypatch.setattr(images, name, lambda *_: None)
        assert fast == outcome(content, spec)
        return any(taken)

    return compare


SIZES = [
    *((1, 1), (1, 300), (300, 1), (8, 8), (15, 17), (64, 64), (63, 65), (129, 127), (200, 333)),
    *((512, 384), (513, 385), (1000, 70), (257, 1031)),
]
SPECS = [
    SPEC,
    PixelSpec(height=28, width=28, channels=1),
    PixelSpec(height=64, width=64, channels=3),
    PixelSpec(height=32, width=96, channels=3, fit="stretch"),
]


@pytest.mark.parametrize("size", SIZES)
def test_simplejpeg_gives_the_pixels_that_pillow_gives(size, both):
    image = Image.fromarray(photo(*size))
    taken = []
    kinds = itertools.product((0, 1, 2), (False, True), ("L", "RGB"), (40, 92))
    for subsampling, progressive, mode, quality in kinds:
        options = {"subsampling": subsampling, "progressive": progressive, "quality": quality}
        content = saved(image.convert(mode), "JPEG", **options)
        taken += [both(content, spec) for spec in SPECS]
    assert any(taken)
    assert all(taken) or min(size) < 64


def test_without_simplejpeg_pillow_decodes_to_the_same_pixels(monkeypatch):
    content = saved(Image.fromarray(photo(70, 90)), "JPEG")
    expected = read_pixels(content, SPEC)
    monkeypatch.setitem(sys.modules, "simplejpeg", None)
    find_simplejpeg.cache_clear()
    assert find_simplejpeg() is None
    np.testing.assert_array_equal(read_pixels(content, SPEC), expected)
    find_simplejpeg.cache_clear()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_simplejpeg_gives_the_same_pixels_for_pictures_that_are_turned(orientation, both):
    exif = Image.Exif()
    exif[0x0112] = orientation
    for size in ((300, 500), (90, 70)):
        content = saved(Image.fromarray(photo(*size)), "JPEG", exif=exif)
        assert all(both(content, spec) for spec in SPECS)


def test_jpegs_of_another_kind_go_to_pillow_and_give_the_same(both):
    image = Image.fromarray(photo(100, 100))
    assert not both(saved(image.convert("CMYK"), "JPEG"), SPEC)
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    assert both(saved(image, "JPEG", icc_profile=profile), SPEC)
    assert both(saved(image, "JPEG", comment=b"a comment", dpi=(300, 300)), SPEC)
    assert both(saved(image, "MPO", save_all=True, append_images=[image.rotate(90)]), SPEC)


def test_a_jpeg_cut_off_anywhere_has_the_same_outcome_with_simplejpeg(both):
    for progressive in (False, True):
        content = saved(Image.fromarray(photo(24, 32)), "JPEG", progressive=progressive)
        assert both(content, PixelSpec(height=20, width=20, channels=3))
        for length in range(0, len(content), 3):
            assert not both(content[:length], PixelSpec(height=20, width=20, channels=3))


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_damaged_jpeg_has_the_same_outcome_with_simplejpeg(both):
    rng = np.random.default_rng(0)
    spec = PixelSpec(height=20, width=20, channels=3)
    whole = saved(Image.fromarray(photo(24, 32)), "JPEG")
    assert 100 < sum(both(damaged(whole, rng), spec) for _ in range(1_000)) < 900


def damaged(content: bytes, rng: np.random.Generator) -> bytes:
    """One to three bytes are others."""
    changed = bytearray(content)
    for _ in range(rng.integers(1, 4)):
        changed[rng.integers(len(changed))] = rng.integers(256)
    return bytes(changed)


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_plain_pngs_have_the_pixels_that_pillow_gives(mode, both):
    for size in ((28, 28), (1, 1), (8, 8), (37, 90), (90, 37)):
        image = Image.fromarray(photo(*size)).convert(mode)
        for level in (0, 9):  # without compression and with all filters
            for spec in SPECS:
                assert both(saved(image, "PNG", compress_level=level, dpi=(72, 72)), spec)


def test_pngs_of_another_kind_go_to_pillow(both):
    image = Image.fromarray(photo(28, 28))
    others = [image.convert(mode) for mode in ("1", "P", "LA", "RGBA", "I;16")]
    assert not any(both(saved(other, "PNG"), SPEC) for other in others)
    assert not both(saved(image, "PNG", transparency=(1, 2, 3)), SPEC)
    exif = Image.Exif()
    exif[0x0112] = 6
    assert not both(saved(image, "PNG", exif=exif), SPEC)
    frames = saved(image, "PNG", save_all=True, append_images=[image.rotate(90)])
    assert not both(frames, SPEC)


def test_a_png_cut_off_or_damaged_anywhere_has_the_same_outcome(both):
    rng = np.random.default_rng(0)
    whole = saved(Image.fromarray(photo(12, 12)), "PNG")
    assert not any(both(whole[:length], SPEC) for length in range(len(whole)))
    for _ in range(600):
        both(damaged(whole, rng), SPEC)


def test_a_png_whose_checksums_are_right_and_whose_pixels_are_not_has_the_same_outcome(both):
    rng = np.random.default_rng(0)
    rows = b"".join(b"\0" + bytes(rng.integers(0, 256, 12, dtype=np.uint8)) for _ in range(12))
    for _ in range(300):
        body = damaged(zlib.compress(rows), rng)
        both(png_header(12, 12)[:33] + chunk(b"IDAT", body) + chunk(b"IEND", b""), SPEC)
    for filter_byte in (5, 255):
        body = zlib.compress(bytes([filter_byte]) + rows[1:])
        both(png_header(4, 12)[:33] + chunk(b"IDAT", body) + chunk(b"IEND", b""), SPEC)


def chunk(kind: bytes, data: bytes) -> bytes:
    body = kind + data
    return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))
