"""The protocol of executors: processes, threads, a loop over an array, GPUs."""

from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any, Protocol

from vsc_serve.executors.task import Chunk, ChunkResult


class Executor(AbstractContextManager["Executor"], Protocol):
    """Reads and encodes chunks. It starts when it is entered, and ends when it is left."""

    workers: int
    """How many chunks are worked on at a time, at most."""
    kind: str
    """What works, in the plural, for people."""
    largest_chunk: int
    """Sources in a chunk at most."""

    @property
    def started(self) -> int:
        """How many workers were started: a small job does not need all of them."""

    def expect(self, count: int) -> None:
        """Take note that at least so many sources will come: start the workers they need."""

    def provenance(self) -> dict[str, Any]:
        """Return what a codes file says about where its codes come from."""

    def run(self, chunks: Iterator[Chunk]) -> Iterator[ChunkResult]:
        """Do the chunks; give their results in order.

        Only a few chunks are taken ahead of the results, so that memory stays bounded.
        """
