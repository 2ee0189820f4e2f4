"""The data sets of the benchmark: rows to fit and rows to test, with labels or true factors."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from vsc_serve.errors import UsageError
from vsc_serve.images import PixelSpec
from vsc_training.data import Examples, load_examples
from vsc_training.model import DataSpec
from vsc_training.smiley import Smiley, generate

_SMILEY_TRAIN: Final = 50_000
_SMILEY_TEST: Final = 10_000
_SMILEY_SEEDS: Final = (1000, 1001)
_TEST_SHARE: Final = 0.25
"""Share of a data set in one file that is kept for the test."""


@dataclass(frozen=True)
class Dataset:
    """One data set, in two parts."""

    train: Examples
    test: Examples
    test_factors: NDArray[np.float32] | None = None
    """True factors of the test rows, where they are known, shape (rows, factors).

    NaN where a factor has no effect on a row.
    """

    def labels(self) -> tuple[NDArray[np.int64], NDArray[np.int64]] | None:
        """Return the labels of both parts, or None when one of them has none."""
        if self.train.labels is None or self.test.labels is None:
            return None
        return self.train.labels, self.test.labels


@cache
def load_dataset(source: str) -> Dataset:
    """Read a data set once per process.

    Args:
        source: `smiley`; or TRAIN,TEST, each a folder of images or an npz or npy file; or one
            path: a folder with `train` and `test` in it, or a file of which a quarter is the test.

    Raises:
        UsageError: Nothing usable there.
    """
    if source == "smiley":
        return _smiley()
    paths = [Path(path) for path in source.split(",")]
    if len(paths) == 2:
        return Dataset(load_examples(paths[0]), load_examples(paths[1]))
    if len(paths) > 2:
        raise UsageError(f"{source}: expected TRAIN,TEST or one path, not {len(paths)} paths.")
    if paths[0].is_dir():
        return Dataset(load_examples(paths[0] / "train"), load_examples(paths[0] / "test"))
    return _split(load_examples(paths[0]))


def read_sources(arguments: Sequence[str]) -> dict[str, str]:
    """Read `NAME=SOURCE` arguments; `smiley` needs no source. Raises UsageError."""
    sources = {}
    for argument in arguments:
        name, separator, source = argument.partition("=")
        if not separator and name != "smiley":
            raise UsageError(f"--data {argument}: expected NAME=TRAIN,TEST, NAME=PATH or smiley.")
        sources[name] = source or "smiley"
    return sources


def _split(examples: Examples) -> Dataset:
    return split_off(examples, _TEST_SHARE, b"test")


def split_off(examples: Examples, share: float, salt: bytes) -> Dataset:
    """Split by the content of the rows, so that equal rows are all on one side.

    Args:
        examples: The rows.
        share: Share of the rows that become the test.
        salt: Another one gives another choice: needed to split a part that was split off.
    """
    keys = np.array([_key(row, salt) for row in examples.rows])
    is_test = keys < share * 2**32
    return Dataset(
        _pick(examples, np.flatnonzero(~is_test)), _pick(examples, np.flatnonzero(is_test))
    )


def _key(row: NDArray[Any], salt: bytes) -> int:
    digest = hashlib.blake2b(row.tobytes(), digest_size=4, salt=salt).digest()
    return int.from_bytes(digest, "little")


def _pick(examples: Examples, numbers: NDArray[np.intp]) -> Examples:
    return replace(
        examples,
        rows=np.ascontiguousarray(examples.rows[numbers]),
        ids=[examples.ids[number] for number in numbers],
        labels=None if examples.labels is None else examples.labels[numbers],
    )


def _smiley() -> Dataset:
    train = generate(_SMILEY_TRAIN, _SMILEY_SEEDS[0])
    test = generate(_SMILEY_TEST, _SMILEY_SEEDS[1])
    return Dataset(_smiley_examples(train), _smiley_examples(test), _factors(test))


def _smiley_examples(smiley: Smiley) -> Examples:
    """Return faces as examples; a label is the set of attributes a face has, one of sixteen."""
    first_factors = (0, 4, 10, 13)  # one column of each attribute
    labels = smiley.spikes[:, first_factors] @ (1, 2, 4, 8)
    images = smiley.images[..., None]
    spec = DataSpec(pixel_spec=PixelSpec(height=images.shape[1], width=images.shape[2], channels=1))
    ids = [str(number) for number in range(len(images))]
    return Examples(images, ids, spec, labels.astype(np.int64))


def _factors(smiley: Smiley) -> NDArray[np.float32]:
    """Return each factor's value, NaN where its attribute is absent, shape (images, 18)."""
    return np.where(smiley.spikes, smiley.values, np.float32(np.nan))
