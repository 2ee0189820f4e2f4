"""Figures of the features in a set of codes."""

from typing import Any, Final

import numpy as np

from vsc_serve.codes import Codes

LIVE_SHARE: Final = 1e-3
"""A feature is live when it is on for at least this share of the rows."""
ALWAYS_ON_SHARE: Final = 0.99
"""A feature is always on when it is on for more than this share of the rows."""


def feature_summary(codes: Codes) -> dict[str, Any]:
    """Return figures of codes: active per image, live and always-on features, empty rows.

    Args:
        codes: Shape (images, latents).
    """
    image_count, latent_dim = codes.shape
    firing = np.bincount(codes.indices, minlength=latent_dim) / max(image_count, 1)
    row_counts = np.diff(codes.indptr)
    return {
        "images": image_count,
        "latents": latent_dim,
        "active": float(row_counts.mean()) if image_count else 0.0,
        "empty": int((row_counts == 0).sum()),
        "live": int((firing >= LIVE_SHARE).sum()),
        "always_on": int((firing > ALWAYS_ON_SHARE).sum()),
    }
