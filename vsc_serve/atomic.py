"""Write files and folders whole or not at all.

What is being written lies under a temporary name beside its target and is renamed at the end, so a
killed run, a full disk or an error never leaves half a file under the name a reader opens.
"""

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from vsc_serve.errors import InputError, UsageError


def refuse_existing(path: Path, *, force: bool) -> None:
    """Raise UsageError when `path` is there already and may not be replaced."""
    if not force and (path.exists() or path.is_symlink()):
        raise UsageError(
            f"{path}: exists already. Choose another --out, or replace it with --force."
        )


@contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """Open a new file for writing; it appears under `path` when the block ends without an error.

    Raises:
        InputError: The file cannot be written (no such folder, no permission, disk full).
    """
    temporary = _name_beside(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise _cannot_write(path, error) from error
    finally:
        with suppress(OSError):
            temporary.unlink()


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Give an empty folder to fill; it appears under `path` when the block ends without an error.

    A folder or file that is there already is replaced; see `refuse_existing`.

    Raises:
        InputError: The folder cannot be written.
    """
    temporary = _name_beside(path)
    try:
        temporary.mkdir(parents=True)
        yield temporary
        _replace_folder(temporary, path)
    except OSError as error:
        raise _cannot_write(path, error) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _replace_folder(new: Path, path: Path) -> None:
    """Rename `new` to `path`. A full folder cannot be renamed over, so the old one steps aside."""
    if path.is_dir() and not path.is_symlink():
        old = new.with_name(new.name + ".old")
        path.rename(old)
        try:
            new.rename(path)
        except OSError:
            old.rename(path)
            raise
        shutil.rmtree(old, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
        new.rename(path)


def _name_beside(path: Path) -> Path:
    """Return a name in the same folder that nothing else uses.

    Made here and not by `tempfile`, whose files are private to the user: a plain `open` gives the
    permissions any other new file gets.
    """
    if not path.name:
        raise UsageError(
            f"{path}: a folder that is in use cannot be replaced. Choose another --out."
        )
    return path.with_name(f".{path.name[:80]}.{secrets.token_hex(6)}.tmp")


def _cannot_write(path: Path, error: OSError) -> InputError:
    return InputError(f"{path}: cannot be written ({error.strerror or error}).")
