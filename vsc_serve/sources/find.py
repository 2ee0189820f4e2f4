"""From what was typed to sources: folders, files, patterns, archives, tables, URLs and lists."""

import os
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import chain
from typing import Final

from vsc_serve.errors import UsageError
from vsc_serve.sources.base import FileSource, Source
from vsc_serve.sources.folder import Entry, FolderSearch, LocalTree, Tree, why_not_wanted
from vsc_serve.sources.listing import read_paths
from vsc_serve.sources.names import (
    CONTAINER_SUFFIXES,
    IMAGE_SUFFIXES,
    Choice,
    Ids,
    Naming,
    is_container_name,
)
from vsc_serve.sources.parquet import ParquetSource, import_pyarrow, search_parquet
from vsc_serve.sources.pattern import PatternSearch, is_pattern, split_pattern
from vsc_serve.sources.places import is_url, local_path
from vsc_serve.sources.tar import search_tar
from vsc_serve.sources.unique import unique_ids
from vsc_serve.sources.url import UrlSource, UrlTree, is_folder_url
from vsc_serve.sources.zip import search_zip

_STDIN: Final = "-"
_WEB: Final = ("http://", "https://")
"""URLs where `?` stands before a query and nothing can be listed."""


def find_sources(
    inputs: Sequence[str],
    *,
    exclude: Sequence[str] = (),
    ids: Ids = "relative",
    on_skip: Callable[[str, str], None] | None = None,
) -> Iterator[Source]:
    """Find pictures, lazily and always in the same order.

    Args:
        inputs: Folders, files, patterns with `*`, archives (tar, zip), Parquet files, URLs, and `-`
            for a list of paths on standard input. A name that exists is never a pattern.
        exclude: Shell patterns of relative paths, and of names where they have no `/`, that are
            left out; a folder that matches is left out with all that is in it.
        ids: `relative`: the path inside the folder or archive, and with several inputs after the
            input as it was given. `absolute`: the whole path. `name`: the last part.
        on_skip: Told the path and the reason of everything that is passed over.

    Returns:
        The sources, in the order of the inputs; within a folder or pattern in the order of the
        paths, within an archive or table in its own.

    Raises:
        UsageError: An input is not there, or none holds a picture, before the first source; or,
            while they come, two have the same id.
    """
    if not inputs:
        raise UsageError("no input. Give folders, files or URLs, or - for a list of paths.")
    choice = Choice(exclude, on_skip)
    found = _search_all(inputs, choice, ids)
    first = next(found, None)
    if first is None:
        raise UsageError(_nothing_found(inputs, choice))
    again = partial(_search_all, inputs, choice.without_report(), ids)
    # Paths in a folder differ, and a million need no check. What tables call their rows may not.
    has_one_folder = ids != "name" and len(inputs) == 1 and _is_folder(inputs[0])
    return unique_ids(
        chain([first], found),
        None if _STDIN in inputs else again,
        (ParquetSource,) if has_one_folder else (object,),
    )


def _search_all(inputs: Sequence[str], choice: Choice, ids: Ids) -> Iterator[Source]:
    """Chain the searches for all inputs; that each is there is checked before the first starts."""
    searches = [_search(given, choice, ids, is_alone=len(inputs) == 1) for given in inputs]
    return chain.from_iterable(searches)


def _search(given: str, choice: Choice, ids: Ids, *, is_alone: bool) -> Iterator[Source]:
    """Return the search for one input. Raises UsageError when there is nothing."""
    if given == _STDIN:
        return _search_list(read_paths(), choice, ids)
    place = local_path(given)
    prefix = "" if is_alone else f"{given.rstrip('/')}/"
    naming = Naming(prefix, _whole(place), ids)
    if _is_folder(given):
        return _search_folder(_tree(place), naming, choice)
    if _is_there(place):
        return _search_file(place, naming, choice)
    if is_pattern(place) and not place.startswith(_WEB):
        return _search_pattern(place, choice, ids)
    raise UsageError(f"{given}: no such file or folder. Check the path.")


def _search_list(paths: Iterator[str], choice: Choice, ids: Ids) -> Iterator[Source]:
    """Give the files on a list. What is not there becomes a source that cannot be read."""
    for given in paths:
        place = local_path(given)
        yield from _search_file(place, Naming(f"{given}/", _whole(place), ids), choice)


def _search_folder(tree: Tree, naming: Naming, choice: Choice, start: str = "") -> Iterator[Source]:
    """Give the pictures below a folder; in one without any, those in archives and tables."""
    has_picture = False
    for source in FolderSearch(tree, naming, choice, start=start):
        has_picture = True
        yield source
    if not has_picture:
        yield from FolderSearch(
            tree,
            naming,
            choice.without_report(),
            start=start,
            wanted=is_container_name,
            unpack=lambda path: _unpack(tree.place(path), naming.within(path), choice),
        )


def _search_file(place: str, naming: Naming, choice: Choice) -> Iterator[Source]:
    """Give the pictures of a file that was named, whatever its ending."""
    if is_container_name(place):
        return _unpack(place, naming, choice)
    names = {"relative": place, "absolute": naming.top, "name": place.rpartition("/")[2]}
    name = names[naming.ids]
    return iter([UrlSource(name, place) if is_url(place) else FileSource(name, place)])


def _search_pattern(place: str, choice: Choice, ids: Ids) -> Iterator[Source]:
    """Give what a pattern matches. Raises UsageError when that is nothing."""
    base, parts = split_pattern(place)
    if base and not _is_folder(base):
        raise UsageError(f"{place}: there is no folder {base}. Check the path.")
    tree = _tree(base)
    naming = Naming(base, _whole(base), ids)
    any_ending = not parts[-1].endswith("*")

    def match_file(path: str, entry: Entry) -> Iterator[Source]:
        name = path.rpartition("/")[2]
        if is_container_name(name):
            yield from _unpack(tree.place(path), naming.within(path), choice)
        elif any_ending or (why := why_not_wanted(name)) is None:
            yield tree.source(naming.id_of(path), path, entry)
        else:
            choice.skip(naming.prefix + path, why)

    found = iter(
        PatternSearch(
            tree,
            parts,
            naming,
            choice,
            folder=lambda path: _search_folder(tree, naming, choice, path),
            file=match_file,
        )
    )
    first = next(found, None)
    if first is None:
        raise UsageError(_nothing_found([place], choice))
    return chain([first], found)


def _unpack(place: str, naming: Naming, choice: Choice) -> Iterator[Source]:
    """Give the pictures in an archive or table."""
    name = place.lower()
    if name.endswith(".zip"):
        return search_zip(place, naming, choice)
    if name.endswith(".parquet"):
        import_pyarrow(place)
        return search_parquet(place, naming, choice)
    return search_tar(place, naming, choice)


def _tree(place: str) -> Tree:
    return UrlTree(place) if is_url(place) else LocalTree(place)


def _whole(place: str) -> str:
    """Return the whole path, links and all, or the URL, without `/` at its end."""
    return (place if is_url(place) else os.path.abspath(place)).rstrip("/")  # noqa: PTH100


def _is_folder(given: str) -> bool:
    if is_url(given):
        return is_folder_url(given) is True
    return os.path.isdir(local_path(given))  # noqa: PTH112  # strings all the way, as in `folder`


def _is_there(place: str) -> bool:
    if is_url(place):
        return is_folder_url(place) is not None
    return os.path.lexists(place)


def _nothing_found(inputs: Sequence[str], choice: Choice) -> str:
    """Say what was looked for, and what was passed over instead."""
    skipped = ", ".join(f"{count:,} {why}" for why, count in choice.skipped.most_common(8))
    return (
        f"{', '.join(inputs)}: no image found."
        f" Looked for files ending in {' '.join(sorted(IMAGE_SUFFIXES))},"
        f" and {' '.join(CONTAINER_SUFFIXES)} holding such."
        f" Passed over: {skipped or 'nothing'}."
    )
