"""Encoding on GPUs: processes read into shared memory, one model a GPU takes the pixels from there.

Reading is kept ahead of the models by the memory that the processes share with this one: they stop
when it is full, and it is used again as soon as a model has had the pixels.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from itertools import zip_longest
from threading import Lock
from time import perf_counter
from typing import Any, Final, Self

import numpy as np
from numpy.typing import NDArray

from vsc_serve.bundle import Bundle, Manifest, image_spec
from vsc_serve.compaction import COMPACT, DENSE, EncodedBatch, is_plain
from vsc_serve.encoder import BATCH_SIZE, Encoder, check_probes
from vsc_serve.executors.processes import TASKS_AHEAD, ProcessExecutor
from vsc_serve.executors.read import ReadOptions, ReadSpec
from vsc_serve.executors.task import Chunk, ChunkResult, Encode, encode_fresh
from vsc_serve.options import EncodeOptions
from vsc_serve.session import BoundSession, Device, open_graph

_AHEAD: Final = 2
"""Chunks that wait before each model."""
_LANES: Final = 2
"""Threads a GPU, each with memory of its own: while one computes, another copies or compacts."""


class GpuExecutor:
    """Processes that read, and models in this process that encode.

    Args:
        spec: Specification of the readers; see `read_spec`.
        readers: Processes that give pixels.
        encoders: For each device one or more, called by a thread each.
        provenance: What codes come from.
    """

    def __init__(
        self,
        spec: ReadSpec,
        readers: ProcessExecutor,
        encoders: Sequence[Sequence[Encode]],
        provenance: dict[str, Any],
    ) -> None:
        self.workers = readers.workers
        self.kind = f"processes and {len(encoders)} x cuda"
        self.largest_chunk = BATCH_SIZE  # 1,024: half as fast (training/LOG.md)
        self._readers = readers
        self._no_pixels = np.empty((0, *spec.spec.shape), np.uint8)
        self._clocks = [_BusyClock() for _ in encoders]
        by_device = zip(self._clocks, encoders, strict=True)
        lanes = zip_longest(*([(clock, one) for one in ones] for clock, ones in by_device))
        self._lanes = [lane for turn in lanes for lane in turn if lane is not None]
        self._provenance = provenance
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        """Spawn the first reader, and a thread for each device."""
        self._stack.enter_context(self._readers)
        self._threads = [
            self._stack.enter_context(ThreadPoolExecutor(1, "vsc-device")) for _ in self._lanes
        ]
        return self

    def __exit__(self, *error: Any) -> None:
        """Wait for the devices, and end the readers."""
        self._stack.__exit__(*error)

    @property
    def started(self) -> int:
        """How many readers were spawned."""
        return self._readers.started

    @property
    def busy_s(self) -> list[float]:
        """Seconds in which each device had work, copies and compaction included."""
        return [clock.busy_s for clock in self._clocks]

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
            lane = turn % len(self._lanes)
            clock, encode = self._lanes[lane]
            waiting.append(self._threads[lane].submit(self._encode, clock, encode, result))
            if len(waiting) > _AHEAD * len(self._lanes):
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()

    def _encode(self, clock: "_BusyClock", encode: Encode, result: ChunkResult) -> ChunkResult:
        """Encode the pixels of a result, and let go of their memory."""
        pixels = self._no_pixels if result.pixels is None else result.pixels
        with clock:
            done = encode_fresh(result, pixels, encode)
        if result.release is not None:
            result.release()
        return done


class _BusyClock:
    """Adds up the time in which at least one thread is inside."""

    def __init__(self) -> None:
        self.busy_s = 0.0
        self._lock = Lock()
        self._inside = 0
        self._since = 0.0

    def __enter__(self) -> None:
        with self._lock:
            if not self._inside:
                self._since = perf_counter()
            self._inside += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._inside -= 1
            if not self._inside:
                self.busy_s += perf_counter() - self._since


def read_spec(
    manifest: Manifest,
    lane_count: int,
    read: ReadOptions = ReadOptions(),  # noqa: B008  # frozen
) -> ReadSpec:
    """Return the specification of reading processes for so many threads that encode.

    Each has memory for what is before it, what may wait for a model, and one chunk more, so that
    there is always room for the chunk that everything else waits for.
    """
    return ReadSpec(
        spec=image_spec(manifest),
        latent_dim=manifest.latent_dim,
        slot_count=TASKS_AHEAD + 2 + _AHEAD * lane_count + 1,
        slot_rows=BATCH_SIZE,
        read=read,
    )


def open_encoders(
    bundle: Bundle, options: EncodeOptions, device: Device, device_count: int
) -> tuple[list[list[Encode]], dict[str, Any]]:
    """Open a model on every GPU, and check each against the bundle's probes.

    With plain options and a bundle that has the graph for it, codes are compacted on the device.

    Returns:
        What encodes, two or more for each device, and where codes come from.

    Raises:
        BundleError: A device does not give the codes of the probes.
        DeviceError: The device or onnxruntime is not there.
    """
    compaction = COMPACT if bundle.manifest.has_csr and is_plain(options) else DENSE
    opened: list[list[Encode]] = []
    for number in range(device_count):
        session = open_graph(bundle, compaction.graph, device=device, device_id=number)
        encoders = [
            Encoder(
                BoundSession(session, BATCH_SIZE), bundle.manifest, compaction, path=bundle.path
            )
            for _ in range(_LANES)
        ]
        for encoder in encoders:  # which also makes its memory and chooses its kernels
            check_probes(encoder, bundle)
        opened.append([encode_on(encoder, options) for encoder in encoders])
    return opened, encoders[0].provenance(options)


def encode_on(encoder: Encoder, options: EncodeOptions) -> Encode:
    """Return what encodes pixels with an encoder."""

    def encode(pixels: NDArray[np.uint8]) -> EncodedBatch:
        return encoder.encode_counted(pixels, options)

    return encode
