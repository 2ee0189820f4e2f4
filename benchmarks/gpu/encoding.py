"""Images per second of `vsc encode` on a GPU, and the share of the time that the GPU waits."""

import time
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.encode.images import SETS, make_folder
from benchmarks.encode.models import make_bundle
from benchmarks.gpu.sizes import Sizes
from vsc_serve.bundle import open_bundle
from vsc_serve.executors import ExecutorOptions, open_executor
from vsc_serve.executors.gpu import GpuExecutor
from vsc_serve.pipeline import Job, run_job
from vsc_serve.pipeline.shards import ShardStore
from vsc_serve.sources import find_sources


def run(sizes: Sizes, work: Path) -> dict[str, Any]:
    """Encode every set of images of `benchmarks.encode`."""
    for kind in ("mlp", "conv"):
        make_bundle(work / kind, kind)
    rows = []
    for images in SETS:
        folder = work / images.name
        make_folder(folder, images, max(int(images.count * sizes.encode_scale), 16))
        for device in dict.fromkeys(("cpu", sizes.device)):
            found = _measure(folder, work / images.model, work / "codes.npz", device, sizes)
            rows.append({"images": images.name, "device": device} | found)
    return {"rows": rows}


def _measure(folder: Path, model: Path, out: Path, device: Any, sizes: Sizes) -> dict[str, Any]:
    bundle = open_bundle(model)
    job = Job(inputs=[str(folder)], out=out, model=model)
    rates, waits = [], []
    with open_executor(bundle, how=ExecutorOptions(device=device)) as executor:
        executor.provenance()
        for turn in range(sizes.encode_rounds + 1):
            busy = sum(executor.busy_s) if isinstance(executor, GpuExecutor) else 0.0
            began = time.perf_counter()
            with ShardStore(out).locked():
                sources = find_sources(job.inputs)
                outcome = run_job(job, executor, sources, bundle.manifest.latent_dim)
            seconds = time.perf_counter() - began
            if not turn:
                continue  # the first one warms the workers and the page cache
            rates.append(outcome.statistics.images / seconds)
            if isinstance(executor, GpuExecutor):
                devices = len(executor.busy_s)
                waits.append(1 - (sum(executor.busy_s) - busy) / (devices * seconds))
        return {
            "images/s": median(rates),
            "workers": f"{executor.started} {executor.kind}",
            "GPU waits": f"{median(waits):.0%}" if waits else "-",
        }
