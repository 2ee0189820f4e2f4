"""Read the tensors of a file that torch wrote before its version 1.6, without torch.

Such a file is a sequence of pickles and the bytes of the storages. The unpickler here knows
tensors, their storages and an ordered dictionary, and refuses every other name, so that a file can
run nothing.
"""

import pickle  # noqa: TID251  # the format is one; find_class below looks nothing up
from collections import OrderedDict
from typing import Any, BinaryIO, Final, NamedTuple, NoReturn

import numpy as np
from numpy.typing import NDArray

_MAGIC: Final = 0x1950A86A20F9469CFC6C
_PROTOCOL: Final = 1001
_STORAGES: Final[dict[str, np.dtype[Any]]] = {
    "FloatStorage": np.dtype("<f4"),
    "LongStorage": np.dtype("<i8"),
}


class _Tensor(NamedTuple):
    """A tensor as it is pickled: a view of a storage."""

    storage: str
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    """Steps along each axis, in values: converted weights keep the order of axes they had."""


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: BinaryIO) -> None:
        super().__init__(file)
        self.types: dict[str, np.dtype[Any]] = {}
        self.sizes: dict[str, int] = {}

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _rebuild
        if module == "torch" and name in _STORAGES:
            return name
        raise ValueError(f"names {module}.{name}, which is no tensor")

    def persistent_load(self, saved: Any) -> str:
        kind, storage, key, _device, size, *_ = saved
        if kind != "storage":
            raise ValueError(f"holds a {kind!r}, which is no tensor")
        self.types[key], self.sizes[key] = _STORAGES[storage], size
        return str(key)


class _NumbersOnly(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> NoReturn:
        raise ValueError(f"names {module}.{name} where numbers stand")


def read_tensors(file: BinaryIO) -> dict[str, NDArray[Any]]:
    """Return the tensors of a file by name, each with its axes in the usual order.

    Args:
        file: What `torch.save` wrote of a dictionary of tensors.

    Raises:
        ValueError: It is no such file, or cut short.
    """
    try:
        return _read(file)
    except (pickle.UnpicklingError, EOFError, KeyError, TypeError, IndexError) as error:
        raise ValueError(f"no file of tensors ({error})") from error


def _read(file: BinaryIO) -> dict[str, NDArray[Any]]:
    if [_NumbersOnly(file).load() for _ in range(2)] != [_MAGIC, _PROTOCOL]:
        raise ValueError("no file of tensors (written by a newer torch, or by something else)")
    _NumbersOnly(file).load()  # sizes of the types of the machine that wrote it
    unpickler = _Unpickler(file)
    tensors = unpickler.load()
    storages = {key: _storage(file, key, unpickler) for key in _NumbersOnly(file).load()}
    return {name: _view(storages[tensor.storage], tensor) for name, tensor in tensors.items()}


def _storage(file: BinaryIO, key: str, unpickler: _Unpickler) -> NDArray[Any]:
    size, dtype = int.from_bytes(file.read(8), "little"), unpickler.types[key]
    if size != unpickler.sizes[key]:
        raise ValueError(f"a storage of {size} values, {unpickler.sizes[key]} are announced")
    content = file.read(size * dtype.itemsize)
    if len(content) < size * dtype.itemsize:
        raise ValueError("cut short")
    return np.frombuffer(content, dtype)


def _view(storage: NDArray[Any], tensor: _Tensor) -> NDArray[Any]:
    """Return the values that a tensor sees of its storage, in memory of their own."""
    steps = zip(tensor.shape, tensor.strides, strict=True)
    last = tensor.offset + sum((size - 1) * step for size, step in steps)
    if min((tensor.offset, *tensor.shape, *tensor.strides)) < 0 or last >= len(storage):
        raise ValueError("a tensor reaches beyond its storage")
    strides = [step * storage.itemsize for step in tensor.strides]
    view = np.lib.stride_tricks.as_strided(storage[tensor.offset :], tensor.shape, strides)
    return np.array(view, order="C")


def _rebuild(
    storage: str, offset: int, shape: tuple[int, ...], strides: tuple[int, ...], *_: object
) -> _Tensor:
    return _Tensor(storage, offset, tuple(shape), tuple(strides))
