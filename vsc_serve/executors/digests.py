"""Digests of what codes were made from: an image that is the same need not be encoded again."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Self

import numpy as np
from numpy.typing import NDArray

from vsc_serve.atomic import atomic_file

_WORDS = 4
"""A sha256 is four words of 64 bits."""


class DigestTable:
    """Finds the row of a digest among many.

    Args:
        table: Sorted rows of five words: the digest's four, and the row it belongs to.
    """

    def __init__(self, table: NDArray[np.uint64]) -> None:
        self._table = table
        self._first = np.ascontiguousarray(table[:, 0])

    @classmethod
    def load(cls, path: Path) -> Self:
        """Map what `save_digests` wrote; processes share the memory."""
        return cls(np.load(path, mmap_mode="r", allow_pickle=False))

    def row_of(self, digest: bytes) -> int:
        """Return the row that was made from content of this digest, -1 without one."""
        words = np.frombuffer(digest, ">u8").astype(np.uint64)
        start = np.searchsorted(self._first, words[0], "left")
        stop = np.searchsorted(self._first, words[0], "right")
        for row in self._table[start:stop]:
            if (row[:_WORDS] == words).all():
                return int(row[_WORDS])
        return -1


def save_digests(path: Path, digests: Sequence[str]) -> None:
    """Write digests, one per row, in the order that they are searched in."""
    words = np.frombuffer(bytes.fromhex("".join(digests)), ">u8").astype(np.uint64)
    table = np.empty((len(digests), _WORDS + 1), np.uint64)
    table[:, :_WORDS] = words.reshape(-1, _WORDS)
    table[:, _WORDS] = np.arange(len(digests))
    content = io.BytesIO()  # into a file `np.save` writes without a look at whether it could
    np.save(content, table[np.argsort(table[:, 0], kind="stable")], allow_pickle=False)
    with atomic_file(path) as file:
        file.write(content.getbuffer())
