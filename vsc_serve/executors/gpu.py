"""Encoding on GPUs: processes read into shared memory, one model a GPU takes the pixels from there.

Reading is kept ahead of the models by the memory that the processes share with this one: they stop
when it is full, and it is used again as soon as a model has had the pixels.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self, TypeAlias

import numpy as np
from numpy.typing import NDArray

from vsc_serve.bundle import ENCODER, ENCODER_CSR, Manifest, image_spec
from vsc_serve.codes import CodeRows, build_csr, stack_rows, threshold_logit
from vsc_serve.encoder import BATCH_SIZE, Encoder
from vsc_serve.errors import InputError
from vsc_serve.executors.processes import TASKS_AHEAD, ProcessPool
from vsc_serve.executors.read import PixelSetup, no_rows
from vsc_serve.executors.task import Chunk, Piece, encode_piece
from vsc_serve.options import PLAIN, EncodeOptions
from vsc_serve.session import BoundSession, Device, open_session

Encode: TypeAlias = Callable[[NDArray[np.uint8]], CodeRows]
"""From pixels to codes."""

_AHEAD: Final = 2
"""Chunks that wait before each model."""


class DevicePool:
    """Processes that read, and models in this process that encode.

    Args:
        setup: What they read for; see `read_setup`.
        readers: Processes that give pixels.
        encoders: One for each device; each is called by one thread.
        provenance: What codes come from.
        counts_near: Whether the encoders count decisions near the threshold.
    """

    def __init__(
        self,
        setup: PixelSetup,
        readers: ProcessPool,
        encoders: Sequence[Encode],
        provenance: dict[str, Any],
        *,
        counts_near: bool,
    ) -> None:
        self.workers = readers.workers
        self.kind = f"processes and {len(encoders)} x cuda"
        self.largest_chunk = BATCH_SIZE
        self.counts_near = counts_near
        self._readers = readers
        self._no_pixels = np.empty((0, *setup.spec.shape), np.uint8)
        self._encoders = list(encoders)
        self._provenance = provenance
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        """Start the first reader, and a thread for each device."""
        self._stack.enter_context(self._readers)
        self._threads = [
            self._stack.enter_context(ThreadPoolExecutor(1, "vsc-device")) for _ in self._encoders
        ]
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Wait for the devices, and end the readers."""
        self._stack.__exit__(kind, error, trace)

    @property
    def begun(self) -> int:
        """How many readers were at work at a time."""
        return self._readers.begun

    def expect(self, count: int) -> None:
        """Start the readers that so many sources need."""
        self._readers.expect(count)

    def provenance(self) -> dict[str, Any]:
        """Return what a codes file says about where its codes come from."""
        return self._provenance

    def run(self, chunks: Iterator[Chunk]) -> Iterator[Piece]:
        """Do the chunks; give what became of them, in order. The devices take turns."""
        waiting: deque[Future[Piece]] = deque()
        for turn, piece in enumerate(self._readers.run(chunks)):
            device = turn % len(self._encoders)
            encode = self._encoders[device]
            waiting.append(self._threads[device].submit(self._encode, encode, piece))
            if len(waiting) > _AHEAD * len(self._encoders):
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()

    def _encode(self, encode: Encode, piece: Piece) -> Piece:
        """Encode the pixels of a piece, and let go of their memory."""
        pixels = self._no_pixels if piece.pixels is None else piece.pixels
        done = encode_piece(piece, pixels, encode)
        if piece.release is not None:
            piece.release()
        return done


def read_setup(
    manifest: Manifest, device_count: int, *, has_digests: bool = False, known: Path | None = None
) -> PixelSetup:
    """Return what reading processes need.

    Each has memory for what is before it, what may wait for a model, and one chunk more, so that
    there is always room for the chunk that everything else waits for.
    """
    return PixelSetup(
        spec=image_spec(manifest),
        latent_dim=manifest.latent_dim,
        has_digests=has_digests,
        known=known,
        slot_count=TASKS_AHEAD + 2 + _AHEAD * device_count + 1,
        slot_rows=BATCH_SIZE,
    )


def open_encoders(
    model: Path, options: EncodeOptions, device: Device, device_count: int
) -> tuple[list[Encode], dict[str, Any]]:
    """Open a model on every GPU; the first is checked against the bundle's probes.

    With plain options and a bundle that has the graph for it, codes are compacted on the device.

    Returns:
        What encodes, one for each device, and where codes come from.

    Raises:
        VscError: See `Encoder.open`.
    """
    checked = Encoder.open(model, device=device)
    manifest = checked.manifest
    opened: list[Encode] = []
    for number in range(device_count):
        if compacts_on_device(manifest, options):
            session = _open_bound(model / ENCODER_CSR, device, number)
            opened.append(CompactEncoder(session, manifest, options).encode)
        else:
            encoder = Encoder(_open_bound(model / ENCODER, device, number), manifest)
            opened.append(partial(_encode_dense, encoder, options))
    return opened, checked.provenance(options)


def compacts_on_device(manifest: Manifest, options: EncodeOptions) -> bool:
    """Tell whether codes come off the device compacted: values and indices, nothing else."""
    return manifest.has_csr and options == EncodeOptions(tau=options.tau)


def _open_bound(path: Path, device: Device, number: int) -> BoundSession:
    return BoundSession(open_session(path, device=device, device_id=number), BATCH_SIZE)


def _encode_dense(encoder: Encoder, options: EncodeOptions, pixels: NDArray[np.uint8]) -> CodeRows:
    if not len(pixels):
        return no_rows(encoder.manifest.latent_dim, aligned=options.uncertainty)
    return encoder.encode_rows(pixels, options)


class CompactEncoder:
    """Encodes with the graph that compacts codes itself.

    Args:
        session: `encoder_csr.onnx`.
        manifest: What the bundle says.
        options: A threshold, at most.
    """

    def __init__(
        self, session: BoundSession, manifest: Manifest, options: EncodeOptions = PLAIN
    ) -> None:
        self._session = session
        self._latent_dim = manifest.latent_dim
        self._limit = np.array(threshold_logit(options.tau or manifest.tau))

    def encode(self, pixels: NDArray[np.uint8]) -> CodeRows:
        """Encode pixels, batch by batch.

        Raises:
            InputError: The model gives values that are not finite.
        """
        starts = range(0, len(pixels), BATCH_SIZE)
        parts = [self._encode_batch(pixels[start : start + BATCH_SIZE]) for start in starts]
        return stack_rows(parts, self._latent_dim) if parts else no_rows(self._latent_dim)

    def _encode_batch(self, batch: NDArray[np.uint8]) -> CodeRows:
        outputs = ["values", "indices", "row_counts"]
        feeds: dict[str, NDArray[Any]] = {"image": batch, "tau_logit": self._limit}
        values, indices, row_counts = self._session.run_whole(outputs, feeds)
        bounds = np.zeros(len(batch) + 1, np.int64)
        np.cumsum(row_counts[: len(batch)], out=bounds[1:])
        entries = int(bounds[-1])
        kept = values[:entries].astype(np.float32, copy=False)
        if not np.isfinite(kept).all():
            bad = int(np.searchsorted(bounds, np.flatnonzero(~np.isfinite(kept))[0], "right")) - 1
            raise InputError(f"row {bad}: the model gives values that are not finite")
        energy = float(np.square(kept, dtype=np.float64).sum())
        codes = build_csr(kept.copy(), indices[:entries].copy(), bounds, self._latent_dim)
        return CodeRows(codes=codes, kept_energy=energy, total_energy=energy)
