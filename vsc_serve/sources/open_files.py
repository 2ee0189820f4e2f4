"""Keep open in each thread what images are read from one after the other."""

import os
import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, Final, TypeVar, cast

from vsc_serve.sources.retry import RetryPolicy

_MOST_OPEN: Final = 4
"""Archives that one thread keeps open. Sources come in order, so that it rarely needs a second."""

Handle = TypeVar("Handle")


class _Open(threading.local):
    """Files that this thread has open, in this process."""

    process = -1
    handles: "OrderedDict[tuple[str, object], _Kept]"


_open = _Open()


def keep_open(
    place: str, opener: Callable[[str, RetryPolicy], Handle], retry: RetryPolicy
) -> Handle:
    """Return what `opener` makes of a place, the same one each time.

    After a fork it is opened again: two processes with one file position would read nonsense.

    Args:
        place: Path or URL.
        opener: Called when this thread has nothing open for this place and opener.
        retry: How often and how long to try while the place cannot be reached.
    """
    if _open.process != os.getpid():
        _open.process, _open.handles = os.getpid(), OrderedDict()
    key = (place, opener)
    if key not in _open.handles:
        _open.handles[key] = _Kept(opener(place, retry))
        if len(_open.handles) > _MOST_OPEN:
            _open.handles.popitem(last=False)
    _open.handles.move_to_end(key)
    return cast("Handle", _open.handles[key].handle)


def drop(place: str, opener: Callable[..., object]) -> None:
    """Close what `keep_open` has: after an error its position is anyone's guess."""
    if _open.process == os.getpid():
        _open.handles.pop((place, opener), None)


class _Kept:
    """Closes what it holds when nobody holds it: dropped, pushed out, or its thread at an end."""

    def __init__(self, handle: Any) -> None:
        self.handle = handle

    def __del__(self) -> None:
        self.handle.close()
