"""JPEG: the pixels that Pillow gives, and no row from a file whose image data are not whole."""

import io
import itertools
import random
import resource
from collections.abc import Callable, Iterator
from typing import Any, Final

import numpy as np
import pytest
from PIL import Image, ImageCms

from vsc_serve.errors import InputError
from vsc_serve.images import PixelSpec, decode_pixels, jpeg, read_pixels, to_pixels

SPEC: Final = PixelSpec(height=8, width=8, channels=3)
EOI: Final = b"\xff\xd9"
TRUNCATED: Final = "broken image: image file is truncated (the JPEG data end early)"
DAMAGED: Final = "broken image: part of the JPEG data is damaged"


def photo(height: int, width: int, seed: int = 0) -> Image.Image:
    """Waves at several scales and noise: as many details as a photograph has."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width] / max(height, width, 2)
    a, b, c, d, e = rng.uniform(2, 40, 5)
    waves = [np.sin(a * x + b * y), np.sin(c * x * y + 1), np.cos(d * y - e * x)]
    noisy = 127 + 90 * np.stack(waves, axis=2) + rng.normal(0, 12, (height, width, 3))
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8))


def saved(image: Image.Image, file_format: str = "JPEG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def several_scans(image: Image.Image) -> bytes:
    """A baseline file with one scan for each component, put together from three grey files."""
    planes = [saved(plane, quality=90) for plane in image.convert("YCbCr").split()]
    tables = planes[0][: planes[0].index(b"\xff\xc0")]
    frame = bytearray(planes[0][planes[0].index(b"\xff\xc0") :][:13])
    frame[3], frame[9] = 17, 3
    frame[10:] = bytes([1, 0x11, 0, 2, 0x11, 0, 3, 0x11, 0])
    huffman = planes[0][planes[0].index(b"\xff\xc4") : planes[0].index(b"\xff\xda")]
    parts = [tables, bytes(frame), huffman]
    for name, plane in enumerate(planes, 1):
        scan = bytearray(plane[plane.index(b"\xff\xda") : -2])
        scan[5] = name
        parts.append(bytes(scan))
    return b"".join([*parts, EOI])


KINDS: Final[dict[str, Callable[[Image.Image], bytes]]] = {
    "baseline": lambda image: saved(image, quality=90),
    "optimised": lambda image: saved(image, optimize=True, subsampling=0),
    "grey": lambda image: saved(image.convert("L")),
    "progressive": lambda image: saved(image, progressive=True),
    "restarts in rows": lambda image: saved(image, restart_marker_rows=1),
    "restarts in blocks": lambda image: saved(image, restart_marker_blocks=5),
    "progressive, restarts": lambda image: saved(image, progressive=True, restart_marker_rows=2),
    "several scans": several_scans,
    "CMYK": lambda image: saved(image.convert("CMYK")),
}


def data_start(content: bytes) -> int:
    """Where the entropy-coded data of the first scan begin."""
    place = content.index(b"\xff\xda")
    return place + 2 + int.from_bytes(content[place + 2 : place + 4])


def refusal(content: bytes, spec: PixelSpec = SPEC) -> str | None:
    """The reason, or None for a row."""
    try:
        read_pixels(content, spec)
    except InputError as error:
        return f"{error}" if error.kind == "broken" else f"{error} ({error.kind})"
    return None


# The same pixels as Pillow's


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


def assert_as_pillow(content: bytes) -> None:
    for spec in SPECS:
        pillows = to_pixels(Image.open(io.BytesIO(content)), spec)
        np.testing.assert_array_equal(read_pixels(content, spec), pillows)


@pytest.mark.parametrize("size", SIZES)
def test_jpegs_have_the_pixels_that_pillow_gives(size):
    image = photo(*size)
    kinds = itertools.product((0, 1, 2), (False, True), ("L", "RGB", "CMYK"), (40, 92))
    for subsampling, progressive, mode, quality in kinds:
        options = {"subsampling": subsampling, "progressive": progressive, "quality": quality}
        assert_as_pillow(saved(image.convert(mode), **options))


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_jpeg_has_the_pixels_that_pillow_gives(kind):
    for size in ((90, 70), (160, 500)):
        assert_as_pillow(KINDS[kind](photo(*size)))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_turned_jpegs_have_the_pixels_that_pillow_gives(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    for size, mode in itertools.product(((300, 500), (90, 70)), ("RGB", "CMYK")):
        assert_as_pillow(saved(photo(*size).convert(mode), exif=exif))


def test_jpegs_with_metadata_have_the_pixels_that_pillow_gives():
    image = photo(100, 100)
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    assert_as_pillow(saved(image, icc_profile=profile))
    assert_as_pillow(saved(image, comment=b"a comment", dpi=(300, 300)))
    assert_as_pillow(saved(image, "MPO", save_all=True, append_images=[image.rotate(90)]))


# Sound files, however odd


def with_scan_parameters(content: bytes, parameters: bytes) -> bytes:
    place = data_start(content)
    return content[: place - 3] + parameters + content[place:]


def with_segment(content: bytes, marker: int, body: bytes) -> bytes:
    segment = bytes([0xFF, marker]) + (len(body) + 2).to_bytes(2) + body
    return content[:2] + segment + content[2:]


def taller(content: bytes, rows: int) -> bytes:
    """Let the frame say that an image has fewer rows than its data have."""
    place = content.index(b"\xff\xc0") + 5
    height = int.from_bytes(content[place : place + 2]) - rows
    return content[:place] + height.to_bytes(2) + content[place + 2 :]


def odd_but_sound() -> Iterator[tuple[str, bytes, bytes]]:
    """Names, files as cameras and programs write them, and a plain file with the same image."""
    image = photo(96, 120)
    plain, restarts = saved(image), saved(image, restart_marker_rows=1)
    video = b"\0\0\0\x18ftypmp42" + bytes(500) + random.Random(0).randbytes(5_000)
    trailer = b"\0\0\x01\x0b\x0e\0\0\0Image_UTC_Data" + video
    yield "video after the end (motion photo)", plain + video, plain
    yield "another image after the end (MPO)", plain + saved(photo(50, 50)), plain
    yield "zeros after the end", plain + bytes(4_096), plain
    yield "no end marker", plain[:-2], plain
    yield "half an end marker", plain[:-1], plain
    yield "no end marker, restarts", restarts[:-2], restarts
    yield "no end marker but a trailer (Samsung panorama)", plain[:-2] + trailer, plain
    progressive = saved(image, progressive=True)
    yield "no end marker, progressive", progressive[:-2], progressive
    for padding in (b"\x7f", bytes(8), bytes(600), b"\xff" * 9, b"\xff" * 600):
        yield f"{len(padding)} bytes before the end marker", plain[:-2] + padding + EOI, plain
    yield "scan parameters without meaning (Samsung)", with_scan_parameters(plain, b"\1\2\3"), plain
    jfif = plain.index(b"JFIF\0") + 5
    yield "JFIF of version 9", plain[:jfif] + b"\x09" + plain[jfif + 1 :], plain
    yield "junk between segments", plain[:20] + b"\0junk\x01" + plain[20:], plain
    yield "fill bytes", plain[:20] + b"\xff" * 7 + plain[20:], plain
    yield "a broken colour profile", with_segment(plain, 0xE2, b"ICC_PROFILE\0\x07\x02abc"), plain
    yield "a thumbnail in EXIF", with_segment(plain, 0xE1, b"Exif\0\0" + saved(photo(9, 9))), plain
    place = restarts.index(b"\xff\xd3")
    webcam = restarts[:place] + b"\x5a\x17" + restarts[place:]
    yield "two bytes before a restart marker (webcams)", webcam, restarts
    shorter = saved(image.crop((0, 0, 120, 64)), restart_marker_rows=1)
    yield "more intervals than the image has (scanner)", taller(restarts, 32), shorter


SOUND: Final = list(odd_but_sound())


@pytest.mark.parametrize(
    ("content", "plain"), [entry[1:] for entry in SOUND], ids=[e[0] for e in SOUND]
)
def test_odd_files_that_are_whole_give_their_row(content, plain):
    for spec in (SPEC, PixelSpec(height=64, width=64, channels=1)):
        np.testing.assert_array_equal(read_pixels(content, spec), read_pixels(plain, spec))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"optimize": True},
        {"progressive": True},
        {"restart_marker_rows": 1},
        {"subsampling": 0},
        {"quality": 100},
        {"quality": 1},
    ],
    ids=str,
)
def test_flat_and_half_flat_images_are_not_taken_for_zeroed_ones(options):
    """Zero bits may be flat blocks: a wall, a scan of paper, a photograph with a grey border."""
    bordered = photo(600, 800)
    bordered.paste((128, 128, 128), (0, 300, 800, 600))
    paper = Image.new("RGB", (1500, 2000), "white")
    paper.paste(photo(40, 40), (700, 900))
    for image in (
        bordered,
        paper,
        Image.new("RGB", (3000, 1000)),
        Image.new("L", (2000, 2000), 128),
    ):
        assert refusal(saved(image, **options)) is None


@pytest.mark.slow
def test_no_photograph_is_refused(data_folder, tmp_path):
    """13,409 JPEG files that several programs wrote."""
    import tarfile

    count = 0
    for name in ("photos.tar.xz", "clothing.tar"):
        with tarfile.open(data_folder / name) as archive:
            for member in archive:
                if member.isfile():
                    file = archive.extractfile(member)
                    assert file is not None
                    assert refusal(file.read()) is None, member.name
                    count += 1
    assert count == 13_409


# Files that are not whole


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("end", [EOI, b"", b"\xff", EOI + bytes(100)])
def test_data_that_end_early_give_no_row(kind, end):
    content = KINDS[kind](photo(120, 160))
    start, last = data_start(content), len(content) - 2
    for share in (0.0, 0.01, 0.3, 0.5, 0.77, 0.98):
        cut = content[: start + int(share * (last - start))]
        assert (refusal(cut + end) or "").startswith("broken image: "), share
    assert refusal(content[: start + (last - start) // 2] + end) in (TRUNCATED, DAMAGED)


def two_by_one() -> bytes:
    """Three components of 2x1 each, for which simplejpeg has no name, of a grey file's blocks."""
    grey = saved(photo(64, 96).convert("L"))
    frame, scan = grey.index(b"\xff\xc0"), grey.index(b"\xff\xda")
    size = b"\x08" + (32).to_bytes(2) + (64).to_bytes(2)
    components = b"".join(bytes([name, 0x21, 0]) for name in (1, 2, 3))
    parts = [grey[:frame], b"\xff\xc0\0\x11", size, b"\3", components, grey[frame + 13 : scan]]
    return b"".join([*parts, b"\xff\xda\0\x0c\3\1\0\2\0\3\0\0\x3f\0", grey[data_start(grey) :]])


def test_kinds_that_only_pillow_decodes_are_refused_when_they_end_early():
    content = two_by_one()
    assert refusal(content) is None
    assert refusal(content[: len(content) * 2 // 3] + EOI) == TRUNCATED
    assert refusal(content[:800] + bytes(64) + content[864:]) in (DAMAGED, TRUNCATED)


def test_the_last_byte_of_the_data_is_missed():
    for kind in ("baseline", "grey", "optimised", "CMYK"):
        content = KINDS[kind](photo(120, 160))
        assert refusal(content[:-3] + EOI) == TRUNCATED


def test_a_scan_that_is_missing_is_missed():
    """Each of these is a valid file, and libjpeg has nothing to say: colour or detail is lost."""
    for content in (several_scans(photo(64, 64)), saved(photo(64, 64), progressive=True)):
        scans = [
            place for place in range(len(content)) if content[place : place + 2] == b"\xff\xda"
        ]
        for place in scans[1:]:
            assert refusal(content[:place] + EOI) == TRUNCATED


def test_restart_markers_that_are_missing_are_missed():
    content = saved(photo(160, 160), restart_marker_rows=1)
    first, third = content.index(b"\xff\xd1"), content.index(b"\xff\xd3")
    assert refusal(content[:first] + content[third:]) == DAMAGED
    last = content.rindex(b"\xff", 0, -2)
    assert refusal(content[:last] + EOI) is not None


@pytest.mark.parametrize("kind", ["baseline", "grey", "restarts in rows", "CMYK"])
def test_a_stretch_of_zeros_gives_no_row(kind):
    content = KINDS[kind](photo(200, 300))
    start, last = data_start(content), len(content) - 2
    for place in range(start, last - 512, 997):
        for length in (64, 512):
            zeroed = content[:place] + bytes(length) + content[place + length :]
            assert refusal(zeroed) in (DAMAGED, TRUNCATED)
    assert refusal(content[: last - 700] + bytes(702)) is not None


ROUNDS: Final = 40


@pytest.mark.parametrize("kind", KINDS)
def test_thousands_of_cut_and_zeroed_files_give_no_row(kind):
    """Files as a full disk, a broken transfer or a lost sector leave them.

    Zeros in a progressive file may be refinements and end runs of blocks: some are not seen.
    """
    rng = random.Random(len(kind))
    counts = {"cut": 0, "zeroed": 0}
    for seed in range(ROUNDS):
        content = KINDS[kind](photo(rng.randrange(60, 200), rng.randrange(60, 200), seed))
        start, last = data_start(content), len(content) - 2
        for _ in range(6):
            cut = content[: rng.randrange(start, last)] + rng.choice([b"", EOI])
            counts["cut"] += refusal(cut) is not None
            length = rng.randrange(64, max(65, (last - start) // 3))
            place = rng.randrange(start, max(start + 1, last - length))
            zeroed = content[:place] + bytes(length) + content[place + length :]
            counts["zeroed"] += refusal(zeroed) is not None
    assert counts["cut"] == 6 * ROUNDS
    least = 0.9 if "progressive" in kind else 1.0
    assert counts["zeroed"] >= least * 6 * ROUNDS


SEQUENTIAL: Final = [kind for kind in KINDS if "progressive" not in kind and "several" not in kind]


@pytest.mark.parametrize("kind", SEQUENTIAL)
def test_where_simplejpeg_cannot_be_had_pillow_refuses_the_same_for_the_same_reason(
    kind, monkeypatch
):
    """Of one scan: Pillow tells where it ends, up to the last bytes."""
    content = KINDS[kind](photo(150, 150))
    expected = read_pixels(content, SPEC)
    start, last = data_start(content), len(content) - 2
    places = range(start, last - 600, 211)
    cut = [content[:place] + end for place in places for end in (EOI, b"")]
    zeroed = [content[:place] + bytes(512) + content[place + 512 :] for place in places]
    assert {refusal(file) for file in cut} <= {TRUNCATED, DAMAGED}
    monkeypatch.setattr(jpeg, "simplejpeg", None)
    np.testing.assert_array_equal(read_pixels(content, SPEC), expected)
    assert {refusal(file) for file in cut} == {TRUNCATED}
    assert {refusal(file) for file in zeroed} <= {TRUNCATED, DAMAGED}


def test_without_simplejpeg_missing_scans_are_missed_too(monkeypatch):
    monkeypatch.setattr(jpeg, "simplejpeg", None)
    for kind in ("progressive", "several scans"):
        content = KINDS[kind](photo(64, 64))
        assert refusal(content) is None
        assert refusal(content[: content.rindex(b"\xff\xda")] + EOI) == TRUNCATED


def test_without_simplejpeg_odd_files_give_the_same_rows(monkeypatch):
    rows = [read_pixels(content, SPEC) for _, content, _ in SOUND]
    monkeypatch.setattr(jpeg, "simplejpeg", None)
    for (name, content, _), row in zip(SOUND, rows, strict=True):
        np.testing.assert_array_equal(read_pixels(content, SPEC), row, err_msg=name)


@pytest.mark.parametrize("kind", KINDS)
def test_the_verdict_does_not_depend_on_who_decodes_or_at_what_scale(kind, monkeypatch):
    """simplejpeg, Pillow, an eighth, everything: the same reason, or a row from each."""
    rng = random.Random(0)
    whole = KINDS[kind](photo(150, 150))
    files = [damaged(whole, rng) for _ in range(60)]
    large = PixelSpec(height=150, width=150, channels=3)
    verdicts = [refusal(content) for content in files]
    assert None in verdicts or kind != "baseline"
    assert any(verdicts)
    assert [refusal(content, large) for content in files] == verdicts
    for content, verdict in zip(files, verdicts, strict=True):
        with Image.open(io.BytesIO(content)) as opened:
            assert outcome_of_opened(opened) == verdict
    monkeypatch.setattr(jpeg, "_SMALLEST_SCALED_SIDE", 10_000)  # Pillow decodes
    assert [refusal(content) for content in files] == verdicts


def outcome_of_opened(image: Image.Image) -> str | None:
    try:
        decode_pixels(image, SPEC)
    except InputError as error:
        return str(error)
    return None


def damaged(content: bytes, rng: random.Random) -> bytes:
    """Cut, zeroed, shortened, or with one to three other bytes, in the image data."""
    start, last = data_start(content), len(content) - 2
    place, length = rng.randrange(start, last - 100), rng.randrange(1, 100)
    match rng.randrange(4):
        case 0:
            return content[:place] + EOI
        case 1:
            return content[:place] + bytes(length) + content[place + length :]
        case 2:
            return content[:place] + content[place + length :]
    changed = bytearray(content)
    for _ in range(rng.randrange(1, 4)):
        changed[rng.randrange(start, last)] = rng.randrange(256)
    return bytes(changed)


def test_other_damage_gives_a_row_or_a_reason():
    rng = np.random.default_rng(0)
    whole = saved(photo(24, 32))
    outcomes = []
    for _ in range(1_000):
        changed = bytearray(whole)
        for _ in range(rng.integers(1, 4)):
            changed[rng.integers(len(changed))] = rng.integers(256)
        try:
            read_pixels(bytes(changed), PixelSpec(height=20, width=20, channels=3))
            outcomes.append(True)
        except InputError:
            outcomes.append(False)
    assert 100 < sum(outcomes) < 900


# Size


def claiming(content: bytes, width: int, height: int) -> bytes:
    place = next(content.index(mark) for mark in (b"\xff\xc0", b"\xff\xc2") if mark in content) + 5
    return content[:place] + height.to_bytes(2) + width.to_bytes(2) + content[place + 4 :]


def test_a_phones_108_megapixels_are_read_at_an_eighth():
    content = saved(Image.new("L", (12_000, 9_000), 99))
    assert (read_pixels(content, SPEC) == 99).all()


def test_the_limit_applies_to_what_is_decoded():
    content = saved(photo(256, 256))
    assert refusal(content) is None  # 32x32 are decoded
    assert read_pixels(content, SPEC, max_pixels=32 * 32).shape == SPEC.shape
    with pytest.raises(InputError) as caught:
        read_pixels(content, SPEC, max_pixels=32 * 32 - 1)
    assert caught.value.kind == "too large"
    assert str(caught.value) == (
        "too large: 256x256 (of which 1/8 is decoded) is over the limit of 1,023 pixels"
    )


def test_a_progressive_file_counts_with_the_memory_for_its_coefficients():
    """Two bytes a coefficient, against four bytes a pixel of other images."""
    image = photo(256, 256)
    for subsampling, bytes_a_pixel in ((0, 6), (2, 3)):
        content = saved(image, progressive=True, subsampling=subsampling)
        enough = 256 * 256 * bytes_a_pixel // 4
        assert read_pixels(content, SPEC, max_pixels=enough).shape == SPEC.shape
        with pytest.raises(InputError, match=r"^too large: 256x256, in several scans and kept"):
            read_pixels(content, SPEC, max_pixels=enough - 1)


@pytest.mark.parametrize("progressive", [False, True])
def test_a_small_file_that_claims_a_large_image_costs_nothing(progressive):
    content = claiming(saved(photo(64, 64), progressive=progressive), 9_000, 9_000)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert refusal(content) == TRUNCATED
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 20_000


def test_a_lossless_jpeg_is_not_decoded_at_a_reduced_scale():
    """Decoders take the frame's size for the reduced one, and would write past their memory."""
    side = (256).to_bytes(2)
    frame = b"\xff\xc3\0\x0b\x08" + side + side + b"\x01\x01\x11\0"
    table = b"\xff\xc4\0\x14\0" + bytes([1]) + bytes(15) + b"\0"  # one bit: no difference
    scan = b"\xff\xda\0\x08\x01\x01\0\x01\0\0"
    content = b"\xff\xd8" + frame + table + scan + bytes(256 * 256 // 8) + EOI
    assert (read_pixels(content, SPEC) == 128).all()
