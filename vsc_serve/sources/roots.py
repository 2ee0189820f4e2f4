"""Notice that the folder or mount that holds an input has gone away.

A disk that is unmounted leaves an empty folder, or none: every file below it is "no such file". So
what was there when the search began is remembered by its device and inode, and looked at again
when a file is missing.
"""

import os
from dataclasses import dataclass

_MOST_FOLDERS = 4096
"""Folders whose roots are remembered at a time."""


@dataclass(frozen=True, slots=True)
class Root:
    """A folder as it was when it was first seen."""

    path: str
    device: int
    inode: int

    def is_lost(self) -> bool:
        """Tell whether it is gone, or another folder stands in its place."""
        return find_root(self.path) != self


def find_root(path: str) -> Root | None:
    """Return a folder as it is now, None where there is none."""
    try:
        status = os.stat(path)  # noqa: PTH116  # strings all the way, as in `folder`
    except (OSError, ValueError):
        return None
    return Root(path, status.st_dev, status.st_ino)


class Mounts:
    """The mounts that files named one by one lie on."""

    def __init__(self) -> None:
        self._known: dict[str, Root] = {}
        self._of_folder: dict[str, Root | None] = {}

    def root_of(self, path: str) -> Root | None:
        """Return the mount of a file.

        Where an earlier file lay on a mount, a later one below the same place belongs to it, also
        when the mount has gone away in between.
        """
        folder = path.rpartition("/")[0] or ("/" if path.startswith("/") else ".")
        if folder not in self._of_folder:
            if len(self._of_folder) >= _MOST_FOLDERS:
                self._of_folder.clear()
            self._of_folder[folder] = self._find(os.path.abspath(folder))  # noqa: PTH100
        return self._of_folder[folder]

    def _find(self, folder: str) -> Root | None:
        mount = _mount_of(folder)
        known = self._deepest(folder)
        if mount is None or (known is not None and len(known.path) >= len(mount.path)):
            return known
        return self._known.setdefault(mount.path, mount)

    def _deepest(self, folder: str) -> Root | None:
        while folder not in self._known and folder != (above := os.path.dirname(folder)):  # noqa: PTH120
            folder = above
        return self._known.get(folder)


def _mount_of(folder: str) -> Root | None:
    """Return the topmost folder on the way to this one that lies on the same device."""
    found = find_root(folder)
    while found is not None and (above := os.path.dirname(found.path)) != found.path:  # noqa: PTH120
        outer = find_root(above)
        if outer is None or outer.device != found.device:
            break
        found = outer
    return found
