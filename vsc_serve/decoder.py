"""From codes back to images or vectors."""

from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from vsc_serve.bundle import DECODER, Manifest, open_bundle
from vsc_serve.codes import Codes
from vsc_serve.errors import InputError
from vsc_serve.session import Device, Session, open_graph

BATCH_SIZE: Final = 256
"""Codes that the graph is given at a time."""


class Decoder:
    """Draws what a code says: the mean of the likelihood, as pixels in [0, 1] (or as vectors)."""

    def __init__(self, session: Session, manifest: Manifest) -> None:
        """Wrap an open session. `Decoder.open` is what most callers want."""
        self._session = session
        self.manifest = manifest

    @classmethod
    def open(cls, path: Path | str, *, device: Device = "auto", threads: int = 0) -> "Decoder":
        """Open the decoder of a bundle. Raises what `Encoder.open` raises."""
        bundle = open_bundle(Path(path))
        session = open_graph(bundle, DECODER, device=device, threads=threads)
        return cls(session, bundle.manifest)

    def decode(self, codes: Codes) -> NDArray[np.float32]:
        """Decode sparse codes.

        Args:
            codes: Shape (images, latents).

        Returns:
            Means, shape (images, height, width, channels) in [0, 1], or (vectors, dimensions).

        Raises:
            InputError: The codes have another number of latents than the model.
        """
        if codes.shape[1] != self.manifest.latent_dim:
            raise InputError(
                f"codes have {codes.shape[1]} latents, but model {self.manifest.name} has"
                f" {self.manifest.latent_dim}. Decode with the model that made them."
            )
        starts = range(0, max(codes.shape[0], 1), BATCH_SIZE)
        parts = [
            self._session.run(["mean"], {"code": _dense(codes[start : start + BATCH_SIZE])})[0]
            for start in starts
        ]
        return np.concatenate(parts)


def _dense(codes: Codes) -> NDArray[np.float32]:
    return codes.toarray().astype(np.float32, copy=False)
