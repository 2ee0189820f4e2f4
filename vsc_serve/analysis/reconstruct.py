"""Write what codes say as images: one PNG a row, or a contact sheet."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from vsc_serve.analysis.contact_sheet import draw_contact_sheet
from vsc_serve.atomic import atomic_file, atomic_folder
from vsc_serve.bundle import Manifest, image_spec
from vsc_serve.codes import CodeFile
from vsc_serve.decoder import Decoder
from vsc_serve.errors import InputError
from vsc_serve.images import read_pixels
from vsc_serve.outputs import marked, write_marker
from vsc_serve.untrusted import is_folder

_ROWS_AT_ONCE = 1024
_KIND = "reconstructions"

RECONSTRUCTIONS = marked("a folder of reconstructions", _KIND, "*.png")
"""Output of `write_reconstructions`."""


def write_reconstructions(
    decoder: Decoder, stored: CodeFile, *, rows: Sequence[int], out: Path
) -> int:
    """Write the reconstruction of each row as a PNG, under the row's id with `.png` added.

    Args:
        decoder: The model that made the codes.
        stored: The codes and their ids.
        rows: Which rows.
        out: Folder to write, whole or not at all.

    Returns:
        How many were written.

    Raises:
        InputError: The model does not draw images, or an id cannot be the name of a file.
    """
    _require_images(decoder.manifest)
    with atomic_folder(out, RECONSTRUCTIONS) as folder:
        write_marker(folder, _KIND)
        for start in range(0, len(rows), _ROWS_AT_ONCE):
            chosen = list(rows[start : start + _ROWS_AT_ONCE])
            for row, pixels in zip(
                chosen, to_uint8(decoder.decode(stored.codes[chosen])), strict=True
            ):
                _save(folder, stored.ids[row], _image(pixels))
    return len(rows)


def write_contact_sheet(
    decoder: Decoder, stored: CodeFile, *, rows: Sequence[int], images: Path | None, path: Path
) -> None:
    """Draw a contact sheet of some rows.

    Args:
        decoder: The model that made the codes.
        stored: The codes and their ids.
        rows: Which rows.
        images: Folder that was encoded; without it the sheet shows no inputs.
        path: PNG to write.

    Raises:
        InputError: The model does not draw images, or an input is not under `images` any more or
            cannot be read.
    """
    _require_images(decoder.manifest)
    spec = image_spec(decoder.manifest)
    chosen = list(rows)
    ids = [stored.ids[row] for row in chosen]
    inputs = None
    if images is not None:
        inputs = np.stack([_read_input(images, identity, decoder) for identity in ids])
    sheet = draw_contact_sheet(inputs, stored.codes[chosen], decoder, ids=ids)
    assert inputs is None or inputs.shape[1:] == spec.shape
    with atomic_file(path) as file:
        sheet.save(file, "PNG")


def _require_images(manifest: Manifest) -> None:
    """Raise InputError for a model whose decoder gives vectors."""
    image_spec(manifest)
    if not manifest.draws_images:
        raise InputError(
            f"model {manifest.name} reads images through a backbone and decodes to the backbone's"
            " vectors: there is nothing to draw. `Decoder.decode` gives the vectors."
        )


def to_uint8(means: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Turn means in [0, 1] into pixels, rounded to the nearest level."""
    return np.rint(means.clip(0.0, 1.0) * 255.0).astype(np.uint8)


def _read_input(images: Path, identity: str, decoder: Decoder) -> NDArray[np.uint8]:
    path = images / identity if is_folder(images) else images
    try:
        return read_pixels(path, image_spec(decoder.manifest))
    except InputError as error:
        raise InputError(
            f"{path}: {error}. `images` must be the folder that was encoded."
        ) from error


def _image(pixels: NDArray[Any]) -> Image.Image:
    return Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)


def _save(folder: Path, identity: str, image: Image.Image) -> None:
    """Write the PNG of a row below the folder; an id such as `/a/b.png` becomes `a/b.png.png`.

    Raises:
        InputError: The id cannot be the name of a file, or is that of an earlier row.
    """
    inside = (part for part in Path(f"{identity}.png").parts if part not in ("/", ".."))
    path = folder.joinpath(*inside)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("xb") as file:
            image.save(file, "PNG")
    except FileExistsError:
        raise InputError(
            f"id {identity}: its image would take the place of another row's. Draw one with `rows`."
        ) from None
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise InputError(f"id {identity}: its image cannot be written ({reason}).") from error
