"""CUDA through its own libraries: how many GPUs there are, pinned memory, provider options."""

import ctypes
import os
import weakref
from typing import Any, Final

import numpy as np
from numpy.typing import DTypeLike, NDArray

_RUNTIMES: Final = ("libcudart.so.13", "libcudart.so.12")
_PORTABLE: Final = 1
"""Flag of cudaHostRegister: the memory is pinned for all GPUs, not for the current one."""
_TF32_OVERRIDE: Final = "NVIDIA_TF32_OVERRIDE"


def has_driver() -> bool:
    """Tell whether an NVIDIA driver is on this machine."""
    return _driver() is not None


def cuda_count() -> int:
    """Return how many GPUs the driver shows to this process; 0 without a driver."""
    driver, count = _driver(), ctypes.c_int(0)
    if driver is None or driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)):
        return 0
    return count.value


def provider_options(device_id: int, *, allows_tf32: bool) -> dict[str, str]:
    """Return options of onnxruntime's CUDA provider under which codes can be reproduced.

    TF32 is on by default there. It keeps 10 bits of a product's factors: values move by 1e-3, which
    the probes of a bundle refuse. The default search for convolution kernels takes times, so that
    two processes may choose different kernels, and each new shape is searched again.

    Args:
        device_id: Which GPU.
        allows_tf32: Whether products may round their factors to TF32.
    """
    return {
        "device_id": str(device_id),
        "use_tf32": str(int(allows_tf32)),
        "cudnn_conv_algo_search": "HEURISTIC",
        "arena_extend_strategy": "kSameAsRequested",
    }


def forbid_tf32() -> None:
    """Keep cuDNN from TF32 too, which `use_tf32` may not reach; to be called before CUDA loads.

    Whoever has set NVIDIA_TF32_OVERRIDE has decided.
    """
    os.environ.setdefault(_TF32_OVERRIDE, "0")


class PinnedArray:
    """An array that cannot be paged out, so that a GPU fetches it itself, twice as fast.

    Without the CUDA runtime it is an ordinary array. It is unpinned when nobody holds it.

    Args:
        shape: Shape of the array.
        dtype: Its type.
        is_pinned: Whether to pin it.
    """

    def __init__(self, shape: tuple[int, ...], dtype: DTypeLike, *, is_pinned: bool = True) -> None:
        self.array: NDArray[Any] = np.zeros(shape, dtype)
        runtime = _runtime() if is_pinned else None
        self.is_pinned = runtime is not None and _register(runtime, self.array)
        if self.is_pinned:
            # The array is an argument, so that its memory is there until it is unpinned.
            weakref.finalize(self, _unregister, runtime, self.array)


def _register(runtime: Any, array: NDArray[Any]) -> bool:
    address = ctypes.c_void_p(array.ctypes.data)
    size = ctypes.c_size_t(array.nbytes)
    return bool(runtime.cudaHostRegister(address, size, ctypes.c_uint(_PORTABLE)) == 0)


def _unregister(runtime: Any, array: NDArray[Any]) -> None:
    runtime.cudaHostUnregister(ctypes.c_void_p(array.ctypes.data))


def _driver() -> Any:
    return _load("nvcuda.dll" if os.name == "nt" else "libcuda.so.1")


def _runtime() -> Any:
    return next(filter(None, map(_load, _RUNTIMES)), None)


def _load(name: str) -> Any:
    """Return a library, None where it is not there."""
    try:
        return ctypes.CDLL(name)
    except OSError:
        return None
