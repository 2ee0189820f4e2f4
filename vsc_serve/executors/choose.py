"""Choose and start what reads and encodes."""

import logging
import os
from pathlib import Path

from vsc_serve.bundle import Manifest
from vsc_serve.cpus import usable_cpus
from vsc_serve.encoder import Encoder
from vsc_serve.errors import DeviceError, UsageError
from vsc_serve.executors.gpu import (
    DevicePool,
    compacts_on_device,
    open_encoders,
    read_setup,
)
from vsc_serve.executors.processes import ProcessPool
from vsc_serve.executors.read import Setup, Work
from vsc_serve.executors.task import Pool
from vsc_serve.executors.threads import ThreadPool
from vsc_serve.options import PLAIN, EncodeOptions
from vsc_serve.session import Device, cuda_count, cuda_is_there

logger = logging.getLogger(__name__)


def open_pool(
    model: Path,
    manifest: Manifest,
    options: EncodeOptions = PLAIN,
    *,
    device: Device = "auto",
    workers: int | None = None,
    has_digests: bool = False,
    known: Path | None = None,
) -> Pool:
    """Choose what reads and encodes; it starts when it is entered.

    On the CPU every worker is a process that decodes and runs a model of one thread: measured
    fastest for small images, as fast as threads for large ones, and a decoder that crashes takes
    only its worker along. With CUDA the processes only read, and this one runs a model a GPU.
    `workers=0` is threads of this process, which start sooner.

    Args:
        model: The bundle.
        manifest: What its manifest says.
        options: How to encode.
        device: Where the model runs.
        workers: Processes; by default one for each processor that this process may use.
        has_digests: Whether rows get the sha256 of what they were made from.
        known: Where the digests of rows that need not be made again will be.

    Raises:
        UsageError: `workers` is negative.
        DeviceError: CUDA was asked for and cannot be used.
    """
    if workers is not None and workers < 0:
        raise UsageError(f"--workers must be 0 or more, not {workers}")
    count = usable_cpus() if workers is None else workers
    if not count or os.name != "posix":
        encoder = Encoder.open(model, device=device, threads=0 if device == "cuda" else 1)
        work = Work(encoder, options, has_digests=has_digests, known=known)
        return ThreadPool(work, count or usable_cpus())
    if device == "cuda" or (device == "auto" and cuda_is_there()):
        try:
            return _open_on_cuda(model, manifest, options, count, has_digests, known)
        except DeviceError as error:
            if device == "cuda":
                raise
            logger.warning("using the CPU: %s", error)
    setup = Setup(
        model=model,
        options=options,
        latent_dim=manifest.latent_dim,
        has_digests=has_digests,
        known=known,
    )
    return ProcessPool(setup, count)


def _open_on_cuda(
    model: Path,
    manifest: Manifest,
    options: EncodeOptions,
    workers: int,
    has_digests: bool,  # noqa: FBT001  # handed through
    known: Path | None,
) -> Pool:
    """Start processes that read for a model on every GPU."""
    device_count = max(cuda_count(), 1)  # without any, opening the model says what is missing
    encoders, provenance = open_encoders(model, options, "cuda", device_count)
    setup = read_setup(manifest, device_count, has_digests=has_digests, known=known)
    counts_near = not compacts_on_device(manifest, options)
    readers = ProcessPool(setup, workers)
    return DevicePool(setup, readers, encoders, provenance, counts_near=counts_near)
