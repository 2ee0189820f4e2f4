"""A folder of hostile files, and what becomes of each: a row, or the reason why it has none."""

import io
import os
import re
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from PIL import Image

from vsc_serve.images import BadImage, PixelSpec, read_images
from vsc_serve.sources import find_sources

SPEC = PixelSpec(height=8, width=8, channels=3)


class Hostile(NamedTuple):
    content: bytes
    reason: str | None
    """Begins like this; None for a file that gives a row."""


def saved(image: Image.Image, file_format: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def noise(width: int = 40, height: int = 30) -> Image.Image:
    rng = np.random.default_rng(width + height)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


def chunk(kind: bytes, data: bytes) -> bytes:
    body = kind + data
    return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))


def png_of(width: int, height: int, *chunks: bytes, colour: int = 0, interlace: int = 0) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, 8, colour, 0, 0, interlace)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + b"".join(chunks)


def replaced(content: bytes, place: int, new: bytes) -> bytes:
    return content[:place] + new + content[place + len(new) :]


def flipped(content: bytes, place: int) -> bytes:
    return content[:place] + bytes([content[place] ^ 0x55]) + content[place + 1 :]


def make_corpus() -> dict[str, Hostile]:
    """Hostile files by name."""
    jpeg, png = saved(noise(), "JPEG"), saved(noise(), "PNG")
    rows = b"".join(b"\0" + bytes(range(8)) for _ in range(8))
    data, end = chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b"")
    bomb = chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(100_000_000)))
    animation = {"save_all": True, "append_images": [noise().rotate(180)]}
    return {
        # Not images
        "empty.jpg": Hostile(b"", "empty file (0 bytes)"),
        "text.jpg": Hostile(b"I am a text\n", "not an image, or cut off: begins with b'I am a t'"),
        "page.png": Hostile(b"<!DOCTYPE html><p>404 Not Found", "not an image, or cut off"),
        "drawing.png": Hostile(b"<svg xmlns='http://www.w3.org/2000/svg'/>", "not an image"),
        "zeros.jpg": Hostile(bytes(5_000), "not an image, or cut off"),
        "program.tif": Hostile(
            b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image"
        ),
        "archive.jpg": Hostile(b"PK\3\4" + bytes(100), "not an image, or cut off"),
        # The wrong ending
        "really_a_jpeg.png": Hostile(jpeg, None),
        "really_a_png.JPG": Hostile(png, None),
        "really_a_gif.webp": Hostile(saved(noise(), "GIF"), None),
        # Cut off
        "half.jpg": Hostile(jpeg[: len(jpeg) // 2], "broken image: image file is truncated"),
        "half.png": Hostile(png[: len(png) // 2], "broken image: "),
        "half.gif": Hostile(saved(noise(), "GIF")[:1_200], "broken image: image file is trunc"),
        "half.bmp": Hostile(saved(noise(), "BMP")[:900], "broken image: image file is trunc"),
        "half.webp": Hostile(saved(noise(), "WEBP")[:200], ""),
        "half.tif": Hostile(saved(noise(), "TIFF")[:900], ""),
        "half.jp2": Hostile(saved(noise(), "JPEG2000")[:900], "broken image: "),
        "half.avif": Hostile(saved(noise(), "AVIF")[:300], ""),
        "half.ppm": Hostile(saved(noise(), "PPM")[:900], "broken image: image file is trunc"),
        "half.tga": Hostile(saved(noise(), "TGA")[:900], ""),
        "without_its_last_byte.jpg": Hostile(jpeg[:-1], None),  # of the end marker
        "without_its_last_block.jpg": Hostile(jpeg[:-4], "broken image: image file is truncated"),
        "half_grey.jpg": Hostile(
            jpeg[: len(jpeg) // 2] + b"\xff\xd9", "broken image: image file is truncated"
        ),
        "zeroed_sector.jpg": Hostile(replaced(jpeg, 900, bytes(512)), "broken image: "),
        "header_only.png": Hostile(png[:33], "broken image: the header of this PNG is damaged"),
        "header_only.jpg": Hostile(jpeg[:20], "broken image: "),
        # Sizes
        "wide_bomb.png": Hostile(png_of(100_000, 100_000, data, end), "too large: "),
        "just_over.png": Hostile(png_of(10_000, 9_000, data, end), "too large: "),
        "bomb.ppm": Hostile(b"P6 999999999 999999999 255\n", "too large: "),
        "bomb.bmp": Hostile(
            replaced(saved(noise(), "BMP"), 18, struct.pack("<ii", 60_000, 60_000)),
            "too large: ",
        ),
        "one.png": Hostile(saved(noise(1, 1), "PNG"), None),
        "one.jpg": Hostile(saved(noise(1, 1), "JPEG"), None),
        "thin.png": Hostile(saved(noise(1, 20_000), "PNG"), None),
        "flat.png": Hostile(saved(noise(20_000, 1), "PNG"), None),
        "thin.jpg": Hostile(saved(noise(1, 20_000), "JPEG"), None),
        "no_width.png": Hostile(png_of(0, 8, data, end), "broken image: "),
        # PNG chunks
        "wrong_checksum.png": Hostile(flipped(png, 29), "broken image: "),
        "wrong_data.png": Hostile(flipped(png, len(png) // 2), "broken image: "),
        "unknown_chunk.png": Hostile(png_of(8, 8, chunk(b"abCd", b"x"), data, end), None),
        "no_end.png": Hostile(png_of(8, 8, data), None),
        "no_data.png": Hostile(png_of(8, 8, end), "broken image: "),
        "too_little_data.png": Hostile(
            png_of(8, 8, chunk(b"IDAT", zlib.compress(rows[:20])), end), "broken image: "
        ),
        "data_twice.png": Hostile(png_of(8, 8, data, chunk(b"tIME", b""), data, end), None),
        "long_chunk.png": Hostile(png_of(8, 8)[:33] + b"\x7f\xff\xff\xffIDAT", "broken image: "),
        "text_bomb.png": Hostile(png_of(8, 8, bomb, data, end), None),
        "no_palette.png": Hostile(png_of(8, 8, data, end, colour=3), "broken image: its colours"),
        "interlaced.png": Hostile(interlaced(), None),
        # Metadata
        "bad_exif.jpg": Hostile(saved(noise(), "JPEG", exif=b"Exif\0\0MM\0*\xff"), None),
        "bad_exif.png": Hostile(png_of(8, 8, chunk(b"eXIf", b"nonsense"), data, end), None),
        "endless_exif.jpg": Hostile(
            saved(
                noise(), "JPEG", exif=b"Exif\0\0II*\0\x08\0\0\0\1\0\x69\x87\4\0\1\0\0\0\x08\0\0\0"
            ),
            None,
        ),
        "bad_profile.png": Hostile(
            png_of(8, 8, chunk(b"iCCP", b"x\0\0" + zlib.compress(b"no profile")), data, end), None
        ),
        "bad_profile.jpg": Hostile(saved(noise(), "JPEG", icc_profile=b"no profile"), None),
        "orientation_99.jpg": Hostile(saved(noise(), "JPEG", exif=exif_of(99)), None),
        "claims_to_be_large.jpg": Hostile(claiming(jpeg, 60_000), "broken image: image file is tr"),
        "rubbish_after_the_end.jpg": Hostile(jpeg + b"rubbish" * 99, None),
        # Several images, odd colours
        "animated.gif": Hostile(saved(noise(), "GIF", **animation), None),
        "animated.png": Hostile(saved(noise(), "PNG", **animation), None),
        "animated.webp": Hostile(saved(noise(), "WEBP", **animation), None),
        "no_frames.gif": Hostile(b"GIF89a\x08\0\x08\0\0\0\0;", ""),
        "pages.tif": Hostile(saved(noise(), "TIFF", **animation), None),
        "endless_pages.tif": Hostile(endless_tiff(), ""),
        "ink.jpg": Hostile(saved(noise().convert("CMYK"), "JPEG"), None),
        "ink.tif": Hostile(saved(noise().convert("CMYK"), "TIFF"), None),
        "bits.png": Hostile(saved(noise().convert("1"), "PNG"), None),
        "bits.tif": Hostile(saved(noise().convert("1"), "TIFF", compression="group4"), None),
        "grey_16.png": Hostile(saved(noise().convert("I;16"), "PNG"), None),
        "palette.png": Hostile(saved(noise().convert("P"), "PNG"), None),
        "grey_alpha.png": Hostile(saved(noise().convert("LA"), "PNG"), None),
        "real_numbers.tif": Hostile(saved(noise().convert("F"), "TIFF"), "mode F (32 bits"),
        "lab.tif": Hostile(saved(noise().convert("RGB").convert("LAB"), "TIFF"), "mode LAB"),
        # Names
        "two\nlines.png": Hostile(png, None),
        "größe 漢字 🙂.png": Hostile(png, None),
        "n" * 251 + ".png": Hostile(png, None),
        os.fsdecode(b"caf\xe9.png"): Hostile(png, None),
        "-rf.png": Hostile(png, None),
        "; rm -rf *.png": Hostile(png, None),
    }


def claiming(jpeg: bytes, side: int) -> bytes:
    """A JPEG whose frame claims another size."""
    return replaced(jpeg, jpeg.index(b"\xff\xc0") + 5, struct.pack(">HH", side, side))


def interlaced() -> bytes:
    """An 8x8 grey PNG in the seven passes of Adam7, all of one value."""
    passes = ((1, 1), (1, 1), (2, 1), (2, 2), (4, 2), (4, 4), (8, 4))
    rows = b"".join((b"\0" + b"\x80" * width) * height for width, height in passes)
    return png_of(8, 8, chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b""), interlace=1)


def exif_of(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif.tobytes()


def endless_tiff() -> bytes:
    """A TIFF whose directory of pages leads back to itself, without a page."""
    return b"II*\0" + struct.pack("<IHI", 8, 0, 8)


CORPUS = make_corpus()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The corpus on a disk, with the things that are no files."""
    folder = tmp_path_factory.mktemp("hostile")
    for name, hostile in CORPUS.items():
        (folder / name).write_bytes(hostile.content)
    (folder / "a_folder.jpg").mkdir()
    (folder / "dangling.jpg").symlink_to("nowhere.jpg")
    (folder / "round.jpg").symlink_to("round.jpg")
    (folder / "around.jpg").symlink_to(folder)
    os.mkfifo(folder / "pipe.jpg")
    (folder / "device.jpg").symlink_to("/dev/zero")
    (folder / "locked.jpg").write_bytes(CORPUS["one.jpg"].content)
    (folder / "locked.jpg").chmod(0)
    yield folder
    (folder / "locked.jpg").chmod(0o600)


NO_FILES = {
    "dangling.jpg": "no such file (a link that leads nowhere?)",
    "round.jpg": "unreadable: Too many levels of symbolic links",
    "pipe.jpg": "not a regular file",
    "device.jpg": "not a regular file",
}
if os.geteuid() != 0:  # root reads everything
    NO_FILES["locked.jpg"] = "unreadable: Permission denied"


@pytest.fixture(scope="module")
def outcome(folder: Path) -> tuple[np.ndarray, list[str], list[BadImage]]:
    return read_images(find_sources([str(folder)]), SPEC)


def test_every_file_of_the_corpus_has_a_row_or_a_reason_and_no_other_has(outcome):
    pixels, ids, bad = outcome
    assert pixels.shape == (len(ids), 8, 8, 3)
    assert sorted([*ids, *(image.id for image in bad)]) == sorted(
        [*CORPUS, *NO_FILES, *(["locked.jpg"] if "locked.jpg" not in NO_FILES else [])]
    )


@pytest.mark.parametrize("name", [*CORPUS, *NO_FILES])
def test_each_hostile_file_has_the_outcome_that_is_written_here(name, outcome):
    reasons = {image.id: image.reason for image in outcome[2]}
    expected = NO_FILES[name] if name in NO_FILES else CORPUS[name].reason
    if expected is None:
        assert name in outcome[1], reasons.get(name)
    else:
        assert re.match(re.escape(expected), reasons[name]), reasons[name]
        assert "\n" not in reasons[name]
        assert len(reasons[name]) < 300


def test_rows_belong_to_their_ids_with_hostile_files_around_them(folder, outcome):
    """Complaint: skipping files shifts rows against ids."""
    pixels, ids, _ = outcome
    for name in ids:
        (row,), _, _ = read_images(find_sources([str(folder / name)]), SPEC)
        np.testing.assert_array_equal(pixels[ids.index(name)], row)


def test_complaint_one_truncated_image_costs_itself_and_nothing_else(tmp_path):
    for number in range(9):
        noise(40, 30 + number).save(tmp_path / f"{number}.jpg")
    whole = (tmp_path / "4.jpg").read_bytes()
    (tmp_path / "4.jpg").write_bytes(whole[: len(whole) // 2])
    _, ids, bad = read_images(find_sources([str(tmp_path)]), SPEC)
    assert ids == [f"{number}.jpg" for number in range(9) if number != 4]
    assert [image.id for image in bad] == ["4.jpg"]
    assert bad[0].reason.startswith("broken image: image file is truncated")
