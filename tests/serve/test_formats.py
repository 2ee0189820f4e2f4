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
from vsc_serve.images import PixelSpec, is_heif, read_pixels

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


def png(
    rows: bytes,
    *,
    depth: int,
    colour: int,
    side: int = 4,
    before: bytes = b"",
    interlaced: bool = False,
) -> bytes:
    """A PNG from rows that begin with their filter byte."""
    header = struct.pack(">IIBBBBB", side, side, depth, colour, 0, 0, interlaced)
    return b"".join(
        [
            b"\x89PNG\r\n\x1a\n",
            chunk(b"IHDR", header),
            before,
            chunk(b"IDAT", zlib.compress(rows)),
            chunk(b"IEND", b""),
        ]
    )


def tiff(data: bytes, tags: dict[int, int | tuple[int, ...]], *, order: str = "<") -> bytes:
    """A TIFF of 4x4 in one strip, uncompressed; 8 bits of grey unless `tags` say otherwise."""
    at = 4_096
    plain: dict[int, int | tuple[int, ...]] = {256: 4, 257: 4, 258: 8, 259: 1, 262: 1, 277: 1}
    table = plain | {278: 4, 273: at, 279: len(data)} | tags
    entries, behind = b"", b""
    for tag, value in sorted(table.items()):
        numbers = value if isinstance(value, tuple) else (value,)
        packed = struct.pack(f"{order}{len(numbers)}H", *numbers)
        if len(packed) > 4:
            packed, behind = struct.pack(f"{order}I", 1_024 + len(behind)), behind + packed
        entries += struct.pack(f"{order}HHI", tag, 3, len(numbers)) + packed.ljust(4, b"\0")
    start = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}I", 8)
    header = start + struct.pack(f"{order}H", len(table)) + entries + bytes(4)
    return (header.ljust(1_024, b"\0") + behind).ljust(at, b"\0") + data


def flat_png(pixel: bytes, **kind: Any) -> bytes:
    return png((b"\0" + pixel * 4) * 4, **kind)


def only_colour(content: bytes, spec: PixelSpec = RGB) -> list[int]:
    """The colour of an image that has one."""
    pixels = read_pixels(content, spec)
    colours = np.unique(pixels.reshape(-1, spec.channels), axis=0)
    assert len(colours) == 1
    return [int(value) for value in colours[0]]


def onto_white(value: int, alpha: int) -> int:
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
    for content in (
        saved(Image.fromarray(np.full((4, 4), 0.5, np.float32)), "TIFF"),
        tiff(np.full((4, 4), 7, "<u4").tobytes(), {258: 32}),
    ):
        with pytest.raises(InputError, match=r"^mode [IF] \(32 bits a pixel\) has no defined"):
            read_pixels(content, GREY)


@pytest.mark.parametrize("dtype", ["i1", "<i2", "<i4"])
def test_signed_numbers_have_no_range_and_are_refused(dtype):
    values = np.full((4, 4), 7, dtype)
    content = tiff(values.tobytes(), {258: values.dtype.itemsize * 8, 339: 2})
    with pytest.raises(InputError, match=r"^signed numbers have no defined range") as caught:
        read_pixels(content, GREY)
    assert caught.value.kind == "unsupported"


def test_of_12_bits_the_upper_eight_count():
    assert only_colour(tiff(b"\xab\xfa\xbf" * 8, {258: 12}), GREY) == [0xAB]


def test_a_jpeg_2000_of_16_bits_gives_its_upper_byte():
    content = saved(Image.fromarray(np.full((4, 4), 0xABFF, np.uint16)), "JPEG2000")
    assert only_colour(content, GREY) == [0xAB]


@pytest.mark.parametrize(("most", "value", "expected"), [(15, 10, 170), (1023, 682, 170)])
def test_a_pgm_is_spread_from_its_largest_value(most, value, expected):
    row = value.to_bytes(2 if most > 255 else 1)
    assert only_colour(b"P5 4 4 %d\n" % most + row * 16, GREY) == [expected]


@pytest.mark.parametrize(
    ("bits", "row", "value"),
    [
        (1, b"\xf0", 255),
        (2, b"\x55", 85),
        (4, b"\x33\x33", 51),
        (8, b"\x30" * 4, 0x30),
        (16, b"\xff\x30" * 4, 0x30),
    ],
)
def test_a_tiff_may_say_that_white_is_zero(bits, row, value):
    assert only_colour(tiff(row * 4, {258: bits, 262: 1}), GREY) == [value]
    assert only_colour(tiff(row * 4, {258: bits, 262: 0}), GREY) == [255 - value]


def test_a_tiff_of_a_kind_that_is_not_read_says_so():
    """Big-endian and white is zero, of 16 bits: no file that is cut off."""
    content = tiff(b"\x30\xff" * 16, {258: 16, 262: 0}, order=">")
    with pytest.raises(
        InputError, match=r"^broken image: the header of this TIFF is .* of a kind "
    ):
        read_pixels(content, GREY)
    assert only_colour(tiff(b"\x30\xff" * 16, {258: 16}, order=">"), GREY) == [0x30]


@pytest.mark.parametrize("missing", ["strips", "planes"])
def test_a_tiff_without_some_of_its_strips_is_refused(missing):
    tags = {278: 2} if missing == "strips" else {258: (8, 8, 8), 262: 2, 277: 3, 284: 2}
    with pytest.raises(InputError, match=r"^broken image: part of its strips or tiles are missing"):
        read_pixels(tiff(b"\x30" * 16, tags), GREY)


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


@pytest.mark.parametrize("factor", [257, 256, 1])
def test_the_palette_of_a_tiff_may_have_16_bits_or_8(factor):
    colours = [(1, 40), (2, 50), (3, 60)]
    palette = [value * factor for pair in colours for value in (*pair, *[0] * 254)]
    content = tiff(b"\x01" * 16, {258: 8, 262: 3, 320: tuple(palette)})
    assert only_colour(content) == [40, 50, 60]


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
def test_transparency_is_composited_onto_white(alpha):
    colour = flat_png(bytes([0, 50, 100, alpha]), depth=8, colour=6)
    assert only_colour(colour) == [onto_white(value, alpha) for value in (0, 50, 100)]
    grey = flat_png(bytes([100, alpha]), depth=8, colour=4)
    assert only_colour(grey, GREY) == [onto_white(100, alpha)]


def test_a_palette_with_alphas_and_a_transparent_colour_are_composited_onto_white():
    palette = chunk(b"PLTE", bytes([1, 2, 3, 40, 50, 60])) + chunk(b"tRNS", bytes([255, 51]))
    content = flat_png(b"\x01", depth=8, colour=3, before=palette)
    assert only_colour(content) == [onto_white(value, 51) for value in (40, 50, 60)]
    key = chunk(b"tRNS", struct.pack(">HHH", 9, 8, 7))
    assert only_colour(flat_png(bytes([9, 8, 7]), depth=8, colour=2, before=key)) == [255] * 3
    assert only_colour(flat_png(bytes([9, 8, 6]), depth=8, colour=2, before=key)) == [9, 8, 6]
    grey_key = chunk(b"tRNS", struct.pack(">H", 100))
    assert only_colour(flat_png(b"\x64", depth=8, colour=0, before=grey_key), GREY) == [255]


@pytest.mark.parametrize(("depth", "row"), [(1, b"\xf0"), (2, b"\xff"), (4, b"\xff\xff")])
def test_one_transparent_grey_of_few_bits_is_composited_onto_white(depth, row):
    """The value in the file counts, not the one that it is spread to."""
    clear = (0).to_bytes(2)
    black = png((b"\0" + bytes(len(row))) * 4, depth=depth, colour=0, before=chunk(b"tRNS", clear))
    assert only_colour(black, GREY) == [255]
    key = chunk(b"tRNS", (2**depth - 2).to_bytes(2))
    darker = bytes(byte & (0xEE if depth == 4 else 0xAA) for byte in row)  # all values one less
    if depth > 1:
        below = png((b"\0" + darker) * 4, depth=depth, colour=0, before=key)
        assert only_colour(below, GREY) == [255]
        other = chunk(b"tRNS", (1).to_bytes(2))
        kept = only_colour(png((b"\0" + darker) * 4, depth=depth, colour=0, before=other), GREY)
        assert kept == [255 * (2**depth - 2) // (2**depth - 1)]


ADAM7 = (
    (0, 0, 8, 8),
    (4, 0, 8, 8),
    (0, 4, 4, 8),
    (2, 0, 4, 4),
    (0, 2, 2, 4),
    (1, 0, 2, 2),
    (0, 1, 1, 2),
)
"""Left, top, and steps to the right and down, of each pass."""


def rows_of(samples: np.ndarray, *, interlaced: bool) -> bytes:
    """16-bit samples as a PNG stores them, each row after its filter byte."""
    passes = ADAM7 if interlaced else ((0, 0, 1, 1),)
    parts = [samples[top::down, left::right] for left, top, right, down in passes]
    rows = [row for part in parts if part.size for row in part.astype(">u2")]
    return b"".join(b"\0" + row.tobytes() for row in rows)


@pytest.mark.parametrize("interlaced", [False, True])
def test_one_transparent_colour_of_16_bits_is_compared_with_all_of_them(interlaced):
    """Of two colours whose upper bytes are equal, one is transparent."""
    samples = np.full((4, 4, 3), (0x3001, 0x2002, 0x1004))
    samples[0] = (0x3001, 0x2002, 0x1003)
    for channels, kind in ((3, 2), (1, 0)):
        key = np.array([0x3001, 0x2002, 0x1003], ">u2")[3 - channels :]
        rows = rows_of(samples[..., 3 - channels :], interlaced=interlaced)
        before = chunk(b"tRNS", key.tobytes())
        content = png(rows, depth=16, colour=kind, before=before, interlaced=interlaced)
        pixels = read_pixels(content, RGB)
        expected = [0x30, 0x20, 0x10] if channels == 3 else [0x10] * 3
        assert (pixels[0] == 255).all()
        assert (pixels[1:] == expected).all()


@pytest.mark.parametrize("associated", [False, True])
def test_a_tiff_may_have_its_colours_multiplied_by_alpha(associated):
    grey, colour = (20, 51) if associated else (100, 51), (20, 10, 0, 51)
    tags = {258: (8, 8), 277: 2, 338: 1 if associated else 2}
    assert only_colour(tiff(bytes(grey) * 16, tags), GREY) == [onto_white(100, 51)]
    tags = {258: (8, 8, 8, 8), 262: 2, 277: 4, 338: 1 if associated else 2}
    colour = colour if associated else (100, 50, 0, 51)
    expected = [onto_white(value, 51) for value in (100, 50, 0)]
    assert only_colour(tiff(bytes(colour) * 16, tags)) == expected


def tga(pixels: bytes, *, attribute_bits: int) -> bytes:
    header = struct.pack("<BBBHHBHHHHBB", 0, 0, 2, 0, 0, 0, 0, 0, 4, 4, 32, 0x20 | attribute_bits)
    return header + pixels


def bmp(pixels: bytes) -> bytes:
    """A BMP of version 5, 32 bits, with a mask for alpha."""
    fields = struct.pack("<IiiHHIIiiII", 124, 4, -4, 1, 32, 3, 64, 2835, 2835, 0, 0)
    masks = struct.pack("<IIII", 0xFF0000, 0xFF00, 0xFF, 0xFF000000) + b"BGRs"
    header = (fields + masks).ljust(124, b"\0")
    return b"BM" + struct.pack("<IHHI", 14 + 124 + 64, 0, 0, 14 + 124) + header + pixels


@pytest.mark.parametrize("attribute_bits", [0, 8])
def test_an_alpha_of_tga_or_bmp_that_is_0_everywhere_is_none(attribute_bits):
    """Games and old programs leave the fourth byte at 0. Where one pixel has it, it counts."""
    unused, clear = bytes([30, 20, 200, 0]), bytes([30, 20, 200, 255])
    for make in (lambda pixels: tga(pixels, attribute_bits=attribute_bits), bmp):
        assert only_colour(make(unused * 16)) == [200, 20, 30]
        pixels = read_pixels(make(clear + unused * 15), RGB).reshape(-1, 3)
        assert pixels[0].tolist() == [200, 20, 30]
        assert (pixels[1:] == 255).all()


def test_a_transparent_gif_and_webp_are_composited_onto_white():
    clear = Image.new("RGBA", (4, 4), (200, 0, 0, 0))
    assert only_colour(saved(clear, "GIF")) == [255, 255, 255]
    assert only_colour(saved(clear, "WEBP", lossless=True)) == [255, 255, 255]


# Several images in a file


@pytest.mark.parametrize("file_format", ["GIF", "PNG", "WEBP", "TIFF", "MPO", "AVIF"])
def test_of_several_images_in_a_file_the_first_counts(file_format):
    first, second = Image.new("RGB", (16, 16), (250, 5, 5)), Image.new("RGB", (16, 16), (5, 5, 250))
    options = {"lossless": True} if file_format == "WEBP" else {}
    content = saved(first, file_format, save_all=True, append_images=[second], **options)
    with Image.open(io.BytesIO(content)) as image:
        assert image.n_frames == 2
    np.testing.assert_allclose(only_colour(content), [250, 5, 5], atol=5)


def small_gif(*, transparent: bool) -> bytes:
    """A canvas of 4x4 whose first frame is one red pixel at (2, 1)."""
    control = b"!\xf9\x04\x01\0\0\0\0" if transparent else b""
    return (
        b"GIF89a\4\0\4\0\x80\0\0"
        + bytes([10, 20, 30, 255, 0, 0])
        + control
        + struct.pack("<BHHHHB", 0x2C, 2, 1, 1, 1, 0)
        + b"\x02\x02\x4c\x01\x00;"
    )


@pytest.mark.parametrize("transparent", [False, True])
def test_what_the_first_frame_of_a_gif_leaves_uncovered_is_white(transparent):
    """As browsers have it; the first colour of the palette is not what is behind."""
    pixels = read_pixels(small_gif(transparent=transparent), RGB).copy()
    assert pixels[1, 2].tolist() == [255, 0, 0]
    pixels[1, 2] = 255
    assert (pixels == 255).all()


def test_what_the_first_frame_of_a_webp_leaves_uncovered_is_white():
    frame = saved(Image.new("RGB", (2, 2), (255, 0, 0)), "WEBP", lossless=True)[12:]
    size = (1).to_bytes(3, "little") * 2
    animation = (1).to_bytes(3, "little") + (0).to_bytes(3, "little") + size + bytes(4) + frame
    canvas = bytes([2, 0, 0, 0]) + (3).to_bytes(3, "little") * 2
    chunks = [(b"VP8X", canvas), (b"ANIM", bytes(6)), (b"ANMF", animation)]
    body = b"WEBP" + b"".join(k + struct.pack("<I", len(d)) + d for k, d in chunks)
    pixels = read_pixels(b"RIFF" + struct.pack("<I", len(body)) + body, RGB).copy()
    assert (pixels[:2, 2:] == (255, 0, 0)).all()
    pixels[:2, 2:] = 255
    assert (pixels == 255).all()


# Rotation


def turned(orientation: int) -> tuple[Image.Image, bytes]:
    """An image that is brighter at its stored top left, with a note how a viewer turns it."""
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
    image, exif = turned(orientation)
    content = saved(image.convert("RGB"), file_format, exif=exif)
    upright = (16, 32) if orientation < 5 else (32, 16)
    pixels = read_pixels(content, PixelSpec(height=upright[0], width=upright[1], channels=1))
    corners = {"tl": pixels[3, 3], "tr": pixels[3, -4], "bl": pixels[-4, 3], "br": pixels[-4, -4]}
    assert {name for name, value in corners.items() if value > 128} == {BRIGHT_CORNER[orientation]}


def test_broken_exif_turns_nothing_and_costs_no_image():
    for exif in (
        b"Exif\0\0nonsense",
        b"Exif\0\0II*\0\xff\xff\xff\xff",
        b"Exif\0\0MM\0*\0\0\0\x08\xff",
    ):
        for file_format in ("JPEG", "PNG", "WEBP"):
            content = saved(Image.new("RGB", (8, 8), (90, 90, 90)), file_format, exif=exif)
            np.testing.assert_allclose(only_colour(content), [90, 90, 90], atol=2)


# HEIF


def test_complaint_phone_formats_are_read_when_the_plugin_is_there(tmp_path):
    heif = pytest.importorskip("pillow_heif")
    file = io.BytesIO()
    heif.from_pillow(Image.new("RGB", (64, 64), (200, 100, 50))).save(file, quality=100)
    np.testing.assert_allclose(only_colour(file.getvalue()), [200, 100, 50], atol=4)


def test_complaint_phone_formats_without_the_plugin_say_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    for brand, others in ((b"heic", b"mif1heic"), (b"mif1", b"heixmiaf"), (b"msf1", b"hevc")):
        box = b"ftyp" + brand + bytes(4) + others
        content = struct.pack(">I", len(box) + 4) + box + bytes(100)
        with pytest.raises(
            InputError, match=r"needs pillow-heif: pip install 'vsc-serve\[heif\]'$"
        ) as caught:
            read_pixels(content, RGB)
        assert caught.value.kind == "package missing"


def test_avif_is_not_taken_for_heif():
    content = saved(Image.new("RGB", (8, 8), (200, 100, 50)), "AVIF", quality=100)
    assert not is_heif(content)
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
