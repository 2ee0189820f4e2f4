"""Examples by row number, as the model takes them."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


@dataclass(frozen=True)
class Feed:
    """Examples by row number, as the model takes them: on the device where they fit."""

    rows: Tensor | NDArray[Any]
    device: torch.device

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
        return taken.float() / 255.0 if taken.dtype == torch.uint8 else taken.float()

    def batches(self, numbers: Tensor, size: int) -> Iterator[Tensor]:
        """Yield the rows in runs of `size`."""
        for start in range(0, len(numbers), size):
            yield self.take(numbers[start : start + size])
