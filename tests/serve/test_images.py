"""Finding pictures in folders, and what becomes of a file that cannot be read."""

import io
import json
import os
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from vsc_serve.errors import InputError, UsageError
from vsc_serve.images import MAX_PIXELS, decode_pixels, find_images, read_images, read_pixels
from vsc_serve.preprocess import PixelSpec

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


def ids(*inputs: Path) -> list[str]:
    return [source.id for source in find_images(inputs)]


def reason(source: Path | bytes, **limits: int) -> str:
    """Why a picture has no row. Fails when it has one."""
    with pytest.raises(InputError) as caught:
        read_pixels(source, SPEC, **limits)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# Finding


def test_a_folder_is_searched_to_any_depth_in_the_order_of_its_paths(tmp_path):
    fill(tmp_path, "b.png", "a/z.JPG", "a/b/c.jpeg", "a.png", "B.webp", "c/1.tif", "c/10.png")
    assert ids(tmp_path) == [
        *("B.webp", "a.png", "a/b/c.jpeg", "a/z.JPG", "b.png", "c/1.tif", "c/10.png")
    ]


def test_files_that_are_no_images_and_hidden_and_junk_places_are_skipped(tmp_path):
    fill(tmp_path, "a.png", ".hidden.png", "._a.png", ".git/b.png", "__MACOSX/a.png")
    fill(tmp_path, "x/@eaDir/a.jpg", "node_modules/logo.png", "notes.txt", "Thumbs.db", "png")
    assert ids(tmp_path) == ["a.png"]


def test_a_link_that_leads_back_up_is_not_followed_for_ever(tmp_path):
    fill(tmp_path, "a.png", "deep/b.png")
    (tmp_path / "deep" / "again").symlink_to(tmp_path)
    (tmp_path / "deep" / "self").symlink_to("self")
    assert ids(tmp_path) == ["a.png", "deep/b.png"]


def test_a_linked_folder_is_searched_under_the_links_name(tmp_path):
    elsewhere = fill(tmp_path / "elsewhere", "a.png", "b/c.png")
    folder = fill(tmp_path / "folder", "z.png")
    (folder / "more").symlink_to(elsewhere)
    assert ids(folder) == ["more/a.png", "more/b/c.png", "z.png"]
    (tmp_path / "linked").symlink_to(folder)
    assert ids(tmp_path / "linked") == ids(folder)


def test_a_folder_keeps_its_own_name_when_a_link_leads_to_it_too(tmp_path):
    fill(tmp_path, "real/a.png", "z/b.png")
    (tmp_path / "a_link_that_sorts_first").symlink_to(tmp_path / "real")
    (tmp_path / "real" / "z_link").symlink_to(tmp_path / "z")
    assert ids(tmp_path) == ["real/a.png", "z/b.png"]


def test_a_folder_that_is_named_like_a_picture_is_a_folder(tmp_path):
    fill(tmp_path, "trip.jpg/a.png")
    assert ids(tmp_path) == ["trip.jpg/a.png"]


def test_a_file_named_on_its_own_keeps_its_path_and_needs_no_ending(tmp_path, monkeypatch):
    monkeypatch.chdir(fill(tmp_path, "some/picture"))
    assert ids(Path("some/picture")) == ["some/picture"]
    (source,) = find_images([Path("some/picture")])
    assert read_pixels(source.path, SPEC).shape == SPEC.shape


def test_with_several_inputs_an_id_begins_with_the_input_and_their_order_stays(
    tmp_path, monkeypatch
):
    monkeypatch.chdir(fill(tmp_path, "b/1.png", "a/1.png", "0.png"))
    assert ids(Path("b"), Path("0.png"), Path("a")) == ["b/1.png", "0.png", "a/1.png"]


def test_names_in_any_encoding_are_found_and_survive_json(tmp_path):
    fill(tmp_path, "größe 漢字.png")
    undecodable = os.fsdecode(b"caf\xe9.png")  # Latin-1, not UTF-8
    try:
        fill(tmp_path, undecodable)
    except OSError:
        pytest.skip("this file system has UTF-8 names only")
    sources = find_images([tmp_path])
    assert [source.id for source in sources] == [undecodable, "größe 漢字.png"]
    assert json.loads(json.dumps([source.id for source in sources])) == [s.id for s in sources]
    _, rows, bad = read_images(sources, SPEC)
    assert len(rows) == 2
    assert not bad


def test_an_empty_folder_and_one_without_images_say_what_was_looked_for(tmp_path):
    with pytest.raises(UsageError, match=r"no image found. Looked for files ending in \.apng"):
        find_images([tmp_path])
    fill(tmp_path, "notes.txt")
    with pytest.raises(UsageError, match=f"^{tmp_path}: no image found"):
        find_images([tmp_path])


def test_an_input_that_is_not_there_is_named(tmp_path):
    with pytest.raises(UsageError, match=r"missing: no such file or folder\. Check the path\."):
        find_images([tmp_path / "missing"])


def test_a_folder_that_cannot_be_searched_is_an_error_and_not_a_gap(tmp_path, monkeypatch):
    fill(tmp_path, "a.png", "locked/b.png")
    scandir = os.scandir

    def refuse(path):
        if Path(path).name == "locked":
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)  # root, as in a container, may read everything
    with pytest.raises(InputError, match=r"locked: folder cannot be searched \(Permission denied"):
        find_images([tmp_path])


# Reading


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
    _, rows, bad = read_images(find_images([tmp_path]), SPEC)
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
        *(struct.error, zlib.error),
    ],
)
def test_whatever_a_decoder_raises_becomes_a_reason(error, monkeypatch):
    def fail(self):
        raise error("the reason")

    monkeypatch.setattr(Image.Image, "getexif", fail)
    with pytest.raises(InputError, match=r"^broken image: '?the reason"):
        decode_pixels(Image.new("RGB", (8, 8)), SPEC)


def test_an_error_without_a_text_gives_its_name(monkeypatch):
    def fail(self):
        raise MemoryError

    monkeypatch.setattr(Image.Image, "getexif", fail)
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
    pixels, rows, bad = read_images(find_images([tmp_path]), SPEC)
    assert [entry.id for entry in bad] == ["00.png", "07.png", "08.png", "19.png"]
    assert all(entry.reason.startswith("not an image") for entry in bad)
    assert pixels.shape == (16, 8, 8, 3)
    assert [f"{row[0, 0, 0]:02}.png" for row in pixels] == rows


def test_no_readable_picture_gives_no_row_and_keeps_the_shape(tmp_path):
    (tmp_path / "a.png").write_bytes(b"")
    pixels, rows, bad = read_images(find_images([tmp_path]), SPEC)
    assert pixels.shape == (0, 8, 8, 3)
    assert rows == []
    assert len(bad) == 1


@settings(max_examples=150, deadline=None)
@given(data=st.data(), file_format=st.sampled_from(["PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP"]))
def test_a_damaged_file_gives_pixels_or_a_reason_and_nothing_else(data, file_format):
    content = bytearray(picture_bytes(file_format))
    for _ in range(data.draw(st.integers(1, 8))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    del content[data.draw(st.integers(1, len(content))) :]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow warns about odd metadata and goes on
        try:
            pixels = read_pixels(bytes(content), SPEC, max_pixels=1_000_000)
        except InputError:
            return
        assert pixels.shape == SPEC.shape
