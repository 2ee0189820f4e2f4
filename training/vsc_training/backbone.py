"""A backbone: any ONNX image encoder, whose embeddings a model is fitted to.

Beside `FILE.onnx` lies `FILE.json`, which says how an image becomes what the file takes:

    {"height": 224, "width": 224, "mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}

Training embeds images by the rule that an export puts into the graph, operation by operation, and
a run keeps the rule and the digest of the file: embeddings cannot come from one backbone in
training and from another in production.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from vsc_serve.bundle import sha256
from vsc_serve.errors import InputError, UsageError
from vsc_serve.images import PixelSpec
from vsc_serve.session import Device, OnnxSession, Port, open_session
from vsc_training.backbone_rule import (
    LEVELS,
    Layout,
    layout_of,
    pixel_spec_of,
    read_stated,
    scaling_of,
)

BATCH_SIZE: Final = 64
"""Images embedded at a time."""

_TYPES: Final[dict[str, np.dtype[Any]]] = {
    "tensor(float)": np.dtype(np.float32),
    "tensor(float16)": np.dtype(np.float16),
    "tensor(uint8)": np.dtype(np.uint8),
}
_DRAWN_COUNT: Final = 5
_LARGEST_MOVE: Final = 3e-3
"""How far the other images of a batch may move an embedding, rms, in standard deviations.

Measured: at most 3e-7 (EfficientNet-Lite0 and a small ViT, float32 and float16); 0.012 and 0.3 with
dynamic quantisation, whose step follows the largest value in the batch.
"""


@dataclass(frozen=True, kw_only=True)
class BackboneSpec:
    """What a backbone is, and how pixels become its input: (pixels / 255 - mean) / std."""

    pixel_spec: PixelSpec
    """How an image becomes pixels."""
    layout: Layout
    """Order of the axes that the file takes."""
    mean: tuple[float, ...]
    """Mean of each channel, in [0, 1]; empty where the file takes uint8."""
    std: tuple[float, ...]
    """Standard deviation of each channel; empty where the file takes uint8."""
    type: str
    """Type that the file takes: float32, float16 or uint8."""
    input: str
    """Name of its input."""
    output: str
    """Name of the output that is the embedding."""
    dim: int
    """Length of an embedding."""
    sha256: str
    """Digest of the file, and of the files its weights are in."""

    @property
    def factor(self) -> NDArray[np.float32]:
        """What pixels are multiplied by, shape (channels): 1 / (255 std)."""
        return (1.0 / (LEVELS * np.array(self.std, np.float64))).astype(np.float32)

    @property
    def offset(self) -> NDArray[np.float32]:
        """What is added then, shape (channels): -mean / std."""
        mean, std = np.array(self.mean, np.float64), np.array(self.std, np.float64)
        return (-mean / std).astype(np.float32)

    def prepare(self, pixels: NDArray[np.uint8]) -> NDArray[Any]:
        """Turn pixels, shape (images, height, width, channels), into what the file takes."""
        values: NDArray[Any] = pixels
        if self.type != "uint8":
            values = pixels.astype(np.float32) * self.factor + self.offset
        if self.layout == "NCHW":
            values = values.transpose(0, 3, 1, 2)
        return np.ascontiguousarray(values, np.dtype(self.type))

    def to_json(self) -> dict[str, Any]:
        """Return the fields as a JSON object."""
        lists = {"mean": list(self.mean), "std": list(self.std)}
        return asdict(self) | {"pixel_spec": self.pixel_spec.to_json()} | lists

    @classmethod
    def from_json(cls, stored: dict[str, Any]) -> "BackboneSpec":
        """Read what `to_json` wrote. Raises ValueError or KeyError on anything else."""
        values = {field.name: stored[field.name] for field in fields(cls)}
        read = {name: tuple(values[name]) for name in ("mean", "std")}
        return cls(**values | read | {"pixel_spec": PixelSpec.from_json(values["pixel_spec"])})

    def differences(self, other: "BackboneSpec") -> str:
        """Say in what another backbone differs: `mean 0.5, there 0.485; ...`."""
        own, its = self.to_json(), other.to_json()
        return "; ".join(
            f"{key} {own[key]}, there {its[key]}" for key in own if own[key] != its[key]
        )


class Backbone:
    """An open backbone: pixels to embeddings."""

    def __init__(self, session: OnnxSession, spec: BackboneSpec) -> None:
        """Wrap an open session. `Backbone.open` is what most callers want."""
        self._session = session
        self.spec = spec

    @classmethod
    def open(cls, path: Path, *, device: Device = "cpu", threads: int = 0) -> "Backbone":
        """Open a backbone and check that it is one.

        Args:
            path: The ONNX file; the JSON file with its preprocessing lies beside it.
            device: Where it computes.
            threads: Threads inside one operator; 0 lets onnxruntime choose.

        Raises:
            UsageError: A file is missing, or the JSON does not fit the graph; what to write there.
            InputError: The graph is no encoder of images.
            BundleError: onnxruntime cannot load the graph.
            DeviceError: The device or onnxruntime is not there.
        """
        if not path.is_file():
            raise UsageError(f"`backbone` {path}: no such file. Check the path.")
        session = open_session(path, device=device, threads=threads)
        taken = _only_input(path, session.inputs)
        stated = read_stated(path, taken)
        output = _embedding(path, session.outputs, stated.get("output"))
        spec = BackboneSpec(
            pixel_spec=pixel_spec_of(path, stated),
            layout=layout_of(path, stated),
            **scaling_of(path, stated, taken),
            type=_TYPES[taken.type].name,
            input=taken.name,
            output=output.name,
            dim=0,
            sha256=digest(path),
        )
        _check_shape(path, taken, spec)
        backbone = cls(session, spec)
        return cls(session, replace(spec, dim=backbone._measure(path)))

    def embed(self, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Embed images.

        Args:
            pixels: Shape (images, height, width, channels), as the spec's `pixel_spec` says.

        Returns:
            Embeddings, float32, shape (images, dimensions).
        """
        parts = [
            self._run(pixels[start : start + BATCH_SIZE])
            for start in range(0, len(pixels), BATCH_SIZE)
        ]
        return np.concatenate(parts) if parts else np.empty((0, self.spec.dim), np.float32)

    def _run(self, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        feeds = {self.spec.input: self.spec.prepare(pixels)}
        (embedded,) = self._session.run([self.spec.output], feeds)
        return embedded.astype(np.float32, copy=False)

    def _measure(self, path: Path) -> int:
        """Embed drawn images, at once and one by one, and return the length of an embedding."""
        drawn = _draw_images(self.spec.pixel_spec)
        whole = self._try(path, drawn)
        alone = np.concatenate([self._try(path, drawn[i : i + 1]) for i in range(len(drawn))])
        if not np.isfinite(whole).all():
            raise InputError(
                f"{path}: gives values that are NaN or infinite. Check mean and std in"
                f" {path.with_suffix('.json').name}, or use a float32 file."
            )
        scale = float(np.square(whole - whole.mean(0)).mean()) ** 0.5
        moved = float(np.square(whole - alone).mean()) ** 0.5
        if moved > _LARGEST_MOVE * scale:
            raise InputError(
                f"{path}: the embedding of an image depends on the others in its batch (by"
                f" {moved / scale:.1%} of the standard deviation, rms). Dynamic quantisation does"
                " that, and batch normalisation that was exported in training mode: export it for"
                " inference, or quantise it statically."
            )
        return int(whole.shape[1])

    def _try(self, path: Path, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        try:
            found = self._run(pixels)
        except Exception as error:  # onnxruntime raises its own classes, and RuntimeError
            raise InputError(
                f"{path}: does not run on {len(pixels)} images of {self.spec.pixel_spec}"
                f" ({str(error).splitlines()[0][:200]}). Export it with a free batch dimension,"
                f" and check {path.with_suffix('.json').name}."
            ) from error
        if found.ndim != 2 or len(found) != len(pixels):
            raise InputError(
                f"{path}: output {self.spec.output} is {found.shape} for {len(pixels)} images; one"
                " vector each is needed. Name a pooled output in"
                f' {path.with_suffix(".json").name}: {{"output": ...}}.'
            )
        return found


def _draw_images(spec: PixelSpec) -> NDArray[np.uint8]:
    """Return images of four by four squares, each of a colour drawn from a fixed seed."""
    rng = np.random.default_rng(0)
    squares = rng.integers(0, 256, (_DRAWN_COUNT, 4, 4, spec.channels), dtype=np.uint8)
    rows = np.arange(spec.height) * 4 // spec.height
    columns = np.arange(spec.width) * 4 // spec.width
    return squares[:, rows][:, :, columns]


def digest(path: Path) -> str:
    """Return the digest of an ONNX file and of the files beside it that hold its weights.

    The file names those in its text, so every neighbour whose name occurs there counts.
    """
    content = path.read_bytes()
    neighbours = sorted(
        other
        for other in path.parent.iterdir()
        if other != path and other.is_file() and other.name.encode() in content
    )
    if not neighbours:
        return hashlib.sha256(content).hexdigest()
    parts = [f"{other.name}:{sha256(other)}" for other in (path, *neighbours)]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _only_input(path: Path, inputs: Sequence[Port]) -> Port:
    if len(inputs) != 1:
        names = ", ".join(one.name for one in inputs)
        raise InputError(
            f"{path}: {len(inputs)} inputs ({names}); a backbone takes images and nothing else."
            " Export the image encoder alone."
        )
    (taken,) = inputs
    if taken.type not in _TYPES or len(taken.shape) != 4:
        raise InputError(
            f"{path}: input {taken.name} is {taken.type} {list(taken.shape)}; a backbone takes four"
            f" dimensions of {', '.join(dtype.name for dtype in _TYPES.values())}."
        )
    if isinstance(taken.shape[0], int):
        raise InputError(
            f"{path}: input {taken.name} has a fixed batch of {taken.shape[0]}."
            " Export it with a free batch dimension."
        )
    return taken


def _embedding(path: Path, outputs: Sequence[Port], wanted: Any) -> Port:
    names = [one.name for one in outputs]
    if wanted is None and len(outputs) == 1:
        return outputs[0]
    if wanted not in names:
        raise UsageError(
            f"{path}: which output is the embedding? Write one of {', '.join(names)} into"
            f' {path.with_suffix(".json").name}: {{"output": ...}}; found {wanted!r}.'
        )
    return outputs[names.index(wanted)]


def _check_shape(path: Path, taken: Port, spec: BackboneSpec) -> None:
    height, width, channels = spec.pixel_spec.shape
    stated = (channels, height, width) if spec.layout == "NCHW" else (height, width, channels)
    for found, one in zip(taken.shape[1:], stated, strict=True):
        if isinstance(found, int) and found != one:
            raise UsageError(
                f"{path}: input {taken.name} is {list(taken.shape)}, but"
                f" {path.with_suffix('.json').name} says {spec.layout} with {height}x{width} pixels"
                f" of {channels} channels. Correct height, width, channels or layout there."
            )
