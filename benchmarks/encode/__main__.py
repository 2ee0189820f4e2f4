"""Images per second of `vsc encode`, beside other ways and beside the limit of its parts.

    python -m benchmarks.encode                  # all sets, five rounds: about twenty minutes
    python -m benchmarks.encode --scale 0.1      # a tenth of the images
    python -m benchmarks.encode --memory 10000 100000 1000000
    python -m benchmarks.encode --start

The contenders take turns, so that a busy moment of the machine hits all of them; figures are
medians over the rounds, and shares are medians of the shares in each round.
"""

import argparse
import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median

import onnxruntime

from benchmarks.encode import contenders, memory
from benchmarks.encode.images import SETS, ImageSet, make_folder
from benchmarks.encode.models import make_bundle
from vsc_serve.cpus import usable_cpus

FLAGS = ("avx2", "avx512f", "avx512_vnni")


def measure(images: ImageSet, work: Path, count: int, rounds: int, *, has_torch: bool) -> None:
    """Print the table of one set."""
    folder, model = work / "images" / images.name, work / images.model
    make_folder(folder, images, count)
    bench = contenders.Bench(folder, model, work / "codes.npz", usable_cpus())
    size = sum(path.stat().st_size for path in bench.paths()[:200]) / min(count, 200) / 1024
    print(f"\n{images.name}: {count:,} files of {size:.1f} KiB\n")
    rates: dict[str, list[float]] = {}
    with (
        contenders.start_processes(bench.workers) as parts,
        contenders.start_engine(bench) as pool,
    ):
        pool.provenance()
        turns = {"naive loop": contenders.naive(bench)}
        if has_torch:
            turns["torch DataLoader + onnxruntime"] = contenders.data_loader(bench)
            turns["reader, mapper, writer"] = contenders.reader_mapper_writer(bench)
        turns["vsc, engine"] = contenders.engine(bench, pool)
        turns["vsc, whole command"] = contenders.command(bench)
        contenders.engine(bench, pool)()  # the page cache and every worker are warm after this
        for _ in range(rounds):
            for name, encode in turns.items():
                rates.setdefault(name, []).append(_rate(encode))
            limit, with_reading = contenders.limits(bench, parts, min(count, 2000))
            rates.setdefault("limit: decode, model", []).append(limit)
            rates.setdefault("limit: read, decode, model", []).append(with_reading)
    _print_rates(rates)


def _print_rates(rates: dict[str, list[float]]) -> None:
    print("| | images/s | lowest to highest | of decode, model | and reading | of the naive loop |")
    print("|---|---|---|---|---|---|")
    for name, found in rates.items():
        share = _ratio(found, rates["limit: decode, model"])
        with_reading = _ratio(found, rates["limit: read, decode, model"])
        times = _ratio(found, rates["naive loop"])
        spread = f"{min(found):,.0f} to {max(found):,.0f}"
        print(
            f"| {name} | {median(found):,.0f} | {spread} | {share:.0%} | {with_reading:.0%} |"
            f" {times:.1f}x |"
        )


def _ratio(above: Sequence[float], below: Sequence[float]) -> float:
    return median(one / other for one, other in zip(above, below, strict=True))


def _rate(encode: contenders.Contender) -> float:
    began = time.perf_counter()
    count = encode()
    return count / (time.perf_counter() - began)


def measure_memory(work: Path, counts: Sequence[int]) -> None:
    """Print peak memory over the number of images."""
    print("\n| images | peak of all processes, MiB | of the parent | seconds |")
    print("|---|---|---|---|")
    for count in counts:
        folder = work / "many" / str(count)
        make_folder(folder, SETS[0], count)
        out = work / "codes.npz"
        peak, parent, seconds = memory.peak_of_command(folder, work / "mlp", out)
        print(f"| {count:,} | {peak:,.0f} | {parent:,.0f} | {seconds:.1f} |", flush=True)


def measure_start(work: Path, rounds: int) -> None:
    """Print the seconds from nothing to the codes of one image."""
    print("\n| first code from a cold start | seconds |")
    print("|---|---|")
    for images in (SETS[0], SETS[3]):
        folder = work / "one" / images.name
        make_folder(folder, images, 1)
        bench = contenders.Bench(folder, work / images.model, work / "codes.npz", 1)
        for name, arguments in (("processes", ()), ("threads", ("--workers", "0"))):
            encode = contenders.command(bench, *arguments)
            seconds = [1 / _rate(encode) for _ in range(rounds)]
            print(f"| {images.name}, {name} | {median(seconds):.2f} |")


def machine() -> str:
    """Return a line on the machine."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    facts = dict(
        [part.strip() for part in line.partition(":")[::2]] for line in lines if ":" in line
    )
    flags = [flag for flag in FLAGS if flag in facts.get("flags", "").split()]
    load = os.getloadavg()[0]
    return (
        f"{usable_cpus()} processors, {facts.get('model name', 'unknown')} ({', '.join(flags)}),"
        f" onnxruntime {onnxruntime.__version__}, load {load:.1f}"
    )


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description="Time `vsc encode`.")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each (default 5)")
    parser.add_argument("--scale", type=float, default=1.0, help="share of the images (default 1)")
    parser.add_argument("--sets", type=int, nargs="+", default=list(range(len(SETS))))
    parser.add_argument("--memory", type=int, nargs="+", help="image counts to take memory at")
    parser.add_argument("--start", action="store_true", help="time the first code")
    parser.add_argument("--without-torch", action="store_true", help="leave out what needs torch")
    parser.add_argument("--work", type=Path, help="folder to work in (default: a temporary one)")
    given = parser.parse_args()
    print(machine())
    with tempfile.TemporaryDirectory(dir=given.work) as name:
        work = Path(name)
        for kind in ("mlp", "conv"):
            make_bundle(work / kind, kind)
        if given.memory:
            measure_memory(work, given.memory)
        elif given.start:
            measure_start(work, given.rounds)
        else:
            for number in given.sets:
                count = max(int(SETS[number].count * given.scale), 16)
                has_torch = not given.without_torch
                measure(SETS[number], work, count, given.rounds, has_torch=has_torch)


if __name__ == "__main__":
    main()
