"""Write files and folders whole or not at all.

What is being written lies under a temporary name beside its target and is renamed at the end, so a
killed run, a full disk or an error never leaves half a file under the name a reader opens.
`outputs` says what may be replaced.
"""

import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from hashlib import blake2b
from pathlib import Path
from typing import BinaryIO, Final

from vsc_serve.errors import InputError, UsageError
from vsc_serve.outputs import TEMPORARY, FolderKind, remove_folder

_NAME_BYTES: Final = 200
"""Bytes of a name that are kept in a name made from it; file systems take 255 in all."""


@contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """Open a new file for writing; it appears under `path` when the block ends without an error.

    A plain file that is there is replaced; a link is followed to what it leads to.

    Raises:
        InputError: The file cannot be written (no such folder, no permission, disk full), or what
            is there is no plain file.
    """
    target = Path(os.path.realpath(path))
    temporary = _temporary_beside(target)
    try:
        _require_plain(path, target)
        target.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(target)
    except OSError as error:
        raise _cannot_write(path, error) from error
    finally:
        with suppress(OSError):
            temporary.unlink()


@contextmanager
def atomic_folder(path: Path, kind: FolderKind) -> Iterator[Path]:
    """Give an empty folder to fill; it appears under `path` when the block ends without an error.

    A folder of the same kind that is there is replaced; see `outputs.check_output`, which says so
    before the work.

    Raises:
        UsageError: What is there is no folder of this kind.
        InputError: The folder cannot be written.
    """
    target = Path(os.path.realpath(path))
    temporary = _temporary_beside(target)
    try:
        temporary.mkdir(parents=True)
        yield temporary
        replace_folder(temporary, target, kind)
    except OSError as error:
        raise _cannot_write(path, error) from error
    finally:
        with suppress(OSError):
            remove_folder(temporary, TEMPORARY)


def replace_folder(new: Path, path: Path, kind: FolderKind) -> None:
    """Rename `new` to `path`. A full folder cannot be renamed over, so the old one steps aside.

    Args:
        new: The finished folder, on the same file system.
        path: Its name; a folder of this kind that has it is removed afterwards.
        kind: What both are.

    Raises:
        UsageError: What is there is no folder of this kind.
        OSError: One of them cannot be renamed; the old one is then where it was.
    """
    if not os.path.lexists(path):
        new.rename(path)
        return
    if reason := kind.why_not_ours(path):
        raise UsageError(f"{path}: {reason}; it was not replaced.")
    old = set_aside(path)
    try:
        new.rename(path)
    except OSError:
        old.rename(path)
        raise
    with suppress(OSError):
        remove_folder(old, TEMPORARY)


def set_aside(path: Path) -> Path:
    """Rename a folder so that another may take its name; returns the name it has then."""
    aside = name_beside(path, ".", f".{secrets.token_hex(6)}.old")
    path.rename(aside)
    return aside


def name_beside(path: Path, prefix: str = "", suffix: str = "") -> Path:
    """Return a name in the same folder made of another, no longer than a file system takes."""
    name = path.name
    if len(os.fsencode(name)) > _NAME_BYTES:
        digest = blake2b(os.fsencode(name), digest_size=6).hexdigest()
        name = f"{os.fsdecode(os.fsencode(name)[: _NAME_BYTES // 2])}-{digest}"
    return path.with_name(f"{prefix}{name}{suffix}")


def _temporary_beside(path: Path) -> Path:
    """Return a name in the same folder that nothing else uses.

    Made here and not by `tempfile`, whose files are private to the user: a plain `open` gives the
    permissions any other new file gets.
    """
    if not path.name:
        raise UsageError(f"{path}: no name for an output. Choose another `out`.")
    return name_beside(path, ".", f".{secrets.token_hex(6)}.tmp")


def _require_plain(path: Path, target: Path) -> None:
    with suppress(FileNotFoundError):
        mode = target.stat().st_mode
        if stat.S_ISDIR(mode):
            raise InputError(f"{path}: cannot be written (Is a directory).")
        if not stat.S_ISREG(mode):
            raise InputError(f"{path}: cannot be written (a device or a pipe, not a plain file).")


def _cannot_write(path: Path, error: OSError) -> InputError:
    return InputError(f"{path}: cannot be written ({error.strerror or error}).")
