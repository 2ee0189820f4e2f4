"""Search a folder: lazily, in the order of the paths, every real folder once.

Links to folders. A folder that is reached under its own name is read there, and a link to it is
passed over. A link that leads to a place not reached otherwise is followed where it stands, under
its own name; a second link to the same place is passed over. So a search ends whatever the links,
and nothing is read twice. Only the places that links led to are remembered.
"""

import errno
import os
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple, Protocol

from vsc_serve.errors import InputError, SourceUnavailable
from vsc_serve.sources.base import FileSource, Source, UnreadableSource, fault_below, gone
from vsc_serve.sources.faults import Fault, fault_of_file
from vsc_serve.sources.names import Choice, Naming, extension_of, is_image_name, is_junk
from vsc_serve.sources.retry import RETRY, RetryPolicy, reach
from vsc_serve.sources.roots import Root, find_root


class Entry(NamedTuple):
    """One name in a folder."""

    key: str
    """Its name, with `/` after a folder's: sorted by it, entries come in the order of paths."""
    is_folder: bool
    is_link: bool = False
    size: int = -1
    """Bytes, where the listing says so."""


class Tree(Protocol):
    """Folders below one place. Paths in it are relative, those of folders end with `/`."""

    @property
    def top(self) -> str:
        """Where it lies: a path or URL, without `/` at its end."""

    def entries(self, folder: str) -> list[Entry]:
        """List a folder in order. Raises InputError with the reason, or SourceUnavailable."""

    def real(self, path: str) -> str:
        """Return where a path lies when all links are followed."""

    def place(self, path: str) -> str:
        """Return the whole path or URL."""

    def source(self, name: str, path: str, entry: Entry) -> Source:
        """Return a file as a source of the given id."""


class LocalTree:
    """Folders on this machine.

    Args:
        top: The topmost.
        retry: How often and how long to try while a folder cannot be reached.
    """

    def __init__(self, top: str, retry: RetryPolicy = RETRY) -> None:
        self._start = "" if top in ("", ".") else f"{top.rstrip('/')}/"
        self._retry = retry
        self.top = top.rstrip("/") or top[:1]
        # The topmost folder, and those that another disk is mounted at or a link leads to.
        self._roots = {"": find_root(self._start or ".")}

    def entries(self, folder: str) -> list[Entry]:
        """List a folder in order. Raises InputError with the reason, or SourceUnavailable."""
        place = self._start + folder or "."
        root = self._root_of(folder)
        found = reach(place, partial(_list, place, root), self._retry, partial(_judge, root, place))
        here = find_root(place)
        if here is not None and root is not None and here.device != root.device:
            self._roots[folder] = here
        return found

    def _root_of(self, path: str) -> Root | None:
        """Return the root that a folder or file lies below."""
        if len(self._roots) == 1:
            return self._roots[""]
        while path not in self._roots:
            path = _parent(path)
        return self._roots[path]

    def real(self, path: str) -> str:
        """Return where a path lies when all links are followed."""
        return os.path.realpath(self._start + path)

    def place(self, path: str) -> str:
        """Return the whole path."""
        return self._start + path

    def source(self, name: str, path: str, entry: Entry) -> FileSource:
        """Return a file as a source of the given id."""
        return FileSource(name, self._start + path, self._root_of(path))


class FolderSearch:
    """One search below one folder.

    Args:
        tree: Where the folder lies.
        naming: How ids and excluded paths are made.
        choice: What is left out.
        start: The folder inside the tree, empty or with `/` at its end.
        wanted: Which file names are given.
        unpack: Gives the sources of a wanted file at a path; without, it is one image.
        lists_locked: Whether a folder that cannot be listed becomes a source.
    """

    def __init__(
        self,
        tree: Tree,
        naming: Naming,
        choice: Choice,
        *,
        start: str = "",
        wanted: Callable[[str], bool] = is_image_name,
        unpack: Callable[[str], Iterator[Source]] | None = None,
        lists_locked: bool = True,
    ) -> None:
        self._tree = tree
        self._naming = naming
        self._choice = choice
        self._wanted = wanted
        self._unpack = unpack
        self._lists_locked = lists_locked
        self._start = _Folder(start, tree.real(start))
        self._roots = {self._start.real: start}

    def __iter__(self) -> Iterator[Source]:
        """Give the files in the order of their paths; a folder that is locked becomes a source."""
        pending = [(self._start, self._list(self._start))]
        while pending:
            folder, entries = pending[-1]
            entry = next(entries, None)
            if isinstance(entry, UnreadableSource):
                yield entry
            elif entry is None:
                pending.pop()
            elif not entry.is_folder:
                path = folder.path + entry.key
                if not self._is_wanted(path, entry):
                    continue
                if self._unpack is None:
                    yield self._tree.source(self._naming.id_of(path), path, entry)
                else:
                    yield from self._unpack(path)
            elif below := self._enter(folder, entry):
                pending.append((below, self._list(below)))

    def _list(self, folder: "_Folder") -> Iterator[Entry | UnreadableSource]:
        try:
            return iter(self._tree.entries(folder.path))
        except SourceUnavailable:
            raise
        except InputError as error:
            if not self._lists_locked:
                return iter(())
            name = self._naming.id_of(folder.path.rstrip("/")) if folder.path else self._tree.top
            return iter([UnreadableSource(name, str(error), error.kind)])

    def _is_wanted(self, path: str, entry: Entry) -> bool:
        """Tell whether a file is given; count it where it is passed over."""
        why = why_not_wanted(entry.key, wanted=self._wanted)
        if why is None and self._choice.excludes(self._naming.prefix + path):
            why = "excluded"
        if why is not None:
            self._choice.skip(self._naming.prefix + path, why)
        return why is None

    def _enter(self, folder: "_Folder", entry: Entry) -> "_Folder | None":
        """Return a folder below, or None when it is passed over."""
        name = entry.key[:-1]
        path = folder.path + entry.key
        why = self._why_passed_over(path, name)
        real = _inside(folder.real) + name
        if why is None and entry.is_link:
            real = self._tree.real(path)
            why = "link to a folder that is read elsewhere" if self._is_reached(real) else None
        elif why is None and real in self._roots:
            why = "folder that was read where a link leads to it"
        if why is not None:
            self._choice.skip(self._naming.prefix + path, why)
            return None
        if entry.is_link:
            self._roots[real] = path
        return _Folder(path, real)

    def _why_passed_over(self, path: str, name: str) -> str | None:
        if is_junk(name):
            return "hidden or junk folder"
        return "excluded" if self._choice.excludes(self._naming.prefix + path) else None

    def _is_reached(self, real: str) -> bool:
        """Tell whether the search comes to a real folder without the link that leads to it."""
        return any(
            real == root or (real.startswith(_inside(root)) and self._is_open(real, root, path))
            for root, path in self._roots.items()
        )

    def _is_open(self, real: str, root: str, path: str) -> bool:
        """Tell whether no part of the way from a root down to a folder is passed over."""
        for name in real[len(_inside(root)) :].split("/"):
            path += f"{name}/"
            if self._why_passed_over(path, name) is not None:
                return False
        return True


class _Folder(NamedTuple):
    path: str
    """Path inside the tree, empty or with `/` at the end."""
    real: str
    """Where it lies when all links are followed."""


def why_not_wanted(name: str, wanted: Callable[[str], bool] = is_image_name) -> str | None:
    """Say why a file's name is passed over, or None."""
    if name.startswith("."):
        return "hidden"
    if wanted(name):
        return None
    extension = extension_of(name)
    return f"with extension {extension}" if extension else "without extension"


def _inside(folder: str) -> str:
    return folder if folder.endswith("/") else f"{folder}/"


def _parent(path: str) -> str:
    """Return the folder of a path inside a tree, empty or with `/` at the end."""
    above, slash, _ = path.rstrip("/").rpartition("/")
    return above + slash


def _list(place: str, root: Root | None) -> list[Entry]:
    with os.scandir(place) as found:
        entries = sorted(_entry(one) for one in found)
    if not entries and root is not None and root.is_lost():
        raise _Lost(root)
    return entries


class _Lost(OSError):
    """A folder that is empty because what was mounted there has gone away."""

    def __init__(self, root: Root) -> None:
        super().__init__(errno.ESTALE, gone(root).reason)


def _judge(root: Root | None, place: str, error: Exception) -> Fault:
    fault = fault_below(root, place, error)
    if fault.kind == "unavailable":
        return fault
    text = error.strerror if isinstance(error, OSError) else str(error)
    return fault._replace(reason=f"folder cannot be searched ({text})")


def _entry(found: "os.DirEntry[str]") -> Entry:
    try:
        is_folder = found.is_dir()
    except OSError as error:  # a link to itself, or into a place that is locked
        if fault_of_file(error).kind == "unavailable":
            raise
        is_folder = False
    return Entry(found.name + "/" if is_folder else found.name, is_folder, found.is_symlink())
