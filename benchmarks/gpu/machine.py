"""What the measurements ran on."""

import os
import platform
import shutil
import subprocess
from collections.abc import Collection
from importlib.metadata import PackageNotFoundError, version
from typing import Final, NoReturn

import torch

from vsc_serve.cpus import usable_cpus
from vsc_serve.errors import DeviceError
from vsc_serve.session import cuda_is_there

_PACKAGES: Final = ("vsc-serve", "torch", "onnxruntime", "onnxruntime-gpu", "numpy", "pillow")
_QUERY: Final = "name,driver_version,memory.total,compute_cap"


def require_gpu(parts: Collection[str]) -> None:
    """Raise DeviceError with the reason unless these parts can use a GPU.

    `train` needs torch with CUDA, and every other part the CUDA provider of onnxruntime.
    """
    if "train" in parts and not torch.cuda.is_available():
        _refuse("torch finds no CUDA device")
    if set(parts) - {"train"} and not cuda_is_there():
        _refuse("the CUDA provider of onnxruntime or the NVIDIA driver is missing")


def _refuse(reason: str) -> NoReturn:
    raise DeviceError(
        f"no GPU to measure: {reason}. See docs/gpu.md, or pass --dry for small sizes on the CPU."
    )


def describe_machine() -> dict[str, str]:
    """Return the GPU, driver, processors, versions and settings, by name."""
    found = {
        "gpu": _gpus() or "none",
        "processors": str(usable_cpus()),
        "python": platform.python_version(),
        "NVIDIA_TF32_OVERRIDE": os.environ.get("NVIDIA_TF32_OVERRIDE", "(not set)"),
    }
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _gpus() -> str:
    if shutil.which("nvidia-smi") is None:
        return ""
    command = ["nvidia-smi", f"--query-gpu={_QUERY}", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    return "; ".join(done.stdout.strip().splitlines())
