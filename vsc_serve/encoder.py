"""The one path from pixels to codes, and back: whatever makes a code calls `Encoder.encode`."""

import hashlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal, get_args

import numpy as np
import PIL
from numpy.typing import NDArray
from PIL import Image

from vsc_serve.bundle import DECODER, ENCODER, Bundle, Manifest, Probe, open_bundle
from vsc_serve.codes import (
    CodeRows,
    Codes,
    active_positions,
    csr_at,
    stack_codes,
    stack_rows,
    threshold_logit,
)
from vsc_serve.errors import BundleError, InputError, UsageError
from vsc_serve.images import decode_pixels, read_pixels
from vsc_serve.preprocess import PixelSpec
from vsc_serve.session import Device, Session, open_session
from vsc_serve.sources import Ids

if TYPE_CHECKING:
    from vsc_serve.pipeline import Batch

logger = logging.getLogger(__name__)

BATCH_SIZE: Final = 256
"""Rows a graph is given at a time; a batch of 32 already reaches 87 % of its speed."""

GUARD_BAND: Final = 1e-4
"""Spike logits this near to the threshold may fall on its other side on another engine."""

View = Literal["mean", "gamma", "spike"]

_SMALLEST: Final = np.finfo(np.float32).tiny
_LARGEST_LOGVAR: Final = 170.0
"""Beyond it sigma is no finite float32."""

Picture = Path | str | bytes | Image.Image


@dataclass(frozen=True, kw_only=True)
class EncodeOptions:
    """What an active latent is, and what is told of it. Raises UsageError for what cannot be."""

    tau: float | None = None
    """Spike threshold in (0, 1) in place of the model's own."""
    view: View = "mean"
    """The value of an active latent: its slab mean mu, its spike probability gamma, or 1."""
    max_active: int | None = None
    """Keep this many active latents of a row, those with the largest |mu|; None keeps all."""
    uncertainty: bool = False
    """Give gamma and sigma of every entry beside the codes."""

    def __post_init__(self) -> None:
        if self.tau is not None:
            threshold_logit(self.tau)
        if self.view not in get_args(View):
            raise UsageError(f"view must be one of {', '.join(get_args(View))}, not {self.view}")
        if self.max_active is not None and self.max_active < 1:
            raise UsageError(f"max_active must be 1 or more, not {self.max_active}")

    @classmethod
    def of_codes(cls, meta: Mapping[str, Any]) -> "EncodeOptions":
        """Return what stored codes were made with, so that a query can be made alike.

        Args:
            meta: Provenance of the codes; what it does not say is as in a plain file.

        Raises:
            UsageError: The codes were changed since: no encoder gives codes that are split by sign.
        """
        if meta.get("sign") is not None:
            raise UsageError(
                f"these codes were changed since they were encoded (sign: {meta['sign']}). Give the"
                " file that `vsc encode` wrote."
            )
        return cls(
            tau=meta.get("tau"),
            view=meta.get("view", "mean"),
            max_active=meta.get("max_active"),
        )


PLAIN: Final = EncodeOptions()
"""The model's own threshold, slab means, every active latent."""


class Encoder:
    """Turns images (or vectors) into sparse codes.

        encoder = Encoder.open("model/")
        codes = encoder.encode(["cat.jpg", "dog.jpg"])   # scipy.sparse.csr_array, one row each

    The same image gives the same code whatever else is in the batch.
    """

    def __init__(self, session: Session, manifest: Manifest) -> None:
        """Wrap an open session. `Encoder.open` is what most callers want."""
        self._session = session
        self._opened_from: tuple[Path, Device] | None = None
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
        encoder._opened_from = (bundle.path, device)
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
        rows = images if isinstance(images, np.ndarray) else self.read(images)
        return self.encode_rows(rows, EncodeOptions(tau=tau)).codes

    def encode_rows(self, rows: NDArray[Any], options: EncodeOptions = PLAIN) -> CodeRows:
        """Encode pixels or vectors, with all that may be asked of a code.

        Every view has the same active latents: those where the graph's code is not 0.

        Args:
            rows: Pixels or vectors, as `encode` takes them.
            options: Threshold, values, and what else to give.

        Raises:
            InputError: Wrong shape or type, or a model that gives values that are not finite.
        """
        _check_rows(rows, self.manifest)
        if not len(rows):
            return _no_rows(self.manifest.latent_dim, options)
        parts = [
            self._encode_batch(rows[start : start + BATCH_SIZE], start, options)
            for start in range(0, len(rows), BATCH_SIZE)
        ]
        return stack_rows(parts, self.manifest.latent_dim)

    def stream(
        self,
        inputs: Sequence[Path | str],
        options: EncodeOptions = PLAIN,
        *,
        workers: int | None = None,
        batch_size: int | None = None,
        exclude: Sequence[str] = (),
        ids: Ids = "relative",
    ) -> "Iterator[Batch]":
        """Encode pictures as `vsc encode` does, on all processors; give codes as they are ready.

            for batch in encoder.stream(["images/"]):
                batch.ids, batch.rows.codes, batch.bad

        Args:
            inputs: Folders, files, patterns, archives and URLs.
            options: Threshold, values, and what else to give.
            workers: Processes; by default one for each processor that may be used; 0 is threads.
            batch_size: Sources of a batch; by default as many as take a tenth of a second.
            exclude: Patterns of paths to leave out.
            ids: What rows are called.

        Raises:
            VscError: No picture was found; on the first batch.
            UsageError: The encoder was not opened from a bundle, which workers need.
        """
        from vsc_serve.pipeline import stream  # the one import upwards: see pyproject.toml

        if self._opened_from is None:
            raise UsageError("stream needs an encoder that Encoder.open opened from a bundle")
        path, device = self._opened_from
        return stream(
            path,
            inputs,
            options,
            device=device,
            workers=workers,
            batch_size=batch_size,
            exclude=exclude,
            ids=ids,
        )

    def provenance(
        self, options: EncodeOptions = PLAIN, *, tau: float | None = None
    ) -> dict[str, Any]:
        """Return what a codes file says about where its codes come from.

        Args:
            options: What the codes were made with.
            tau: The same as `options.tau`, for codes of `encode`.
        """
        from vsc_serve import __version__

        chosen = options.tau if tau is None else tau
        limit = {} if options.max_active is None else {"max_active": options.max_active}
        return {
            "model": self.manifest.name,
            "model_digest": self.manifest.digest,
            "tau": self.manifest.tau if chosen is None else chosen,
            "view": options.view,
            **limit,
            "engine": self.engine,
            "vsc_serve": __version__,
        }

    def _encode_batch(self, batch: NDArray[Any], start: int, options: EncodeOptions) -> CodeRows:
        """Encode what a graph is given at once; `start` is its first row, for messages."""
        limit = threshold_logit(self.manifest.tau if options.tau is None else options.tau)
        feeds = {self.manifest.modality: batch, "tau_logit": np.array(limit)}
        outputs = ["code", "spike_logit", *(["logvar"] if options.uncertainty else [])]
        found = dict(zip(outputs, self._session.run(outputs, feeds), strict=True))
        bad = _first_bad_row(found)
        if bad is not None:
            raise InputError(
                f"row {start + bad}: model {self.manifest.name} gives values that are not finite"
                " (NaN or infinity). Leave the row out; a model that does so for ordinary input is"
                " broken."
            )
        near = int(np.count_nonzero(np.abs(found["spike_logit"] - limit) <= GUARD_BAND))
        return replace(_compact(found, options), near_threshold=near)

    def read(self, pictures: Sequence[Picture]) -> NDArray[np.uint8]:
        """Return the pixels of pictures, as `encode_rows` takes them.

        Args:
            pictures: Paths, encoded pictures (bytes) or PIL images.

        Raises:
            InputError: One cannot be read, or the model does not take pictures.
        """
        spec = image_spec(self.manifest)
        if isinstance(pictures, str | bytes | Path | Image.Image):
            raise InputError("encode takes a list of pictures, not a single one: pass [picture]")
        pixels = [_picture_pixels(picture, row, spec) for row, picture in enumerate(pictures)]
        return np.stack(pixels) if pixels else np.empty((0, *spec.shape), np.uint8)


def _first_bad_row(found: Mapping[str, NDArray[np.float32]]) -> int | None:
    """Return the first row of which something is not finite, as NaN in a logit hides a latent."""
    is_bad = {"code": ~np.isfinite(found["code"]), "spike_logit": np.isnan(found["spike_logit"])}
    if "logvar" in found:
        is_bad["logvar"] = ~(found["logvar"] <= _LARGEST_LOGVAR)
    rows = [int(np.flatnonzero(bad.any(axis=1))[0]) for bad in is_bad.values() if bad.any()]
    return min(rows, default=None)


def _compact(found: Mapping[str, NDArray[np.float32]], options: EncodeOptions) -> CodeRows:
    """Keep of what the graph gives, by name of its output, only what belongs to active latents."""
    dense = found["code"]
    active = active_positions(dense)
    total_energy = _energy(dense, active)
    if options.max_active is not None:
        active = _strongest(dense, active, options.max_active)
    gamma, sigma = None, None
    if options.uncertainty or options.view == "gamma":
        gamma = _gamma(found["spike_logit"].ravel()[active])
    if options.uncertainty:
        sigma = np.exp(found["logvar"].ravel()[active] / 2)
    return CodeRows(
        codes=csr_at(active, _view(dense, active, gamma, options.view), dense.shape),
        gamma=gamma if options.uncertainty else None,
        sigma=sigma,
        kept_energy=total_energy if options.max_active is None else _energy(dense, active),
        total_energy=total_energy,
    )


def _view(
    dense: NDArray[np.float32],
    active: NDArray[np.intp],
    gamma: NDArray[np.float32] | None,
    view: View,
) -> NDArray[np.float32]:
    if view == "spike":
        return np.ones(len(active), np.float32)
    return dense.ravel()[active] if gamma is None or view == "mean" else gamma


def _gamma(spike_logit: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return sigmoid(spike_logit), computed in float64; never 0, which a code cannot store."""
    gamma = np.exp(-np.logaddexp(0.0, -spike_logit.astype(np.float64)))
    return np.maximum(gamma.astype(np.float32), _SMALLEST)


def _strongest(
    dense: NDArray[np.float32], active: NDArray[np.intp], count: int
) -> NDArray[np.intp]:
    """Keep the positions of the `count` largest |mu| of each row; of equal ones the lower."""
    rows = active // dense.shape[1]
    order = np.lexsort((-np.abs(dense.ravel()[active]), rows))  # stable, and row by row
    place = np.arange(len(rows)) - np.searchsorted(rows, rows)
    kept: NDArray[np.intp] = active[np.sort(order[place < count])]
    return kept


def _energy(dense: NDArray[np.float32], active: NDArray[np.intp]) -> float:
    mu = dense.ravel()[active].astype(np.float64)
    return float(mu @ mu)


def _no_rows(latent_dim: int, options: EncodeOptions) -> CodeRows:
    none = np.empty(0, np.float32) if options.uncertainty else None
    return CodeRows(codes=stack_codes([], latent_dim), gamma=none, sigma=none)


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
        _check_probe_code(path, probe, encoder.encode(rows), bundle.manifest.value_tolerance)


def _read_probe(path: Path, manifest: Manifest) -> NDArray[Any]:
    if manifest.pixel_spec is None:
        return np.fromfile(path, np.float32)[None]
    return read_pixels(path, manifest.pixel_spec)[None]


def _check_probe_code(path: Path, probe: Probe, found: Codes, tolerance: float) -> None:
    is_same = found.indices.tolist() == probe.indices and np.allclose(
        found.data, np.array(probe.values, np.float32), rtol=0.0, atol=tolerance
    )
    if not is_same:
        raise BundleError(
            f"{path}: gives another code than at export: latents {found.indices.tolist()}, expected"
            f" {probe.indices}. The engine or processor computes differently; export again on it."
        )
