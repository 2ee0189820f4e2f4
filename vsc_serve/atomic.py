"""Write files and folders whole or not at all.

What is being written lies under a temporary name beside its target and is renamed at the end, so a
killed run, a full disk or an error never leaves half a file under the name a reader opens.
`outputs` says what may be replaced.
"""

import ctypes
import errno
import glob
import os
import secrets
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from hashlib import blake2b
from pathlib import Path
from typing import BinaryIO, Final

from vsc_serve.errors import InputError, UsageError
from vsc_serve.outputs import TEMPORARY, FolderKind, may_remove, remove_folder

_NAME_BYTES: Final = 200
"""Bytes of a name that are kept in a name made from it; file systems take 255 in all."""

_TOKEN_DIGITS: Final = 12

_HERE: Final = -100
"""Linux's AT_FDCWD: names are relative to the current folder."""
_RENAME_EXCHANGE: Final = 2


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
    """Rename `new` to `path`, in one step where the system can exchange two names.

    A full folder cannot be renamed over: elsewhere the old one steps aside first.

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
    staged = _aside(path, "tmp")  # after an exchange the old folder has this name
    new.rename(staged)
    try:
        old = staged if _exchange(staged, path) else _replace_in_two_steps(staged, path)
    except OSError:
        staged.rename(new)
        raise
    with suppress(OSError):
        remove_folder(old, TEMPORARY)


def _exchange(one: Path, other: Path) -> bool:
    """Exchange the names of two folders in one step; tell whether the system can do so."""
    if sys.platform != "linux":
        return False
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        return False
    names = os.fsencode(one), os.fsencode(other)
    if rename(_HERE, names[0], _HERE, names[1], _RENAME_EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP):
        return False
    raise OSError(number, os.strerror(number), str(other))


def _replace_in_two_steps(new: Path, path: Path) -> Path:
    """Rename `new` to `path`; return the name that the old folder has then."""
    old = _aside(path, "old")
    path.rename(old)
    try:
        new.rename(path)
    except OSError:
        old.rename(path)
        raise
    return old


def remove_at_once(folder: Path, kind: FolderKind) -> None:
    """Remove a folder that this tool wrote; killed meanwhile, it leaves none under that name.

    Raises:
        UsageError: It is not of this kind, or holds something that vsc did not write.
        OSError: It cannot be removed.
    """
    if may_remove(folder, kind):
        aside = _aside(folder, "tmp")
        folder.rename(aside)
        remove_folder(aside, TEMPORARY)


def left_behind(path: Path, extension: str) -> list[Path]:
    """Return what interrupted writes of a file or folder have left beside it.

    Args:
        path: The file or folder, without links. Nobody may be writing it: hold its lock.
        extension: `tmp` for what was not finished, or was replaced; `old` for what was set aside.
    """
    start, digits = name_beside(path, ".", ".").name, "[0-9a-f]" * _TOKEN_DIGITS
    return sorted(path.parent.glob(f"{glob.escape(start)}{digits}.{extension}"))


def _aside(path: Path, extension: str) -> Path:
    return name_beside(path, ".", f".{secrets.token_hex(_TOKEN_DIGITS // 2)}.{extension}")


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
    return _aside(path, "tmp")


def _require_plain(path: Path, target: Path) -> None:
    with suppress(FileNotFoundError):
        mode = target.stat().st_mode
        if stat.S_ISDIR(mode):
            raise InputError(f"{path}: cannot be written (Is a directory).")
        if not stat.S_ISREG(mode):
            raise InputError(f"{path}: cannot be written (a device or a pipe, not a plain file).")


def _cannot_write(path: Path, error: OSError) -> InputError:
    return InputError(f"{path}: cannot be written ({error.strerror or error}).")
