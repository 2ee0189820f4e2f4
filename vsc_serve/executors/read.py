"""Work on a chunk: read, decode, encode. The same code runs in processes and in threads."""

import hashlib
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from time import perf_counter
from typing import Any, Final, Protocol

import numpy as np
from numpy.typing import NDArray

from vsc_serve.bundle import image_spec
from vsc_serve.codes import CodeRows, empty_rows
from vsc_serve.encoder import Encoder
from vsc_serve.errors import InputError, SourceUnavailable
from vsc_serve.executors.digests import DigestTable
from vsc_serve.executors.task import (
    ChunkResult,
    Rejected,
    StageSeconds,
    Task,
    encode_fresh,
)
from vsc_serve.images import MAX_PIXELS, PixelSpec, read_pixels
from vsc_serve.options import EncodeOptions
from vsc_serve.sources import FileSource, RowSource, Source
from vsc_serve.sources.base import read_with_status

Beat = Callable[[int], None]
"""Told how many images were begun."""


@dataclass(frozen=True, kw_only=True)
class ReadOptions:
    """How images are read."""

    max_pixels: int = MAX_PIXELS
    """Largest image that is decoded, in pixels."""
    keeps_digests: bool = False
    """Whether rows get the sha256 of the content they were made from."""
    digest_table: Path | None = None
    """File with the digests of rows that need not be made again; need not be there."""


class WorkerSpec(Protocol):
    """Worker specification: it travels to another process, and opens the worker there."""

    @property
    def shared_bytes(self) -> int:
        """Size of the memory that a worker shares with its parent."""

    def open(self, beat: Beat) -> "EncodeWorker | ReadWorker":
        """Open the worker. Raises VscError."""

    def rejected_result(self, rejected: Rejected, signature: str) -> ChunkResult:
        """Return the result of a single source without a row."""


@dataclass(frozen=True, kw_only=True)
class EncodeSpec:
    """Specification of a worker that reads and encodes, on one thread of the CPU."""

    model: Path
    """The bundle."""
    options: EncodeOptions
    latent_dim: int
    """Columns of a code."""
    read: ReadOptions = ReadOptions()  # frozen
    shared_bytes: int = 0
    """Codes are small: they come back as messages."""

    def open(self, beat: Beat) -> "EncodeWorker":
        """Open the model."""
        encoder = Encoder.open(self.model, device="cpu", threads=1)
        return EncodeWorker(encoder, self.options, self.read, beat)

    def rejected_result(self, rejected: Rejected, signature: str) -> ChunkResult:
        """Return the result of a single source without a row."""
        rows = empty_rows(self.latent_dim, aligned=self.options.uncertainty)
        return _of_rejected(rows, rejected, signature)


@dataclass(frozen=True, kw_only=True)
class ReadSpec:
    """Specification of a worker that only reads: its pixels go to a model in another process."""

    spec: PixelSpec
    latent_dim: int
    slot_count: int
    """Chunks that fit into the memory a worker shares with its parent."""
    slot_rows: int
    """Images of a chunk at most."""
    read: ReadOptions = ReadOptions()  # frozen

    @property
    def shared_bytes(self) -> int:
        """Size of the shared memory."""
        return self.slot_count * self.slot_rows * math.prod(self.spec.shape)

    def slots(self, memory: memoryview) -> NDArray[np.uint8]:
        """Return shared memory as pixels, shape (slots, rows, height, width, channels)."""
        shape = (self.slot_count, self.slot_rows, *self.spec.shape)
        return np.frombuffer(memory, np.uint8).reshape(shape)

    def open(self, beat: Beat) -> "ReadWorker":
        """Return the worker; there is nothing to open."""
        return ReadWorker(self, beat)

    def rejected_result(self, rejected: Rejected, signature: str) -> ChunkResult:
        """Return the result of a single source without a row."""
        return _of_rejected(empty_rows(self.latent_dim), rejected, signature)


def _of_rejected(rows: CodeRows, rejected: Rejected, signature: str) -> ChunkResult:
    return ChunkResult(
        offset=rejected.position, rows=rows, rejected=[rejected], signatures=[signature]
    )


class ImageReader:
    """Reads and decodes the sources of tasks.

    Args:
        spec: What images become.
        options: How they are read. The table of digests is looked for when the first is read.
        beat: Told how many images were begun.
    """

    def __init__(
        self, spec: PixelSpec, options: ReadOptions, beat: Beat = lambda count: None
    ) -> None:
        self._spec = spec
        self._options = options
        self._beat = beat
        self._begun = 0

    @cached_property
    def _table(self) -> DigestTable | None:
        path = self._options.digest_table
        return DigestTable.load(path) if path is not None and path.exists() else None

    def read(self, task: Task, slot: NDArray[np.uint8] | None = None) -> "ReadImages":
        """Read and decode the sources of a task, into `slot` where one is given.

        Raises:
            SourceUnavailable: A source cannot be reached now, or the machine failed (no memory, too
                many open files): no image is to blame.
        """
        images = ReadImages(task, self._spec, slot)
        for position, source in enumerate(task.sources, task.offset):
            self._begun += 1
            self._beat(self._begun)
            try:
                self._take(images, position, source)
            except SourceUnavailable:
                raise
            except InputError as error:
                images.reject(position, source, error)
            except OSError as error:
                raise SourceUnavailable(
                    f"{source.id}: cannot be read ({error.strerror or error}): the machine failed,"
                    " not the image."
                ) from error
        return images

    def _take(self, images: "ReadImages", position: int, source: Source) -> None:
        """Read one image. Raises InputError with the reason."""
        began = perf_counter()
        content = images.fetch(source)
        digest = hashlib.sha256(content) if self._options.keeps_digests else None
        row = -1 if digest is None or self._table is None else self._table.row_of(digest.digest())
        read = perf_counter()
        images.seconds.read += read - began
        if row < 0:
            pixels = read_pixels(content, self._spec, max_pixels=self._options.max_pixels)
            images.pixels[len(images.fresh)] = pixels
            images.seconds.decode += perf_counter() - read
            images.fresh.append(position)
        images.keep(position, row, digest.hexdigest() if digest is not None else None)


class EncodeWorker(ImageReader):
    """Worker that reads and encodes.

    Args:
        encoder: The open model.
        options: How it encodes.
        read: How images are read.
        beat: Told how many images were begun.
    """

    def __init__(
        self,
        encoder: Encoder,
        options: EncodeOptions,
        read: ReadOptions,
        beat: Beat = lambda count: None,
    ) -> None:
        super().__init__(image_spec(encoder.manifest), read, beat)
        self.encoder = encoder
        self._encode_options = options

    @property
    def provenance(self) -> dict[str, Any]:
        """What a codes file says about where its codes come from."""
        return self.encoder.provenance(self._encode_options)

    def run(self, task: Task) -> ChunkResult:
        """Do a task. Raises SourceUnavailable: see `ImageReader.read`."""
        images = self.read(task)
        result = images.result(empty_rows(0))
        pixels = images.pixels[: len(images.fresh)]
        return encode_fresh(
            result,
            pixels,
            lambda rows: self.encoder.encode_counted(rows, self._encode_options),
        )


class ReadWorker(ImageReader):
    """Worker that only reads and decodes; the pixels stay where the task says.

    Args:
        spec: Its specification.
        beat: Told how many images were begun.
    """

    provenance: Final[dict[str, Any]] = {}

    def __init__(self, spec: ReadSpec, beat: Beat) -> None:
        super().__init__(spec.spec, spec.read, beat)
        self._latent_dim = spec.latent_dim

    def run(self, task: Task, slot: NDArray[np.uint8]) -> ChunkResult:
        """Do a task: fill the first rows of `slot`, and say what they are."""
        return self.read(task, slot).result(empty_rows(self._latent_dim))


class ReadImages:
    """Images of a task while they are read.

    Args:
        task: What is read.
        spec: What images become.
        slot: Where pixels go; by default to memory of its own.
    """

    def __init__(self, task: Task, spec: PixelSpec, slot: NDArray[np.uint8] | None) -> None:
        self.pixels = np.empty((len(task.sources), *spec.shape), np.uint8) if slot is None else slot
        self.fresh: list[int] = []
        """Position in the chunk of each row of pixels that is filled."""
        self.seconds = StageSeconds()
        self._offset = task.offset
        self._rejected: list[Rejected] = []
        self._signatures: list[str] = []
        self._kept: list[int] = []
        self._reused: list[int] = []
        self._digests: list[str] = []

    def fetch(self, source: Source) -> bytes:
        """Read a source and note its signature; for a file both from one look at it."""
        if type(source) is FileSource:
            content, status = read_with_status(source.path, root=source.root)
            self._signatures.append(_signature(status))
            return content
        self._signatures.append(file_signature(source))
        return source.read()

    def reject(self, position: int, source: Source, error: InputError) -> None:
        """Note that a source has no row."""
        self._rejected.append(Rejected(position, str(error), error.kind))
        if len(self._signatures) <= position - self._offset:
            self._signatures.append(file_signature(source))

    def keep(self, position: int, reused_row: int, digest: str | None) -> None:
        """Give an image a row."""
        self._kept.append(position)
        if digest is not None:
            self._digests.append(digest)
            self._reused.append(reused_row)

    def result(self, rows: CodeRows) -> ChunkResult:
        """Return the result of the task, with the codes of the fresh images."""
        return ChunkResult(
            offset=self._offset,
            rows=rows,
            kept=self._kept,
            rejected=sorted(self._rejected),
            signatures=self._signatures,
            seconds=self.seconds,
            digests=self._digests,
            reused=self._reused,
        )


def file_signature(source: Source) -> str:
    """Return what changes when a source does: size and time of the file that it is, or lies in.

    Sources that are no files on this machine are taken as unchanged while they keep their name;
    for rows of arrays, the identity of the job has the signature of all files.
    """
    path = getattr(source, "path", None)
    if path is None or isinstance(source, RowSource):
        return ""
    try:
        return _signature(os.stat(path))  # noqa: PTH116  # a Path costs more than the call
    except (OSError, ValueError):
        return "-"


def _signature(status: os.stat_result) -> str:
    return f"{status.st_size} {status.st_mtime_ns}"
