"""The model bundle: a folder with ONNX files, their manifest, and what proves that they are whole.

`Manifest` is what `manifest.json` says. `open_bundle` reads it and checks the digest of every file,
so that nothing later has to ask whether a file is the right one. docs/formats.md describes the
format.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Final, Literal, TypeAlias, get_args

from vsc_serve.errors import BundleError, InputError
from vsc_serve.images import PixelSpec
from vsc_serve.outputs import FolderKind

FORMAT: Final = 1
"""Newest bundle format this version reads and writes."""

MANIFEST: Final = "manifest.json"
ENCODER: Final = "encoder.onnx"
ENCODER_CSR: Final = "encoder_csr.onnx"
ENCODER_TOPK: Final = "encoder_topk.onnx"
DECODER: Final = "decoder.onnx"

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

_ADDED: Final = frozenset({"precision", "graphs", "backbone"})
"""Fields that bundles of this format written by older versions lack."""


@dataclass(frozen=True, kw_only=True)
class Probe:
    """A small picture (or vector) in the bundle, and the code it must give."""

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
    """What `manifest.json` says about a model."""

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
    """How a picture becomes pixels. None for vectors."""
    input_dim: int | None = None
    """Length of a vector. None for images."""
    precision: Precision = "float32"
    """Precision of the encoder's layers."""
    graphs: dict[str, GraphSignature] = field(default_factory=dict)
    """Inputs and outputs of each graph, by its file. Empty in bundles of older versions."""
    backbone: dict[str, Any] | None = None
    """What embeds pictures inside the encoder, and the digest of its file. None without one."""
    format: int = FORMAT
    """Version of this layout."""

    def __post_init__(self) -> None:
        if not 0.0 < self.tau < 1.0:
            raise ValueError(f"tau must be above 0 and below 1, not {self.tau}")
        if self.latent_dim < 1:
            raise ValueError(f"latent_dim must be positive, not {self.latent_dim}")
        if (self.modality == "image") != (self.pixel_spec is not None):
            raise ValueError("an image model has a pixel_spec, a vector model has none")
        if (self.modality == "vector") != (self.input_dim is not None):
            raise ValueError("a vector model has an input_dim, an image model has none")
        if self.precision not in get_args(Precision):
            raise ValueError(
                f"precision must be {', '.join(get_args(Precision))}, not {self.precision!r}"
            )
        unlisted = {ENCODER, *(probe.file for probe in self.probes)} - self.files.keys()
        if unlisted:
            raise ValueError(f"no digest for {', '.join(sorted(unlisted))}")

    @property
    def digest(self) -> str:
        """Digest of graphs and weights: two bundles with the same one give the same codes."""
        parts = [f"{name}:{self.files[name]}" for name in sorted(self.files) if _is_weight(name)]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]

    @property
    def draws_pictures(self) -> bool:
        """Whether the decoder draws pictures; behind a backbone it draws embeddings."""
        return self.modality == "image" and self.backbone is None

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
            stored: dict[str, Any] = json.loads(text)
            found = stored["format"]
        except (ValueError, KeyError, TypeError) as error:
            raise BundleError(
                f"{path}: not a bundle manifest ({error!r}). Export again."
            ) from error
        if found != FORMAT:
            raise BundleError(
                f"{path}: format {found}, but this vsc-serve reads format {FORMAT}."
                " Upgrade vsc-serve, or export the model again."
            )
        try:
            spec = stored["pixel_spec"]
            stored["pixel_spec"] = PixelSpec.from_json(spec) if spec else None
            stored["probes"] = [Probe(**probe) for probe in stored["probes"]]
            names = {part.name for part in fields(cls)} - (_ADDED - stored.keys())
            return cls(**{name: stored[name] for name in names})
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise BundleError(f"{path}: damaged manifest ({error!r}). Export again.") from error


def _bundle_files(stored: dict[str, Any]) -> Sequence[str] | None:
    """Return the files that a manifest lists; None where it is no bundle's."""
    files = stored.get("files")
    return list(files) if isinstance(files, dict) and ENCODER in files else None


BUNDLE_FOLDER: Final = FolderKind(
    name="a model bundle", markers=(MANIFEST,), contents=_bundle_files
)


@dataclass(frozen=True)
class Bundle:
    """A bundle whose files have been checked."""

    path: Path
    manifest: Manifest


def open_bundle(path: Path) -> Bundle:
    """Open a bundle and check that every file is there and unchanged.

    Args:
        path: Folder that `vsc export` wrote.

    Returns:
        The bundle.

    Raises:
        BundleError: It is missing, of another format, or a file in it is missing or changed.
    """
    manifest_path = path / MANIFEST
    try:
        text = manifest_path.read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError):
        raise BundleError(
            f"{path}: no model bundle there (no {MANIFEST})."
            f" Make one with `vsc export RUN --out {path}`."
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise BundleError(f"{manifest_path}: unreadable ({error}). Export again.") from error
    manifest = Manifest.from_json(text, manifest_path)
    for name, expected in manifest.files.items():
        _check_file(path / name, expected)
    return Bundle(path, manifest)


def image_spec(manifest: Manifest) -> PixelSpec:
    """Return how images become pixels. Raises InputError for a model of vectors."""
    if manifest.pixel_spec is None:
        raise InputError(
            f"model {manifest.name} encodes vectors of length {manifest.input_dim}, not images"
        )
    return manifest.pixel_spec


def sha256(path: Path) -> str:
    """Return the hexadecimal sha256 digest of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _check_file(path: Path, expected: str) -> None:
    try:
        found = sha256(path)
    except OSError as error:
        raise BundleError(
            f"{path}: listed in the manifest but unreadable ({error.strerror}). Export again."
        ) from error
    if found != expected:
        raise BundleError(
            f"{path}: changed since it was exported (sha256 {found[:12]}, expected"
            f" {expected[:12]}). Copy the bundle again, or export again."
        )


def _is_weight(name: str) -> bool:
    return name.endswith((".onnx", ".bin"))
