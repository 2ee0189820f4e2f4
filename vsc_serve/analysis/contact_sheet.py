"""One image that shows what codes keep of images, and what each active feature draws in them.

A row is an image: the input, the reconstruction of its code, and for each active feature a tile
with the change that this feature makes in this image.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from vsc_serve.bundle import image_spec
from vsc_serve.codes import Codes, dense_to_csr
from vsc_serve.decoder import Decoder
from vsc_serve.errors import UsageError

TILE_PX: Final = 96
"""Longest side of a tile: larger images are shrunk to it, smaller ones grow by a whole factor."""

_MARGIN_PX: Final = 20
_GAP_PX: Final = 10
_LINE_PX: Final = 17
_TEXT_PX: Final = 12
_END_WIDTH_PX: Final = 96
_CELL_PX: Final = (84, 3 * _LINE_PX)
"""Least width and height of a place on the sheet, so that text fits beside the smallest tiles."""
_LEAST_WIDTH_PX: Final = 560

_PAPER: Final = (255, 255, 255)
_INK: Final = (32, 32, 32)
_FAINT_INK: Final = (110, 110, 110)
_FRAME: Final = (205, 205, 205)

# Colours of a change of a grey model, from darker over no change to brighter: safe for colour-blind
# readers, equally dark at both ends. Half the colours go to small changes, which are most of them.
_CHANGES: Final = np.array([-1.0, -0.2, 0.0, 0.2, 1.0])
_COLOURS: Final = np.array(
    [(18, 72, 140), (112, 164, 214), (240, 240, 240), (246, 158, 96), (176, 56, 8)], np.float64
)

_GREY_LEVEL: Final = 1 / 255
"""Change that gets the strongest colour at least: smaller ones are rounding, not drawing."""

_Pixels = NDArray[np.uint8]


@dataclass(frozen=True)
class _Feature:
    """An active feature of one image."""

    number: int
    value: float
    change: NDArray[np.float32]
    """Reconstruction with the feature minus without it, shape (height, width, channels)."""


@dataclass(frozen=True)
class _Row:
    """Row of the sheet: one image."""

    id: str
    pixels: _Pixels | None
    reconstruction: NDArray[np.float32]
    features: list[_Feature]
    """The most important ones, in descending importance."""
    active_count: int

    @property
    def squared_error(self) -> float | None:
        """Squared error of the reconstruction, summed over the image's pixels in [0, 1]."""
        if self.pixels is None:
            return None
        return float(np.square(self.reconstruction - self.pixels / 255.0).sum())


@dataclass(frozen=True)
class _Layout:
    """Where things lie on the sheet, in pixels."""

    tile: tuple[int, int]
    """Width and height of a tile."""
    lead_count: int
    """Columns before the features: input and reconstruction, or the latter alone."""
    feature_count: int
    """Columns of features."""
    row_count: int

    @property
    def pitch(self) -> int:
        """From one column to the next."""
        return max(self.tile[0], _CELL_PX[0]) + _GAP_PX

    @property
    def row_height(self) -> int:
        """From one row to the next."""
        return max(self.tile[1] + _LINE_PX, _CELL_PX[1]) + _GAP_PX

    @property
    def header_height(self) -> int:
        """Above the first row."""
        return _MARGIN_PX + _LINE_PX + 6

    @property
    def size(self) -> tuple[int, int]:
        """Width and height of the sheet."""
        columns = (self.lead_count + self.feature_count) * self.pitch + _GAP_PX
        width = max(_LEAST_WIDTH_PX, 2 * _MARGIN_PX + columns + _END_WIDTH_PX)
        rows = self.row_count * self.row_height
        return (width, self.header_height + rows + 2 * _LINE_PX + _MARGIN_PX)

    def tile_at(self, row: int, column: int) -> tuple[int, int]:
        """Left and top of a tile. The features stand a gap apart from what comes before them."""
        apart = _GAP_PX if column >= self.lead_count else 0
        left = _MARGIN_PX + column * self.pitch + apart
        return (left, self.header_height + row * self.row_height)


def draw_contact_sheet(
    inputs: _Pixels | None,
    codes: Codes,
    decoder: Decoder,
    *,
    ids: Sequence[str],
    max_features: int = 10,
) -> Image.Image:
    """Draw inputs, reconstructions, and what each active feature draws, one row an image.

    What feature j draws in an image is decode(code) - decode(code without j). A feature is the more
    important the larger the sum of squares of that change. All tiles of a sheet share one scale.

    Args:
        inputs: Pixels, shape (images, height, width, channels); None leaves the column out.
        codes: Their codes, shape (images, latents).
        decoder: The decoder of the model that made the codes.
        ids: Names of the images, one per row.
        max_features: Show at most this many features of an image.

    Returns:
        The sheet, an RGB image. The same arguments give the same pixels.

    Raises:
        UsageError: There are no rows to draw, or `max_features` is negative.
        InputError: The model encodes vectors, or has another number of latents than the codes.
    """
    spec = image_spec(decoder.manifest)
    if codes.shape[0] == 0:
        raise UsageError("no rows to draw on the sheet. Choose rows that the codes have.")
    if max_features < 0:
        raise UsageError(f"a sheet cannot show {max_features} features. Give 0 or more.")
    if len(ids) != codes.shape[0] or (inputs is not None and len(inputs) != codes.shape[0]):
        raise ValueError(f"{len(ids)} ids and {codes.shape[0]} codes do not belong together")
    rows = [
        _look_at(codes, number, decoder, name, inputs, max_features)
        for number, name in enumerate(ids)
    ]
    layout = _Layout(
        tile=_tile_size(spec.height, spec.width),
        lead_count=1 if inputs is None else 2,
        feature_count=_feature_columns(rows) if max_features else 0,
        row_count=len(rows),
    )
    return _draw(rows, layout, is_grey=spec.channels == 1)


def _look_at(
    codes: Codes,
    number: int,
    decoder: Decoder,
    name: str,
    inputs: _Pixels | None,
    max_features: int,
) -> _Row:
    """Decode one code, whole and without each of its features, in one call of the decoder."""
    code = codes[[number]].toarray()
    active = np.flatnonzero(code[0])
    variants = np.repeat(code, len(active) + 1, axis=0)
    variants[np.arange(len(active)) + 1, active] = 0.0
    drawn = decoder.decode(dense_to_csr(variants))
    changes = drawn[:1] - drawn[1:]
    importance = np.square(changes, dtype=np.float64).sum(axis=(1, 2, 3))
    order = np.argsort(-importance, kind="stable")[:max_features]
    return _Row(
        id=name,
        pixels=None if inputs is None else inputs[number],
        reconstruction=drawn[0],
        features=[_Feature(int(active[k]), float(code[0, active[k]]), changes[k]) for k in order],
        active_count=len(active),
    )


def _feature_columns(rows: list[_Row]) -> int:
    """Return how many columns of features are needed; the heading takes as much room as three."""
    return max(3, *(len(row.features) for row in rows))


def _tile_size(height: int, width: int) -> tuple[int, int]:
    """Return the width and height of a tile: as large as fits into TILE_PX in both directions."""
    longest = max(height, width)
    if longest <= TILE_PX:
        factor = TILE_PX // longest
        return (width * factor, height * factor)
    return (max(1, width * TILE_PX // longest), max(1, height * TILE_PX // longest))


def _draw(rows: list[_Row], layout: _Layout, *, is_grey: bool) -> Image.Image:
    sheet = Image.new("RGB", layout.size, _PAPER)
    pen = ImageDraw.Draw(sheet)
    largest = [float(np.abs(feature.change).max()) for row in rows for feature in row.features]
    scale = max([_GREY_LEVEL, *largest])
    _draw_header(pen, layout)
    for number, row in enumerate(rows):
        lead = [] if row.pixels is None else [row.pixels]
        lead.append(_to_bytes(row.reconstruction * 255))
        tiles = lead + [_colour(f.change / scale, is_grey=is_grey) for f in row.features]
        for column, tile in enumerate(tiles):
            _paste(sheet, pen, tile, layout, (number, column))
        _draw_labels(pen, row, number, layout)
    _draw_legend(pen, layout, scale, is_grey=is_grey)
    return sheet


def _draw_header(pen: ImageDraw.ImageDraw, layout: _Layout) -> None:
    names = ["input", "reconstruction"][-layout.lead_count :]
    if layout.feature_count:
        names.append("what each active feature draws, strongest first")
    y = _MARGIN_PX
    for column, name in enumerate(names):
        pen.text((layout.tile_at(0, column)[0], y), name, _INK, _font())
    last = layout.lead_count + layout.feature_count
    pen.text((layout.tile_at(0, last)[0], y), "statistics", _INK, _font())
    left, right = _MARGIN_PX, layout.size[0] - _MARGIN_PX
    pen.line((left, y + _LINE_PX, right, y + _LINE_PX), _FRAME)


def _draw_labels(pen: ImageDraw.ImageDraw, row: _Row, number: int, layout: _Layout) -> None:
    """Write the image's id, the number and value of each feature, and the statistics of the row."""
    left, top = layout.tile_at(number, 0)
    y = top + layout.tile[1] + 2
    room = layout.lead_count * layout.pitch - _GAP_PX
    pen.text((left, y), _shorten(row.id, room), _FAINT_INK, _font())
    for position, feature in enumerate(row.features):
        left, _ = layout.tile_at(number, layout.lead_count + position)
        pen.text((left, y), f"#{feature.number}  {feature.value:+.2f}", _INK, _font())
    if layout.feature_count and not row.features:
        left, _ = layout.tile_at(number, layout.lead_count)
        pen.text((left, top), "no active feature", _FAINT_INK, _font())
    left, _ = layout.tile_at(number, layout.lead_count + layout.feature_count)
    for line, text in enumerate(_statistics(row)):
        pen.text((left, top + line * _LINE_PX), text, _INK, _font())


def _statistics(row: _Row) -> list[str]:
    statistics = [f"{row.active_count} active"]
    if len(row.features) < row.active_count:
        statistics.append(f"{len(row.features)} shown")
    if row.squared_error is not None:
        statistics.append(f"error {row.squared_error:.1f}")
    return statistics


def _draw_legend(pen: ImageDraw.ImageDraw, layout: _Layout, scale: float, *, is_grey: bool) -> None:
    """Say below the rows what the colours and the statistics mean."""
    x, y = _MARGIN_PX, layout.size[1] - _MARGIN_PX - 2 * _LINE_PX
    texts = []
    if layout.feature_count:
        for change, meaning in ((-1.0, "darker"), (0.0, "no change"), (1.0, "brighter")):
            if is_grey:
                x = _draw_swatch(pen, (x, y), change, meaning)
        colour = "strongest colour" if is_grey else "mid-grey: no change;  strongest colour"
        pen.text((x, y), f"{colour}: a change of {scale:.2g}", _FAINT_INK, _font())
        texts.append("#feature and its value")
    if layout.lead_count == 2:
        texts.append("error: squared, summed over the pixels, which go from 0 to 1")
    pen.text((_MARGIN_PX, y + _LINE_PX), ";  ".join(texts), _FAINT_INK, _font())


def _draw_swatch(pen: ImageDraw.ImageDraw, at: tuple[int, int], change: float, meaning: str) -> int:
    """Draw a small square in the colour of a change, with its meaning. Returns where it ends."""
    x, y = at
    red, green, blue = _colour(np.full((1, 1, 1), change), is_grey=True)[0, 0].tolist()
    pen.rectangle((x, y + 2, x + 11, y + 13), (red, green, blue), _FRAME)
    pen.text((x + 17, y), meaning, _FAINT_INK, _font())
    return x + 33 + int(_font().getlength(meaning))


def _paste(
    sheet: Image.Image,
    pen: ImageDraw.ImageDraw,
    pixels: _Pixels,
    layout: _Layout,
    place: tuple[int, int],
) -> None:
    left, top = layout.tile_at(*place)
    width, height = layout.tile
    image = Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)
    grows = width >= image.width
    how = Image.Resampling.NEAREST if grows else Image.Resampling.BOX
    sheet.paste(image.resize((width, height), how), (left, top))
    pen.rectangle((left - 1, top - 1, left + width, top + height), outline=_FRAME)


def _colour(change: NDArray[np.floating], *, is_grey: bool) -> _Pixels:
    """Turn a change in [-1, 1] into colours: two of them for grey models, else around mid-grey."""
    if not is_grey:
        return _to_bytes(128 + 127 * change)
    channels = [np.interp(change[:, :, 0], _CHANGES, colour) for colour in _COLOURS.T]
    return _to_bytes(np.stack(channels, axis=-1))


def _to_bytes(levels: NDArray[np.floating]) -> _Pixels:
    rounded: _Pixels = np.clip(np.rint(levels), 0, 255).astype(np.uint8)
    return rounded


def _shorten(text: str, width: int) -> str:
    """Cut a name from the left, where paths are alike, until it fits into `width` pixels.

    What the font that Pillow brings along cannot draw is written as an escape.
    """
    short = text.encode("unicode_escape").decode("ascii")
    while _font().getlength(short) > width and len(short) > 4:
        short = "..." + short[4:]
    return short


def _font() -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size=_TEXT_PX)
