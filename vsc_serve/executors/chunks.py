"""How sources are cut into chunks: small, then a tenth of a second each, and small at the end."""

from collections import deque
from collections.abc import Iterator
from itertools import islice
from typing import Final

from vsc_serve.executors.task import LARGEST_CHUNK, Chunk, ChunkResult
from vsc_serve.sources import Source

_SMALLEST: Final = 8
FIRST: Final = 16
"""Images in a chunk before anything was measured: the first code comes soon."""
_CHUNK_S: Final = 0.1
"""Seconds that a worker should spend on a chunk: long beside sending it, short beside a run."""
_ROUNDS_AHEAD: Final = 2
"""Chunks per worker that are looked ahead for the end of the sources."""


class ChunkSize:
    """The number of sources in the next chunk, from how long the last one took.

    Chunks decide nothing about the codes: a row is the same whatever else is encoded with it.

    Args:
        fixed: Sources in a chunk, if they are not to be measured.
        largest: Sources in a chunk at most.
        workers: Towards the end chunks shrink, so that no worker is left with a whole chunk while
            the others have none.
    """

    def __init__(
        self, fixed: int | None = None, largest: int = LARGEST_CHUNK, workers: int = 1
    ) -> None:
        self._is_fixed = fixed is not None
        self._largest = largest
        self._shares = workers * _ROUNDS_AHEAD if workers > 1 else 1
        self.value = min(fixed or FIRST, largest)

    def learn(self, result: ChunkResult) -> None:
        """Take note of how long a chunk took."""
        spent = result.seconds.read + result.seconds.decode + result.seconds.model
        if self._is_fixed or not result.signatures or spent <= 0:
            return
        fitting = _CHUNK_S / spent * len(result.signatures)
        power = 1 << max(int(fitting), 1).bit_length() - 1
        self.value = max(_SMALLEST, min(self._largest, power))

    def cut(self, sources: Iterator[Source]) -> Iterator[Chunk]:
        """Cut sources into chunks of the size that is right at the time."""
        ahead: deque[Source] = deque()
        while True:
            missing = self.value * self._shares - len(ahead)
            ahead.extend(islice(sources, max(missing, 0)))
            if not ahead:
                return
            count = self._next(len(ahead))
            yield tuple(ahead.popleft() for _ in range(count))

    def _next(self, ahead: int) -> int:
        """Return the size of a chunk when so many sources are known to follow."""
        if self._is_fixed or ahead >= self.value * self._shares:
            return min(self.value, ahead)
        share = max(_SMALLEST, -(-ahead // self._shares))
        return min(share, self.value, ahead)
