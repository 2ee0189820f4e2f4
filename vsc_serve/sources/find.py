"""From what was typed to sources: folders, files, patterns, archives, tables, URLs and lists."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import chain
from typing import Final

from vsc_serve.errors import InputError, SourceUnavailable, UsageError
from vsc_serve.sources.base import FileSource, Source, UnreadableSource
from vsc_serve.sources.compression import HEAD_BYTES, container_of
from vsc_serve.sources.files import PlaceFile
from vsc_serve.sources.folder import Entry, FolderSearch, LocalTree, Tree, why_not_wanted
from vsc_serve.sources.inputs import (
    Input,
    given_names,
    is_folder,
    is_folder_or_unknown,
    is_there,
    whole_path,
)
from vsc_serve.sources.listing import read_paths
from vsc_serve.sources.names import (
    CONTAINER_SUFFIXES,
    IMAGE_SUFFIXES,
    Choice,
    Ids,
    LateReport,
    Naming,
    is_container_name,
)
from vsc_serve.sources.parquet import import_pyarrow, search_parquet
from vsc_serve.sources.parquet_columns import NoImages
from vsc_serve.sources.pattern import PatternSearch, is_pattern, split_pattern
from vsc_serve.sources.retry import RETRY, RetryPolicy
from vsc_serve.sources.roots import Mounts, Root
from vsc_serve.sources.stores import is_url, local_path
from vsc_serve.sources.tar import search_tar
from vsc_serve.sources.unique import unique_ids
from vsc_serve.sources.url import UrlSource, UrlTree
from vsc_serve.sources.zip import search_zip

STDIN: Final = "-"
_WEB: Final = ("http://", "https://")
"""URLs where `?` stands before a query and nothing can be listed."""
_SEARCHES: Final = {"tar": search_tar, "zip": search_zip, "parquet": search_parquet}


def find_sources(
    inputs: Input | Sequence[Input],
    *,
    exclude: Sequence[str] = (),
    ids: Ids = "relative",
    on_skip: Callable[[str, str], None] | None = None,
    retry: RetryPolicy = RETRY,
) -> Iterator[Source]:
    """Find images, lazily and always in the same order.

    Args:
        inputs: Folders, files, patterns with `*`, archives (tar, zip), Parquet files, URLs, and `-`
            for a list of paths on standard input. A name that exists is never a pattern.
        exclude: Shell patterns of relative paths, and of names where they have no `/`, that are
            left out; a folder that matches is left out with all that is in it.
        ids: `relative`: the path inside the folder or archive, and with several inputs after the
            input as it was given. `absolute`: the whole path. `name`: the last part.
        on_skip: Told the path and the reason of everything that is passed over.
        retry: How often and how long to try while an input cannot be reached.

    Returns:
        The sources, in the order of the inputs; within a folder or pattern in the order of the
        paths, within an archive or table in its own.

    Raises:
        UsageError: An input is not there, or none holds an image, before the first source; or,
            while they come, two have the same id.
        SourceUnavailable: An input cannot be reached; at any time.
    """
    given = given_names(inputs)
    choice = Choice(exclude, on_skip)
    found = Finder(choice, ids, retry).search_all(given)
    first = next(found, None)
    if first is None:
        raise UsageError(nothing_found(given, choice))
    sources = chain([first], found)
    is_of_files = isinstance(first, FileSource) and ids != "name"
    if is_of_files and len(given) == 1 and is_folder(local_path(given[0]), retry):
        return sources  # paths in a folder differ, and a million need no check
    quiet = choice.without_report()
    again = None if STDIN in given else lambda: Finder(quiet, ids, retry).search_all(given)
    return unique_ids(sources, again)


class Finder:
    """One search of inputs for images.

    Args:
        choice: What is left out.
        ids: How rows are called.
        retry: How often and how long to try while an input cannot be reached.
    """

    def __init__(self, choice: Choice, ids: Ids, retry: RetryPolicy) -> None:
        self._choice = choice
        self._ids = ids
        self._retry = retry
        self._mounts = Mounts()

    def search_all(self, inputs: Sequence[str]) -> Iterator[Source]:
        """Chain the searches for all inputs; that each is there is checked before the first."""
        return chain.from_iterable(
            [self._search(given, is_alone=len(inputs) == 1) for given in inputs]
        )

    def _search(self, given: str, *, is_alone: bool) -> Iterator[Source]:
        """Return the search for one input. Raises UsageError when there is nothing."""
        if given == STDIN:
            return self._in_list(read_paths())
        place = local_path(given)
        naming = Naming("" if is_alone else f"{given.rstrip('/')}/", whole_path(place), self._ids)
        if is_folder(place, self._retry):
            return self._in_folder(self._tree(place), naming)
        if is_there(place, self._retry):
            return self._in_file(place, naming)
        if is_pattern(place) and not place.startswith(_WEB):
            return self._in_pattern(place)
        raise _not_there(given)

    def _in_list(self, paths: Iterator[str]) -> Iterator[Source]:
        """Give the files on a list. What is not there becomes a source that cannot be read."""
        for given in paths:
            place = local_path(given)
            yield from self._in_file(place, Naming(f"{given}/", whole_path(place), self._ids))

    def _in_folder(self, tree: Tree, naming: Naming, start: str = "") -> Iterator[Source]:
        """Give the images below a folder; in one without any, those in archives and tables."""
        has_image = False
        report = LateReport(self._choice)
        for source in FolderSearch(tree, naming, report, start=start):
            if not has_image and not isinstance(source, UnreadableSource):
                has_image = True
                report.release()
            yield source
        if not has_image:
            yield from FolderSearch(
                tree,
                naming,
                self._choice.without_report(),
                start=start,
                wanted=is_container_name,
                unpack=lambda path: self._unpack(tree.place(path), naming.within(path)),
                lists_locked=False,
            )

    def _in_file(self, place: str, naming: Naming) -> Iterator[Source]:
        """Give the images of a file that was named, whatever its extension."""
        if is_container_name(place):
            if place.lower().endswith(".parquet"):
                import_pyarrow(place)  # now, not when the inputs before it are done
            return self._unpack(place, naming, is_named=True)
        names = {"relative": place, "absolute": naming.top, "name": place.rpartition("/")[2]}
        name = names[naming.ids]
        if is_url(place):
            return iter([UrlSource(name, place)])
        return iter([FileSource(name, place, self._mounts.root_of(place))])

    def _in_pattern(self, place: str) -> Iterator[Source]:
        """Give what a pattern matches. Raises UsageError when that is nothing."""
        base, parts = split_pattern(place, partial(is_folder_or_unknown, retry=self._retry))
        if base and not is_folder(base, self._retry):
            raise UsageError(f"{place}: there is no folder {base}. Check the path.")
        if not any(map(is_pattern, parts)):
            raise _not_there(place)
        tree = self._tree(base)
        naming = Naming(base, whole_path(base), self._ids)
        takes_any = not parts[-1].endswith("*")
        found = iter(
            PatternSearch(
                tree,
                parts,
                naming,
                self._choice,
                folder=lambda path: self._in_folder(tree, naming, path),
                file=lambda path, entry: self._matched(tree, naming, path, entry, takes_any),
            )
        )
        first = next(found, None)
        if first is None:
            raise UsageError(nothing_found([place], self._choice))
        return chain([first], found)

    def _matched(
        self,
        tree: Tree,
        naming: Naming,
        path: str,
        entry: Entry,
        takes_any: bool,  # noqa: FBT001  # a step of `_in_pattern`
    ) -> Iterator[Source]:
        """Give the images of a file that a pattern matches."""
        name = path.rpartition("/")[2]
        if is_container_name(name):
            yield from self._unpack(tree.place(path), naming.within(path))
        elif takes_any or (why := why_not_wanted(name)) is None:
            yield tree.source(naming.id_of(path), path, entry)
        else:
            self._choice.skip(naming.prefix + path, why)

    def _unpack(self, place: str, naming: Naming, *, is_named: bool = False) -> Iterator[Source]:
        """Give the images in an archive or table; what it is, its first bytes say.

        A without a column of images holds what is known about images elsewhere, and is passed
        over, unless it was named.
        """
        try:
            with PlaceFile(place, self._retry, root=self._mount_of(place)) as file:
                kind = container_of(file.read_at(0, HEAD_BYTES), place)
                yield from _SEARCHES[kind](file, naming, self._choice)
        except SourceUnavailable:
            raise
        except NoImages as error:
            if is_named:
                yield UnreadableSource(naming.id_of_archive(place), str(error), error.kind)
            else:
                path = naming.prefix.rstrip("/") or place
                self._choice.skip(path, "without a column of images")
        except InputError as error:
            yield UnreadableSource(naming.id_of_archive(place), str(error), error.kind)

    def _mount_of(self, place: str) -> Root | None:
        return None if is_url(place) else self._mounts.root_of(place)

    def _tree(self, place: str) -> Tree:
        return UrlTree(place, self._retry) if is_url(place) else LocalTree(place, self._retry)


def _not_there(given: str) -> UsageError:
    return UsageError(f"{given}: no such file or folder. Check the path.")


def nothing_found(inputs: Sequence[str], choice: Choice) -> str:
    """Say what was looked for, and what was passed over instead."""
    skipped = ", ".join(f"{count:,} {why}" for why, count in choice.skipped.most_common(8))
    return (
        f"{', '.join(inputs)}: no image found."
        f" Looked for files ending in {' '.join(sorted(IMAGE_SUFFIXES))},"
        f" and {' '.join(CONTAINER_SUFFIXES)} holding such."
        f" Passed over: {skipped or 'nothing'}."
    )
