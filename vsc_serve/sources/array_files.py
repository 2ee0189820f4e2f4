"""Find numpy files of rows: named, matched by a pattern, or in folders that hold no images."""

from collections.abc import Iterator, Sequence

from vsc_serve.errors import InputError, UsageError
from vsc_serve.sources.base import FileSource, Source, UnreadableSource
from vsc_serve.sources.find import STDIN, Finder
from vsc_serve.sources.folder import Entry, FolderSearch, Tree, why_not_wanted
from vsc_serve.sources.inputs import Input, given_names, is_folder
from vsc_serve.sources.names import ARRAY_SUFFIXES, Choice, Ids, Naming, is_array_name
from vsc_serve.sources.pattern import is_pattern
from vsc_serve.sources.retry import RETRY, RetryPolicy
from vsc_serve.sources.stores import local_path
from vsc_serve.sources.url import UrlSource


def holds_arrays(
    inputs: Input | Sequence[Input], *, exclude: Sequence[str] = (), retry: RetryPolicy = RETRY
) -> bool:
    """Tell whether inputs are numpy files, or folders and patterns of such and of no images.

    Args:
        inputs: As `find_sources` takes them.
        exclude: What is left out.
        retry: How often and how long to try while an input cannot be reached.

    Raises:
        UsageError: Some are and some are not.
        SourceUnavailable: An input cannot be reached.
    """
    given = given_names(inputs)
    holding = [one for one in given if _holds_arrays(one, Choice(exclude), retry)]
    if holding and len(holding) < len(given):
        other = next(one for one in given if one not in holding)
        raise UsageError(
            f"{holding[0]} holds arrays and {other} does not: encode them one after the other"
        )
    return bool(holding)


def _holds_arrays(given: str, choice: Choice, retry: RetryPolicy) -> bool:
    place = local_path(given)
    has_folder = given != STDIN and is_folder(place, retry)
    if given == STDIN or not (has_folder or is_pattern(place) or is_array_name(place)):
        return False
    if is_array_name(place) and not has_folder:
        return True
    image = _first(Finder(choice, "relative", retry), given)
    if image is not None:
        return _is_array(image)
    return _first(ArrayFinder(choice, "relative", retry), given) is not None


def _first(finder: Finder, given: str) -> Source | None:
    """Return the first source that can be read, None without one."""
    try:
        found = finder.search_all([given])
        return next((one for one in found if not isinstance(one, UnreadableSource)), None)
    except UsageError:  # a pattern that matches nothing of the kind
        return None


def _is_array(source: Source) -> bool:
    """Tell whether a source is a numpy file: a pattern with an extension takes any file."""
    return isinstance(source, FileSource | UrlSource) and is_array_name(source.where)


def find_array_files(
    inputs: Sequence[str], choice: Choice, ids: Ids, retry: RetryPolicy
) -> Iterator[FileSource | UrlSource]:
    """Give the numpy files of inputs, in their order.

    Raises:
        InputError: A folder cannot be searched.
        UsageError: An input is not there, or is something else.
        SourceUnavailable: An input cannot be reached.
    """
    for source in ArrayFinder(choice, ids, retry).search_all(inputs):
        if isinstance(source, UnreadableSource):
            raise InputError(f"{source.id}: {source.reason}", kind=source.kind)
        assert isinstance(source, FileSource | UrlSource)
        yield source


class ArrayFinder(Finder):
    """One search of inputs for numpy files, each of which is one source."""

    def _in_folder(self, tree: Tree, naming: Naming, start: str = "") -> Iterator[Source]:
        search = FolderSearch(tree, naming, self._choice, start=start, wanted=is_array_name)
        return iter(search)

    def _in_file(self, place: str, naming: Naming) -> Iterator[Source]:
        if not is_array_name(place):
            raise UsageError(f"{place}: not one of {' '.join(ARRAY_SUFFIXES)}")
        return super()._in_file(place, naming)

    def _matched(
        self,
        tree: Tree,
        naming: Naming,
        path: str,
        entry: Entry,
        takes_any: bool,  # noqa: FBT001  # as in `Finder`
    ) -> Iterator[Source]:
        why = why_not_wanted(path.rpartition("/")[2], wanted=is_array_name)
        if why is None:
            yield tree.source(naming.id_of(path), path, entry)
        else:
            self._choice.skip(naming.prefix + path, why)
