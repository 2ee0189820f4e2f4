"""Outputs: what may be written where, and what may be replaced.

An output that exists is replaced only with `force`, and only when it is of the kind that is
written: a folder that this tool wrote and that holds nothing else, or a plain file of that format.
Nothing that holds an input is ever replaced. `check_output` finds all of this before anything is
made, and `remove_folder` is the one function that deletes a folder.
"""

import json
import os
import re
import shutil
import stat
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Final, TypeAlias

from vsc_serve.errors import InputError, UsageError

MARKER: Final = ".vsc-serve.json"
"""File in a folder of ours that has no manifest of its own."""

_TEMPORARY: Final = re.compile(r"\..*\.[0-9a-f]{12}\.(tmp|old)")
"""Names that `atomic` gives what is not finished, and what is being replaced."""
_LOCK: Final = re.compile(r"\..*\.lock(-owner)?")
"""Names that `locks` gives its files."""


@dataclass(frozen=True, kw_only=True)
class FileKind:
    """Kind of a file that is written."""

    name: str
    """Name of the kind, with its article: `a codes file`."""
    recognises: Callable[[Path], bool]
    """Tells whether a file that is not empty is of this kind."""

    def why_not_ours(self, path: Path) -> str | None:
        """Return why a path may not be replaced by a file of this kind, or None."""
        status = path.lstat()
        if stat.S_ISDIR(status.st_mode):
            return f"a folder, not {self.name}"
        if not stat.S_ISREG(status.st_mode):
            return f"no plain file (a {_special(status.st_mode)}), and never replaced"
        if not status.st_size:
            return None
        try:
            is_ours = self.recognises(path)
        except OSError as error:
            return f"not readable ({error.strerror or error}), so that nobody knows what it holds"
        return None if is_ours else f"not {self.name}"


@dataclass(frozen=True, kw_only=True)
class FolderKind:
    """Kind of a folder that is written."""

    name: str
    """Name of the kind, with its article: `a model bundle`."""
    contents: Callable[[dict[str, Any]], Sequence[str] | None]
    """From the JSON object in the marker: patterns of the paths that a folder of this kind may
    hold, or None where the object says that it is of another kind."""
    markers: tuple[str, ...] = (MARKER,)
    """Files of which one says what the folder is."""

    def why_not_ours(self, path: Path) -> str | None:
        """Return why a path may not be replaced by a folder of this kind, or None."""
        if not path.is_dir() or path.is_symlink():
            return f"a file, not {self.name}"
        names = sorted(name for name in _files_below(path) if not _is_left_behind(name))
        if not names:
            return None
        allowed = self._allowed(path)
        if allowed is None:
            return f"not {self.name} that vsc wrote (no {self.markers[0]} that says so)"
        foreign = [name for name in names if not _matches(name, (*self.markers, *allowed))]
        if foreign:
            more = f" and {len(foreign) - 1:,} more" if len(foreign) > 1 else ""
            return f"{self.name}, but it also holds {foreign[0]!r}{more}, which vsc did not write"
        return None

    def _allowed(self, path: Path) -> Sequence[str] | None:
        for marker in self.markers:
            with suppress(OSError, ValueError, RecursionError):
                stored = json.loads((path / marker).read_text(encoding="utf-8"))
                allowed = self.contents(stored) if isinstance(stored, dict) else None
                if allowed is not None:
                    return allowed
        return None


Kind: TypeAlias = FileKind | FolderKind


def begins_with(name: str, signature: bytes) -> FileKind:
    """Return the kind of a file whose first bytes say what it is."""

    def recognises(path: Path) -> bool:
        with path.open("rb") as file:
            return file.read(len(signature)) == signature

    return FileKind(name=name, recognises=recognises)


PNG: Final = begins_with("a PNG image", b"\x89PNG\r\n\x1a\n")


def marked(name: str, kind: str, *patterns: str) -> FolderKind:
    """Return the kind of a folder that `write_marker` marks.

    Args:
        name: What it is, with its article.
        kind: What the marker says.
        *patterns: Paths that it may hold; `*` matches `/` too.
    """

    def contents(stored: dict[str, Any]) -> Sequence[str] | None:
        return patterns if stored.get("kind") == kind else None

    return FolderKind(name=name, contents=contents)


def write_marker(folder: Path, kind: str) -> None:
    """Mark a folder as one of ours. Raises OSError."""
    content = json.dumps({"format": 1, "kind": kind, "writer": "vsc-serve"}) + "\n"
    (folder / MARKER).write_text(content, encoding="utf-8")


def check_output(path: Path, kind: Kind, *, force: bool, inputs: Sequence[Path | str] = ()) -> Path:
    """Check that an output may be written, before anything is made or deleted.

    Args:
        path: Where it is to be. A link is followed: what it leads to is what is written.
        kind: What is to be written.
        force: Whether one that exists may be replaced.
        inputs: Files and folders that are read.

    Returns:
        The path without links.

    Raises:
        UsageError: It exists and may not be replaced, or holds an input.
        InputError: It cannot be written: no permission, or no folder where one belongs.
    """
    if path.name in ("", ".."):
        raise UsageError(f"{path}: no name for an output. Give the name of {kind.name} to write.")
    real = Path(os.path.realpath(path))
    for given in inputs:
        if _holds(real, Path(given)):
            raise UsageError(
                f"{path}: holds the input {given}, and an output never replaces its input."
                " Choose another `out`."
            )
    if os.path.lexists(real):
        _check_existing(path, real, kind, force=force)
    _check_writable(path, real)
    return real


def _check_existing(path: Path, real: Path, kind: Kind, *, force: bool) -> None:
    is_empty_folder = isinstance(kind, FolderKind) and real.is_dir() and not any(real.iterdir())
    if not force and not is_empty_folder:
        raise UsageError(
            f"{path}: exists already. Choose another `out`, or replace it with `force=True`."
        )
    if reason := kind.why_not_ours(real):
        raise UsageError(
            f"{path}: {reason}. `force=True` replaces only {kind.name}; nothing was deleted. Choose"
            " another `out`, or remove it yourself."
        )


def _holds(out: Path, given: Path) -> bool:
    """Tell whether an output is an input or a folder that an input lies in, whatever the names."""
    try:
        status = out.stat()
        place = Path(os.path.realpath(given))
        steps = (place, *place.parents) if stat.S_ISDIR(status.st_mode) else (place,)
        return any(os.path.samestat(status, step.stat()) for step in steps)
    except (OSError, ValueError):  # one of them is not there, or no path at all
        return False


def _check_writable(path: Path, real: Path) -> None:
    """Raise InputError where the output could not be made: better now than after the work."""
    above = next(folder for folder in real.parents if os.path.lexists(folder))
    if not above.is_dir():
        raise InputError(f"{path}: cannot be written ({above} is no folder).")
    if not os.access(above, os.W_OK | os.X_OK):
        raise InputError(f"{path}: cannot be written (no permission to write in {above}).")


def remove_folder(folder: Path, kind: FolderKind) -> None:
    """Remove a folder that this tool wrote, with all that is in it.

    Args:
        folder: The folder; one that is not there is no error.
        kind: What it must be.

    Raises:
        UsageError: It is not of this kind, or holds something that vsc did not write.
        OSError: It cannot be removed.
    """
    if may_remove(folder, kind):
        shutil.rmtree(folder)


def may_remove(folder: Path, kind: FolderKind) -> bool:
    """Tell whether there is a folder to remove. Raises UsageError where it is not of this kind."""
    if not os.path.lexists(folder):
        return False
    if reason := kind.why_not_ours(folder):
        raise UsageError(f"{folder}: {reason}; it was not removed.")
    return True


class _Temporary(FolderKind):
    """Folders that `atomic` made itself: they are known by their names."""

    def why_not_ours(self, path: Path) -> str | None:
        return None if _TEMPORARY.fullmatch(path.name) else "no temporary folder of vsc"


TEMPORARY: Final = _Temporary(name="a temporary folder", contents=lambda stored: None)
"""Names of the leftovers of an interrupted write."""


def _files_below(folder: Path) -> Iterator[str]:
    """Give the paths of all files below a folder, links to folders among them."""
    for place, folders, files in os.walk(folder):
        links = [name for name in folders if os.path.islink(os.path.join(place, name))]  # noqa: PTH114, PTH118  # a Path a file is slow
        for name in (*files, *links):
            yield os.path.relpath(os.path.join(place, name), folder)  # noqa: PTH118


def _is_left_behind(name: str) -> bool:
    """Tell whether a path is a lock, or what an interrupted write leaves."""
    parts = name.split("/")
    return _LOCK.fullmatch(parts[-1]) is not None or any(map(_TEMPORARY.fullmatch, parts))


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _special(mode: int) -> str:
    kinds = ((stat.S_ISFIFO, "pipe"), (stat.S_ISSOCK, "socket"), (stat.S_ISLNK, "broken link"))
    return next((name for is_kind, name in kinds if is_kind(mode)), "device")
