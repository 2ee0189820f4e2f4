"""Encoded images to pixels: what is refused and why, limits, and what stays as it was."""

import io
import os
import struct
import subprocess
import sys
import textwrap
import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from vsc_serve.errors import InputError
from vsc_serve.images import MAX_PIXELS, PixelSpec, decode_pixels, read_images, read_pixels
from vsc_serve.sources import find_sources

SPEC = PixelSpec(height=8, width=8, channels=3)


def image_bytes(file_format: str = "PNG", *, size_px: int = 16) -> bytes:
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
        path.write_bytes(image_bytes())
    return folder


def refusal(source: Path | bytes, **limits: int) -> InputError:
    """The error that says why an image has no row. Fails when it has one."""
    with pytest.raises(InputError) as caught:
        read_pixels(source, SPEC, **limits)
    assert "\n" not in str(caught.value)
    return caught.value


def reason(source: Path | bytes, **limits: int) -> str:
    return str(refusal(source, **limits))


def test_an_image_is_read_the_same_from_its_file_and_from_its_bytes(tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(image_bytes())
    np.testing.assert_array_equal(read_pixels(path, SPEC), read_pixels(image_bytes(), SPEC))


def test_broken_files_are_refused_with_a_reason_that_fits(tmp_path):
    png, jpeg = image_bytes("PNG", size_px=64), image_bytes("JPEG", size_px=64)
    assert reason(b"") == "empty file (0 bytes)"
    assert reason(b"hello, world") == "not an image, or cut off: begins with b'hello, w'"
    assert reason(png[:7]) == "not an image, or cut off: begins with b'\\x89PNG\\r\\n\\x1a'"
    assert reason(jpeg[:10]) == "broken image: Truncated File Read"
    assert reason(png[: len(png) // 2]).startswith("broken image: ")
    assert reason(jpeg[: len(jpeg) // 2]).startswith("broken image: image file is truncated")
    assert reason(png[:33]).startswith("broken image: the header of this PNG is damaged, cut off, ")
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


def test_a_program_that_draws_an_image_is_not_run():
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


def test_an_opened_image_that_is_cut_off_is_refused_too():
    png = image_bytes("PNG", size_px=64)
    with pytest.raises(InputError, match=r"^broken image: "):
        decode_pixels(Image.open(io.BytesIO(png[:500])), SPEC)


@pytest.mark.parametrize(
    "file_format", ["PNG", "JPEG", "GIF", "BMP", "PPM", "WEBP", "TIFF", "AVIF", "JPEG2000", "TGA"]
)
def test_every_format_behind_a_known_extension_is_read(file_format):
    assert read_pixels(image_bytes(file_format), SPEC).shape == SPEC.shape


def test_bad_files_among_good_ones_shift_no_row(tmp_path):
    fill(tmp_path, *(f"{number:02}.png" for number in range(20)))
    for number in range(20):
        Image.new("RGB", (8, 8), (number, 0, 0)).save(tmp_path / f"{number:02}.png")
    for number in (0, 7, 8, 19):
        (tmp_path / f"{number:02}.png").write_bytes(b"not an image")
    pixels, rows, bad = read_images(find_sources([str(tmp_path)]), SPEC)
    assert [entry.id for entry in bad] == ["00.png", "07.png", "08.png", "19.png"]
    assert all(entry.reason.startswith("not an image") for entry in bad)
    assert pixels.shape == (16, 8, 8, 3)
    assert [f"{row[0, 0, 0]:02}.png" for row in pixels] == rows


def test_no_readable_image_gives_no_row_and_keeps_the_shape(tmp_path):
    (tmp_path / "a.png").write_bytes(b"")
    pixels, rows, bad = read_images(find_sources([str(tmp_path)]), SPEC)
    assert pixels.shape == (0, 8, 8, 3)
    assert rows == []
    assert len(bad) == 1


def tiff_of_mode(mode: str) -> bytes:
    return saved(Image.new(mode, (4, 4)), "TIFF")


def saved(image: Image.Image, file_format: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def test_a_refusal_has_a_kind_that_a_program_can_count(tmp_path, monkeypatch):
    assert refusal(b"").kind == "empty"
    assert refusal(b"hello, world").kind == "not an image"
    for file_format in ("PNG", "JPEG", "GIF", "BMP", "WEBP", "TIFF", "AVIF", "JPEG2000"):
        whole = image_bytes(file_format, size_px=64)
        assert refusal(whole[: len(whole) // 2]).kind == "broken"
    assert refusal(png_header(100_000, 100_000)).kind == "too large"
    for mode in ("I", "F", "LAB"):
        assert refusal(tiff_of_mode(mode)).kind == "unsupported"
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    assert refusal(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic").kind == "package missing"
    (tmp_path / "a.png").write_bytes(b"")
    _, _, (bad,) = read_images(find_sources([str(tmp_path)]), SPEC)
    assert (bad.id, bad.kind) == ("a.png", "empty")


@pytest.mark.parametrize("file_format", ["PNG", "JPEG", "GIF", "BMP", "TIFF", "TGA"])
def test_an_opened_image_gives_what_its_file_gives(file_format):
    content = saved(
        Image.fromarray(np.arange(2700, dtype=np.uint8).reshape(30, 30, 3)), file_format
    )
    with Image.open(io.BytesIO(content)) as opened:
        np.testing.assert_array_equal(decode_pixels(opened, SPEC), read_pixels(content, SPEC))
        np.testing.assert_array_equal(decode_pixels(opened, SPEC), read_pixels(content, SPEC))
        opened.load()
        assert opened.size == (30, 30)


def test_an_opened_jpeg_whose_data_end_early_is_refused_like_its_file():
    content = image_bytes("JPEG", size_px=64)
    cut = content[: len(content) // 2] + b"\xff\xd9"
    with Image.open(io.BytesIO(cut)) as opened, pytest.raises(InputError) as caught:
        decode_pixels(opened, SPEC)
    assert str(caught.value) == reason(cut)


def test_of_an_opened_image_the_frame_that_was_chosen_counts():
    frames = [Image.new("RGB", (8, 8), colour) for colour in ((250, 0, 0), (0, 0, 250))]
    content = saved(frames[0], "GIF", save_all=True, append_images=frames[1:])
    with Image.open(io.BytesIO(content)) as opened:
        opened.seek(1)
        assert decode_pixels(opened, SPEC)[0, 0].tolist() == [0, 0, 250]


# Limits


FORMATS = ("PNG", "JPEG", "GIF", "BMP", "PPM", "WEBP", "TIFF", "AVIF", "JPEG2000", "TGA", "HEIF")


def content_of(file_format: str) -> bytes:
    """An image of 64x64 whose decoding at any scale takes over 8x8 pixels."""
    if file_format == "HEIF":
        heif = pytest.importorskip("pillow_heif")
        pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
        buffer = io.BytesIO()
        heif.from_pillow(Image.fromarray(pixels)).save(buffer)
        return buffer.getvalue()
    if file_format == "GIF":  # a frame that is larger than the canvas, and cleared afterwards
        content = bytearray(saved(Image.new("P", (64, 64), 1), "GIF", disposal=2))
        content[6:10] = struct.pack("<HH", 8, 8)
        return bytes(content)
    return image_bytes(file_format, size_px=64)


@pytest.mark.parametrize("file_format", FORMATS)
@pytest.mark.parametrize("pillows_limit", [1, 10, 3_000, None])
def test_the_limit_of_pillow_has_no_say(file_format, pillows_limit, monkeypatch):
    """Neither an error above twice its limit, nor a warning above it (here an error too)."""
    content = content_of(file_format)
    expected = read_pixels(content, SPEC)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", pillows_limit)
    np.testing.assert_array_equal(read_pixels(content, SPEC), expected)
    assert refusal(content, max_pixels=255).kind == "too large"  # a JPEG is decoded to 16x16


@pytest.mark.slow
@pytest.mark.parametrize("file_format", ["PNG", "TIFF"])
def test_the_limit_can_be_raised_above_pillows(file_format):
    side = 13_500
    assert side**2 > 2 * (Image.MAX_IMAGE_PIXELS or 0)
    content = saved(Image.new("1", (side, side)), file_format)
    assert reason(content) == f"too large: {side}x{side} is over the limit of 89,478,485 pixels"
    assert read_pixels(content, SPEC, max_pixels=side**2).max() == 0


# What belongs to the whole process


WATCH = textwrap.dedent(
    """
    import sys, warnings
    import numpy  # which adds filters of its own
    from PIL import Image, ImageFile, PngImagePlugin

    def state():
        return (
            list(warnings.filters), warnings.showwarning, Image.MAX_IMAGE_PIXELS,
            ImageFile.LOAD_TRUNCATED_IMAGES, ImageFile.MAXBLOCK, ImageFile.SAFEBLOCK,
            PngImagePlugin.MAX_TEXT_CHUNK, PngImagePlugin.MAX_TEXT_MEMORY,
            "HEIF" in Image.OPEN,
        )
    before = state()
    import vsc_serve
    from vsc_serve.images import MAX_PIXELS, PixelSpec, read_images
    from vsc_serve.sources import find_sources
    assert state() == before, "importing"
    spec = PixelSpec(height=8, width=8, channels=3)
    pixels, ids, bad = read_images(find_sources(sys.argv[1:]), spec)
    print(*ids, *(f"{image.id}:{image.kind}" for image in bad))
    assert state() == before, "decoding"
    """
)


def test_importing_and_decoding_leave_pillow_and_its_warnings_as_they_were(tmp_path):
    for file_format in FORMATS:
        (tmp_path / f"{file_format}.img").write_bytes(content_of(file_format))
    (tmp_path / "bomb.png").write_bytes(png_header(30_000, 30_000))
    (tmp_path / "text.png").write_bytes(b"text")
    paths = sorted(str(path) for path in tmp_path.iterdir())
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", WATCH, *paths],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    names = [Path(word).name for word in done.stdout.split()]
    assert sorted(name for name in names if name.endswith(".img")) == sorted(
        f"{file_format}.img" for file_format in FORMATS
    )


def test_odd_metadata_are_no_reason_to_warn_anybody():
    """Broken EXIF, a wrong count of frames, a palette with alphas: Pillow would warn of each."""
    image = Image.new("RGB", (16, 16), (90, 90, 90))
    broken = b"Exif\0\0II*\0\x08\0\0\0\x01\0\x1a\x01\x05\0\x01\0\0\0\xff\xff\0\0"
    files = [saved(image, file_format, exif=broken) for file_format in ("JPEG", "PNG", "WEBP")]
    animated = saved(image, "PNG", save_all=True, append_images=[image.rotate(9, fillcolor=1)])
    place = animated.index(b"acTL")
    animated = animated[: place + 4] + bytes(8) + animated[place + 12 :]
    crc = zlib.crc32(animated[place : place + 12]).to_bytes(4)
    files.append(animated[: place + 12] + crc + animated[place + 16 :])
    palette = image.convert("P")
    files.append(saved(palette, "PNG", transparency=bytes(range(256))))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for content in files:
            assert read_pixels(content, SPEC).shape == SPEC.shape
