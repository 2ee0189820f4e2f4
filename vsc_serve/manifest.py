"""The manifest of a model bundle: what `manifest.json` says, with every field checked.

docs/formats.md describes the format.
"""

import hashlib
import json
import math
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from itertools import chain, pairwise
from pathlib import Path
from typing import Any, Final, Literal, TypeAlias, get_args
from warnings import warn

from vsc_serve.errors import BundleError, InputError
from vsc_serve.images import PixelSpec
from vsc_serve.images.preprocess import stored_fields
from vsc_serve.schema import conform_fields, load_json, shortened

FORMAT: Final = 1
"""Newest bundle format this version reads and writes."""

MANIFEST: Final = "manifest.json"
ENCODER: Final = "encoder.onnx"
ENCODER_CSR: Final = "encoder_csr.onnx"
ENCODER_TOPK: Final = "encoder_topk.onnx"
DECODER: Final = "decoder.onnx"
LINEAR_MAP: Final = "linear_map.npz"
STATISTICS: Final = "statistics.json"

EMBEDDING: Final = "embedding"
"""Output of an encoder behind a backbone: what the backbone gives."""

Modality = Literal["image", "vector"]
Precision = Literal["float32", "fp16", "int8"]
"""Type of the encoder's layers. The spike head and the threshold are float32 in all of them."""

_VALUE_TOLERANCE: Final[dict[Precision, float]] = {"float32": 1e-4, "fp16": 1e-2, "int8": 5e-2}
"""How far a value may lie from the one that was exported, on any engine.

A processor that computes in fp16 rounds otherwise than one that emulates it, and a rounding error
before a quantised layer can move an activation by one of its steps.
"""

GraphSignature: TypeAlias = dict[str, dict[str, str]]
"""`inputs` and `outputs` of a graph: name to type and shape, `uint8 (batch, 28, 28, 1)`."""

# What no sensible bundle reaches; a manifest that asks for more asks for memory or time.
_MAX_FILES: Final = 1000
_MAX_LATENTS: Final = 2**20
_MAX_INPUT: Final = 2**24
"""Values of one image or vector."""

_DIGEST: Final = re.compile(r"[0-9a-f]{64}")
_PORT: Final = re.compile(r"[a-z]+[0-9]* \(.{0,200}\)")
_ROWS: Final = re.compile(r"\w{1,99} (float32|int32) \(\w+(, [0-9]{1,9})*\)")
"""Name, type and shape of an output whose shape another program must know."""


@dataclass(frozen=True, kw_only=True)
class Probe:
    """A small image (or vector) in the bundle, and the code it must give."""

    file: str
    """Path inside the bundle."""
    pixels_sha256: str
    """Digest of its pixels after preprocessing; of its bytes for a vector."""
    indices: list[int]
    """Latents that are on."""
    values: list[float]
    """Their values, in the same order."""


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """Contents of `manifest.json`: facts about a model."""

    name: str
    """Name of the model."""
    modality: Modality
    """`image` (uint8 pixels) or `vector` (float32)."""
    latent_dim: int
    """Latents J: columns of a code."""
    tau: float
    """Spike threshold in (0, 1) that the encoder applies unless told otherwise."""
    alpha: float
    """Share of active latents that was asked for in training."""
    active: float
    """Active latents per image that was measured when the bundle was written."""
    opset: int
    """ONNX operator set."""
    files: dict[str, str]
    """sha256 of every other file in the bundle, by its path inside it."""
    probes: list[Probe]
    """Inputs with known codes, checked when the bundle is opened."""
    versions: dict[str, str] = field(default_factory=dict)
    """Versions of the packages that wrote the bundle."""
    pixel_spec: PixelSpec | None = None
    """How an image becomes pixels. None for vectors."""
    input_dim: int | None = None
    """Length of a vector. None for images."""
    precision: Precision = "float32"
    """Precision of the encoder's layers."""
    graphs: dict[str, GraphSignature] = field(default_factory=dict)
    """Inputs and outputs of each graph, by its file. Empty in bundles of older versions."""
    query_tau: float | None = None
    """Spike threshold of queries, at most `tau`. None is `options.QUERY_TAU`."""
    backbone: dict[str, Any] | None = None
    """What embeds images inside the encoder, and the digest of its file. None without one."""
    format: int = FORMAT
    """Version of this layout."""

    def __post_init__(self) -> None:
        problem = next(chain(_wrong_values(self), _wrong_input(self), _wrong_files(self)), None)
        if problem is not None:
            raise ValueError(problem)

    @property
    def digest(self) -> str:
        """Digest of graphs and weights: two bundles with the same one give the same codes."""
        parts = [f"{name}:{self.files[name]}" for name in sorted(self.files) if _is_weight(name)]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]

    @property
    def graph_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes that inputs and outputs of the graphs have, by name, without the batch."""
        entry = self.pixel_spec.shape if self.pixel_spec else (self.input_dim or 0,)
        latents = dict.fromkeys(("code", "spike_logit", "mu", "logvar"), (self.latent_dim,))
        drawn = {} if self.backbone is not None else {"mean": entry}
        embedding = {} if self.backbone is None else {EMBEDDING: (self.data_dim,)}
        return {self.modality: entry, **latents, **drawn, **embedding}

    @property
    def data_dim(self) -> int:
        """Values of what the decoder draws: pixels, a vector's, or of a backbone's embedding."""
        if self.backbone is not None:
            return int(self.backbone["dim"])
        return math.prod(self.pixel_spec.shape) if self.pixel_spec else self.input_dim or 0

    @property
    def draws_images(self) -> bool:
        """Whether the decoder draws images; behind a backbone it draws embeddings."""
        return self.modality == "image" and self.backbone is None

    @property
    def draws_pictures(self) -> bool:
        """The old name of `draws_images`, for one more release."""
        warn("Manifest.draws_pictures is now draws_images", DeprecationWarning, stacklevel=2)
        return self.draws_images

    @property
    def value_tolerance(self) -> float:
        """How far a probe's values may lie from those at export, on any engine."""
        return _VALUE_TOLERANCE[self.precision]

    @property
    def has_csr(self) -> bool:
        """Whether the bundle holds the graph that compacts codes itself, `encoder_csr.onnx`."""
        return ENCODER_CSR in self.files

    def to_json(self) -> str:
        """Return the text of `manifest.json`."""
        stored = asdict(self)
        stored["pixel_spec"] = self.pixel_spec.to_json() if self.pixel_spec else None
        return json.dumps(stored, indent=2, sort_keys=True) + "\n"

    @classmethod
    def from_json(cls, text: str, path: Path) -> "Manifest":
        """Read the text of a manifest. `path` is named in errors. Raises BundleError."""
        try:
            stored = load_json(text)
            found = stored["format"]
        except (ValueError, KeyError, TypeError) as error:
            raise BundleError(
                f"{path}: not a bundle manifest ({error!r}). Export again."
            ) from error
        if found != FORMAT or type(found) is not int:
            raise BundleError(
                f"{path}: format {shortened(found)}, but this vsc-serve reads format {FORMAT}."
                " Upgrade vsc-serve, or export the model again."
            )
        try:
            if isinstance(spec := stored.get("pixel_spec"), dict):
                stored["pixel_spec"] = stored_fields(spec)
            return conform_fields(stored, cls, ignore=True)
        except ValueError as error:
            raise BundleError(f"{path}: damaged manifest ({error}). Export again.") from error


def _wrong_values(manifest: Manifest) -> Iterator[str]:
    if not 0.0 < manifest.tau < 1.0:
        yield f"tau must be above 0 and below 1, not {manifest.tau}"
    if manifest.query_tau is not None and not 0.0 < manifest.query_tau <= manifest.tau:
        yield f"query_tau must be above 0 and at most tau, not {manifest.query_tau}"
    if not 0 < manifest.latent_dim <= _MAX_LATENTS:
        yield f"latent_dim must be positive and at most {_MAX_LATENTS}, not {manifest.latent_dim}"
    if not (math.isfinite(manifest.alpha) and math.isfinite(manifest.active)):
        yield "alpha and active must be finite"
    if manifest.precision not in get_args(Precision):
        yield f"precision must be {', '.join(get_args(Precision))}, not {manifest.precision!r}"
    if manifest.backbone is not None:
        dim = manifest.backbone.get("dim")
        if type(dim) is not int or not 0 < dim <= _MAX_INPUT:
            yield f"backbone.dim must be an integer from 1 to {_MAX_INPUT}"
    for probe in manifest.probes:
        rising = [-1, *probe.indices, manifest.latent_dim]
        is_row = all(first < second for first, second in pairwise(rising))
        if len(probe.indices) != len(probe.values) or not is_row:
            yield f"indices and values of the probe {probe.file!r} make no code"


def _wrong_input(manifest: Manifest) -> Iterator[str]:
    if (manifest.modality == "image") != (manifest.pixel_spec is not None):
        yield "an image model has a pixel_spec, a vector model has none"
    if (manifest.modality == "vector") != (manifest.input_dim is not None):
        yield "a vector model has an input_dim, an image model has none"
    shape = manifest.pixel_spec.shape if manifest.pixel_spec else (manifest.input_dim or 0,)
    if not 0 < math.prod(shape) <= _MAX_INPUT:
        yield f"an input has 1 to {_MAX_INPUT} values, not {math.prod(shape)}"


def _wrong_files(manifest: Manifest) -> Iterator[str]:
    unlisted = {ENCODER, *(probe.file for probe in manifest.probes)} - manifest.files.keys()
    if unlisted:
        yield f"no digest for {', '.join(sorted(unlisted))}"
    if len(manifest.files) > _MAX_FILES:
        yield f"{len(manifest.files)} files; a bundle has up to {_MAX_FILES}"
    for name, digest in manifest.files.items():
        if not _DIGEST.fullmatch(digest):
            yield f"the digest of {name!r} is no sha256"
    for signature in manifest.graphs.values():
        for ports in signature.values():
            if any(not _PORT.fullmatch(port) for port in ports.values()):
                yield "graphs must give a type and a shape for each name"
    if ENCODER_TOPK in manifest.files:
        outputs = manifest.graphs.get(ENCODER_TOPK, {}).get("outputs", {})
        if not outputs or not all(map(_ROWS.fullmatch, map(" ".join, outputs.items()))):
            yield f"graphs must give the shapes of the outputs of {ENCODER_TOPK}"


def image_spec(manifest: Manifest) -> PixelSpec:
    """Return how images become pixels. Raises InputError for a model of vectors."""
    if manifest.pixel_spec is None:
        raise InputError(
            f"model {manifest.name} encodes vectors of length {manifest.input_dim}, not images"
        )
    return manifest.pixel_spec


def url_name(manifest: Manifest) -> str:
    """Return the model's name as a folder and a URL take it."""
    return re.sub(r"[^A-Za-z0-9_.-]+", "_", manifest.name).strip(".") or "model"


def _is_weight(name: str) -> bool:
    return name.endswith((".onnx", ".bin"))
