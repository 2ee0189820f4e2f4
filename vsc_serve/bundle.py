"""The model bundle: a folder with ONNX files, their manifest, and what proves that they are whole.

`Manifest` is what `manifest.json` says. `open_bundle` reads it and checks the digest of every file,
so that nothing later has to ask whether a file is the right one. docs/formats.md describes the
format.
"""

import hashlib
import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Final, Literal

from vsc_serve.errors import BundleError
from vsc_serve.preprocess import PixelSpec

FORMAT: Final = 1
"""Newest bundle format this version reads and writes."""

MANIFEST: Final = "manifest.json"
ENCODER: Final = "encoder.onnx"
ENCODER_CSR: Final = "encoder_csr.onnx"
DECODER: Final = "decoder.onnx"

Modality = Literal["image", "vector"]


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
        unlisted = {ENCODER, *(probe.file for probe in self.probes)} - self.files.keys()
        if unlisted:
            raise ValueError(f"no digest for {', '.join(sorted(unlisted))}")

    @property
    def digest(self) -> str:
        """Digest of graphs and weights: two bundles with the same one give the same codes."""
        parts = [f"{name}:{self.files[name]}" for name in sorted(self.files) if _is_weight(name)]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]

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
            return cls(**{name.name: stored[name.name] for name in fields(cls)})
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise BundleError(f"{path}: damaged manifest ({error!r}). Export again.") from error


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
