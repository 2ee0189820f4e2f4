"""Media types: what requests bring, what answers are, and which one a client prefers."""

from collections.abc import Sequence
from typing import Final

JSON: Final = "application/json"
NPZ: Final = "application/x-npz"
MULTIPART: Final = "multipart/form-data"
METRICS: Final = "text/plain; version=0.0.4"
"""Text format of Prometheus."""
RAW: Final = "application/octet-stream"


def preferred(accept: str, offers: Sequence[str]) -> str | None:
    """Return the offer that an Accept header prefers, the first without a preference; or None."""
    qualities = dict(map(_media_range, accept.split(","))) if accept.strip() else {"*/*": 1.0}

    def quality(offer: str) -> float:
        matching = (offer, "application/*", "*/*")  # the most specific one counts
        return next((qualities[name] for name in matching if name in qualities), 0.0)

    best = max(offers, key=quality)
    return best if quality(best) > 0.0 else None


def _media_range(text: str) -> tuple[str, float]:
    """Split `type/subtype; q=0.5` into its name and its quality, 1 where no number is given."""
    name, *parameters = (part.strip().lower() for part in text.split(";"))
    given = next((part[2:] for part in parameters if part.startswith("q=")), "1")
    try:
        return name, float(given)
    except ValueError:
        return name, 1.0
