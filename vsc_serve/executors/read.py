"""The work on one chunk: read, decode, encode. The same code runs in processes and in threads."""

import hashlib
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from time import perf_counter
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from vsc_serve.bundle import image_spec
from vsc_serve.codes import CodeRows, dense_to_csr
from vsc_serve.encoder import Encoder
from vsc_serve.errors import InputError
from vsc_serve.executors.digests import KnownDigests
from vsc_serve.executors.task import Bad, Piece, Seconds, Task, encode_piece
from vsc_serve.images import PixelSpec, read_pixels
from vsc_serve.options import EncodeOptions
from vsc_serve.sources import FileSource, Source
from vsc_serve.sources.base import read_with_status


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What a worker needs to open the model; it travels to other processes."""

    model: Path
    """The bundle."""
    options: EncodeOptions
    latent_dim: int
    """Columns of a code."""
    has_digests: bool = False
    """Whether rows get the sha256 of what they were made from."""
    known: Path | None = None
    """File with the digests of rows that need not be made again; need not be there."""
    shared_bytes: int = 0
    """Codes are small: they come back as messages."""

    def bad_piece(self, bad: Bad, stamp: str) -> Piece:
        """Return what became of a single source that has no row."""
        rows = no_rows(self.latent_dim, aligned=self.options.uncertainty)
        return Piece(bad.position, rows, [], [bad], [stamp], Seconds(), [], [])

    def open(self, beat: Callable[[int], None]) -> "Work":
        """Open the model on one thread of the CPU.

        Args:
            beat: Told how many images were begun.
        """
        encoder = Encoder.open(self.model, device="cpu", threads=1)
        return Work(
            encoder, self.options, has_digests=self.has_digests, known=self.known, beat=beat
        )


@dataclass(frozen=True, kw_only=True)
class PixelSetup:
    """What a worker needs that only reads: its pixels go to a model elsewhere, in shared memory."""

    spec: PixelSpec
    latent_dim: int
    has_digests: bool = False
    known: Path | None = None

    def bad_piece(self, bad: Bad, stamp: str) -> Piece:
        """Return what became of a single source that has no row."""
        return Piece(bad.position, no_rows(self.latent_dim), [], [bad], [stamp], Seconds(), [], [])

    slot_count: int
    """Chunks that fit into the memory a worker shares with its parent."""
    slot_rows: int
    """Pictures of a chunk at most."""

    @property
    def shared_bytes(self) -> int:
        """Size of the shared memory."""
        return self.slot_count * self.slot_rows * math.prod(self.spec.shape)

    def slots(self, memory: memoryview) -> NDArray[np.uint8]:
        """Return shared memory as pixels, shape (slots, rows, height, width, channels)."""
        shape = (self.slot_count, self.slot_rows, *self.spec.shape)
        return np.frombuffer(memory, np.uint8).reshape(shape)

    def open(self, beat: Callable[[int], None]) -> "PixelWork":
        """Return what reads; there is nothing to open."""
        return PixelWork(self, beat)


class Reader:
    """Reads and decodes the sources of tasks.

    Args:
        spec: What pictures become.
        has_digests: Whether rows get the sha256 of what they were made from.
        known: File with the digests of rows that need not be made again; looked for when the first
            image is read.
        beat: Told how many images were begun.
    """

    def __init__(
        self,
        spec: PixelSpec,
        *,
        has_digests: bool = False,
        known: Path | None = None,
        beat: Callable[[int], None] = lambda count: None,
    ) -> None:
        self._spec = spec
        self._has_digests = has_digests
        self._known_path = known
        self._beat = beat
        self._begun = 0

    @cached_property
    def _known(self) -> KnownDigests | None:
        path = self._known_path
        return KnownDigests.load(path) if path is not None and path.exists() else None

    def read(self, task: Task, slot: NDArray[np.uint8] | None = None) -> "Reading":
        """Read and decode the sources of a task, into `slot` where one is given."""
        reading = Reading(task, self._spec, slot)
        for position, source in enumerate(task.sources, task.offset):
            self._begun += 1
            self._beat(self._begun)
            try:
                self._take(reading, position, source)
            except InputError as error:
                reading.refuse(position, source, str(error))
            except OSError as error:
                raise InputError(
                    f"{source.id}: cannot be read ({error}): not the picture, but the machine"
                    " failed. Run the same command again to go on."
                ) from error
        return reading

    def _take(self, reading: "Reading", position: int, source: Source) -> None:
        """Read one picture. Raises InputError with the reason."""
        began = perf_counter()
        content = reading.read(source)
        digest = hashlib.sha256(content) if self._has_digests else None
        row = -1 if digest is None or self._known is None else self._known.row_of(digest.digest())
        read = perf_counter()
        reading.seconds.read += read - began
        if row < 0:
            reading.pixels[len(reading.fresh)] = read_pixels(content, reading.spec)
            reading.seconds.decode += perf_counter() - read
            reading.fresh.append(position)
        reading.keep(position, row, digest.hexdigest() if digest is not None else None)


class Work(Reader):
    """An open model, and what is to be done with each chunk.

    Args:
        encoder: The model.
        options: How it encodes.
        **reading: See `Reader`.
    """

    def __init__(self, encoder: Encoder, options: EncodeOptions, **reading: Any) -> None:
        super().__init__(image_spec(encoder.manifest), **reading)
        self.encoder = encoder
        self._options = options

    @property
    def provenance(self) -> dict[str, Any]:
        """What a codes file says about where its codes come from."""
        return self.encoder.provenance(self._options)

    def run(self, task: Task) -> Piece:
        """Do a task.

        Raises:
            InputError: The machine failed, and not a picture (too many open files, no memory).
        """
        reading = self.read(task)
        piece = reading.piece(no_rows(0))
        pixels = reading.pixels[: len(reading.fresh)]
        return encode_piece(
            piece, pixels, lambda rows: self.encoder.encode_rows(rows, self._options)
        )


class PixelWork(Reader):
    """Reads and decodes; the pixels stay where the task says.

    Args:
        setup: What pictures become.
        beat: Told how many images were begun.
    """

    provenance: Final[dict[str, Any]] = {}

    def __init__(self, setup: PixelSetup, beat: Callable[[int], None]) -> None:
        super().__init__(setup.spec, has_digests=setup.has_digests, known=setup.known, beat=beat)
        self._latent_dim = setup.latent_dim

    def run(self, task: Task, slot: NDArray[np.uint8]) -> Piece:
        """Do a task: fill the first rows of `slot`, and say what they are."""
        return self.read(task, slot).piece(no_rows(self._latent_dim))


def no_rows(latent_dim: int, *, aligned: bool = False) -> CodeRows:
    """Return the codes of no pictures, with gamma and sigma if wanted."""
    none = np.empty(0, np.float32) if aligned else None
    codes = dense_to_csr(np.empty((0, latent_dim), np.float32))
    return CodeRows(codes=codes, gamma=none, sigma=none)


class Reading:
    """The pictures of a task while they are read.

    Args:
        task: What is read.
        spec: What pictures become.
        slot: Where pixels go; by default to memory of its own.
    """

    def __init__(self, task: Task, spec: PixelSpec, slot: NDArray[np.uint8] | None) -> None:
        self.spec = spec
        self.offset = task.offset
        self.pixels = np.empty((len(task.sources), *spec.shape), np.uint8) if slot is None else slot
        self.fresh: list[int] = []
        """Position in the chunk of each row of pixels that is filled."""
        self.bad: list[Bad] = []
        self.stamps: list[str] = []
        self.seconds = Seconds()
        self._kept: list[int] = []
        self._old_rows: list[int] = []
        self._digests: list[str] = []

    def read(self, source: Source) -> bytes:
        """Read a source and note its stamp; for a file both from one look at it."""
        if type(source) is FileSource:
            content, status = read_with_status(source.path)
            self.stamps.append(_stamp(status))
            return content
        self.stamps.append(stamp_of(source))
        return source.read()

    def refuse(self, position: int, source: Source, reason: str) -> None:
        """Note that a source has no row."""
        self.bad.append(Bad(position, reason))
        if len(self.stamps) <= position - self.offset:
            self.stamps.append(stamp_of(source))

    def keep(self, position: int, old_row: int, digest: str | None) -> None:
        """Give a picture a row."""
        self._kept.append(position)
        if digest is not None:
            self._digests.append(digest)
            self._old_rows.append(old_row)

    def piece(self, rows: CodeRows) -> Piece:
        """Return what became of the task, with the codes of the fresh pictures."""
        bad = sorted(self.bad)
        found = (self.stamps, self.seconds, self._digests, self._old_rows)
        return Piece(self.offset, rows, self._kept, bad, *found)


def stamp_of(source: Source) -> str:
    """Return what changes when a source does: size and time of the file that it is, or lies in.

    Sources that are no files on this machine are taken as unchanged while they keep their name.
    """
    path = getattr(source, "path", None)
    if path is None:
        return ""
    try:
        return _stamp(os.stat(path))  # noqa: PTH116  # a Path costs more than the call
    except (OSError, ValueError):
        return "-"


def _stamp(status: os.stat_result) -> str:
    return f"{status.st_size} {status.st_mtime_ns}"
