"""How sources are cut into chunks: small at first, then as many as take a tenth of a second."""

from collections.abc import Iterator
from itertools import islice
from typing import Final

from vsc_serve.pipeline.task import CHUNK, Chunk, Piece
from vsc_serve.sources import Source

_SMALLEST: Final = 8
_FIRST: Final = 16
"""Images in a chunk before anything was measured: the first code comes soon."""
_CHUNK_S: Final = 0.1
"""Seconds that a worker should spend on a chunk: long beside sending it, short beside a run."""


class ChunkSize:
    """The number of sources in the next chunk, from how long the last one took.

    Chunks decide nothing about the codes: a row is the same whatever else is encoded with it.
    """

    def __init__(self, fixed: int | None = None, largest: int = CHUNK) -> None:
        self._is_fixed = fixed is not None
        self._largest = largest
        self.value = min(fixed or _FIRST, largest)

    def learn(self, piece: Piece) -> None:
        """Take note of how long a piece took."""
        spent = piece.seconds.read + piece.seconds.decode + piece.seconds.model
        if self._is_fixed or not piece.stamps or spent <= 0:
            return
        fitting = _CHUNK_S / spent * len(piece.stamps)
        power = 1 << max(int(fitting), 1).bit_length() - 1
        self.value = max(_SMALLEST, min(self._largest, power))

    def cut(self, sources: Iterator[Source]) -> Iterator[Chunk]:
        """Cut sources into chunks of the size that is right at the time."""
        while chunk := tuple(islice(sources, self.value)):
            yield chunk
