"""Names of files and rows: which are looked at, passed over as junk, or left out on request."""

import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import translate
from typing import Final, Literal

Ids = Literal["relative", "absolute", "name"]
"""Names of rows: path within the input, whole path, or the last part of the path."""

IMAGE_SUFFIXES: Final = frozenset(
    {
        *(".apng", ".avif", ".bmp", ".dib", ".gif", ".heic", ".heif", ".hif", ".j2k", ".jfif"),
        *(".jp2", ".jpe", ".jpeg", ".jpg", ".pbm", ".pgm", ".png", ".pnm", ".ppm", ".tga"),
        *(".tif", ".tiff", ".webp"),
    }
)
"""File name extensions that are looked for in folders. A file named on its own is always tried."""

TAR_SUFFIXES: Final = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")
"""Extensions of tar archives, plain and compressed."""

CONTAINER_SUFFIXES: Final = (*TAR_SUFFIXES, ".zip", ".parquet")
"""Extensions of files that hold many images."""

ARRAY_SUFFIXES: Final = (".npy", ".npz")
"""Extensions of numpy files."""

_JUNK_FOLDERS: Final = frozenset(
    {
        "__MACOSX",
        "@eaDir",
        "$RECYCLE.BIN",
        "System Volume Information",
        "lost+found",
        "node_modules",
        "__pycache__",
    }
)


def is_image_name(name: str) -> bool:
    """Tell whether a file name has the extension of an image."""
    return extension_of(name) in IMAGE_SUFFIXES


def is_array_name(name: str) -> bool:
    """Tell whether a file name has the extension of a numpy file."""
    return name.lower().endswith(ARRAY_SUFFIXES)


def is_container_name(name: str) -> bool:
    """Tell whether a file name has the extension of an archive or a table of images."""
    return name.lower().endswith(CONTAINER_SUFFIXES)


def extension_of(name: str) -> str:
    """Return the extension of a name in lower case with its dot, or nothing."""
    stem, dot, last = name.rpartition(".")
    return dot + last.lower() if stem else ""


def is_junk(name: str) -> bool:
    """Tell whether a folder is passed over: hidden, or made by a system for itself."""
    return name.startswith(".") or name in _JUNK_FOLDERS


def why_junk(relative: str) -> str | None:
    """Say why a path inside an archive is passed over, or None."""
    *folders, name = relative.split("/")
    if any(is_junk(folder) for folder in folders if folder not in ("", ".", "..")):
        return "in a hidden or junk folder"
    return "hidden" if name.startswith(".") else None


def id_text(value: object) -> str | None:
    """Return what a file says is the id of a row as text; None where it is null or empty.

    Bytes are UTF-8; those that are not become their hexadecimal digits after `0x`. Numbers that are
    whole have no decimal point, as tables with nulls in a column of numbers are often written.
    """
    if isinstance(value, bytes):
        try:
            return value.decode() or None
        except UnicodeDecodeError:
            return f"0x{value.hex()}"
    if isinstance(value, float):
        if math.isnan(value):
            return None
        return str(int(value)) if value.is_integer() else repr(value)
    return None if value is None else str(value) or None


@dataclass(frozen=True, slots=True)
class Naming:
    """Rule by which the images below one input are called."""

    prefix: str
    """Goes before the path inside the input: nothing, or the input as it was given and `/`."""
    top: str
    """The input's whole path, without `/` at its end."""
    ids: Ids

    def id_of(self, relative: str) -> str:
        """Return the id of an image from its path inside the input."""
        if self.ids == "absolute":
            return f"{self.top}/{relative}"
        return self.prefix + relative if self.ids == "relative" else relative.rpartition("/")[2]

    def id_of_archive(self, place: str) -> str:
        """Return the id of an archive or table itself, when it cannot be read."""
        return self.top if self.ids == "absolute" else place

    def within(self, relative: str) -> "Naming":
        """Return the naming of what is inside an archive that lies inside the input."""
        return Naming(f"{self.prefix}{relative}/", f"{self.top}/{relative}", self.ids)


class Choice:
    """Choice of the names that are left out, with a count of what was passed over and why.

    Args:
        exclude: Shell patterns (`*` matches `/` too). One without `/` is also tried on each part of
            a path.
        on_skip: Told the relative path and the reason of everything that is passed over.
    """

    def __init__(
        self, exclude: Sequence[str] = (), on_skip: Callable[[str, str], None] | None = None
    ) -> None:
        self._paths = _compile(exclude)
        self._names = _compile([pattern for pattern in exclude if "/" not in pattern])
        self._on_skip = on_skip
        self.skipped: Counter[str] = Counter()

    def excludes(self, path: str) -> bool:
        """Tell whether a pattern matches this path or its last part; its folders are not tried."""
        if self._paths is None:
            return False
        path = path.rstrip("/")
        name = path.rpartition("/")[2]
        return bool(self._paths(path) or (self._names and self._names(name)))

    def excludes_any(self, path: str) -> bool:
        """Tell whether a pattern matches this path or a folder that it lies in."""
        if self._paths is None:
            return False
        ends = [place for place, letter in enumerate(path) if letter == "/"]
        return any(self.excludes(path[:end]) for end in [*ends, len(path)] if end)

    def without_report(self) -> "Choice":
        """Return the same choice for a second search, which tells nobody what it passes over."""
        quiet = Choice()
        quiet._paths, quiet._names = self._paths, self._names
        return quiet

    def skip(self, path: str, why: str) -> None:
        """Count and report something that is passed over."""
        self.skipped[why] += 1
        if self._on_skip is not None:
            self._on_skip(path, why)


class LateReport(Choice):
    """Choice that keeps what it would say of archives until it is known that they are not read.

    Args:
        choice: The choice that is told.
    """

    def __init__(self, choice: Choice) -> None:
        super().__init__()
        self._paths, self._names = choice._paths, choice._names
        self._choice = choice
        self._late: list[tuple[str, str]] | None = []

    def skip(self, path: str, why: str) -> None:
        """Report something that is passed over, or keep it for later."""
        if self._late is not None and is_container_name(path) and why.startswith("with extension"):
            self._late.append((path, why))
        else:
            self._choice.skip(path, why)

    def release(self) -> None:
        """Report what was kept, and keep nothing from now on."""
        late, self._late = self._late or [], None
        for path, why in late:
            self._choice.skip(path, why)


def _compile(patterns: Sequence[str]) -> Callable[[str], re.Match[str] | None] | None:
    """Return one matcher for all the patterns, or None without any."""
    cleaned = [pattern.rstrip("/") for pattern in patterns if pattern.rstrip("/")]
    if not cleaned:
        return None
    return re.compile("|".join(translate(pattern) for pattern in cleaned)).match
