"""Memory of a worker of `vsc encode`: run `python -m benchmarks.worker_memory`.

Worker processes with the built-in model encode made-up images. What each has is read from
`/proc` (Linux): resident is what it sees, private what nobody shares with it, and what the last
worker adds to the machine.
"""

import argparse
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image

from vsc_serve.bundle import open_bundle
from vsc_serve.executors import Executor, ExecutorOptions, open_executor
from vsc_serve.models import builtin_model
from vsc_serve.options import PLAIN
from vsc_serve.pipeline import batches
from vsc_serve.sources import find_sources

_MIB = 2**10


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", type=Path, default=builtin_model())
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--batch-size", type=int, nargs="+", default=[16, 256])
    parser.add_argument("--images", type=int, default=2048)
    given = parser.parse_args()
    print("| workers | batch | resident | private | all, shared once |")
    print("|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _draw(folder, given.images)
        for workers in given.workers:
            for batch_size in given.batch_size:
                _measure(given.model, folder, workers, batch_size)


def _draw(folder: Path, count: int) -> None:
    rng = np.random.default_rng(0)
    for number in range(count):
        pixels = rng.integers(0, 256, (64, 64, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:05}.jpg")


def _measure(model: Path, folder: Path, workers: int, batch_size: int) -> None:
    how = ExecutorOptions(device="cpu", workers=workers)
    with _open(model, how) as executor:
        for _ in batches(executor, find_sources([str(folder)]), batch_size):
            pass
        found = [_memory(process_id) for process_id in _children()]
    resident, private, shared = np.array(found).T / _MIB
    print(
        f"| {len(found):7} | {batch_size:5} | {resident.max():4.0f} MiB | {private.max():3.0f} MiB"
        f" | {shared.sum():12.0f} MiB |"
    )


@contextmanager
def _open(model: Path, how: ExecutorOptions) -> Iterator[Executor]:
    with open_executor(open_bundle(model), PLAIN, how) as executor:
        executor.expect(2**20)  # all workers
        yield executor


def _children() -> list[int]:
    return [
        int(one)
        for one in Path("/proc/self/task").joinpath(str(_own_id()), "children").read_text().split()
    ]


def _own_id() -> int:
    return int(Path("/proc/self").resolve().name)


def _memory(process_id: int) -> tuple[int, int, int]:
    """Return kB of a process: resident, private, and its share of what is shared."""
    lines = Path(f"/proc/{process_id}/smaps_rollup").read_text().splitlines()[1:]
    kilobytes = {line.partition(":")[0]: int(line.split()[1]) for line in lines}
    private = kilobytes["Private_Clean"] + kilobytes["Private_Dirty"]
    return kilobytes["Rss"], private, kilobytes["Pss"]


if __name__ == "__main__":
    if sys.platform != "linux":
        sys.exit("reads /proc: only Linux has it")
    main()
