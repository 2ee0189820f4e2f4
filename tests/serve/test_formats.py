"""Golden pixels of every kind of file: one test for each rule of docs/inputs.md.

What is expected is computed here from the rule, and files are made by hand where Pillow does not
write their kind; so a new release of Pillow that reads a kind otherwise is seen.
"""

import io
import struct
import sys
import zlib
from typing import Any

import numpy as np
import pytest
from PIL import Image

from vsc_serve.errors import InputError
from vsc_serve.images import PixelSpec, read_pixels
from vsc_serve.images import decode as images

GREY = PixelSpec(height=4, width=4, channels=1)
RGB = PixelSpec(height=4, width=4, channels=3)
ORIENTATION = 0x0112


def saved(image: Image.Image, file_format: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def chunk(kind: bytes, data: bytes) -> bytes:
    body = kind + data
    return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))


def png(rows: bytes, *, depth: int, colour: int, side: int = 4, before: bytes = b"") -> bytes:
    """A PNG from rows that begin with their filter byte."""
    header = struct.pack(">IIBBBBB", side, side, depth, colour, 0, 0, 0)
    return b"".join(
        [
            b"\x89PNG\r\n\x1a\n",
            chunk(b"IHDR", header),
            before,
            chunk(b"IDAT", zlib.compress(rows)),
            chunk(b"IEND", b""),
        ]
    )


def flat_png(pixel: bytes, **kind: Any) -> bytes:
    return png((b"\0" + pixel * 4) * 4, **kind)


def only_colour(content: bytes, spec: PixelSpec = RGB) -> list[int]:
    """The colour of a picture that has one."""
    pixels = read_pixels(content, spec)
    colours = np.unique(pixels.reshape(-1, spec.channels), axis=0)
    assert len(colours) == 1
    return [int(value) for value in colours[0]]


def over_white(value: int, alpha: int) -> int:
    return round((value * alpha + 255 * (255 - alpha)) / 255)


def luma(red: int, green: int, blue: int) -> int:
    """ITU-R 601, as every grey conversion here."""
    return round(0.299 * red + 0.587 * green + 0.114 * blue)


# Depth


def test_of_16_bit_grey_the_upper_byte_counts():
    assert only_colour(flat_png(b"\xab\xff", depth=16, colour=0), GREY) == [0xAB]
    values = np.full((4, 4), 0xABFF, np.uint16)
    assert only_colour(saved(Image.fromarray(values), "TIFF"), GREY) == [0xAB]
    pgm = b"P5 4 4 65535\n" + b"\xab\xff" * 16
    assert only_colour(pgm, GREY) == [0xAB]


def test_of_16_bit_colour_the_upper_bytes_count():
    assert only_colour(flat_png(b"\x12\xff\x34\xff\x56\xff", depth=16, colour=2)) == [18, 52, 86]
    with_alpha = flat_png(b"\x12\xff\x34\xff\x56\xff\xff\xff", depth=16, colour=6)
    assert only_colour(with_alpha) == [18, 52, 86]


def test_bits_are_black_and_white():
    assert only_colour(png(b"\0\xf0" * 4, depth=1, colour=0), GREY) == [255]
    assert only_colour(png(b"\0\x00" * 4, depth=1, colour=0)) == [0, 0, 0]
    assert only_colour(b"P4 4 4\n" + b"\xf0" * 4, GREY) == [0]  # PBM: one is ink


def test_two_and_four_bits_are_spread_over_the_whole_range():
    assert only_colour(png(b"\0\x55" * 4, depth=2, colour=0), GREY) == [85]
    assert only_colour(png(b"\0\x99\x99" * 4, depth=4, colour=0), GREY) == [0x99]


def test_32_bit_numbers_have_no_range_and_are_refused():
    for values in (np.full((4, 4), 7, np.int32), np.full((4, 4), 0.5, np.float32)):
        with pytest.raises(InputError, match=r"^mode [IF] \(32 bits a pixel\) has no defined"):
            read_pixels(saved(Image.fromarray(values), "TIFF"), GREY)


# Colour


@pytest.mark.parametrize(
    ("red", "green", "blue"), [(255, 0, 0), (0, 255, 0), (0, 0, 255), (9, 99, 200)]
)
def test_grey_is_made_of_colour_by_its_luma(red, green, blue):
    content = flat_png(bytes([red, green, blue]), depth=8, colour=2)
    assert only_colour(content, GREY)[0] == pytest.approx(luma(red, green, blue), abs=1)


def test_colour_is_made_of_grey_three_times():
    assert only_colour(flat_png(b"\x63", depth=8, colour=0)) == [99, 99, 99]


def test_a_palette_gives_its_colours():
    palette = chunk(b"PLTE", bytes([1, 2, 3, 40, 50, 60]))
    assert only_colour(flat_png(b"\x01", depth=8, colour=3, before=palette)) == [40, 50, 60]


def cmyk_jpeg(cyan: int, magenta: int, yellow: int, black: int) -> bytes:
    image = Image.new("CMYK", (8, 8), (cyan, magenta, yellow, black))
    return saved(image, "JPEG", quality=100, subsampling=0)


INKS = [
    (0, 0, 0, 0),
    (255, 0, 0, 0),
    (0, 255, 0, 0),
    (0, 0, 255, 0),
    (0, 0, 0, 255),
    (90, 30, 60, 50),
]


@pytest.mark.parametrize("inks", INKS)
def test_cmyk_jpeg_from_adobe_programs_is_stored_inverted_and_read_as_ink(inks):
    content = cmyk_jpeg(*inks)
    assert b"Adobe" in content
    expected = [(255 - ink) * (255 - inks[3]) / 255 for ink in inks[:3]]
    np.testing.assert_allclose(only_colour(content), expected, atol=3)


@pytest.mark.parametrize("inks", INKS)
def test_cmyk_tiff_is_stored_as_ink(inks):
    content = saved(Image.new("CMYK", (4, 4), inks), "TIFF")
    expected = [(255 - ink) * (255 - inks[3]) / 255 for ink in inks[:3]]
    np.testing.assert_allclose(only_colour(content), expected, atol=1)


@pytest.mark.parametrize("stored", [(200, 128, 128, 255), (120, 90, 180, 255), (100, 150, 60, 128)])
def test_ycck_jpeg_is_turned_to_cmyk_first(stored):
    """Four numbers in the file: luma, two colour differences, black; inverted, as Adobe does."""
    content = cmyk_jpeg(*(255 - value for value in stored))  # Pillow inverts while it writes
    place = content.index(b"Adobe") + 11
    assert content[place] == 0
    content = content[:place] + b"\x02" + content[place + 1 :]
    luminance, blue, red, black = stored
    # The standard conversion gives 255 minus the stored number of each ink, which is the ink.
    inks = np.clip(
        [
            luminance + 1.402 * (red - 128),
            luminance - 0.344136 * (blue - 128) - 0.714136 * (red - 128),
            luminance + 1.772 * (blue - 128),
        ],
        0,
        255,
    )
    np.testing.assert_allclose(only_colour(content), (255 - inks) * black / 255, atol=4)


# Transparency


@pytest.mark.parametrize("alpha", [0, 51, 255])
def test_transparency_is_laid_over_white(alpha):
    colour = flat_png(bytes([0, 50, 100, alpha]), depth=8, colour=6)
    assert only_colour(colour) == [over_white(value, alpha) for value in (0, 50, 100)]
    grey = flat_png(bytes([100, alpha]), depth=8, colour=4)
    assert only_colour(grey, GREY) == [over_white(100, alpha)]


def test_a_palette_with_alphas_and_a_transparent_colour_are_laid_over_white():
    palette = chunk(b"PLTE", bytes([1, 2, 3, 40, 50, 60])) + chunk(b"tRNS", bytes([255, 51]))
    content = flat_png(b"\x01", depth=8, colour=3, before=palette)
    assert only_colour(content) == [over_white(value, 51) for value in (40, 50, 60)]
    key = chunk(b"tRNS", struct.pack(">HHH", 9, 8, 7))
    assert only_colour(flat_png(bytes([9, 8, 7]), depth=8, colour=2, before=key)) == [255] * 3
    assert only_colour(flat_png(bytes([9, 8, 6]), depth=8, colour=2, before=key)) == [9, 8, 6]
    grey_key = chunk(b"tRNS", struct.pack(">H", 100))
    assert only_colour(flat_png(b"\x64", depth=8, colour=0, before=grey_key), GREY) == [255]


def test_a_transparent_gif_and_webp_are_laid_over_white():
    clear = Image.new("RGBA", (4, 4), (200, 0, 0, 0))
    assert only_colour(saved(clear, "GIF")) == [255, 255, 255]
    assert only_colour(saved(clear, "WEBP", lossless=True)) == [255, 255, 255]


# Several pictures in a file


@pytest.mark.parametrize("file_format", ["GIF", "PNG", "WEBP", "TIFF", "MPO", "AVIF"])
def test_of_several_pictures_in_a_file_the_first_counts(file_format):
    first, second = Image.new("RGB", (16, 16), (250, 5, 5)), Image.new("RGB", (16, 16), (5, 5, 250))
    options = {"lossless": True} if file_format == "WEBP" else {}
    content = saved(first, file_format, save_all=True, append_images=[second], **options)
    with Image.open(io.BytesIO(content)) as image:
        assert image.n_frames == 2
    np.testing.assert_allclose(only_colour(content), [250, 5, 5], atol=5)


# Rotation


def turned(orientation: int) -> tuple[Image.Image, bytes]:
    """A picture that is brighter at its stored top left, with a note how a viewer turns it."""
    stored = np.full((16, 32), 40, np.uint8)
    stored[:8, :16] = 220
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    return Image.fromarray(stored), exif.tobytes()


BRIGHT_CORNER = {1: "tl", 2: "tr", 3: "br", 4: "bl", 5: "tl", 6: "tr", 7: "br", 8: "bl"}
"""Where the stored top left goes, from the table of the EXIF standard."""


@pytest.mark.parametrize("orientation", BRIGHT_CORNER)
@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "TIFF", "WEBP", "AVIF", "HEIF"])
def test_the_cameras_rotation_is_undone_once(file_format, orientation):
    if file_format == "HEIF":
        pytest.importorskip("pillow_heif").register_heif_opener()
    picture, exif = turned(orientation)
    content = saved(picture.convert("RGB"), file_format, exif=exif)
    upright = (16, 32) if orientation < 5 else (32, 16)
    pixels = read_pixels(content, PixelSpec(height=upright[0], width=upright[1], channels=1))
    corners = {"tl": pixels[3, 3], "tr": pixels[3, -4], "bl": pixels[-4, 3], "br": pixels[-4, -4]}
    assert {name for name, value in corners.items() if value > 128} == {BRIGHT_CORNER[orientation]}


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow says so, which `images` silences
def test_broken_exif_turns_nothing_and_costs_no_picture():
    for exif in (
        b"Exif\0\0nonsense",
        b"Exif\0\0II*\0\xff\xff\xff\xff",
        b"Exif\0\0MM\0*\0\0\0\x08\xff",
    ):
        for file_format in ("JPEG", "PNG", "WEBP"):
            content = saved(Image.new("RGB", (8, 8), (90, 90, 90)), file_format, exif=exif)
            np.testing.assert_allclose(only_colour(content), [90, 90, 90], atol=2)


# HEIF


def test_complaint_phone_formats_are_read_when_the_plugin_is_there():
    heif = pytest.importorskip("pillow_heif")
    heif.register_heif_opener()
    content = saved(Image.new("RGB", (64, 64), (200, 100, 50)), "HEIF", quality=100)
    Image.OPEN.pop("HEIF", None)  # as in a process that has not met one yet
    images._register_heif.cache_clear()
    np.testing.assert_allclose(only_colour(content), [200, 100, 50], atol=4)


def test_complaint_phone_formats_without_the_plugin_say_what_to_install(monkeypatch):
    for brand, others in ((b"heic", b"mif1heic"), (b"mif1", b"heixmiaf"), (b"msf1", b"hevc")):
        box = b"ftyp" + brand + bytes(4) + others
        content = struct.pack(">I", len(box) + 4) + box + bytes(100)
        images._register_heif.cache_clear()
        monkeypatch.setitem(sys.modules, "pillow_heif", None)
        with pytest.raises(
            InputError, match=r"needs pillow-heif: pip install 'vsc-serve\[heif\]'$"
        ):
            read_pixels(content, RGB)
    images._register_heif.cache_clear()


def test_avif_is_not_taken_for_heif():
    content = saved(Image.new("RGB", (8, 8), (200, 100, 50)), "AVIF", quality=100)
    assert not images.is_heif(content)
    np.testing.assert_allclose(only_colour(content), [200, 100, 50], atol=4)


# Size


def tiled_tiff(tile: int) -> bytes:
    """A TIFF of 16x16 pixels in one tile that claims to be `tile` wide and high."""
    entries: list[tuple[int, int, int]] = [
        *((256, 4, 16), (257, 4, 16), (258, 3, 8), (259, 3, 1), (262, 3, 1), (277, 3, 1)),
        *((322, 4, tile), (323, 4, tile), (324, 4, 200), (325, 4, 256)),
    ]
    table = b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in entries)
    header = b"II*\0" + struct.pack("<IH", 8, len(entries)) + table + bytes(4)
    return header.ljust(200, b"\0") + bytes(256)


def test_a_bomb_inside_a_tiff_tile_is_refused_by_its_pixels():
    assert read_pixels(tiled_tiff(16), GREY).max() == 0
    with pytest.raises(
        InputError, match=r"^too large: 100000x100000 in one tile is over the limit"
    ):
        read_pixels(tiled_tiff(100_000), GREY)


def gif_with_frame(width: int, height: int) -> bytes:
    """A GIF of 1x1 whose first frame claims another size."""
    return (
        b"GIF89a\1\0\1\0\x80\0\0\0\0\0\xff\xff\xff"
        + struct.pack("<BHHHHB", 0x2C, 0, 0, width, height, 0)
        + b"\x02\x02\x44\x01\x00;"
    )


def test_a_bomb_inside_an_animation_is_refused_by_its_pixels():
    assert read_pixels(gif_with_frame(1, 1), GREY).shape == GREY.shape
    with pytest.raises(InputError, match=r"^too large: "):
        read_pixels(gif_with_frame(60_000, 60_000), GREY)
