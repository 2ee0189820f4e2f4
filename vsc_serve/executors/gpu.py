"""Encoding on GPUs: processes read into shared memory, one model a GPU takes the pixels from there.

Reading is kept ahead of the models by the memory that the processes share with this one: they stop
when it is full, and it is used again as soon as a model has had the pixels.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any, Final, Self

import numpy as np
from numpy.typing import NDArray

from vsc_serve.bundle import Bundle, Manifest, image_spec
from vsc_serve.compaction import COMPACT, DENSE, Compaction, EncodedBatch, is_plain
from vsc_serve.encoder import BATCH_SIZE, Encoder
from vsc_serve.executors.processes import TASKS_AHEAD, ProcessExecutor
from vsc_serve.executors.read import ReadOptions, ReadSpec
from vsc_serve.executors.task import Chunk, ChunkResult, Encode, encode_fresh
from vsc_serve.options import EncodeOptions
from vsc_serve.session import BoundSession, Device, open_session

_AHEAD: Final = 2
"""Chunks that wait before each model."""


class GpuExecutor:
    """Processes that read, and models in this process that encode.

    Args:
        spec: Specification of the readers; see `read_spec`.
        readers: Processes that give pixels.
        encoders: One for each device; each is called by one thread.
        provenance: What codes come from.
    """

    def __init__(
        self,
        spec: ReadSpec,
        readers: ProcessExecutor,
        encoders: Sequence[Encode],
        provenance: dict[str, Any],
    ) -> None:
        self.workers = readers.workers
        self.kind = f"processes and {len(encoders)} x cuda"
        self.largest_chunk = BATCH_SIZE
        self._readers = readers
        self._no_pixels = np.empty((0, *spec.spec.shape), np.uint8)
        self._encoders = list(encoders)
        self._provenance = provenance
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        """Spawn the first reader, and a thread for each device."""
        self._stack.enter_context(self._readers)
        self._threads = [
            self._stack.enter_context(ThreadPoolExecutor(1, "vsc-device")) for _ in self._encoders
        ]
        return self

    def __exit__(self, *error: Any) -> None:
        """Wait for the devices, and end the readers."""
        self._stack.__exit__(*error)

    @property
    def started(self) -> int:
        """How many readers were spawned."""
        return self._readers.started

    def expect(self, count: int) -> None:
        """Spawn the readers that so many sources need."""
        self._readers.expect(count)

    def provenance(self) -> dict[str, Any]:
        """Return what a codes file says about where its codes come from."""
        return self._provenance

    def run(self, chunks: Iterator[Chunk]) -> Iterator[ChunkResult]:
        """Do the chunks; give their results in order. The devices take turns."""
        waiting: deque[Future[ChunkResult]] = deque()
        for turn, result in enumerate(self._readers.run(chunks)):
            device = turn % len(self._encoders)
            encode = self._encoders[device]
            waiting.append(self._threads[device].submit(self._encode, encode, result))
            if len(waiting) > _AHEAD * len(self._encoders):
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()

    def _encode(self, encode: Encode, result: ChunkResult) -> ChunkResult:
        """Encode the pixels of a result, and let go of their memory."""
        pixels = self._no_pixels if result.pixels is None else result.pixels
        done = encode_fresh(result, pixels, encode)
        if result.release is not None:
            result.release()
        return done


def read_spec(
    manifest: Manifest,
    device_count: int,
    read: ReadOptions = ReadOptions(),  # noqa: B008  # frozen
) -> ReadSpec:
    """Return the specification of reading processes.

    Each has memory for what is before it, what may wait for a model, and one chunk more, so that
    there is always room for the chunk that everything else waits for.
    """
    return ReadSpec(
        spec=image_spec(manifest),
        latent_dim=manifest.latent_dim,
        slot_count=TASKS_AHEAD + 2 + _AHEAD * device_count + 1,
        slot_rows=BATCH_SIZE,
        read=read,
    )


def open_encoders(
    bundle: Bundle, options: EncodeOptions, device: Device, device_count: int
) -> tuple[list[Encode], dict[str, Any]]:
    """Open a model on every GPU; the first is checked against the bundle's probes.

    With plain options and a bundle that has the graph for it, codes are compacted on the device.

    Returns:
        What encodes, one for each device, and where codes come from.

    Raises:
        VscError: See `Encoder.open`.
    """
    checked = Encoder.open(bundle.path, device=device)
    compaction = COMPACT if bundle.manifest.has_csr and is_plain(options) else DENSE
    opened = [
        encode_on(_open_bound(bundle, compaction, device, number), options)
        for number in range(device_count)
    ]
    return opened, checked.provenance(options)


def encode_on(encoder: Encoder, options: EncodeOptions) -> Encode:
    """Return what encodes pixels with an encoder."""

    def encode(pixels: NDArray[np.uint8]) -> EncodedBatch:
        return encoder.encode_counted(pixels, options)

    return encode


def _open_bound(bundle: Bundle, compaction: Compaction, device: Device, number: int) -> Encoder:
    session = open_session(bundle.path / compaction.graph, device=device, device_id=number)
    return Encoder(BoundSession(session, BATCH_SIZE), bundle.manifest, compaction)
