"""Examples by row number, as the model takes them, and the order in which training sees them."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vsc_training.outliers import Bound


@dataclass(frozen=True)
class Feed:
    """Examples by row number, as the model takes them: on the device where they fit."""

    rows: Tensor | NDArray[Any]
    device: torch.device
    bound: Bound | None = None
    """Draws in vectors that lie far from all others; None leaves every row as it is."""

    @classmethod
    def of(cls, rows: NDArray[Any], device: torch.device) -> "Feed":
        """Hold rows on the device; rows that are mapped from a file stay there."""
        if isinstance(rows, np.memmap):
            return cls(rows, device)
        return cls(torch.from_numpy(np.ascontiguousarray(rows)).to(device), device)

    def take(self, numbers: Tensor) -> Tensor:
        """Return rows as float32, images in [0, 1]."""
        if isinstance(self.rows, Tensor):
            taken = self.rows.index_select(0, numbers.to(self.device))
        else:
            taken = torch.from_numpy(self.rows[numbers.numpy()]).to(self.device)
        if taken.dtype == torch.uint8:
            return taken.float() / 255.0
        return taken.float() if self.bound is None else self.bound.draw_in(taken.float())

    def batches(self, numbers: Tensor, size: int) -> Iterator[Tensor]:
        """Yield the rows in runs of `size`."""
        for start in range(0, len(numbers), size):
            yield self.take(numbers[start : start + size])


class BatchOrder:
    """Row numbers of each batch: a function of the seed and the step.

    Every epoch is a permutation of its own, derived from the seed and the number of the epoch; what
    does not fill a batch at its end is left out. The permutation of the last epoch that was asked
    for is kept.

    Args:
        numbers: Row numbers to train on, at least a batch of them.
        batch_size: Rows of a batch.
        seed: The run's seed.
    """

    def __init__(self, numbers: Tensor, batch_size: int, seed: int) -> None:
        self._numbers, self._batch_size, self._seed = numbers, batch_size, seed
        self._epoch, self._order = 0, self.epoch(0)

    def batch(self, step: int) -> Tensor:
        """Return the row numbers of a step, counted from 0."""
        epoch, position = divmod(step, len(self._numbers) // self._batch_size)
        if epoch != self._epoch:
            self._epoch, self._order = epoch, self.epoch(epoch)
        start = position * self._batch_size
        return self._order[start : start + self._batch_size]

    def epoch(self, number: int) -> Tensor:
        """Return all row numbers in the order of an epoch."""
        seeds = np.random.SeedSequence((self._seed, number)).generate_state(1, np.uint64)
        generator = torch.Generator().manual_seed(int(seeds[0] >> np.uint64(1)))
        return self._numbers[torch.randperm(len(self._numbers), generator=generator)]
