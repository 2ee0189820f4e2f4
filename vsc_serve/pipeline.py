"""From files to codes: read and preprocess in threads, encode, keep order; each stage is timed.

A file that cannot be read has no row; it is listed with its reason, and the rows of the others do
not move.
"""

import json
import time
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from vsc_serve.arrays import ArrayRows
from vsc_serve.atomic import atomic_file
from vsc_serve.codes import Codes, stack_codes
from vsc_serve.console import Progress
from vsc_serve.encoder import Encoder, image_spec
from vsc_serve.errors import InputError
from vsc_serve.images import BadImage, ImageSource, read_images
from vsc_serve.preprocess import PixelSpec

_ARRAY_BLOCK: Final = 4096
"""Rows of a numpy file that are in memory at a time."""
CHUNK: Final = 256
"""Images read and encoded together."""
_CHUNKS_AHEAD: Final = 2
"""Chunks per worker that may be read before they are encoded: bounds the memory."""


@dataclass
class Timings:
    """Seconds of work in each stage; reading may be in several threads at once."""

    read_s: float = 0.0
    """Opening, decoding, resizing; summed over threads."""
    encode_s: float = 0.0
    """Model and compaction."""
    total_s: float = 0.0
    """From the first file to the last code."""


@dataclass(frozen=True)
class Encoded:
    """Codes of many files."""

    codes: Codes
    """One row per image that could be read."""
    ids: list[str]
    """Id of each row."""
    bad: list[BadImage]
    """Files without a row."""
    timings: Timings = field(default_factory=Timings)


class _Chunk(NamedTuple):
    pixels: NDArray[np.uint8]
    ids: list[str]
    bad: list[BadImage]
    seconds: float


def encode_files(
    encoder: Encoder,
    sources: Sequence[ImageSource],
    *,
    tau: float | None = None,
    workers: int = 2,
    report: Progress | None = None,
) -> Encoded:
    """Encode image files, in order.

    Args:
        encoder: The model.
        sources: What to read.
        tau: Spike threshold in place of the model's own.
        workers: Threads that read.
        report: Told how many files are done.

    Returns:
        Codes, ids and the files left out.

    Raises:
        InputError: The model does not take pictures.
    """
    spec = image_spec(encoder.manifest)
    timings = Timings()
    parts: list[Codes] = []
    ids: list[str] = []
    bad: list[BadImage] = []
    done = 0
    began = time.perf_counter()
    for chunk in _read_ahead(sources, spec, workers):
        encode_began = time.perf_counter()
        parts.append(encoder.encode(chunk.pixels, tau=tau))
        timings.encode_s += time.perf_counter() - encode_began
        timings.read_s += chunk.seconds
        ids += chunk.ids
        bad += chunk.bad
        done += len(chunk.ids) + len(chunk.bad)
        if report is not None:
            report.update(done)
    codes = stack_codes(parts, encoder.manifest.latent_dim)
    timings.total_s = time.perf_counter() - began
    return Encoded(codes, ids, bad, timings)


def encode_array(
    encoder: Encoder, source: ArrayRows, *, tau: float | None = None, report: Progress | None = None
) -> Encoded:
    """Encode the rows of a numpy file, block by block.

    Args:
        encoder: The model.
        source: Pixels or vectors, with ids.
        tau: Spike threshold in place of the model's own.
        report: Told how many rows are done.

    Raises:
        InputError: Rows of another kind or shape than the model takes, or not finite.
    """
    timings = Timings()
    parts: list[Codes] = []
    began = time.perf_counter()
    for start in range(0, len(source.rows), _ARRAY_BLOCK):
        read_began = time.perf_counter()
        block = np.ascontiguousarray(source.rows[start : start + _ARRAY_BLOCK])
        encode_began = time.perf_counter()
        parts.append(encoder.encode(block, tau=tau))
        timings.read_s += encode_began - read_began
        timings.encode_s += time.perf_counter() - encode_began
        if report is not None:
            report.update(start + len(block))
    timings.total_s = time.perf_counter() - began
    codes = stack_codes(parts, encoder.manifest.latent_dim)
    return Encoded(codes, source.ids, [], timings)


def write_bad_images(path: Path, bad: Sequence[BadImage]) -> None:
    """Write the files without a row as JSON lines; without any, remove an earlier run's list."""
    if not bad:
        path.unlink(missing_ok=True)
        return
    with atomic_file(path) as file:
        for image in bad:
            file.write((json.dumps({"id": image.id, "reason": image.reason}) + "\n").encode())


def errors_path(out: Path) -> Path:
    """Return where the files without a row are listed: `codes.npz` gives `codes.errors.jsonl`."""
    return out.with_name(f"{out.stem}.errors.jsonl")


def _read_ahead(sources: Sequence[ImageSource], spec: PixelSpec, workers: int) -> Iterator[_Chunk]:
    """Read chunks in threads; yield them in order, never more than a few ahead of the encoder."""
    starts = iter(range(0, len(sources), CHUNK))
    with ThreadPoolExecutor(workers, thread_name_prefix="vsc-read") as pool:
        waiting: deque[Future[_Chunk]] = deque()
        for start in starts:
            waiting.append(pool.submit(_read_chunk, sources[start : start + CHUNK], spec))
            if len(waiting) > workers * _CHUNKS_AHEAD:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def _read_chunk(sources: Sequence[ImageSource], spec: PixelSpec) -> _Chunk:
    began = time.perf_counter()
    pixels, ids, bad = read_images(sources, spec)
    return _Chunk(pixels, ids, bad, time.perf_counter() - began)


def count_reasons(bad: Sequence[BadImage]) -> list[tuple[str, int]]:
    """Count the files left out by the first words of their reason, most frequent first."""
    return Counter(image.reason.split(":")[0] for image in bad).most_common()


def require_rows(encoded: Encoded) -> None:
    """Raise InputError when no file could be read at all."""
    if not encoded.ids:
        first = encoded.bad[0]
        raise InputError(
            f"none of {len(encoded.bad)} image files can be read; the first: {first.id}:"
            f" {first.reason}."
            " Nothing was written."
        )
