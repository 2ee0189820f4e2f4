"""Patterns such as `photos/**/*.jpg`: lazily, in the order of the paths, each match once.

`*`, `?` and `[...]` match within one name, and no name that begins with a dot unless the pattern
does too; `**` stands for any number of folders, of which hidden, junk and linked ones are passed
over, so that it ends. A folder that matches is searched as a folder is.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from fnmatch import translate
from typing import Final, NamedTuple

from vsc_serve.errors import InputError, SourceUnavailable
from vsc_serve.sources.base import Source, UnreadableSource
from vsc_serve.sources.folder import Entry, Tree
from vsc_serve.sources.names import Choice, Naming, is_junk

_MAGIC: Final = re.compile(r"[*?\[]")
_ANY_FOLDERS: Final = "**"


def is_pattern(given: str) -> bool:
    """Tell whether a path has a sign that stands for others."""
    return _MAGIC.search(given) is not None


def split_pattern(given: str, is_folder: Callable[[str], bool]) -> tuple[str, list[str]]:
    """Split a pattern into the folder that is searched, with its `/`, and the parts after it.

    The longest beginning that is the name of a folder is no pattern, whatever signs are in it: in
    `photos [2024]/*.jpg`, the brackets are letters if there is such a folder.

    Args:
        given: The pattern.
        is_folder: Tells whether there is a folder.
    """
    parts = given.split("/")
    first = next(place for place, part in enumerate(parts) if is_pattern(part))
    while first < len(parts) - 1 and (
        not is_pattern(parts[first]) or is_folder("/".join(parts[: first + 1]))
    ):
        first += 1
    base = "".join(f"{part}/" for part in parts[:first])
    return base, [part for part in parts[first:] if part]


class PatternSearch:
    """One search for a pattern below one folder.

    A place in the pattern is the number of its parts that the way so far has used up; with `**` a
    folder can be at several places at once.

    Args:
        tree: The folder before the pattern.
        parts: The pattern, split at `/`.
        naming: How ids and excluded paths are made.
        choice: What is left out.
        folder: Gives the sources below a folder that matches.
        file: Gives the sources of a file that matches.
    """

    def __init__(
        self,
        tree: Tree,
        parts: Sequence[str],
        naming: Naming,
        choice: Choice,
        *,
        folder: Callable[[str], Iterator[Source]],
        file: Callable[[str, Entry], Iterator[Source]],
    ) -> None:
        self._tree = tree
        self._parts = [_Part(part) for part in parts]
        self._naming = naming
        self._choice = choice
        self._folder = folder
        self._file = file

    def __iter__(self) -> Iterator[Source]:
        """Give what matches."""
        return self._search("", self._settle({0}))

    def _search(self, path: str, places: set[int]) -> Iterator[Source]:
        """Give what matches in a folder; the depth is that of the folders, so it may recurse."""
        if len(self._parts) in places:
            yield from self._folder(path)
            return
        try:
            entries = self._tree.entries(path)
        except SourceUnavailable:
            raise
        except InputError as error:
            yield UnreadableSource(self._naming.id_of(path.rstrip("/")), str(error), error.kind)
            return
        for entry in entries:
            after = self._advance(places, entry)
            if after and self._choice.excludes(self._naming.prefix + path + entry.key):
                self._choice.skip(self._naming.prefix + path + entry.key, "excluded")
            elif after and entry.is_folder:
                yield from self._search(path + entry.key, after)
            elif len(self._parts) in after:
                yield from self._file(path + entry.key, entry)

    def _advance(self, places: set[int], entry: Entry) -> set[int]:
        """Return the places in the pattern after one more name."""
        name = entry.key.rstrip("/")
        after = set()
        for place in places - {len(self._parts)}:
            part = self._parts[place]
            if part.is_any_folders and _may_be_entered(name, entry):
                after.add(place)
            elif not part.is_any_folders and part.matches(name, is_folder=entry.is_folder):
                after.add(place + 1)
        return self._settle(after)

    def _settle(self, places: set[int]) -> set[int]:
        """Add the places after a `**`, which may stand for no folder at all."""
        for place, part in enumerate(self._parts):
            if place in places and part.is_any_folders:
                places.add(place + 1)
        return places


class _Part(NamedTuple):
    text: str

    @property
    def is_any_folders(self) -> bool:
        return self.text == _ANY_FOLDERS

    def matches(self, name: str, *, is_folder: bool) -> bool:
        if not is_pattern(self.text):
            return name == self.text
        is_hidden = name.startswith(".") and not self.text.startswith(".")
        is_passed_over = is_hidden or (is_folder and is_junk(name) and name[0] != ".")
        return not is_passed_over and re.match(translate(self.text), name) is not None


def _may_be_entered(name: str, entry: Entry) -> bool:
    return entry.is_folder and not entry.is_link and not is_junk(name)
