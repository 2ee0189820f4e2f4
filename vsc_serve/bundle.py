"""The model bundle: a folder with ONNX files, their manifest, and what proves that they are whole.

`open_bundle` reads the manifest and checks the digest of every file, so that nothing later has to
ask whether a file is the right one. A bundle may be a stranger's: only plain files inside its
folder are opened.
"""

import hashlib
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any, Final

from vsc_serve.errors import BundleError
from vsc_serve.external_data import external_files
from vsc_serve.manifest import (
    DECODER,
    EMBEDDING,
    ENCODER,
    ENCODER_CSR,
    ENCODER_TOPK,
    FORMAT,
    LINEAR_MAP,
    MANIFEST,
    STATISTICS,
    GraphSignature,
    Manifest,
    Modality,
    Precision,
    Probe,
    image_spec,
    url_name,
)
from vsc_serve.outputs import FolderKind
from vsc_serve.schema import shortened
from vsc_serve.untrusted import inside, open_plain, read_plain

__all__ = [
    "BUNDLE_FOLDER",
    "DECODER",
    "EMBEDDING",
    "ENCODER",
    "ENCODER_CSR",
    "ENCODER_TOPK",
    "FORMAT",
    "LINEAR_MAP",
    "MANIFEST",
    "STATISTICS",
    "Bundle",
    "GraphSignature",
    "Manifest",
    "Modality",
    "Precision",
    "Probe",
    "image_spec",
    "open_bundle",
    "sha256",
    "url_name",
]

# What no sensible bundle reaches; one that is larger asks for memory or time.
_MAX_MANIFEST_BYTES: Final = 2**23
_MAX_BUNDLE_BYTES: Final = 2**36


def _bundle_files(stored: dict[str, Any]) -> Sequence[str] | None:
    """Return the files that a manifest lists; None where it is no bundle's."""
    files = stored.get("files")
    return list(files) if isinstance(files, dict) and ENCODER in files else None


BUNDLE_FOLDER: Final = FolderKind(
    name="a model bundle", markers=(MANIFEST,), contents=_bundle_files
)


@dataclass(frozen=True)
class Bundle:
    """A bundle whose files have been checked."""

    path: Path
    manifest: Manifest


def open_bundle(path: Path) -> Bundle:
    """Open a bundle and check that every file is there and unchanged.

    Only plain files inside the folder are opened, and graphs that take weights from no others.

    Args:
        path: Folder that `vsc export` wrote.

    Returns:
        The bundle.

    Raises:
        BundleError: It is missing, of another format, or a file in it is missing or changed.
    """
    manifest_path = path / MANIFEST
    try:
        text = read_plain(inside(path, MANIFEST), _MAX_MANIFEST_BYTES).decode("utf-8")
    except (FileNotFoundError, NotADirectoryError):
        raise BundleError(
            f"{path}: no model bundle there (no {MANIFEST})."
            f" Make one with `vsc export RUN --out {path}`."
        ) from None
    except (OSError, ValueError) as error:
        raise BundleError(f"{manifest_path}: unreadable ({error}). Export again.") from error
    manifest = Manifest.from_json(text, manifest_path)
    _check_files(path, manifest.files)
    _check_graphs(path, manifest.files.keys())
    return Bundle(path, manifest)


def sha256(path: Path) -> str:
    """Return the hexadecimal sha256 digest of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _check_files(folder: Path, digests: dict[str, str]) -> None:
    """Check the files that a manifest lists; their sizes first, so that nothing runs for ever."""
    size = 0
    for name in digests:
        with _open_listed(folder, name) as file:
            size += os.fstat(file.fileno()).st_size
    if size > _MAX_BUNDLE_BYTES:
        raise BundleError(f"{folder}: {size:,} bytes, more than {_MAX_BUNDLE_BYTES:,}.")
    for name, expected in digests.items():
        with _open_listed(folder, name) as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != expected:
            raise BundleError(
                f"{folder / name}: changed since it was exported (sha256 {found[:12]}, expected"
                f" {expected[:12]}). Copy the bundle again, or export again."
            )


def _open_listed(folder: Path, name: str) -> BufferedReader:
    try:
        return open_plain(inside(folder, name))
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise BundleError(
            f"{folder}/{name[:200]}: listed in the manifest but unreadable ({reason})."
            " Export again."
        ) from error


def _check_graphs(folder: Path, names: Iterable[str]) -> None:
    """Raise BundleError for a graph that takes weights from a file without a digest."""
    for graph in (name for name in names if name.endswith(".onnx")):
        try:
            unlisted = external_files(folder / graph).difference(names)
        except (OSError, ValueError) as error:
            raise BundleError(f"{folder / graph}: unreadable ({error}). Export again.") from error
        if unlisted:
            raise BundleError(
                f"{folder / graph}: takes weights from {shortened(min(unlisted))}, which is not"
                " listed in the manifest. Export again."
            )
