"""Vectors that lie far from all others, and what training makes of them.

One per cent of rows with a hundred times the norm (attention sinks of a language model, rows that
nobody normalised) take the whole scale, and the learned variance after it: nearly all latents die.
So training sees such rows drawn in to where the median row lies, their direction kept. Data without
such rows are seen as they are, to the bit.
"""

from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

FAR: Final = 5.0
"""Distance from the centre, in median distances, beyond which a row is drawn in.

Rows of embeddings rarely lie beyond twice; training/LOG.md has what was measured.
"""


@dataclass(frozen=True)
class Bound:
    """What is near, as a sample of vectors has it."""

    center: Tensor
    """Median of each dimension, shape (dimensions)."""
    typical: Tensor
    """Median distance of the rows from the centre, a scalar."""
    far_share: float
    """Share of the sample's rows that are far."""
    farthest: float
    """Distance of the farthest row, in median distances."""

    @classmethod
    def of(cls, rows: Tensor) -> "Bound":
        """Measure a sample, shape (rows, dimensions)."""
        center = rows.median(0).values
        distances = (rows - center).double().norm(dim=1)
        away = distances[distances > 0]  # most rows may be the same one
        typical = away.median() if len(away) else torch.ones_like(distances.sum())
        relative = distances / typical
        return cls(
            center=center,
            typical=typical,
            far_share=float((relative > FAR).double().mean()),
            farthest=float(relative.max()),
        )

    def draw_in(self, rows: Tensor) -> Tensor:
        """Return rows with those that are far at the median distance, in the same direction."""
        away = rows - self.center
        distances = away.double().norm(dim=1, keepdim=True)
        nearer = self.center + away * (self.typical / distances).to(away.dtype)
        return torch.where(distances > FAR * self.typical, nearer, rows)
