"""Read training data into one array: a folder of images, or pixels or vectors in npz or npy.

Images go through `vsc_serve.images.to_pixels`, the function that serves them later. Whether an
example is for training or validation depends on its content alone, so copies of an image never lie
on both sides.
"""

import hashlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from PIL import UnidentifiedImageError

from vsc_serve.errors import InputError, UsageError
from vsc_serve.images import BadImage, PixelSpec, open_image, read_images
from vsc_serve.sources import Source, find_sources, is_junk
from vsc_serve.sources.arrays import SUFFIXES, read_rows
from vsc_training.backbone import Backbone
from vsc_training.embeddings import Embedder, EmbeddingCache
from vsc_training.memory import require_memory_for
from vsc_training.model import DataSpec

logger = logging.getLogger(__name__)

_MANY_GREY: Final = 200
"""Grey images before the first one in colour, from which on that is worth a warning."""
_LARGEST_NATURAL_SIDE: Final = 64
"""Images of one size up to this side keep it; all others become squares of this side."""
_SIDE_STEP: Final = 8
"""Sides are cut to a multiple of this, so that convolutions can halve them."""
_EMBEDDED_AT_ONCE: Final = 256
"""Images in memory while a backbone embeds them."""
_KEPT_IMAGES: Final = 256
_KEPT_BYTES: Final = 32_000_000
"""Bounds of the images that are kept for the export's comparison."""
_CHECKED_AT_ONCE: Final = 4096
_LARGEST_VALUE: Final = 1e15
"""Largest value of a vector: training squares values and adds thousands of squares in float32."""
_GREY_MODES: Final = frozenset({"1", "L", "LA", "La", "I;16", "I;16B", "I;16L", "I;16N"})


@dataclass(frozen=True)
class Examples:
    """Training data in memory (or mapped from a file)."""

    rows: NDArray[Any]
    """Pixels, uint8, (images, height, width, channels); or vectors, float32, (rows, dimensions)."""
    ids: list[str]
    """One per row."""
    spec: DataSpec
    """What one row is."""
    labels: NDArray[np.int64] | None = None
    """Class of each row, where class folders or the file say so."""
    bad: Sequence[BadImage] = ()
    """Files that could not be read."""
    images: NDArray[np.uint8] | None = None
    """Pixels of some of the images, where the rows are their embeddings."""

    def fingerprint(self) -> str:
        """Return a digest of all rows, to tell whether a run goes on with the same data."""
        digest = hashlib.sha256(f"{self.rows.dtype} {self.rows.shape}".encode())
        for start in range(0, len(self.rows), 4096):
            digest.update(np.ascontiguousarray(self.rows[start : start + 4096]).tobytes())
        return digest.hexdigest()[:16]

    def split(self, validation_share: float) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
        """Return the rows for training and those for validation; see `split_rows`."""
        return split_rows(self.rows, validation_share)


def split_rows(
    rows: NDArray[Any], validation_share: float
) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Return the rows for training and those for validation, by a digest of each row's content.

    Args:
        rows: Shape (rows, *shape).
        validation_share: Share for validation, in [0, 1).
    """
    limit = int(validation_share * 2**32)
    keys = np.fromiter((_content_key(row) for row in rows), np.uint64, len(rows))
    is_validation = keys < limit
    return np.flatnonzero(~is_validation), np.flatnonzero(is_validation)


def load_examples(path: Path, *, size: int | None = None) -> Examples:
    """Read training data.

    Args:
        path: A folder of images (class folders give labels), or an `.npz` or `.npy` file with
            uint8 images (count, height, width[, channels]) or float vectors (count, dimensions).
        size: Side of the square that images become; None chooses it from the images.

    Returns:
        The examples, checked: at least two, not all alike, finite.

    Raises:
        UsageError: Nothing there, or nothing usable.
        InputError: The file cannot be used.
    """
    if path.is_dir():
        examples = _load_folder(path, size)
    elif path.suffix in SUFFIXES and path.is_file():
        if size is not None:
            raise UsageError(
                "`size` is for folders of images; the pixels of a file stay as they are"
            )
        examples = _load_file(path)
    else:
        raise UsageError(f"{path}: no folder of images and no .npz or .npy file. Check the path.")
    _check_rows(path, examples.rows)
    return examples


def find_images(folder: Path) -> list[Source]:
    """Return the image files of a folder. Raises UsageError when there is none."""
    if not folder.is_dir():
        raise UsageError(f"{folder}: no folder of images, which is what `backbone` embeds.")
    return list(find_sources([str(folder)]))


def embed_examples(
    folder: Path,
    sources: Sequence[Source],
    backbone: Backbone,
    report: Callable[[int], None],
    cache: EmbeddingCache | None = None,
) -> Examples:
    """Read the images of a folder as embeddings; their pixels do not stay in memory.

    Every file is read; an image that the cache knows by its bytes is not decoded and not embedded.

    Args:
        folder: Where they lie; class folders give labels.
        sources: The images, as `find_images` gives them.
        backbone: What embeds them.
        report: Is told how many images are done.
        cache: Embeddings of earlier runs; gets those of this one.

    Returns:
        The embeddings, checked as `load_examples` checks, with the pixels of some images.

    Raises:
        UsageError: No usable image.
        InputError: The backbone gives values that are not finite, or all alike.
    """
    stride = -(-len(sources) // _kept_count(backbone.spec.pixel_spec))
    embedder = Embedder(backbone, cache)
    ids: list[str] = []
    bad: list[BadImage] = []
    vectors, samples = [], []
    for start in range(0, len(sources), _EMBEDDED_AT_ONCE):
        chunk = embedder.embed(sources[start : start + _EMBEDDED_AT_ONCE])
        vectors.append(chunk.rows)
        samples += chunk.sources[-len(ids) % stride :: stride]
        ids += [source.id for source in chunk.sources]
        bad += chunk.bad
        report(min(start + _EMBEDDED_AT_ONCE, len(sources)))
    _require_one(folder, len(sources), ids, bad)
    embedder.flush()
    pixels, *_ = read_images(samples, backbone.spec.pixel_spec)
    rows = np.concatenate(vectors)
    data = DataSpec(input_dim=backbone.spec.dim, backbone=backbone.spec)
    _check_rows(folder, rows)
    return Examples(rows, ids, data, _checked_labels(folder, ids), bad, pixels)


def _kept_count(spec: PixelSpec) -> int:
    """Return how many images are kept for the export's comparison."""
    return max(1, min(_KEPT_IMAGES, _KEPT_BYTES // (spec.height * spec.width * spec.channels)))


def choose_pixel_spec(sources: Sequence[Source], size: int | None) -> PixelSpec:
    """Choose size and colour from the headers of the images.

    Grey when all of them are grey. Their own size when all have the same one and it is at most
    64x64, else a square of 64; sides of colour images are multiples of 8.

    Args:
        sources: The images. All headers are read, until no further one can change the choice.
        size: Side of a square, in place of the choice.
    """
    is_grey, sizes = _survey(sources)
    width, height = (_LARGEST_NATURAL_SIDE, _LARGEST_NATURAL_SIDE)
    if size is not None:
        width, height = (size, size)
    elif len(sizes) == 1 and max(next(iter(sizes))) <= _LARGEST_NATURAL_SIDE:
        width, height = next(iter(sizes))
        if not is_grey:
            width, height = (max(side // _SIDE_STEP, 1) * _SIDE_STEP for side in (width, height))
    try:
        return PixelSpec(height=height, width=width, channels=1 if is_grey else 3)
    except ValueError as error:
        raise UsageError(f"`size`: {error}") from error


def _survey(sources: Sequence[Source]) -> tuple[bool, set[tuple[int, int]]]:
    """Return whether all images are grey, and their sizes, as far as these can matter."""
    sizes: set[tuple[int, int]] = set()
    grey_count, is_colour = 0, False
    for source in sources:
        header = _read_header(source)
        if header is None:
            continue
        mode, dimensions = header
        sizes.add(dimensions)
        if mode in _GREY_MODES:
            grey_count += 1
        elif not is_colour:
            is_colour = True
            if grey_count >= _MANY_GREY:
                logger.warning(
                    "%s is in colour and the %d images before it are grey: all are read as"
                    " colour, with a network for colour. Keep the two kinds apart if that is not"
                    " meant.",
                    source.id,
                    grey_count,
                )
        has_own_size = len(sizes) == 1 and max(dimensions) <= _LARGEST_NATURAL_SIDE
        if is_colour and not has_own_size:
            break
    return grey_count > 0 and not is_colour, sizes


def _read_header(source: Source) -> tuple[str, tuple[int, int]] | None:
    try:
        with open_image(source.read()) as image:
            return image.mode, image.size
    except (OSError, UnidentifiedImageError, InputError, SyntaxError, ValueError):
        return None  # read_images gives the reason when it comes to this file


def _load_folder(folder: Path, size: int | None) -> Examples:
    sources = list(find_sources([str(folder)]))
    spec = choose_pixel_spec(sources, size)
    require_memory_for(
        len(sources) * prod(spec.shape),
        f"{folder}: {len(sources):,} images of {spec}",
        "ask for a smaller `size`, or use fewer images",
    )
    pixels, ids, bad = read_images(sources, spec)
    _require_one(folder, len(sources), ids, bad)
    labels = _checked_labels(folder, ids)
    return Examples(pixels, ids, DataSpec(pixel_spec=spec), labels, bad)


def _require_one(
    folder: Path, source_count: int, ids: Sequence[str], bad: Sequence[BadImage]
) -> None:
    if not ids:
        raise UsageError(
            f"{folder}: none of {source_count} image files can be read; the first: {bad[0].id}:"
            f" {bad[0].reason}"
        )


def _checked_labels(folder: Path, ids: Sequence[str]) -> NDArray[np.int64] | None:
    labels = _folder_labels(ids)
    if labels is not None:
        _refuse_empty_class(folder, ids)
    return labels


def _folder_labels(ids: Sequence[str]) -> NDArray[np.int64] | None:
    """Number the class folders in sorted order; None unless each image lies in one of several."""
    classes = sorted({identity.split("/")[0] for identity in ids if "/" in identity})
    if len(classes) < 2 or any("/" not in identity for identity in ids):
        return None
    number = {name: position for position, name in enumerate(classes)}
    return np.array([number[identity.split("/")[0]] for identity in ids], np.int64)


def _refuse_empty_class(folder: Path, ids: Sequence[str]) -> None:
    """Raise InputError for a class folder without a readable image: a copy that went wrong."""
    used = {identity.split("/")[0] for identity in ids}
    for path in sorted(folder.iterdir()):
        if path.is_dir() and not is_junk(path.name) and path.name not in used:
            raise InputError(
                f"{path}: a class folder without a readable image."
                " Add images, or remove the folder."
            )


def _load_file(path: Path) -> Examples:
    rows, ids, labels = read_rows(path)
    if rows.ndim == 2:
        rows = rows.astype(np.float32, copy=False)
        return Examples(rows, ids, DataSpec(input_dim=rows.shape[1]), labels)
    spec = PixelSpec(height=rows.shape[1], width=rows.shape[2], channels=rows.shape[3])
    return Examples(rows, ids, DataSpec(pixel_spec=spec), labels)


def _check_rows(path: Path, rows: NDArray[Any]) -> None:
    if len(rows) < 2:
        raise UsageError(f"{path}: {len(rows)} usable example; training needs at least 2.")
    if rows.dtype.kind == "f":
        _check_values(path, rows)
    if all(np.array_equal(row, rows[0]) for row in rows):
        raise InputError(f"{path}: all {len(rows)} examples are alike; there is nothing to learn.")


def _check_values(path: Path, rows: NDArray[Any]) -> None:
    """Raise InputError for values that are not finite, or that float32 cannot square and add."""
    bad_count, first = 0, 0
    for start in range(0, len(rows), _CHECKED_AT_ONCE):
        chunk = rows[start : start + _CHECKED_AT_ONCE]
        is_bad = ~(np.abs(chunk) <= _LARGEST_VALUE).all(axis=1)
        if bad_count == 0 and is_bad.any():
            first = start + int(np.flatnonzero(is_bad)[0])
        bad_count += int(np.count_nonzero(is_bad))
    if not bad_count:
        return
    if np.isfinite(rows[first]).all():
        largest = float(np.abs(rows[first]).max())
        found = f"values beyond {_LARGEST_VALUE:g}, the first is row {first} with {largest:.2g}"
        raise InputError(
            f"{path}: {bad_count} rows hold {found}. A mark for missing values? Remove such rows,"
            " or divide all data by a constant."
        )
    raise InputError(
        f"{path}: {bad_count} rows hold NaN or infinity, the first is row {first}. Remove them."
    )


def _content_key(row: NDArray[Any]) -> int:
    return int.from_bytes(hashlib.blake2b(row.tobytes(), digest_size=4).digest(), "little")
