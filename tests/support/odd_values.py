"""Odd values in JSON that somebody else may have written."""

from typing import Any, Final

import numpy as np

ODD: Final[list[Any]] = [
    *(None, True, 0, -1, 1.5, 2**31, 2**63, 10**30, 1e300, "", "x", "../x", "/dev/zero", "a\0b"),
    *("\ud800", "1" * 2000, [], {}, [[]], {"a": {"b": []}}, ["x"], [None], "manifest.json"),
    float("nan"),
]


def change_value(stored: Any, rng: np.random.Generator, *, depth: int) -> Any:
    """Put an odd value in the place of one that is there, or drop it.

    Args:
        stored: The JSON value.
        rng: Source of the choices.
        depth: One in so many changes goes no deeper.
    """
    if not isinstance(stored, dict | list) or not stored or rng.integers(depth) == 0:
        return ODD[rng.integers(len(ODD))]
    keys = list(stored) if isinstance(stored, dict) else list(range(len(stored)))
    key = keys[rng.integers(len(keys))]
    changed = stored.copy()
    if rng.integers(10) == 0:
        del changed[key]
    else:
        changed[key] = change_value(stored[key], rng, depth=depth)
    return changed
