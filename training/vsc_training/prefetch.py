"""Read ahead: a thread prepares what the coming steps need while the current one computes."""

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Final, Generic, TypeVar

_T = TypeVar("_T")

_AHEAD: Final = 3
"""Steps that are read ahead."""


class Prefetcher(Generic[_T]):
    """Results of a function of the step, computed ahead by one thread, in order.

    Steps are expected one after the other; asking for another one (after a resume) begins anew
    there. An error of the function is raised where its step is asked for.

    Args:
        read: The function; only the thread calls it.
    """

    def __init__(self, read: Callable[[int], _T]) -> None:
        self._read = read
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="prefetch")
        self._coming: deque[Future[_T]] = deque()
        self._next = 0

    def take(self, step: int) -> _T:
        """Return the result of a step."""
        if step != self._next - len(self._coming):
            self._begin_at(step)
        while len(self._coming) <= _AHEAD:
            self._coming.append(self._thread.submit(self._read, self._next))
            self._next += 1
        return self._coming.popleft().result()

    def _begin_at(self, step: int) -> None:
        for future in self._coming:
            future.cancel()
        self._coming.clear()
        self._next = step
