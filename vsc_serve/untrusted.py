"""Open the files that a manifest names, and no others.

A bundle or a folder of shards may be a stranger's: it is downloaded and opened. Nothing here waits
for a pipe, opens a device or follows a name out of the folder. The functions raise ValueError with
the reason, or OSError; the caller knows which file it is about and what to do.
"""

import os
import stat
from collections.abc import Iterator
from io import BufferedReader
from pathlib import Path, PureWindowsPath
from typing import Final

# Without O_NONBLOCK, opening a pipe waits for a writer that may never come.
_FLAGS: Final = (
    os.O_RDONLY
    | getattr(os, "O_NONBLOCK", 0)
    | getattr(os, "O_NOFOLLOW", 0)
    | getattr(os, "O_NOCTTY", 0)
    | getattr(os, "O_BINARY", 0)
)

_MAX_NAME: Final = 1000
"""Characters of a name in a manifest."""

_HUB_LINKS: Final = "snapshots"
_HUB_FILES: Final = "blobs"
"""Folders of a Hugging Face cache: the files of a snapshot are links to `blobs` beside it."""


def is_folder(path: Path) -> bool:
    """Tell whether a folder is there; of a name that is too long for one, there is none."""
    return os.path.isdir(path)  # noqa: PTH112  # Path.is_dir raises for such a name


def is_plain(path: Path) -> bool:
    """Tell whether a regular file is there."""
    return os.path.isfile(path)  # noqa: PTH113  # Path.is_file raises for a name that is too long


def open_plain(path: Path) -> BufferedReader:
    """Open a file for reading if it is a regular file; nothing else is opened or waited for.

    Raises:
        ValueError: It is a folder, pipe, device or socket, or the name cannot be one.
        OSError: It is not there, or cannot be read.
    """
    real = os.path.realpath(path)
    if not stat.S_ISREG(os.stat(real).st_mode):  # noqa: PTH116  # a device may act when it is opened
        raise ValueError("not a regular file")
    file = os.fdopen(os.open(real, _FLAGS), "rb")
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise ValueError("not a regular file")
    return file


def read_plain(path: Path, max_bytes: int) -> bytes:
    """Read a regular file of at most `max_bytes`. Raises as `open_plain`, and ValueError."""
    with open_plain(path) as file:
        content = file.read(max_bytes + 1)
    if len(content) > max_bytes:
        raise ValueError(f"larger than {max_bytes:,} bytes")
    return content


def inside(folder: Path, name: str) -> Path:
    """Return the path of a file that a manifest names, if it lies in the manifest's folder.

    A link is accepted where it ends inside the folder, or, in a snapshot of a Hugging Face cache,
    in the `blobs` of the same repository.

    Args:
        folder: Folder of the manifest.
        name: Name in the manifest: relative, with `/` between its parts.

    Raises:
        ValueError: The name is none, or leads out of the folder.
    """
    _check_name(name)
    path = folder / name
    real = Path(os.path.realpath(path))
    if not any(real.is_relative_to(root) for root in _roots(folder)):
        raise ValueError("leads out of the folder")
    return path


def _check_name(name: str) -> None:
    parts = name.split("/")
    is_name = len(name) <= _MAX_NAME and "\\" not in name and not PureWindowsPath(name).drive
    if not is_name or not name.isprintable() or not {"", ".", ".."}.isdisjoint(parts):
        raise ValueError("not a relative name of a file")


def _roots(folder: Path) -> Iterator[Path]:
    """Yield where the files of a folder may lie, links resolved."""
    real = Path(os.path.realpath(folder))
    yield real
    for parent in real.parents:
        files = parent.parent / _HUB_FILES
        if parent.name == _HUB_LINKS and not files.is_symlink():
            yield files
