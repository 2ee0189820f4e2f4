"""The contact sheet: where things lie on it, what its tiles say, and what it refuses."""

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from vsc_serve.analysis.contact_sheet import TILE_PX, draw_contact_sheet
from vsc_serve.bundle import Manifest
from vsc_serve.codes import Codes, dense_to_csr
from vsc_serve.decoder import Decoder
from vsc_serve.errors import InputError, UsageError
from vsc_serve.images import PixelSpec

LATENTS = 16
NEUTRAL_GREY = (240, 240, 240)
WHITE = (255, 255, 255)
GAP = 10


class PixelSession:
    """A decoder that is easy to foresee: latent j raises pixel j above a grey of 0.5."""

    engine = "fake"

    def __init__(self, shape: tuple[int, int, int]) -> None:
        self.shape = shape
        self.row_counts: list[int] = []

    def run(
        self, outputs: Sequence[str], feeds: Mapping[str, NDArray[Any]]
    ) -> list[NDArray[np.float32]]:
        code = feeds["code"]
        self.row_counts.append(len(code))
        height, width, channels = self.shape
        flat = np.full((len(code), height * width), 0.5, np.float32)
        flat[:, :LATENTS] += code[:, : height * width] / 8
        images = np.repeat(flat[:, :, None], channels, axis=2)
        return [images.reshape(len(code), height, width, channels).clip(0, 1)]


def open_decoder(
    height: int = 8, width: int = 8, channels: int = 1, session: PixelSession | None = None
) -> Decoder:
    manifest = Manifest(
        name="fake",
        modality="image",
        latent_dim=LATENTS,
        tau=0.5,
        alpha=0.1,
        active=2.0,
        opset=20,
        files={"encoder.onnx": "0" * 64},
        probes=[],
        pixel_spec=PixelSpec(height=height, width=width, channels=channels),
    )
    return Decoder(session or PixelSession((height, width, channels)), manifest)


def codes_of(*rows: dict[int, float]) -> Codes:
    dense = np.zeros((len(rows), LATENTS), np.float32)
    for number, row in enumerate(rows):
        dense[number, list(row)] = list(row.values())
    return dense_to_csr(dense)


def grey_inputs(count: int, level: int = 128, size: int = 8) -> NDArray[np.uint8]:
    return np.full((count, size, size, 1), level, np.uint8)


def find_frames(sheet: Image.Image) -> list[tuple[int, int]]:
    """Left and top of every tile, row by row: where the corner of a frame is."""
    pixels = np.asarray(sheet)
    is_frame = (pixels == (205, 205, 205)).all(axis=2)
    length = 60
    runs = np.lib.stride_tricks.sliding_window_view(is_frame, length, axis=1).all(axis=2)
    falls = np.lib.stride_tricks.sliding_window_view(is_frame, 20, axis=0).all(axis=2)
    corners = runs[: falls.shape[0]] & falls[:, : runs.shape[1]]
    # A corner has nothing left of it and nothing above it.
    corners[:, 1:] &= ~is_frame[: corners.shape[0], : corners.shape[1] - 1]
    corners[1:] &= ~is_frame[: corners.shape[0] - 1, : corners.shape[1]]
    return [(int(x) + 1, int(y) + 1) for y, x in np.argwhere(corners)]


def tile_at(sheet: Image.Image, corner: tuple[int, int], side: int = TILE_PX) -> NDArray[np.uint8]:
    left, top = corner
    return np.asarray(sheet)[top : top + side, left : left + side]


def test_a_row_is_input_reconstruction_and_its_active_features():
    codes = codes_of({0: 1.0, 5: -2.0}, {3: 1.0})
    sheet = draw_contact_sheet(grey_inputs(2), codes, open_decoder(), ids=["a.png", "b.png"])
    frames = find_frames(sheet)
    tops = sorted({top for _, top in frames})
    assert [sum(top == y for _, y in frames) for top in tops] == [4, 3]
    assert tops[1] - tops[0] > TILE_PX


def test_tiles_are_the_pixels_enlarged_by_a_whole_factor():
    inputs = np.random.default_rng(0).integers(0, 256, (1, 8, 8, 1), dtype=np.uint8)
    sheet = draw_contact_sheet(inputs, codes_of({0: 4.0}), open_decoder(), ids=["a.png"])
    input_tile, reconstruction = (tile_at(sheet, corner) for corner in find_frames(sheet)[:2])
    enlarged = inputs[0, :, :, 0].repeat(12, axis=0).repeat(12, axis=1)
    np.testing.assert_array_equal(input_tile, np.stack([enlarged] * 3, axis=-1))
    assert (reconstruction[:12, :12] == 255).all()
    assert (reconstruction[12:] == 128).all()


def test_a_feature_colours_the_pixels_that_it_changes_and_leaves_the_others_neutral():
    codes = codes_of({0: 4.0, 9: -2.0})
    sheet = draw_contact_sheet(grey_inputs(1), codes, open_decoder(), ids=["a.png"])
    brighter, darker = (tile_at(sheet, corner) for corner in find_frames(sheet)[2:])
    red, _, blue = brighter[0, 0].astype(int)
    assert red > blue + 100
    red, _, blue = darker[12, 12].astype(int)
    assert blue > red + 50
    for tile, rows, columns in (
        (brighter, slice(0, 12), slice(0, 12)),
        (darker, slice(12, 24), slice(12, 24)),
    ):
        rest = tile.copy()
        rest[rows, columns] = NEUTRAL_GREY
        assert (rest == NEUTRAL_GREY).all()


def test_a_feature_that_changes_nothing_has_a_neutral_tile():
    decoder = open_decoder(height=3, width=5)  # pixel 15 is not there
    sheet = draw_contact_sheet(None, codes_of({0: 1.0, 15: 3.0}), decoder, ids=["a.png"])
    corner = find_frames(sheet)[2]
    assert (np.asarray(sheet)[corner[1] : corner[1] + 57, corner[0] : corner[0] + 95] == 240).all()


def test_a_change_far_below_a_grey_level_is_not_blown_up():
    sheet = draw_contact_sheet(None, codes_of({0: 1e-5}), open_decoder(), ids=["a.png"])
    tile = tile_at(sheet, find_frames(sheet)[1]).astype(int)
    assert np.abs(tile - NEUTRAL_GREY).max() < 3


def test_features_stand_in_the_order_of_what_they_change_not_of_their_value():
    session = PixelSession((8, 8, 1))
    decoder = open_decoder(session=session)
    codes = codes_of({1: 1.0, 2: -3.0, 4: 2.0})
    sheet = draw_contact_sheet(None, codes, decoder, ids=["a.png"])
    changed = []
    for corner in find_frames(sheet)[1:]:
        tile = tile_at(sheet, corner)[::12, ::12]
        changed.append(int(np.flatnonzero((tile != 240).any(axis=2).ravel())[0]))
    assert changed == [2, 4, 1]


def test_a_colour_model_shows_changes_around_mid_grey():
    sheet = draw_contact_sheet(
        None, codes_of({0: -4.0, 1: 2.0}), open_decoder(channels=3), ids=["a.png"]
    )
    darker, brighter = (tile_at(sheet, corner) for corner in find_frames(sheet)[1:])
    assert darker[0, 0].tolist() == [1, 1, 1]
    assert brighter[0, 12].tolist() == [192, 192, 192]
    assert (brighter[12:] == 128).all()


def test_an_empty_code_has_a_row_without_feature_tiles():
    sheet = draw_contact_sheet(grey_inputs(1), codes_of({}), open_decoder(), ids=["a.png"])
    frames = find_frames(sheet)
    assert len(frames) == 2
    right_of_them = np.asarray(sheet)[
        frames[0][1] : frames[0][1] + 20, frames[1][0] + TILE_PX + 8 :
    ]
    assert (right_of_them != 255).any()  # it says that no feature is active


def test_at_most_max_features_are_shown_and_none_if_asked():
    codes = codes_of({number: number + 1.0 for number in range(6)})
    for asked in (4, 0):
        sheet = draw_contact_sheet(None, codes, open_decoder(), ids=["a.png"], max_features=asked)
        assert len(find_frames(sheet)) == 1 + asked
        assert (np.asarray(sheet)[:, -10:] == WHITE).all()


def test_without_inputs_the_sheet_begins_with_the_reconstruction():
    codes = codes_of({0: 1.0, 1: 1.0})
    with_inputs = draw_contact_sheet(grey_inputs(1), codes, open_decoder(), ids=["a.png"])
    without = draw_contact_sheet(None, codes, open_decoder(), ids=["a.png"])
    assert len(find_frames(with_inputs)) == len(find_frames(without)) + 1
    assert tile_at(without, find_frames(without)[0])[0, 0, 0] == 159  # 0.5 + 1/8


def test_the_sheet_grows_with_rows_and_features_and_nothing_is_cut_off():
    def size(codes: Codes) -> tuple[int, int]:
        ids = [f"{number}.png" for number in range(codes.shape[0])]
        sheet = draw_contact_sheet(grey_inputs(len(ids)), codes, open_decoder(), ids=ids)
        edge = np.asarray(sheet)[:, -10:]
        assert (edge == WHITE).all()
        return sheet.size

    many = dict.fromkeys(range(8), 1.0)
    more = dict.fromkeys(range(9), 1.0)
    assert size(codes_of(more))[0] - size(codes_of(many))[0] == TILE_PX + GAP
    assert size(codes_of(many, many))[1] - size(codes_of(many))[1] > TILE_PX
    assert size(codes_of(many, {}))[0] == size(codes_of(many))[0]


@pytest.mark.parametrize("shape", [(300, 200, 3), (1, 2, 1), (90, 20, 1), (28, 28, 1)])
def test_any_shape_fits_into_a_tile(shape):
    height, width, channels = shape
    inputs = np.zeros((1, *shape), np.uint8)
    sheet = draw_contact_sheet(
        inputs, codes_of({0: 1.0}), _blank_decoder(height, width, channels), ids=["a.png"]
    )
    assert sheet.mode == "RGB"
    assert sheet.height < 2 * TILE_PX + 60


def _blank_decoder(height: int, width: int, channels: int) -> Decoder:
    session = _BlankSession((height, width, channels))
    return open_decoder(height, width, channels, session)


class _BlankSession(PixelSession):
    def run(
        self, outputs: Sequence[str], feeds: Mapping[str, NDArray[Any]]
    ) -> list[NDArray[np.float32]]:
        return [np.zeros((len(feeds["code"]), *self.shape), np.float32)]


def test_long_and_foreign_names_are_shortened_or_escaped_not_fatal():
    for name in ("a/" * 200 + "end.png", "größer/日本.png", "two\nlines.png", ""):
        sheet = draw_contact_sheet(grey_inputs(1), codes_of({0: 1.0}), open_decoder(), ids=[name])
        assert (np.asarray(sheet)[:, -10:] == WHITE).all()


def test_the_labels_are_feature_value_active_count_and_squared_error(monkeypatch):
    written = []
    monkeypatch.setattr(
        ImageDraw.ImageDraw, "text", lambda _pen, _at, text, *_args, **_kwargs: written.append(text)
    )
    codes = codes_of({5: -2.0, 12: 4.0, 3: 1.0})
    draw_contact_sheet(
        grey_inputs(1, level=0), codes, open_decoder(), ids=["a.png"], max_features=2
    )
    assert {"a.png", "#12  +4.00", "#5  -2.00", "3 active", "2 shown"} < set(written)
    error = 61 * 0.5**2 + 0.25**2 + 1.0**2 + 0.625**2
    assert f"error {error:.1f}" in written


def test_the_same_codes_give_the_same_bytes():
    def draw() -> bytes:
        file = io.BytesIO()
        codes = codes_of({0: 1.0, 7: -2.5}, {})
        sheet = draw_contact_sheet(grey_inputs(2), codes, open_decoder(), ids=["a", "b"])
        sheet.save(file, "PNG")
        return file.getvalue()

    assert draw() == draw()


def test_the_decoder_is_called_once_a_row():
    session = PixelSession((8, 8, 1))
    codes = codes_of({0: 1.0, 1: 1.0, 2: 1.0}, {}, {3: 1.0})
    draw_contact_sheet(None, codes, open_decoder(session=session), ids=["a", "b", "c"])
    assert session.row_counts == [4, 1, 2]


def test_no_rows_and_negative_counts_are_refused():
    with pytest.raises(UsageError, match="no rows to draw"):
        draw_contact_sheet(None, codes_of({})[:0], open_decoder(), ids=[])
    with pytest.raises(UsageError, match="cannot show -1 features"):
        draw_contact_sheet(None, codes_of({}), open_decoder(), ids=["a"], max_features=-1)


def test_a_model_of_vectors_is_refused():
    manifest = Manifest(
        name="words",
        modality="vector",
        latent_dim=LATENTS,
        tau=0.5,
        alpha=0.1,
        active=2.0,
        opset=20,
        files={"encoder.onnx": "0" * 64},
        probes=[],
        input_dim=64,
    )
    decoder = Decoder(PixelSession((8, 8, 1)), manifest)
    with pytest.raises(InputError, match="vectors of length 64, not images"):
        draw_contact_sheet(None, codes_of({}), decoder, ids=["a"])


def test_names_that_do_not_match_the_codes_are_a_mistake_of_the_caller():
    with pytest.raises(ValueError, match="1 ids and 2 codes"):
        draw_contact_sheet(None, codes_of({}, {}), open_decoder(), ids=["a"])
