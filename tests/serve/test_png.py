"""PNG: plain files take a short way to the same pixels; texts, profiles and rotation."""

import io
import struct
import threading
import warnings
import zlib
from typing import Any, Final

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageCms

from vsc_serve.errors import InputError
from vsc_serve.images import PixelSpec, decode, read_pixels, to_pixels
from vsc_serve.images.png import read_plain_png

SPEC: Final = PixelSpec(height=8, width=8, channels=3)
ANY_SIZE: Final = 10**9
SPECS: Final = [
    SPEC,
    PixelSpec(height=28, width=28, channels=1),
    PixelSpec(height=32, width=96, channels=3, fit="stretch"),
]


def encoded(pixels: NDArray[Any] | Image.Image, **options: object) -> bytes:
    file = io.BytesIO()
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    image.save(file, "PNG", **options)
    return file.getvalue()


def noise(*shape: int, seed: int = 0, most: int = 256) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, most, shape, np.uint8)


def chunk(kind: bytes, data: bytes) -> bytes:
    body = kind + data
    return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))


def with_chunk(content: bytes, kind: bytes, data: bytes) -> bytes:
    """A file with one more chunk before its pixels."""
    return content[:33] + chunk(kind, data) + content[33:]


def outcome(content: bytes, spec: PixelSpec) -> bytes | str:
    """The pixels or the reason."""
    try:
        return read_pixels(content, spec).tobytes()
    except InputError as error:
        return str(error)


# The short way


@pytest.mark.parametrize("shape", [(28, 28), (5, 9), (7, 3, 3), (1, 1), (64, 64, 3), (200, 300)])
def test_a_plain_file_gives_its_pixels(shape):
    for seed in range(5):
        pixels = noise(*shape, seed=seed, most=256 if seed % 2 else 4)
        found = read_plain_png(encoded(pixels), ANY_SIZE)
        assert found is not None
        np.testing.assert_array_equal(np.asarray(found), pixels)


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_plain_files_have_the_pixels_that_pillow_gives(mode):
    for size in ((28, 28), (1, 1), (8, 8), (37, 90), (90, 37)):
        image = Image.fromarray(noise(*size, 3)).convert(mode)
        for level in (0, 9):  # without compression and with all filters
            content = encoded(image, compress_level=level, dpi=(72, 72))
            assert read_plain_png(content, ANY_SIZE) is not None
            for spec in SPECS:
                pillows = to_pixels(Image.open(io.BytesIO(content)), spec)
                np.testing.assert_array_equal(read_pixels(content, spec), pillows)


def test_anything_else_is_left_to_pillow():
    image = Image.fromarray(noise(28, 28, 3))
    others = [image.convert(mode) for mode in ("1", "P", "LA", "RGBA", "I;16")]
    files = [encoded(other) for other in others]
    files.append(encoded(image, transparency=(1, 2, 3)))
    exif = Image.Exif()
    exif[0x0112] = 6
    files.append(encoded(image, exif=exif))
    files.append(encoded(image, save_all=True, append_images=[image.rotate(90)]))
    files += [b"", encoded(noise(400, 400))]
    assert [read_plain_png(content, ANY_SIZE) for content in files] == [None] * len(files)
    assert read_plain_png(encoded(image), 28 * 28) is not None
    assert read_plain_png(encoded(image), 28 * 28 - 1) is None


def test_no_damaged_file_is_taken_for_a_whole_one():
    rng = np.random.default_rng(1)
    pixels = noise(12, 12)
    plain = encoded(pixels)
    for end in range(len(plain) - 12):
        assert read_plain_png(plain[:end], ANY_SIZE) is None
    for place in range(len(plain) - 12):
        damaged = bytearray(plain)
        damaged[place] ^= 1 << int(rng.integers(8))
        found = read_plain_png(bytes(damaged), ANY_SIZE)
        assert found is None or np.array_equal(np.asarray(found), pixels)


def test_a_file_cut_off_or_damaged_anywhere_has_the_outcome_that_it_has_without_the_short_way(
    monkeypatch,
):
    rng = np.random.default_rng(0)
    whole = encoded(noise(12, 12, 3))
    files = [whole[:length] for length in range(len(whole))]
    for _ in range(600):
        changed = bytearray(whole)
        for _ in range(rng.integers(1, 4)):
            changed[rng.integers(len(changed))] = rng.integers(256)
        files.append(bytes(changed))
    rows = b"".join(b"\0" + rng.bytes(12) for _ in range(12))
    for _ in range(300):  # checksums are right and pixels are not
        body = bytearray(zlib.compress(rows))
        body[rng.integers(len(body))] = rng.integers(256)
        files.append(whole[:33] + chunk(b"IDAT", bytes(body)) + chunk(b"IEND", b""))
    for filter_byte in (5, 255):
        body = zlib.compress(bytes([filter_byte]) + rows[1:])
        files.append(whole[:33] + chunk(b"IDAT", body) + chunk(b"IEND", b""))
    outcomes = [outcome(content, SPEC) for content in files]
    monkeypatch.setattr(decode, "read_plain_png", lambda *_: None)
    assert [outcome(content, SPEC) for content in files] == outcomes


def test_threads_do_not_share_the_memory_of_the_short_way():
    spec = PixelSpec(height=28, width=28, channels=1)
    images = [noise(28, 28, seed=seed) for seed in range(4)]
    wrong: list[int] = []

    def read(number: int) -> None:
        content = encoded(images[number])
        rows = [read_pixels(content, spec)[..., 0] for _ in range(300)]
        wrong.extend(number for row in rows if not np.array_equal(row, images[number]))

    threads = [threading.Thread(target=read, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_pixels_that_were_returned_do_not_change_with_the_next_image():
    spec = PixelSpec(height=28, width=28, channels=1)
    first = read_pixels(encoded(noise(28, 28, seed=1)), spec)
    kept = first.copy()
    read_pixels(encoded(noise(28, 28, seed=2)), spec)
    np.testing.assert_array_equal(first, kept)


# Texts, profiles, animations


LARGE: Final = b"x" * 3_000_000
TEXTS: Final = {
    "zTXt": (b"zTXt", b"workflow\0\0" + zlib.compress(LARGE)),
    "iTXt, compressed (XMP)": (b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + zlib.compress(LARGE)),
    "iTXt": (b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + LARGE),
    "tEXt": (b"tEXt", b"parameters\0" + LARGE),
    "a colour profile": (b"iCCP", b"CMYK\0\0" + zlib.compress(LARGE)),
    "a text that is no zlib stream": (b"zTXt", b"Comment\0\0rubbish"),
    "a text bomb": (b"zTXt", b"Comment\0\0" + zlib.compress(bytes(100_000_000))),
}


@pytest.mark.parametrize("kind", TEXTS)
def test_an_image_is_read_whatever_text_or_profile_comes_with_it(kind):
    pixels = noise(8, 8, 4)
    pixels[..., 3] = 255
    content = with_chunk(encoded(pixels), *TEXTS[kind])
    np.testing.assert_array_equal(read_pixels(content, SPEC), pixels[..., :3])


def test_many_texts_cost_no_image():
    plain = encoded(noise(8, 8, 3))
    texts = (chunk(b"tEXt", b"part %d\0" % number + bytes(1_000_000)) for number in range(70))
    content = b"".join([plain[:33], *texts, plain[33:]])
    assert read_pixels(content, SPEC).shape == SPEC.shape


XMP: Final = b'<rdf:Description tiff:Orientation="6"/>'


def in_text(exif: bytes) -> bytes:
    """EXIF data as ImageMagick puts them into a text."""
    lines = [exif.hex()[start : start + 72] for start in range(0, 2 * len(exif), 72)]
    return b"\nexif\n%8d\n" % len(exif) + "\n".join(lines).encode()


def turned_exif() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif.tobytes()


ROTATIONS: Final = {
    "eXIf": (b"eXIf", turned_exif().removeprefix(b"Exif\0\0")),
    "EXIF in a text": (b"tEXt", b"Raw profile type exif\0" + in_text(turned_exif())),
    "EXIF in a compressed text": (
        b"zTXt",
        b"Raw profile type exif\0\0" + zlib.compress(in_text(turned_exif())),
    ),
    "XMP": (b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + XMP),
    "compressed XMP in a language": (
        b"iTXt",
        b"XML:com.adobe.xmp\0\1\0en\0key\0" + zlib.compress(XMP),
    ),
    "XMP of 3 MB": (b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + zlib.compress(XMP + LARGE)),
}


@pytest.mark.parametrize("kind", ROTATIONS)
def test_the_rotation_is_found_wherever_it_is_noted(kind):
    pixels = noise(8, 8, 3)
    content = with_chunk(encoded(pixels), *ROTATIONS[kind])
    clockwise = np.rot90(pixels, -1)
    np.testing.assert_array_equal(read_pixels(content, SPEC), clockwise)
    plain = encoded(pixels)
    late = plain[:-12] + chunk(*ROTATIONS[kind]) + plain[-12:]
    np.testing.assert_array_equal(read_pixels(late, SPEC), clockwise)


def test_of_an_animation_only_the_first_image_is_looked_at():
    frames = [Image.fromarray(noise(8, 8, 3, seed=seed)) for seed in range(3)]
    content = encoded(frames[0], save_all=True, append_images=frames[1:])
    place = content.index(b"fdAT")
    broken = content[: place + 10] + b"rubbish" + content[place + 17 :]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        np.testing.assert_array_equal(read_pixels(broken, SPEC), np.asarray(frames[0]))


def test_a_colour_profile_changes_nothing():
    pixels = noise(8, 8, 3)
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    content = encoded(pixels, icc_profile=profile)
    np.testing.assert_array_equal(read_pixels(content, SPEC), pixels)
