"""Opened images to pixels: colour modes, EXIF rotation, scaled decoding, crop and resize."""

import io
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from vsc_serve.errors import InputError
from vsc_serve.images import PixelSpec, read_pixels, to_pixels
from vsc_serve.images.preprocess import jpeg_scale

GREY = PixelSpec(height=4, width=4, channels=1)
RGB = PixelSpec(height=4, width=4, channels=3)
ORIENTATION = 0x0112

# How a camera stores the upright image for each EXIF orientation: the inverse of what the
# standard tells a viewer to do (6 means: turn by 90 degrees clockwise).
STORED_FOR = {
    1: lambda upright: upright,
    2: np.fliplr,
    3: lambda upright: np.rot90(upright, 2),
    4: np.flipud,
    5: lambda upright: np.swapaxes(upright, 0, 1),
    6: lambda upright: np.rot90(upright, 1),
    7: lambda upright: np.swapaxes(np.rot90(upright, 2), 0, 1),
    8: lambda upright: np.rot90(upright, -1),
}


def palette_image(*, transparency: bytes | int | None = None) -> Image.Image:
    """All pixels have index 1, which is (0, 0, 255)."""
    image = Image.new("P", (4, 4), 1)
    image.putpalette([255, 0, 0, 0, 0, 255])
    if transparency is not None:
        image.info["transparency"] = transparency
    return image


def reopened(image: Image.Image, file_format: str, **options: Any) -> Image.Image:
    """Write an image and open it again, so that it is decoded as a file is."""
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return Image.open(io.BytesIO(buffer.getvalue()))


def corners(height: int, width: int) -> NDArray[np.uint8]:
    """Four quarters of different grey: no rotation or reflection of it equals another."""
    top = np.concatenate(
        [np.full((height // 2, width // 2), 0), np.full((height // 2, width // 2), 80)], axis=1
    )
    return np.concatenate([top, top + 160]).clip(0, 255).astype(np.uint8)


def photo(height: int, width: int) -> NDArray[np.uint8]:
    """A smooth colour image with detail at several scales, as a photograph has."""
    y, x = np.mgrid[0:height, 0:width] / max(height, width)
    waves = [np.sin(7 * x + 3 * y), np.sin(23 * x * y + 1), np.cos(11 * y - 5 * x)]
    return (127 + 100 * np.stack(waves, axis=2)).astype(np.uint8)


@pytest.mark.parametrize(
    ("image", "rgb"),
    [
        pytest.param(Image.new("1", (4, 4), 1), (255, 255, 255), id="one bit, on"),
        pytest.param(Image.new("1", (4, 4), 0), (0, 0, 0), id="one bit, off"),
        pytest.param(Image.new("L", (4, 4), 100), (100, 100, 100), id="grey"),
        pytest.param(Image.new("LA", (4, 4), (100, 0)), (255, 255, 255), id="grey, transparent"),
        pytest.param(Image.new("LA", (4, 4), (100, 51)), (224, 224, 224), id="grey, a fifth"),
        pytest.param(palette_image(), (0, 0, 255), id="palette"),
        pytest.param(
            palette_image(transparency=b"\xff\x00"), (255, 255, 255), id="palette with alphas"
        ),
        pytest.param(
            palette_image(transparency=0), (0, 0, 255), id="palette, another index transparent"
        ),
        pytest.param(Image.new("RGB", (4, 4), (9, 8, 7)), (9, 8, 7), id="RGB"),
        pytest.param(Image.new("RGBA", (4, 4), (9, 8, 7, 255)), (9, 8, 7), id="RGBA, opaque"),
        pytest.param(Image.new("RGBA", (4, 4), (0, 0, 0, 0)), (255, 255, 255), id="RGBA, clear"),
        pytest.param(Image.new("RGBA", (4, 4), (0, 50, 100, 51)), (204, 214, 224), id="RGBA, part"),
        pytest.param(Image.new("CMYK", (4, 4), (0, 0, 0, 0)), (255, 255, 255), id="CMYK, no ink"),
        pytest.param(Image.new("CMYK", (4, 4), (255, 0, 0, 0)), (0, 255, 255), id="CMYK, cyan"),
    ],
)
def test_each_colour_mode_becomes_the_colours_a_viewer_shows(image, rgb):
    np.testing.assert_allclose(to_pixels(image, RGB), np.broadcast_to(rgb, (4, 4, 3)), atol=1)
    luma = np.dot(rgb, (0.299, 0.587, 0.114))
    np.testing.assert_allclose(to_pixels(image, GREY), np.full((4, 4, 1), luma), atol=1.5)


def test_a_colour_that_png_declares_transparent_is_drawn_white():
    image = reopened(Image.new("RGB", (4, 4), (1, 2, 3)), "PNG", transparency=(1, 2, 3))
    assert image.mode == "RGB"
    assert (to_pixels(image, RGB) == 255).all()


@pytest.mark.parametrize("dtype", ["<u2", ">u2"])
def test_of_16_bit_grey_the_upper_byte_counts(dtype):
    values = np.array([[0x00FF, 0x0100], [0x12FE, 0xFFFF]], dtype)
    spec = PixelSpec(height=2, width=2, channels=1)
    mode = "I;16" if dtype == "<u2" else "I;16B"
    image = Image.frombytes(mode, (2, 2), values.tobytes())
    assert to_pixels(image, spec)[..., 0].tolist() == [[0x00, 0x01], [0x12, 0xFF]]
    for file_format in ("PNG", "TIFF"):
        again = reopened(Image.fromarray(values.astype("<u2")), file_format)
        assert again.mode.startswith("I;16")
        assert to_pixels(again, spec)[..., 0].tolist() == [[0x00, 0x01], [0x12, 0xFF]]


@pytest.mark.parametrize("mode", ["I", "F"])
def test_modes_without_a_range_are_refused_with_a_remedy(mode):
    with pytest.raises(InputError, match=rf"mode {mode} .* no defined range; save as 8-bit or"):
        to_pixels(Image.new(mode, (4, 4), 1), GREY)


@pytest.mark.parametrize("file_format", ["PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", STORED_FOR)
def test_every_exif_orientation_gives_the_upright_image(file_format, orientation):
    upright = np.repeat(corners(6, 10)[..., None], 3, axis=2)
    stored = Image.fromarray(np.ascontiguousarray(STORED_FOR[orientation](upright)))
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    options = {"lossless": True} if file_format == "WEBP" else {}
    image = reopened(stored, file_format, exif=exif, **options)
    pixels = to_pixels(image, PixelSpec(height=6, width=10, channels=3))
    np.testing.assert_array_equal(pixels, upright)


@pytest.mark.parametrize("orientation", STORED_FOR)
def test_a_turned_jpeg_is_upright_and_decoded_at_twice_the_target_or_more(orientation):
    upright = corners(160, 480)
    stored = Image.fromarray(np.ascontiguousarray(STORED_FOR[orientation](upright)))
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    image = reopened(stored, "JPEG", quality=95, exif=exif)
    pixels = to_pixels(image, PixelSpec(height=16, width=48, channels=1))[..., 0]
    assert sorted(image.size) == [40, 120]  # a quarter of the file: an eighth would be too small
    inner = np.ix_([3, 12], [8, 40])  # away from the borders between the quarters
    np.testing.assert_allclose(pixels[inner], corners(2, 2), atol=3)


def test_an_orientation_that_does_not_exist_changes_nothing():
    exif = Image.Exif()
    exif[ORIENTATION] = 99
    image = reopened(Image.fromarray(corners(4, 4)), "PNG", exif=exif)
    np.testing.assert_array_equal(to_pixels(image, GREY)[..., 0], corners(4, 4))


@pytest.mark.parametrize("file_format", ["GIF", "PNG", "WEBP", "TIFF"])
def test_of_an_animation_the_first_frame_counts(file_format):
    first, second = Image.new("RGB", (4, 4), (255, 0, 0)), Image.new("RGB", (4, 4), (0, 0, 255))
    options = {"lossless": True} if file_format == "WEBP" else {}
    image = reopened(first, file_format, save_all=True, append_images=[second], **options)
    assert image.n_frames == 2
    assert (to_pixels(image, RGB) == (255, 0, 0)).all()


@pytest.mark.parametrize("size", [(512, 384), (64, 64), (129, 640), (1000, 70), (2048, 1024)])
def test_scaled_jpeg_decoding_keeps_twice_the_target_and_stays_close_to_full(size):
    spec = PixelSpec(height=32, width=32, channels=3)
    scaled = reopened(Image.fromarray(photo(size[1], size[0])), "JPEG", quality=90)
    full = scaled.copy()  # decodes it, after which there is nothing left to scale
    pixels = to_pixels(scaled, spec)
    assert min(scaled.size) >= min(64, *size)
    difference = np.abs(pixels.astype(int) - to_pixels(full, spec).astype(int))
    assert difference.mean() < 1.0
    assert difference.max() <= 8


def test_a_large_jpeg_is_not_decoded_in_full():
    image = reopened(Image.fromarray(photo(1024, 2048)), "JPEG")
    to_pixels(image, PixelSpec(height=32, width=32, channels=3))
    assert image.size == (256, 128)


def test_crop_cuts_the_middle_and_stretch_keeps_everything():
    bands = np.repeat(np.array([0, 100, 200], np.uint8), 8)
    for wide in (np.tile(bands, (8, 1)), np.tile(bands, (8, 1)).T):
        image = Image.fromarray(np.ascontiguousarray(wide))
        crop = to_pixels(image, PixelSpec(height=8, width=8, channels=1))
        assert (crop == 100).all()
        stretch = to_pixels(image, PixelSpec(height=9, width=9, channels=1, fit="stretch"))
        assert sorted(set(stretch[::4, ::4].ravel().tolist())) == [0, 100, 200]


def test_resizing_averages_and_does_not_pick_single_pixels():
    board = (np.indices((64, 64)).sum(axis=0) % 2 * 255).astype(np.uint8)
    pixels = to_pixels(Image.fromarray(board), PixelSpec(height=8, width=8, channels=1))
    np.testing.assert_allclose(pixels, 127.5, atol=4)


@given(
    width=st.integers(1, 300),
    height=st.integers(1, 300),
    target=st.tuples(st.integers(1, 64), st.integers(1, 64)),
    fit=st.sampled_from(["crop", "stretch"]),
)
@example(width=29, height=94, target=(7, 7), fit="crop")  # 7 * (29 / 7) is above 29 in floats
@example(width=1, height=20_000, target=(8, 8), fit="crop")
@example(width=20_000, height=1, target=(8, 8), fit="crop")
@example(width=1, height=20_000, target=(8, 8), fit="stretch")
@example(width=1, height=1, target=(64, 3), fit="crop")
def test_any_size_gives_the_target_and_an_even_image_stays_even(width, height, target, fit):
    spec = PixelSpec(height=target[0], width=target[1], channels=1, fit=fit)
    pixels = to_pixels(Image.new("L", (width, height), 77), spec)
    assert pixels.shape == spec.shape
    assert pixels.dtype == np.uint8
    assert (pixels == 77).all()


def test_an_image_of_the_right_size_is_left_as_it_is():
    pixels = np.random.default_rng(0).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    np.testing.assert_array_equal(to_pixels(Image.fromarray(pixels), RGB), pixels)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"height": 0, "width": 4, "channels": 1}, "must be positive, not 4x0"),
        ({"height": 4, "width": 4, "channels": 4}, r"must be 1 \(grey\) or 3 \(RGB\), not 4"),
        ({"height": 4, "width": 4, "channels": 1, "fit": "pad"}, "crop, stretch, not 'pad'"),
    ],
)
def test_a_pixel_spec_refuses_what_it_cannot_mean(fields, message):
    with pytest.raises(ValueError, match=message):
        PixelSpec(**fields)


def test_a_pixel_spec_survives_json_and_reads_well():
    spec = PixelSpec(height=28, width=32, channels=1, fit="stretch")
    assert PixelSpec.from_json(spec.to_json()) == spec
    assert str(spec) == "32x28 grey, stretch"
    assert str(RGB) == "4x4 RGB, crop"


def test_bicubic_is_pillows_antialiased_filter() -> None:
    image = Image.fromarray(photo(90, 120))
    spec = PixelSpec(height=30, width=30, channels=3, resample="bicubic")
    expected = image.crop((15, 0, 105, 90)).resize((30, 30), Image.Resampling.BICUBIC)
    inner = (slice(2, -2), slice(2, -2))  # at the edge the filter sees beyond the box
    np.testing.assert_array_equal(to_pixels(image, spec)[inner], np.asarray(expected)[inner])
    bilinear = to_pixels(image, PixelSpec(height=30, width=30, channels=3))
    assert (to_pixels(image, spec) != bilinear).any()


@pytest.mark.parametrize("size", [(300, 200), (200, 300), (1200, 900)])
def test_crop_pct_is_a_resize_of_the_shorter_side_and_a_cut_from_the_middle(
    size: tuple[int, int],
) -> None:
    width, height = size
    image = Image.fromarray(photo(height, width))
    found = to_pixels(image, PixelSpec(height=56, width=56, channels=3, crop_pct=56 / 64))
    scale = 64 / min(size)
    whole = image.resize((round(width * scale), round(height * scale)), Image.Resampling.BILINEAR)
    left, top = (whole.width - 56) // 2, (whole.height - 56) // 2
    expected = np.asarray(whole.crop((left, top, left + 56, top + 56)))
    assert np.abs(found.astype(int) - expected).mean() < 3.0
    assert np.abs(found.astype(int) - to_pixels(image, spec_of(56))).mean() > 3.0


def spec_of(side: int) -> PixelSpec:
    return PixelSpec(height=side, width=side, channels=3)


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
@pytest.mark.parametrize("fit", ["crop", "stretch"])
def test_an_image_of_the_models_size_is_cut_as_well(kind: str, fit: Any) -> None:
    buffer = io.BytesIO()
    Image.fromarray(photo(32, 32)).save(buffer, kind)
    spec = PixelSpec(height=32, width=32, channels=3, fit=fit, crop_pct=0.5)
    found = read_pixels(buffer.getvalue(), spec)
    with Image.open(buffer) as opened:
        expected = opened.convert("RGB").resize((32, 32), 2, box=(8, 8, 24, 24))
    np.testing.assert_array_equal(found, np.asarray(expected))


@pytest.mark.parametrize(("side", "decoded"), [(447, 1), (448, 2), (511, 2), (512, 2)])
def test_a_jpeg_is_decoded_at_a_scale_that_has_twice_the_target(side: int, decoded: int) -> None:
    assert jpeg_scale((side, side), 1, spec_of(112)) == decoded


def test_of_the_part_that_is_kept_twice_the_target_is_decoded() -> None:
    spec = PixelSpec(height=112, width=112, channels=3, crop_pct=0.875)
    assert jpeg_scale((511, 511), 1, spec) == 1
    assert jpeg_scale((512, 512), 1, spec) == 2


@pytest.mark.parametrize(
    "spec",
    [
        GREY,
        PixelSpec(height=4, width=6, channels=3, fit="stretch", resample="bicubic"),
        PixelSpec(height=4, width=6, channels=3, crop_pct=0.875),
    ],
)
def test_a_rule_is_read_as_it_was_written(spec: PixelSpec) -> None:
    assert PixelSpec.from_json(spec.to_json()) == spec


def test_the_rule_of_older_bundles_is_written_as_it_was() -> None:
    assert GREY.to_json() == {
        "height": 4,
        "width": 4,
        "channels": 1,
        "fit": "crop",
        "resample": "bilinear-antialias",
        "background": "white",
    }
