"""Examples by row number, as the model takes them, and the order in which training sees them."""

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vsc_training.memory import free_bytes
from vsc_training.outliers import Bound
from vsc_training.prefetch import Prefetcher

logger = logging.getLogger(__name__)

_FILLED_SHARE: Final = 0.8
"""Share of a GPU's free memory that examples and model may take together."""
_COPIED_AT_ONCE: Final = 2**26
"""Bytes that are read from a mapped file at once on the way to a GPU."""


@dataclass(frozen=True)
class DeviceDataset:
    """Examples by row number, as the model takes them: on the device where they fit."""

    rows: Tensor | NDArray[Any]
    device: torch.device
    bound: Bound | None = None
    """Draws in vectors that lie far from all others; None leaves every row as it is."""

    @classmethod
    def of(
        cls, rows: NDArray[Any], device: torch.device, *, needed_bytes: int = 0
    ) -> "DeviceDataset":
        """Hold rows where they are computed with, if they fit there.

        On a CPU, rows that are mapped from a file stay there. A GPU gets all rows if they fit into
        its memory, mapped or not; if they do not, each batch is copied when it is needed.

        Args:
            rows: Shape (rows, *shape).
            device: Where the model computes.
            needed_bytes: Memory of a GPU that something else will need.
        """
        if device.type == "cpu":
            is_mapped = isinstance(rows, np.memmap)
            return cls(rows if is_mapped else torch.from_numpy(np.ascontiguousarray(rows)), device)
        free = free_bytes(device)
        if free is not None and rows.nbytes + needed_bytes > _FILLED_SHARE * free:
            logger.info(
                "the examples take %.1f GiB and the GPU has %.1f GiB free: batches are copied"
                " while it computes",
                rows.nbytes / 2**30,
                free / 2**30,
            )
            return cls(rows, device)
        return cls(_copied(rows, device), device)

    @property
    def index_device(self) -> torch.device:
        """Where row numbers are needed: where the rows lie."""
        return self.rows.device if isinstance(self.rows, Tensor) else torch.device("cpu")

    def take(self, numbers: Tensor) -> Tensor:
        """Return rows as float32, images in [0, 1]."""
        if isinstance(self.rows, Tensor):
            return self.scaled(self.rows.index_select(0, numbers.to(self.rows.device)))
        return self.scaled(self.read(numbers).to(self.device))

    def read(self, numbers: Tensor) -> Tensor:
        """Return rows that are not on the device as they are, in main memory."""
        assert not isinstance(self.rows, Tensor)  # the caller has asked `index_device`
        return torch.from_numpy(self.rows[numbers.numpy()])

    def scaled(self, taken: Tensor) -> Tensor:
        """Return rows as the model takes them."""
        if taken.dtype == torch.uint8:
            return taken.float() / 255.0
        return taken.float() if self.bound is None else self.bound.draw_in(taken.float())

    def batches(self, numbers: Tensor, size: int) -> Iterator[Tensor]:
        """Yield the rows in runs of `size`."""
        numbers = numbers.to(self.index_device)
        for start in range(0, len(numbers), size):
            yield self.take(numbers[start : start + size])


def _copied(rows: NDArray[Any], device: torch.device) -> Tensor:
    """Copy rows to a device, part by part: a mapped file need not fit into main memory."""
    dtype = torch.from_numpy(np.empty(0, rows.dtype)).dtype
    copied = torch.empty(rows.shape, dtype=dtype, device=device)
    count = max(1, _COPIED_AT_ONCE // max(1, rows[:1].nbytes))
    for start in range(0, len(rows), count):
        part = np.array(rows[start : start + count])
        copied[start : start + count].copy_(torch.from_numpy(part))
    return copied


class BatchOrder:
    """Row numbers of each batch: a function of the seed and the step.

    Every epoch is a permutation of its own, derived from the seed and the number of the epoch; what
    does not fill a batch at its end is left out. The permutation of the last epoch that was asked
    for is kept, on the device where the rows lie: to send row numbers there in every step would
    make every step wait.

    Args:
        numbers: Row numbers to train on, at least a batch of them.
        batch_size: Rows of a batch.
        seed: The run's seed.
        device: Where the rows lie.
    """

    def __init__(
        self, numbers: Tensor, batch_size: int, seed: int, device: torch.device | None = None
    ) -> None:
        self._numbers, self._batch_size, self._seed = numbers, batch_size, seed
        self._device = device or numbers.device
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
        order = self._numbers[torch.randperm(len(self._numbers), generator=generator)]
        return order.to(self._device)


class _Copy(NamedTuple):
    """Rows on their way to a GPU."""

    rows: Tensor
    is_there: torch.cuda.Event


def batch_source(
    dataset: DeviceDataset, numbers: Callable[[int], Tensor]
) -> Callable[[int], Tensor]:
    """Return the function that gives the batch of a step.

    Rows that do not lie on the GPU that computes are read ahead: a thread takes them into pinned
    memory and copies them on a stream of its own, beside the steps before.

    Args:
        dataset: The examples.
        numbers: Gives the row numbers of a step.
    """
    if dataset.device.type != "cuda" or isinstance(dataset.rows, Tensor):
        return lambda step: dataset.take(numbers(step))
    stream = torch.cuda.Stream(dataset.device)

    def start(step: int) -> _Copy:
        pinned = dataset.read(numbers(step)).pin_memory()
        with torch.cuda.stream(stream):
            rows = pinned.to(dataset.device, non_blocking=True)
            return _Copy(rows, stream.record_event())

    ahead = Prefetcher(start)

    def take(step: int) -> Tensor:
        copy, own = ahead.take(step), torch.cuda.current_stream(dataset.device)
        own.wait_event(copy.is_there)
        copy.rows.record_stream(own)  # its memory is free again when this stream has used it
        return dataset.scaled(copy.rows)

    return take
