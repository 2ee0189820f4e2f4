"""Statistics of codes: active latents per image; live, dead and always-on features.

They are added up while codes pass by, so that nothing has to stay in memory. This is the one place
that says what a live feature is.
"""

from dataclasses import asdict, dataclass, field
from typing import Any, Final, Self

import numpy as np
from numpy.typing import NDArray

from vsc_serve.codes.rows import Codes

LIVE_SHARE: Final = 1e-3
"""A feature is live when it is on for at least this share of the images, and dead otherwise."""
ALWAYS_ON_SHARE: Final = 0.99
"""A feature is always on when it is on for more than this share of the images."""


@dataclass
class DecisionStatistics:
    """Statistics of the encoder's decisions: near the threshold, and dropped by a limit."""

    judged: int = 0
    """Images of which decisions near the threshold were counted."""
    near_threshold: int = 0
    """Their decisions that lie in the guard band around the threshold."""
    kept_energy: float = 0.0
    """Sum of squared slab means over the entries of the codes."""
    total_energy: float = 0.0
    """The same over all active latents, before `max_active` dropped the weakest."""

    def add(self, other: "DecisionStatistics") -> None:
        """Add the statistics of other images."""
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)


@dataclass
class CodeStatistics:
    """Statistics of a set of codes."""

    firing: NDArray[np.int64]
    """Images in which each feature is on, shape (latents,)."""
    images: int = 0
    """Rows of the codes."""
    entries: int = 0
    """Active latents of all images."""
    empty: int = 0
    """Images without an active latent."""
    fresh: int = 0
    """Images that were encoded, and not taken from earlier codes."""
    decisions: DecisionStatistics = field(default_factory=DecisionStatistics)

    @classmethod
    def none(cls, latent_dim: int) -> Self:
        """Return the statistics of no images."""
        return cls(np.zeros(latent_dim, np.int64))

    @classmethod
    def of(
        cls, codes: Codes, *, fresh: int = 0, decisions: DecisionStatistics | None = None
    ) -> Self:
        """Return the statistics of codes.

        Args:
            codes: Shape (images, latents).
            fresh: How many of the images were encoded just now.
            decisions: What the encoder saw of them.
        """
        return cls(
            firing=np.bincount(codes.indices, minlength=codes.shape[1]).astype(np.int64),
            images=codes.shape[0],
            entries=codes.nnz,
            empty=int((np.diff(codes.indptr) == 0).sum()),
            fresh=fresh,
            decisions=decisions or DecisionStatistics(),
        )

    @property
    def latents(self) -> int:
        """Latents J."""
        return len(self.firing)

    @property
    def active(self) -> float:
        """Active latents per image, on average."""
        return self.entries / self.images if self.images else 0.0

    @property
    def live(self) -> int:
        """Features that are on for at least LIVE_SHARE of the images."""
        return int((self.firing >= LIVE_SHARE * max(self.images, 1)).sum())

    @property
    def dead(self) -> int:
        """Features that are not live."""
        return self.latents - self.live

    @property
    def always_on(self) -> int:
        """Features that are on for more than ALWAYS_ON_SHARE of the images."""
        return int((self.firing > ALWAYS_ON_SHARE * max(self.images, 1)).sum())

    @property
    def near_share(self) -> float | None:
        """Share of the decisions that lie in the guard band; None where none were counted."""
        count = self.decisions.judged * self.latents
        return self.decisions.near_threshold / count if count else None

    def add(self, other: "CodeStatistics") -> None:
        """Add the statistics of other images."""
        for name in ("firing", "images", "entries", "empty", "fresh"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.decisions.add(other.decisions)

    def summary(self) -> dict[str, Any]:
        """Return what a person asks first, by name."""
        return {
            "images": self.images,
            "latents": self.latents,
            "active": self.active,
            "empty": self.empty,
            "live": self.live,
            "always_on": self.always_on,
        }

    def to_json(self) -> dict[str, Any]:
        """Return all counts as a JSON object."""
        return vars(self) | {"firing": self.firing.tolist(), "decisions": asdict(self.decisions)}

    @classmethod
    def from_json(cls, stored: dict[str, Any]) -> Self:
        """Read what `to_json` wrote."""
        firing = np.array(stored["firing"], np.int64)
        decisions = DecisionStatistics(**stored["decisions"])
        return cls(**stored | {"firing": firing, "decisions": decisions})
