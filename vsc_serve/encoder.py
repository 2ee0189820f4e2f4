"""The one path from pixels to codes, and back: whatever makes a code calls `Encoder.encode`."""

import hashlib
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import PIL
from numpy.typing import NDArray
from PIL import Image

from vsc_serve.bundle import DECODER, ENCODER, Bundle, Manifest, Probe, open_bundle
from vsc_serve.codes import Codes, dense_to_csr, stack_codes, threshold_logit
from vsc_serve.errors import BundleError, InputError
from vsc_serve.images import decode_pixels, read_pixels
from vsc_serve.preprocess import PixelSpec
from vsc_serve.session import Device, Session, open_session

logger = logging.getLogger(__name__)

BATCH_SIZE: Final = 256
"""Rows a graph is given at a time; a batch of 32 already reaches 87 % of its speed."""

VALUE_TOLERANCE: Final = 1e-4
"""How far a value may lie from the one that was exported, on any engine."""

Picture = Path | str | bytes | Image.Image


class Encoder:
    """Turns images (or vectors) into sparse codes.

        encoder = Encoder.open("model/")
        codes = encoder.encode(["cat.jpg", "dog.jpg"])   # scipy.sparse.csr_array, one row each

    The same image gives the same code whatever else is in the batch.
    """

    def __init__(self, session: Session, manifest: Manifest) -> None:
        """Wrap an open session. `Encoder.open` is what most callers want."""
        self._session = session
        self.manifest = manifest

    @classmethod
    def open(cls, path: Path | str, *, device: Device = "auto", threads: int = 0) -> "Encoder":
        """Open the encoder of a bundle and check it against the bundle's probes.

        Args:
            path: Folder that `vsc export` wrote.
            device: `cpu`, `cuda` (an error where there is none), or `auto`.
            threads: Threads inside one operator; 0 lets onnxruntime choose.

        Raises:
            BundleError: The bundle is damaged, or does not give the codes it was exported with.
            DeviceError: The device or onnxruntime is not there.
        """
        bundle = open_bundle(Path(path))
        session = open_session(bundle.path / ENCODER, device=device, threads=threads)
        encoder = cls(session, bundle.manifest)
        logger.info("%s: %s on %s", path, bundle.manifest.name, session.engine)
        _check_probes(encoder, bundle)
        return encoder

    @property
    def engine(self) -> str:
        """What computes: engine, version and device."""
        return self._session.engine

    def encode(
        self, images: NDArray[Any] | Sequence[Picture], *, tau: float | None = None
    ) -> Codes:
        """Encode images or vectors into sparse codes.

        Args:
            images: Pixels, uint8, shape (images, height, width, channels) as `PixelSpec` says; or
                vectors, float32, shape (vectors, dimensions); or paths, encoded pictures or
                PIL images.
            tau: Spike threshold in (0, 1) in place of the model's own.

        Returns:
            Codes, shape (images, latents).

        Raises:
            InputError: Wrong shape or type, or a picture that cannot be read.
            UsageError: `tau` is out of range.
        """
        rows = images if isinstance(images, np.ndarray) else self._read(images)
        _check_rows(rows, self.manifest)
        limit = threshold_logit(self.manifest.tau if tau is None else tau)
        parts = [
            self._encode_batch(rows, start, limit) for start in range(0, len(rows), BATCH_SIZE)
        ]
        return stack_codes(parts, self.manifest.latent_dim)

    def provenance(self, *, tau: float | None = None) -> dict[str, Any]:
        """Return what a codes file says about where its codes come from."""
        from vsc_serve import __version__

        return {
            "model": self.manifest.name,
            "model_digest": self.manifest.digest,
            "tau": self.manifest.tau if tau is None else tau,
            "view": "mean",
            "engine": self.engine,
            "vsc_serve": __version__,
        }

    def _encode_batch(self, rows: NDArray[Any], start: int, limit: np.float32) -> Codes:
        batch = rows[start : start + BATCH_SIZE]
        feeds = {self.manifest.modality: batch, "tau_logit": np.array(limit)}
        (dense,) = self._session.run(["code"], feeds)
        codes = dense_to_csr(dense)
        if not np.isfinite(codes.data).all():
            bad = start + int(np.flatnonzero(~np.isfinite(dense).all(axis=1))[0])
            raise InputError(
                f"row {bad}: model {self.manifest.name} gives values that are not finite (NaN or"
                " infinity). Leave the row out; a model that does so for ordinary input is broken."
            )
        return codes

    def _read(self, pictures: Sequence[Picture]) -> NDArray[np.uint8]:
        spec = image_spec(self.manifest)
        if isinstance(pictures, str | bytes | Path | Image.Image):
            raise InputError("encode takes a list of pictures, not a single one: pass [picture]")
        pixels = [_picture_pixels(picture, row, spec) for row, picture in enumerate(pictures)]
        return np.stack(pixels) if pixels else np.empty((0, *spec.shape), np.uint8)


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
        session = open_session(bundle.path / DECODER, device=device, threads=threads)
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


def image_spec(manifest: Manifest) -> PixelSpec:
    """Return how pictures become pixels. Raises InputError for a model of vectors."""
    if manifest.pixel_spec is None:
        raise InputError(
            f"model {manifest.name} encodes vectors of length {manifest.input_dim}, not pictures"
        )
    return manifest.pixel_spec


def _dense(codes: Codes) -> NDArray[np.float32]:
    return codes.toarray().astype(np.float32, copy=False)


def _picture_pixels(picture: Picture, row: int, spec: PixelSpec) -> NDArray[np.uint8]:
    try:
        if isinstance(picture, Image.Image):
            return decode_pixels(picture, spec)
        if isinstance(picture, str | Path | bytes):
            return read_pixels(Path(picture) if isinstance(picture, str) else picture, spec)
    except InputError as error:
        name = f"row {row}" if isinstance(picture, bytes | Image.Image) else picture
        raise InputError(f"{name}: {error}") from error
    raise InputError(
        f"row {row}: a {type(picture).__name__} is no picture. Give paths, encoded pictures (bytes)"
        " or PIL images, or all pixels as one array."
    )


def _check_rows(rows: NDArray[Any], manifest: Manifest) -> None:
    if manifest.pixel_spec is not None:
        expected: tuple[int, ...] = manifest.pixel_spec.shape
        dtype: np.dtype[Any] = np.dtype(np.uint8)
    else:
        expected = (manifest.input_dim or 0,)
        dtype = np.dtype(np.float32)
    if rows.shape[1:] != expected or rows.dtype != dtype:
        raise InputError(
            f"model {manifest.name} takes {dtype} of shape (rows, {', '.join(map(str, expected))}),"
            f" not {rows.dtype} of shape {rows.shape}"
        )
    if rows.dtype.kind == "f" and not np.isfinite(rows).all():
        bad = int(np.flatnonzero(~np.isfinite(rows).all(axis=1))[0])
        raise InputError(f"row {bad} holds values that are not finite (NaN or infinity)")


def _check_probes(encoder: Encoder, bundle: Bundle) -> None:
    """Encode the bundle's probes and compare: preprocessing exactly, codes within the tolerance."""
    for probe in bundle.manifest.probes:
        path = bundle.path / probe.file
        rows = _read_probe(path, bundle.manifest)
        if hashlib.sha256(rows.tobytes()).hexdigest() != probe.pixels_sha256:
            raise BundleError(
                f"{path}: this machine's Pillow {PIL.__version__} turns it into other pixels than"
                f" at export (Pillow {bundle.manifest.versions.get('pillow', 'unknown')})."
                " Install that version, or export again."
            )
        _check_probe_code(path, probe, encoder.encode(rows))


def _read_probe(path: Path, manifest: Manifest) -> NDArray[Any]:
    if manifest.pixel_spec is None:
        return np.fromfile(path, np.float32)[None]
    return read_pixels(path, manifest.pixel_spec)[None]


def _check_probe_code(path: Path, probe: Probe, found: Codes) -> None:
    is_same = found.indices.tolist() == probe.indices and np.allclose(
        found.data, np.array(probe.values, np.float32), rtol=0.0, atol=VALUE_TOLERANCE
    )
    if not is_same:
        raise BundleError(
            f"{path}: gives another code than at export: latents {found.indices.tolist()}, expected"
            f" {probe.indices}. The engine or processor computes differently; export again on it."
        )
