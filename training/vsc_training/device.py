"""Where to compute, and which matrix products may be in bfloat16."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Literal

import torch

from vsc_serve.errors import DeviceError
from vsc_training.config import Recipe

DeviceChoice = Literal["auto", "cpu", "cuda"]


def choose_device(choice: DeviceChoice) -> torch.device:
    """Return the device. Raises DeviceError when CUDA was asked for and is not there."""
    is_there = torch.cuda.is_available()
    if choice == "cuda" and not is_there:
        raise DeviceError(
            f"`device=cuda`: torch {torch.__version__} sees no CUDA device."
            " Check nvidia-smi and that torch is a CUDA build, or use `device=cpu`."
        )
    return torch.device("cuda" if is_there and choice != "cpu" else "cpu")


def uses_bfloat16(recipe: Recipe, device: torch.device) -> bool:
    """Tell whether matrix products run in bfloat16: asked for, or `auto` where they are fast."""
    if recipe.precision != "auto":
        return recipe.precision == "bfloat16"
    if device.type == "cuda":
        # Older GPUs compute bfloat16 by way of float32, which is slower than float32 itself.
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return bool({"avx512_bf16", "amx_bf16"} & _processor_flags())


def _processor_flags() -> set[str]:
    """Return the feature flags of the processor, where the system lists them."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return set()
    return set(next((line.split() for line in lines if line.startswith("flags")), []))


def autocast(device: torch.device, *, bf16: bool) -> AbstractContextManager[None]:
    """Return a context in which matrix products run in bfloat16 when `bf16` says so."""
    return torch.autocast(device.type, torch.bfloat16, enabled=bf16)


@contextmanager
def repeatable_kernels() -> Iterator[None]:
    """Let cuDNN take kernels that give the same result every time, and none chosen by a stopwatch.

    Its fastest gradients of convolutions add in an order that differs from run to run, and
    `--resume` promises the weights of a run that was not interrupted.
    """
    cudnn = torch.backends.cudnn
    before = cudnn.deterministic, cudnn.benchmark
    cudnn.deterministic, cudnn.benchmark = True, False
    try:
        yield
    finally:
        cudnn.deterministic, cudnn.benchmark = before
