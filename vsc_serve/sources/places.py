"""Open what holds pictures, on this machine or behind a URL, and keep it open in each process."""

import os
import re
import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, BinaryIO, Final, Self, TypeVar, cast

from vsc_serve.errors import InputError, UsageError
from vsc_serve.sources.base import open_regular

_URL: Final = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+(::|://)")
_LOCAL: Final = "file://"
_MOST_OPEN: Final = 4
"""Archives that one thread keeps open. Sources come in order, so that it rarely needs a second."""

Handle = TypeVar("Handle")


class _Open(threading.local):
    """What this thread has opened, in this process."""

    process = -1
    handles: "OrderedDict[tuple[str, object], _Kept]"


_open = _Open()


def keep_open(place: str, opener: Callable[[str], Handle]) -> Handle:
    """Return what `opener` makes of a place, the same one each time.

    After a fork it is opened again: two processes with one file position would read nonsense.

    Args:
        place: Path or URL.
        opener: Called when this thread has nothing open for this place and opener.
    """
    if _open.process != os.getpid():
        _open.process, _open.handles = os.getpid(), OrderedDict()
    key = (place, opener)
    if key not in _open.handles:
        _open.handles[key] = _Kept(opener(place))
        if len(_open.handles) > _MOST_OPEN:
            _open.handles.popitem(last=False)
    _open.handles.move_to_end(key)
    return cast("Handle", _open.handles[key].handle)


def drop(place: str, opener: Callable[[str], object]) -> None:
    """Close what `keep_open` has: after an error its position is anyone's guess."""
    if _open.process == os.getpid():
        _open.handles.pop((place, opener), None)


class _Kept:
    """Closes what it holds when nobody holds it: dropped, pushed out, or its thread at an end."""

    def __init__(self, handle: Any) -> None:
        self.handle = handle

    def __del__(self) -> None:
        self.handle.close()


class Unpacked:
    """A compressed file, unpacked while it is read; going back starts again from its beginning.

    Args:
        file: The compressed file, closed with this one.
        unpack: Opens it.
    """

    def __init__(self, file: BinaryIO, unpack: Callable[[BinaryIO], Any]) -> None:
        self._file = file
        try:
            self._unpacked = unpack(file)
        except BaseException:
            file.close()
            raise
        self.read = self._unpacked.read
        self.seek = self._unpacked.seek
        self.tell = self._unpacked.tell

    def close(self) -> None:
        """Close both."""
        self._unpacked.close()
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def is_url(place: str) -> bool:
    """Tell whether a place is a URL that fsspec opens; `file://` is a path."""
    return _URL.match(place) is not None and not place.startswith(_LOCAL)


def local_path(given: str) -> str:
    """Return a path, with `file://` taken off."""
    return given.removeprefix(_LOCAL)


def open_binary(place: str) -> BinaryIO:
    """Open a regular file or a URL for reading anywhere in it.

    Raises:
        InputError: It cannot be opened; the message is the reason.
    """
    if not is_url(place):
        return os.fdopen(open_regular(place), "rb", buffering=0)
    system, path = file_system(place)
    return cast("BinaryIO", call(system.open, path, "rb"))


def file_system(url: str) -> tuple[Any, str]:
    """Return the fsspec file system of a URL, and the path in it.

    Raises:
        UsageError: fsspec or the package for this kind of URL is not installed, or it is unknown.
    """
    try:
        import fsspec

        system, path = fsspec.core.url_to_fs(url)
    except ImportError as error:
        raise UsageError(f"{url}: {error}. Install: pip install 'vsc-serve[urls]'") from error
    except ValueError as error:
        raise UsageError(f"{url}: {error}. Check the URL.") from error
    return system, path


def call(function: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
    """Call into a remote file system; whatever goes wrong there becomes an InputError."""
    try:
        return function(*arguments, **named)
    except FileNotFoundError as error:
        raise InputError("no such file") from error
    except Exception as error:  # every file system has errors of its own
        text = " ".join(str(error).split())
        raise InputError(f"unreadable: {text or type(error).__name__}") from error
