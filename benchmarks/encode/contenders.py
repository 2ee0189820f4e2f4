"""What is measured: ways from a folder to codes, and the parts alone.

Every contender reads the same files in the same order with the same weights in onnxruntime and
leaves a file of codes.
"""

import multiprocessing
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.pool import Pool as Processes
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import scipy.sparse
from numpy.typing import NDArray
from PIL import Image

from vsc_serve.bundle import ENCODER, open_bundle
from vsc_serve.codes import threshold_logit
from vsc_serve.encoder import Encoder
from vsc_serve.executors import Executor, ExecutorOptions, open_executor
from vsc_serve.images import PixelSpec, read_pixels
from vsc_serve.options import PLAIN
from vsc_serve.pipeline import Job, run_job
from vsc_serve.pipeline.shards import ShardStore
from vsc_serve.session import open_session
from vsc_serve.sources import find_sources, read_file

BATCH = 256

Contender = Callable[[], int]
"""Encodes, and returns how many images it did."""


class Bench(NamedTuple):
    """What every contender gets."""

    folder: Path
    model: Path
    out: Path
    workers: int

    def paths(self) -> list[Path]:
        """Return the files in order."""
        return [self.folder / source.id for source in find_sources([str(self.folder)])]

    @property
    def spec(self) -> PixelSpec:
        """What images become."""
        spec = open_bundle(self.model).manifest.pixel_spec
        assert spec is not None
        return spec


def naive(bench: Bench, limit: int = 1000) -> Contender:
    """Return the loop that everybody writes first: Pillow, batches of one, one thread."""
    paths, spec = bench.paths()[:limit], bench.spec
    run = _session(bench.model, 1)

    def encode() -> int:
        parts = [scipy.sparse.csr_array(run(decode_fully(path, spec)[None])) for path in paths]
        scipy.sparse.save_npz(bench.out, scipy.sparse.vstack(parts))
        return len(paths)

    return encode


def decode_fully(path: Path, spec: PixelSpec) -> NDArray[np.uint8]:
    """Decode with Pillow at full size and resize, as most code does."""
    with Image.open(path) as image:
        converted = image.convert("L" if spec.channels == 1 else "RGB")
    if converted.size != (spec.width, spec.height):
        converted = converted.resize((spec.width, spec.height), Image.Resampling.BILINEAR)
    return np.asarray(converted).reshape(spec.shape)


class Files:
    """A torch dataset of files."""

    def __init__(self, paths: Sequence[Path], spec: PixelSpec) -> None:
        self._paths, self._spec = paths, spec

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, index: int) -> NDArray[np.uint8]:
        return decode_fully(self._paths[index], self._spec)


def data_loader(bench: Bench) -> Contender:
    """Return torch's DataLoader before onnxruntime with all threads."""
    paths, spec = bench.paths(), bench.spec
    run = _session(bench.model, bench.workers)

    def encode() -> int:
        parts = [scipy.sparse.csr_array(run(batch)) for batch in _load(paths, spec, bench.workers)]
        codes = scipy.sparse.vstack(parts)
        scipy.sparse.save_npz(bench.out, codes)
        return int(codes.shape[0])

    return encode


def reader_mapper_writer(bench: Bench) -> Contender:
    """Return the shape of clip-retrieval: a reader, a mapper, a writer of numbered partitions."""
    paths, spec = bench.paths(), bench.spec
    run = _session(bench.model, bench.workers)

    def encode() -> int:
        rows: list[NDArray[np.float32]] = []
        names: list[str] = []
        done = 0
        for batch in _load(paths, spec, bench.workers):
            rows.append(run(batch).astype(np.float16))
            names += [str(path) for path in paths[done : done + len(batch)]]
            done += len(batch)
            if len(names) >= 10_000 or done == len(paths):
                np.save(bench.out.with_name(f"part_{done}.npy"), np.concatenate(rows))
                bench.out.with_name(f"part_{done}.txt").write_text("\n".join(names))
                rows, names = [], []
        return done

    return encode


def _load(paths: Sequence[Path], spec: PixelSpec, workers: int) -> Iterator[NDArray[np.uint8]]:
    from torch.utils.data import DataLoader

    loader: Any = DataLoader(
        Files(paths, spec),  # type: ignore[arg-type]  # anything with a length and items will do
        batch_size=BATCH,
        num_workers=workers,
        collate_fn=np.stack,
        multiprocessing_context="spawn",
        timeout=120,
    )
    return iter(loader)


def engine(bench: Bench, executor: Executor) -> Contender:
    """Return the engine of `vsc encode`, with workers that are there already."""
    latent_dim = open_bundle(bench.model).manifest.latent_dim
    job = Job(inputs=[str(bench.folder)], out=bench.out, model=bench.model)

    def encode() -> int:
        with ShardStore(bench.out).locked():
            outcome = run_job(job, executor, find_sources(job.inputs), latent_dim)
            return outcome.statistics.images

    return encode


def start_engine(bench: Bench) -> Executor:
    """Return the workers of the engine, not yet entered."""
    how = ExecutorOptions(device="cpu", workers=bench.workers)
    return open_executor(open_bundle(bench.model), how=how)


def command(bench: Bench, *arguments: str) -> Contender:
    """Return the whole command, from its start to its end."""
    line = [sys.executable, "-m", "vsc_serve", "encode", str(bench.folder), "--out", str(bench.out)]
    line += ["--model", str(bench.model), "--force", "--device", "cpu", *arguments]

    def encode() -> int:
        subprocess.run(line, check=True, capture_output=True)
        return len(bench.paths())

    return encode


class Part(NamedTuple):
    """Images a second of one processor."""

    decode: float
    """From bytes in memory."""
    model: float
    """onnxruntime, batches of 256, one thread, with compaction."""
    read: float
    """Opening and reading the files, as the engine does."""

    @property
    def limit(self) -> float:
        """Decode and model one after the other, and nothing else."""
        return 1 / (1 / self.decode + 1 / self.model)

    @property
    def limit_with_reading(self) -> float:
        """The same with the files read."""
        return 1 / (1 / self.limit + 1 / self.read)


def measure_parts(job: tuple[list[str], Path]) -> Part:
    """Measure the parts in this process."""
    paths, model = job
    encoder = Encoder.open(model, device="cpu", threads=1)
    spec = encoder.manifest.pixel_spec
    assert spec is not None
    began = time.perf_counter()
    contents = [read_file(path) for path in paths]
    read = time.perf_counter()
    pixels = np.stack([read_pixels(content, spec) for content in contents])
    decoded = time.perf_counter()
    encoder.encode_rows(pixels, PLAIN)
    encoded = time.perf_counter()
    count = len(paths)
    return Part(count / (decoded - read), count / (encoded - decoded), count / (read - began))


def limits(bench: Bench, processes: Processes, count: int) -> tuple[float, float]:
    """Return the limit from the parts, without and with reading, all processors at once."""
    paths = [str(path) for path in bench.paths()[:count]]
    found = processes.map(measure_parts, [(paths, bench.model)] * bench.workers, chunksize=1)
    return sum(part.limit for part in found), sum(part.limit_with_reading for part in found)


def start_processes(workers: int) -> Processes:
    """Return fresh processes for `limits`."""
    return multiprocessing.get_context("spawn").Pool(workers)


def _session(model: Path, threads: int) -> Callable[[NDArray[np.uint8]], NDArray[np.float32]]:
    session = open_session(model / ENCODER, device="cpu", threads=threads)
    limit = np.array(threshold_logit(0.5))

    def run(pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        return session.run(["code"], {"image": pixels, "tau_logit": limit})[0]

    return run
