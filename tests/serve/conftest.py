"""A real bundle that needs no training: a fixed linear encoder as an ONNX file, with probes."""

import hashlib
import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from vsc_serve.bundle import DECODER, ENCODER, LINEAR_MAP, MANIFEST, Manifest, Probe, sha256
from vsc_serve.codes import threshold_logit
from vsc_serve.images import PixelSpec
from vsc_serve.linear_map import LinearMap, write_linear_map

LATENT_DIM = 6
SPEC = PixelSpec(height=4, width=4, channels=1)


def save_graph(
    path: Path,
    nodes: list[onnx.NodeProto],
    inputs: dict[str, tuple[int, list[object]]],
    outputs: list[str],
    constants: dict[str, NDArray[np.generic]],
) -> None:
    graph = helper.make_graph(
        nodes,
        "tiny",
        [helper.make_tensor_value_info(name, *kind) for name, kind in inputs.items()],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    opset = helper.make_opsetid("", 20)
    onnx.save(helper.make_model(graph, ir_version=10, opset_imports=[opset]), path)


def save_encoder(path: Path, weight: NDArray[np.float32]) -> None:
    """mu = 2 (image / 255 - 1/2) W, on where its half is above the threshold."""
    save_graph(
        path,
        [
            helper.make_node("Cast", ["image"], ["float"], to=TensorProto.FLOAT),
            helper.make_node("Flatten", ["float"], ["flat"]),
            helper.make_node("Div", ["flat", "white"], ["unit"]),
            helper.make_node("Sub", ["unit", "half"], ["centred"]),
            helper.make_node("MatMul", ["centred", "weight"], ["spike_logit"]),
            helper.make_node("Add", ["spike_logit", "spike_logit"], ["mu"]),
            helper.make_node("Greater", ["spike_logit", "tau_logit"], ["is_on"]),
            helper.make_node("Where", ["is_on", "mu", "zero"], ["code"]),
        ],
        {
            "image": (TensorProto.UINT8, ["batch", SPEC.height, SPEC.width, SPEC.channels]),
            "tau_logit": (TensorProto.FLOAT, []),
        },
        ["code", "spike_logit", "mu"],
        {
            "weight": weight,
            "white": np.float32(255).reshape(()),
            "half": np.float32(0.5).reshape(()),
            "zero": np.float32(0).reshape(()),
        },
    )


def save_vector_encoder(path: Path, weight: NDArray[np.float32]) -> None:
    """Spike logit x W, mu twice that."""
    save_graph(
        path,
        [
            helper.make_node("MatMul", ["vector", "weight"], ["spike_logit"]),
            helper.make_node("Add", ["spike_logit", "spike_logit"], ["mu"]),
            helper.make_node("Greater", ["spike_logit", "tau_logit"], ["is_on"]),
            helper.make_node("Where", ["is_on", "mu", "zero"], ["code"]),
        ],
        {
            "vector": (TensorProto.FLOAT, ["batch", weight.shape[0]]),
            "tau_logit": (TensorProto.FLOAT, []),
        },
        ["code", "spike_logit", "mu"],
        {"weight": weight, "zero": np.float32(0).reshape(())},
    )


def save_decoder(path: Path, weight: NDArray[np.float32]) -> None:
    shape = np.array([-1, *SPEC.shape], np.int64)
    save_graph(
        path,
        [
            helper.make_node("MatMul", ["code", "weight"], ["logit"]),
            helper.make_node("Sigmoid", ["logit"], ["flat"]),
            helper.make_node("Reshape", ["flat", "shape"], ["mean"]),
        ],
        {"code": (TensorProto.FLOAT, ["batch", weight.shape[0]])},
        ["mean"],
        {"weight": weight, "shape": shape},
    )


def make_probe(path: Path, pixels: NDArray[np.uint8], weight: NDArray[np.float32]) -> Probe:
    """Write an image, and compute by hand the code it must give."""
    Image.fromarray(pixels).save(path)
    spike_logit = (pixels.reshape(-1).astype(np.float32) / 255 - 0.5) @ weight
    is_on = spike_logit > threshold_logit(0.5)
    return Probe(
        file=path.name,
        pixels_sha256=hashlib.sha256(pixels.tobytes()).hexdigest(),
        indices=np.flatnonzero(is_on).tolist(),
        values=(2 * spike_logit[is_on]).tolist(),
    )


@pytest.fixture
def tiny_bundle(tmp_path: Path) -> Path:
    """A bundle for 4x4 grey images, with 6 latents and one probe."""
    folder = tmp_path / "tiny"
    folder.mkdir()
    rng = np.random.default_rng(3)
    weight = rng.normal(size=(16, LATENT_DIM)).astype(np.float32)
    save_encoder(folder / ENCODER, weight)
    save_decoder(folder / DECODER, np.ascontiguousarray(weight.T))
    probe = make_probe(folder / "probe.png", rng.integers(0, 256, (4, 4), dtype=np.uint8), weight)
    manifest = Manifest(
        name="tiny",
        modality="image",
        latent_dim=LATENT_DIM,
        tau=0.5,
        alpha=0.1,
        active=3.0,
        opset=20,
        files={path.name: sha256(path) for path in sorted(folder.iterdir())},
        probes=[probe],
        pixel_spec=SPEC,
    )
    (folder / MANIFEST).write_text(manifest.to_json(), encoding="utf-8")
    return folder


@pytest.fixture
def mapped_bundle(tiny_bundle: Path) -> Path:
    """`tiny_bundle` with a linear map."""
    return add_linear_map(tiny_bundle, int(np.prod(SPEC.shape)))


@pytest.fixture
def mapped_vector_bundle(vector_bundle: Path) -> Path:
    """`vector_bundle` with a linear map."""
    return add_linear_map(vector_bundle, 4)


def add_linear_map(bundle: Path, dimensions: int) -> Path:
    """Give a bundle a linear map of random weights."""
    rng = np.random.default_rng(4)
    shapes = ((LATENT_DIM, dimensions), (dimensions,), (dimensions,))
    arrays = (rng.normal(size=shape).astype(np.float32) for shape in shapes)
    write_linear_map(bundle / LINEAR_MAP, LinearMap(*arrays))
    stored = json.loads((bundle / MANIFEST).read_text(encoding="utf-8"))
    stored["files"][LINEAR_MAP] = sha256(bundle / LINEAR_MAP)
    (bundle / MANIFEST).write_text(json.dumps(stored), encoding="utf-8")
    return bundle


@pytest.fixture
def vector_bundle(tmp_path: Path) -> Path:
    """A bundle for vectors of 4 numbers, with 6 latents."""
    folder = tmp_path / "vectors"
    folder.mkdir()
    save_vector_encoder(
        folder / ENCODER, np.random.default_rng(3).normal(size=(4, LATENT_DIM)).astype(np.float32)
    )
    manifest = Manifest(
        name="tiny vectors",
        modality="vector",
        latent_dim=LATENT_DIM,
        tau=0.5,
        alpha=0.1,
        active=3.0,
        opset=20,
        files={ENCODER: sha256(folder / ENCODER)},
        probes=[],
        input_dim=4,
    )
    (folder / MANIFEST).write_text(manifest.to_json(), encoding="utf-8")
    return folder
