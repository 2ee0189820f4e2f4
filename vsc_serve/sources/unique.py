"""Refuse two sources with one id, in little memory."""

import hashlib
from collections.abc import Callable, Iterator
from typing import Final, TypeVar

import numpy as np
from numpy.typing import NDArray

from vsc_serve.errors import UsageError
from vsc_serve.sources.base import Source

Item = TypeVar("Item", bound=Source)

_BLOCK: Final = 65_536
"""Ids that are compared at once with all earlier ones."""


def unique_ids(
    sources: Iterator[Item],
    again: Callable[[], Iterator[Source]] | None,
) -> Iterator[Item]:
    """Pass sources on, as long as no two have the same id.

    Of the ids, 64-bit digests are kept: 8 MB for a million. Two in a million million runs of a
    million images would be refused for equal digests of different ids.

    Args:
        sources: The sources.
        again: Gives them once more, to find the first of two; None where that cannot be.

    Raises:
        UsageError: Two have the same id; it names both. It comes within the next 65,536 sources.
    """
    earlier = np.empty(0, np.uint64)
    block: dict[int, str] = {}
    for source in sources:
        digest = _digest(source.id)
        if digest in block:
            raise _refuse(source.id, again)
        block[digest] = source.id
        if len(block) == _BLOCK:
            earlier, block = _merge(earlier, block, again), {}
        yield source
    _merge(earlier, block, again)


def _digest(name: str) -> int:
    content = name.encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest())


def _merge(
    earlier: NDArray[np.uint64],
    block: dict[int, str],
    again: Callable[[], Iterator[Source]] | None,
) -> NDArray[np.uint64]:
    """Return all digests, sorted. Raises UsageError when one of the block is there already."""
    new = np.sort(np.fromiter(block, np.uint64, len(block)))
    places = np.searchsorted(earlier, new)
    is_there = np.zeros(len(new), np.bool_)
    if len(earlier):
        is_there = earlier[np.minimum(places, len(earlier) - 1)] == new
    if is_there.any():
        raise _refuse(block[int(new[is_there][0])], again)
    return np.insert(earlier, places, new)


def _refuse(name: str, again: Callable[[], Iterator[Source]] | None) -> UsageError:
    """Name the two sources that would have the same id."""
    sources = [] if again is None else _first_two(name, again())
    places = " and ".join(getattr(source, "where", repr(source)) for source in sources)
    return UsageError(
        f"two images would have the id {name!r}{': ' if places else ''}{places}."
        ' Give each image once, or choose longer ids: `ids="relative"`, or `ids="absolute"`.'
    )


def _first_two(name: str, sources: Iterator[Source]) -> list[Source]:
    same = (source for source in sources if source.id == name)
    return [source for source, _ in zip(same, range(2), strict=False)]
