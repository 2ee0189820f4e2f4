"""Choose and open what reads and encodes."""

import logging
import os
from dataclasses import dataclass
from typing import Final

from vsc_serve.bundle import Bundle
from vsc_serve.cpus import usable_cpus
from vsc_serve.cuda import cuda_count
from vsc_serve.encoder import Encoder
from vsc_serve.errors import BundleError, DeviceError, UsageError
from vsc_serve.executors.gpu import GpuExecutor, open_encoders, read_spec
from vsc_serve.executors.processes import ProcessExecutor
from vsc_serve.executors.protocol import Executor
from vsc_serve.executors.read import EncodeSpec, EncodeWorker, ReadOptions
from vsc_serve.executors.threads import ThreadExecutor
from vsc_serve.linear_map import require_linear_map
from vsc_serve.options import PLAIN, EncodeOptions
from vsc_serve.session import Device, cuda_is_there

logger = logging.getLogger(__name__)

_FEEDING: Final = 2
"""Processors that are left to this process where it feeds a GPU: faster by a tenth on 16."""


@dataclass(frozen=True, kw_only=True)
class ExecutorOptions:
    """Where and by how many workers images are read and encoded."""

    device: Device = "auto"
    """Where the model runs."""
    workers: int | None = None
    """Processes; by default one for each processor that this process may use, two fewer where it
    feeds a GPU; 0 is threads."""
    read: ReadOptions = ReadOptions()  # noqa: RUF009  # frozen

    def __post_init__(self) -> None:
        if self.workers is not None and self.workers < 0:
            raise UsageError(f"`workers` must be 0 or more, not {self.workers}")


def open_executor(
    bundle: Bundle,
    options: EncodeOptions = PLAIN,
    how: ExecutorOptions = ExecutorOptions(),  # frozen
) -> Executor:
    """Choose what reads and encodes; it starts when it is entered.

    On the CPU every worker is a process that decodes and runs a model of one thread: measured
    fastest for small images, as fast as threads for large ones, and a decoder that crashes takes
    only its worker along. With CUDA the processes only read, and this one runs a model a GPU.
    Threads of this process start sooner.

    Args:
        bundle: The model.
        options: How to encode.
        how: Where, and by how many.

    Raises:
        DeviceError: CUDA was asked for and cannot be used.
        BundleError: Refitted values are asked for, and the bundle has no linear map.
    """
    if options.refit:
        require_linear_map(bundle)
    count = usable_cpus() if how.workers is None else how.workers
    if not count or os.name != "posix":
        threads = 0 if how.device == "cuda" else 1
        encoder = Encoder.open(bundle.path, device=how.device, threads=threads)
        return ThreadExecutor(EncodeWorker(encoder, options, how.read), count or usable_cpus())
    if how.device == "cuda" or (how.device == "auto" and cuda_is_there()):
        try:
            readers = max(1, count - _FEEDING) if how.workers is None else count
            return _open_on_cuda(bundle, options, readers, how.read)
        except (DeviceError, BundleError) as error:  # none, or one that fails the probes
            if how.device == "cuda":
                raise
            logger.warning("using the CPU: %s", error)
    spec = EncodeSpec(
        model=bundle.path,
        options=options,
        latent_dim=bundle.manifest.latent_dim,
        read=how.read,
    )
    return ProcessExecutor(spec, count)


def _open_on_cuda(
    bundle: Bundle, options: EncodeOptions, workers: int, read: ReadOptions
) -> Executor:
    """Spawn processes that read for a model on every GPU."""
    device_count = max(cuda_count(), 1)  # without any, opening the model says what is missing
    encoders, provenance = open_encoders(bundle, options, "cuda", device_count)
    spec = read_spec(bundle.manifest, sum(map(len, encoders)), read)
    return GpuExecutor(spec, ProcessExecutor(spec, workers), encoders, provenance)
