"""Figures that are added up while codes pass by, so that nothing has to stay in memory."""

from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from vsc_serve.codes import CodeRows


@dataclass
class Figures:
    """Counts over the rows of a run."""

    firing: NDArray[np.int64]
    """Rows in which each latent is on, shape (latents,)."""
    rows: int = 0
    entries: int = 0
    """Active latents of all rows."""
    empty: int = 0
    """Rows without an active latent."""
    fresh: int = 0
    """Rows that were encoded in this run or the runs it resumed, and not taken from old codes."""
    judged: int = 0
    """Fresh rows of which decisions near the threshold were counted."""
    near_threshold: int = 0
    """Their decisions that lie in the guard band around the threshold."""
    kept_energy: float = 0.0
    total_energy: float = 0.0
    """Sum of squares of the fresh rows, after and before the limit of active latents."""

    @classmethod
    def none(cls, latent_dim: int) -> Self:
        """Return the figures of no rows."""
        return cls(np.zeros(latent_dim, np.int64))

    @classmethod
    def of(cls, rows: CodeRows, *, fresh: int, judged: int) -> Self:
        """Return the figures of some rows, of which `fresh` and `judged` are as above."""
        codes = rows.codes
        return cls(
            firing=np.bincount(codes.indices, minlength=codes.shape[1]).astype(np.int64),
            rows=codes.shape[0],
            entries=codes.nnz,
            empty=int((np.diff(codes.indptr) == 0).sum()),
            fresh=fresh,
            judged=judged,
            near_threshold=rows.near_threshold,
            kept_energy=rows.kept_energy,
            total_energy=rows.total_energy,
        )

    def add(self, other: "Figures") -> None:
        """Add the figures of other rows."""
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)

    def to_json(self) -> dict[str, Any]:
        """Return the figures as a JSON object."""
        return vars(self) | {"firing": self.firing.tolist()}

    @classmethod
    def from_json(cls, stored: dict[str, Any]) -> Self:
        """Read what `to_json` wrote."""
        return cls(**stored | {"firing": np.array(stored["firing"], np.int64)})
