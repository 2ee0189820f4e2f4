"""The one path from pixels to codes: whatever makes a code calls `Encoder.encode_rows`."""

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import numpy as np
import PIL
from numpy.typing import NDArray
from PIL import Image

from vsc_serve.bundle import EMBEDDING, ENCODER, Bundle, Manifest, Probe, image_spec, open_bundle
from vsc_serve.codes import (
    CodeRows,
    Codes,
    DecisionStatistics,
    empty_rows,
    stack_rows,
    threshold_logit,
)
from vsc_serve.compaction import (
    DENSE,
    BatchFacts,
    Compaction,
    EncodedBatch,
    NotFinite,
    first_bad_row,
)
from vsc_serve.domain import ReferenceStatistics, read_reference
from vsc_serve.errors import BundleError, InputError
from vsc_serve.images import PixelSpec, decode_pixels, read_pixels
from vsc_serve.linear_map import LinearMap, read_linear_map
from vsc_serve.options import PLAIN, REFITTED, EncodeOptions
from vsc_serve.session import Device, Session, SessionPool, open_graph
from vsc_serve.targets import (
    are_needed,
    require_embedding,
    target_outputs,
    targets_of,
    with_refitted,
    with_targets,
)

logger = logging.getLogger(__name__)

BATCH_SIZE: Final = 256
"""Rows a graph is given at a time; a batch of 32 already reaches 87 % of its speed."""
_GPU_BATCH_SIZES: Final = (1, 16, BATCH_SIZE)
"""Batches that a GPU is given are filled up to one of these: for each new shape it would choose
kernels once more."""

ImageLike = Path | str | bytes | Image.Image


class Encoder:
    """Turns images (or vectors) into sparse codes.

        encoder = Encoder.open("model/")
        codes = encoder.encode(["cat.jpg", "dog.jpg"])   # scipy.sparse.csr_array, one row each

    The same image gives the same code whatever else is in the batch. A GPU rounds differently for
    batches of 1, of up to 16 and of up to 256: by less than the probes of the bundle allow.
    """

    def __init__(
        self,
        session: Session,
        manifest: Manifest,
        compaction: Compaction = DENSE,
        *,
        path: Path | None = None,
    ) -> None:
        """Wrap an open session. `Encoder.open` is what most callers want.

        Args:
            session: Computes the graph that the compaction names.
            manifest: What the bundle says.
            compaction: How outputs become rows.
            path: Folder of the bundle, where its linear map lies; refitted values need it.
        """
        self._session = session
        self._compaction = compaction
        self._path = path
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
        encoder = cls._open_on(bundle, device, threads)
        try:
            check_probes(encoder, bundle)
        except BundleError as error:
            if device != "auto" or not encoder.engine.endswith("cuda"):
                raise
            logger.warning("using the CPU: %s", error)
            encoder = cls._open_on(bundle, "cpu", threads)
            check_probes(encoder, bundle)
        return encoder

    @classmethod
    def _open_on(cls, bundle: Bundle, device: Device, threads: int) -> "Encoder":
        session = open_graph(bundle, ENCODER, device=device, threads=threads)
        logger.info("%s: %s on %s", bundle.path, bundle.manifest.name, session.engine)
        if session.engine.endswith("cuda"):
            pool = SessionPool(session, *_GPU_BATCH_SIZES)
            return cls(pool, bundle.manifest, path=bundle.path)
        return cls(session, bundle.manifest, path=bundle.path)

    @property
    def engine(self) -> str:
        """What computes: engine, version and device."""
        return self._session.engine

    @cached_property
    def linear_map(self) -> LinearMap:
        """The linear map of the bundle, read when it is first wanted.

        Raises:
            BundleError: The bundle has none, or it is damaged.
        """
        return read_linear_map(Bundle(self._path or Path(self.manifest.name), self.manifest))

    @cached_property
    def reference(self) -> ReferenceStatistics | None:
        """Statistics of the model's own data; None of a bundle that has none. BundleError."""
        if self._path is None:
            return None
        return read_reference(Bundle(self._path, self.manifest))

    def encode(
        self, images: NDArray[Any] | Sequence[ImageLike], *, tau: float | None = None
    ) -> Codes:
        """Encode images or vectors into sparse codes.

        Args:
            images: Pixels, uint8, shape (images, height, width, channels) as `PixelSpec` says; or
                vectors, float32, shape (vectors, dimensions); or paths, encoded images or
                PIL images.
            tau: Spike threshold in (0, 1) in place of the model's own.

        Returns:
            Codes, shape (images, latents).

        Raises:
            InputError: Wrong shape or type, or an image that cannot be read.
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
            BundleError: Refitted values are asked for, and the bundle has no linear map.
            UsageError: Queries would keep less than the rows they are for.
        """
        return self.encode_counted(rows, options).rows

    def encode_counted(self, rows: NDArray[Any], options: EncodeOptions = PLAIN) -> EncodedBatch:
        """Encode as `encode_rows` does, and give the statistics of the decisions too."""
        _check_rows(rows, self.manifest)
        if options.refit:
            self.linear_map  # noqa: B018  # a bundle without one says so before any row
        decisions, parts = DecisionStatistics(), []
        for start in range(0, len(rows), BATCH_SIZE):
            encoded = self._encode_batch(rows[start : start + BATCH_SIZE], start, options)
            parts.append(encoded.rows)
            decisions.add(encoded.decisions)
        latent_dim = self.manifest.latent_dim
        if not parts:
            parts = [empty_rows(latent_dim, aligned=options.uncertainty)]
        return EncodedBatch(stack_rows(parts, latent_dim), decisions)

    def outputs(
        self, rows: NDArray[Any], names: Sequence[str], *, tau: float | None = None
    ) -> dict[str, NDArray[np.float32]]:
        """Return dense outputs of the encoder graph.

        Args:
            rows: Pixels or vectors, as `encode` takes them.
            names: Outputs: `code`, `spike_logit`, `mu`, `logvar`.
            tau: Spike threshold in (0, 1) in place of the model's own.

        Returns:
            Each output, shape (rows, latents).

        Raises:
            InputError: Wrong shape or type, or a model that gives values that are not finite.
            UsageError: `tau` is out of range.
        """
        _check_rows(rows, self.manifest)
        limit = threshold_logit(EncodeOptions(tau=tau).thresholds(self.manifest).tau)
        wanted = list(dict.fromkeys(["code", "spike_logit", *names]))  # the first two are checked
        parts = {name: [np.empty((0, self.manifest.latent_dim), np.float32)] for name in wanted}
        for start in range(0, len(rows), BATCH_SIZE):
            batch = rows[start : start + BATCH_SIZE]
            feeds = {self.manifest.modality: batch, "tau_logit": np.array(limit)}
            for name, output in zip(wanted, self._session.run(wanted, feeds), strict=True):
                parts[name].append(output[: len(batch)])
        found = {name: np.concatenate(arrays) for name, arrays in parts.items()}
        bad = first_bad_row(found)
        if bad is not None:
            raise self._not_finite(bad)
        return {name: found[name] for name in names}

    def targets(self, rows: NDArray[Any]) -> NDArray[np.float32]:
        """Return what the decoder is to draw for rows, and a second stage compares with.

        Pixels / 255, the vectors themselves, or the embeddings that a backbone gives.

        Args:
            rows: Pixels or vectors, as `encode` takes them.

        Returns:
            Data, flattened, shape (rows, dimensions).

        Raises:
            InputError: Wrong shape or type.
            BundleError: The bundle has a backbone and was exported without the output `embedding`.
        """
        _check_rows(rows, self.manifest)
        if self.manifest.backbone is None:
            return targets_of(rows, {})
        require_embedding(self.manifest)
        parts = [np.empty((0, self.manifest.data_dim), np.float32)]
        for start in range(0, len(rows), BATCH_SIZE):
            batch = rows[start : start + BATCH_SIZE]
            (found,) = self._session.run([EMBEDDING], {self.manifest.modality: batch})
            parts.append(found[: len(batch)])
        return np.concatenate(parts)

    def provenance(
        self, options: EncodeOptions = PLAIN, *, tau: float | None = None
    ) -> dict[str, Any]:
        """Return what a codes file says about where its codes come from.

        Args:
            options: What the codes were made with.
            tau: The same as `options.tau`, for codes of `encode`.
        """
        from vsc_serve import __version__

        chosen = options if tau is None else replace(options, tau=tau)
        thresholds = chosen.thresholds(self.manifest)
        optional = {
            "max_active": options.max_active,
            "stored_tau": thresholds.stored_tau,
            "values": REFITTED if options.refit else None,
        }
        return {
            "model": self.manifest.name,
            "model_digest": self.manifest.digest,
            "tau": thresholds.tau,
            "view": options.view,
            **{name: value for name, value in optional.items() if value is not None},
            "engine": self.engine,
            "vsc_serve": __version__,
        }

    def _encode_batch(self, rows: NDArray[Any], start: int, options: EncodeOptions) -> EncodedBatch:
        """Encode what a graph is given at once; `start` is its first row, for messages."""
        limit = threshold_logit(options.thresholds(self.manifest).tau)
        feeds = {self.manifest.modality: rows, "tau_logit": np.array(limit)}
        outputs = [*self._compaction.outputs(options), *target_outputs(self.manifest, options)]
        found = dict(zip(outputs, self._session.run(outputs, feeds), strict=True))
        batch = BatchFacts(len(rows), self.manifest.latent_dim, limit)
        try:
            encoded = self._compaction.compact(found, batch, options)
            if not are_needed(options):
                return encoded
            return self._complete(encoded, targets_of(rows, found), options)
        except NotFinite as error:
            raise self._not_finite(start + error.row) from None

    def _not_finite(self, row: int) -> InputError:
        return InputError(
            f"row {row}: model {self.manifest.name} gives values that are not finite"
            " (NaN or infinity). Leave the row out; a model that does so for ordinary input is"
            " broken.",
            kind="not finite",
            row=row,
        )

    def _complete(
        self, encoded: EncodedBatch, targets: NDArray[np.float32], options: EncodeOptions
    ) -> EncodedBatch:
        """Return a batch with what options ask for beside codes of slab means. Raises NotFinite."""
        if options.refit:
            encoded = with_refitted(encoded, targets, self.linear_map)
        return with_targets(encoded, targets) if options.targets else encoded

    def read(self, images: Sequence[ImageLike]) -> NDArray[np.uint8]:
        """Return the pixels of images, as `encode_rows` takes them.

        Args:
            images: Paths, encoded images (bytes) or PIL images.

        Raises:
            InputError: One cannot be read, or the model does not take images.
        """
        spec = image_spec(self.manifest)
        if isinstance(images, str | bytes | Path | Image.Image):
            raise InputError("encode takes a list of images, not a single one: pass [image]")
        pixels = [_image_pixels(image, row, spec) for row, image in enumerate(images)]
        return np.stack(pixels) if pixels else np.empty((0, *spec.shape), np.uint8)


def _image_pixels(image: ImageLike, row: int, spec: PixelSpec) -> NDArray[np.uint8]:
    try:
        if isinstance(image, Image.Image):
            return decode_pixels(image, spec)
        if isinstance(image, str | Path | bytes):
            return read_pixels(Path(image) if isinstance(image, str) else image, spec)
    except InputError as error:
        name = f"row {row}" if isinstance(image, bytes | Image.Image) else image
        raise InputError(f"{name}: {error}") from error
    raise InputError(
        f"row {row}: a {type(image).__name__} is no image. Give paths, encoded images (bytes)"
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
        raise InputError(
            f"row {bad} holds values that are not finite (NaN or infinity)",
            kind="not finite",
            row=bad,
        )


def check_probes(encoder: Encoder, bundle: Bundle) -> None:
    """Encode the bundle's probes and compare: preprocessing exactly, codes within the tolerance.

    Raises:
        BundleError: The probes do not give the codes that they gave at export.
    """
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
