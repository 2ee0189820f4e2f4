"""Look at the machine: what is installed, which engines load, and what to do."""

import platform
import sys
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Final

from vsc_serve import __version__
from vsc_serve.bundle import open_bundle
from vsc_serve.domain import read_reference
from vsc_serve.errors import BundleError, DeviceError
from vsc_serve.models import builtin_model
from vsc_serve.session import cuda_is_there, installed_flavours

_EXTRAS: Final = {
    "train": ("torch", "safetensors", "tensorboard"),
    "export": ("torch", "onnx", "onnxscript"),
    "serve": ("fastapi", "uvicorn", "python-multipart"),
    "heif": ("pillow-heif",),
    "zstd": ("backports.zstd",),
    "parquet": ("pyarrow",),
    "urls": ("fsspec", "s3fs"),
    "h5ad": ("anndata",),
}
"""Packages that each extra brings."""


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at."""

    mark: str
    """`ok`, `-` (not installed, and not needed for everything) or `FAIL`."""
    name: str
    """What was looked at."""
    text: str
    """What was found, and what to do."""


def examine() -> list[Finding]:
    """Look at Python, the engines, CUDA and the extras."""
    base = [
        Finding(
            "ok", "vsc-serve", f"{__version__}, Python {platform.python_version()}, {sys.platform}"
        ),
        _examine_engine(),
        _examine_cuda(),
        _examine_builtin(),
    ]
    return base + [_examine_extra(name, packages) for name, packages in _EXTRAS.items()]


def _examine_engine() -> Finding:
    flavours = installed_flavours()
    if not flavours:
        return Finding("FAIL", "engine", "onnxruntime is missing: pip install 'vsc-serve[cpu]'")
    if len(flavours) > 1:
        return Finding(
            "FAIL",
            "engine",
            "onnxruntime and onnxruntime-gpu overwrite each other:"
            " pip uninstall -y onnxruntime onnxruntime-gpu, then install one again",
        )
    return Finding("ok", "engine", ", ".join(f"{name} {found}" for name, found in flavours.items()))


def _examine_cuda() -> Finding:
    try:
        is_there = cuda_is_there()
    except DeviceError as error:
        return Finding("-", "cuda", f"not looked for: {error}")
    if is_there:
        return Finding("ok", "cuda", "provider and driver are here; `device='cuda'` proves it")
    return Finding(
        "-", "cuda", "none: encoding runs on the CPU. For a GPU: pip install 'vsc-serve[gpu]'"
    )


def _examine_builtin() -> Finding:
    try:
        bundle = open_bundle(builtin_model())
        manifest, reference = bundle.manifest, read_reference(bundle)
    except BundleError as error:
        return Finding("FAIL", "built-in model", f"{error} Install vsc-serve again.")
    own = "" if reference is None else f"; own data: {reference}"
    return Finding("ok", "built-in model", f"{manifest.name}, J={manifest.latent_dim}{own}")


def _examine_extra(name: str, packages: tuple[str, ...]) -> Finding:
    found = {package: _version(package) for package in packages}
    missing = [package for package, installed in found.items() if installed is None]
    if missing:
        return Finding("-", name, f"{', '.join(missing)} missing: pip install 'vsc-serve[{name}]'")
    return Finding("ok", name, ", ".join(f"{package} {found[package]}" for package in packages))


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
