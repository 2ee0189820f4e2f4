"""Bundles with weights drawn at random: their speed is that of trained ones."""

from itertools import pairwise
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from vsc_serve.bundle import ENCODER, MANIFEST, Manifest, sha256
from vsc_serve.images import PixelSpec

ACTIVE = 0.05
"""Share of latents that is on, about."""
CHANNELS = (3, 32, 64, 128, 256)

Weights = dict[str, NDArray[np.generic]]


def make_bundle(folder: Path, kind: str) -> None:
    """Write a bundle: `mlp` is 784-400 with 200 latents, `conv` four 4x4 convolutions with 512."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    if kind == "mlp":
        spec, latent_dim = PixelSpec(height=28, width=28, channels=1), 200
        nodes, weights = _mlp(rng, 400)
        hidden = 400
    else:
        spec, latent_dim = PixelSpec(height=64, width=64, channels=3), 512
        nodes, weights = _conv(rng)
        hidden = 4096
    heads, head_weights = _heads(rng, hidden, latent_dim)
    _save(folder / ENCODER, spec, nodes + heads, weights | head_weights)
    manifest = Manifest(
        name=kind,
        modality="image",
        latent_dim=latent_dim,
        tau=0.5,
        alpha=ACTIVE,
        active=ACTIVE * latent_dim,
        opset=20,
        files={ENCODER: sha256(folder / ENCODER)},
        probes=[],
        pixel_spec=spec,
    )
    (folder / MANIFEST).write_text(manifest.to_json(), encoding="utf-8")


def _mlp(rng: np.random.Generator, hidden: int) -> tuple[list[onnx.NodeProto], Weights]:
    nodes = [
        helper.make_node("Reshape", ["image", "flat_shape"], ["flat"]),
        helper.make_node("Cast", ["flat"], ["float"], to=TensorProto.FLOAT),
        helper.make_node("Div", ["float", "white"], ["unit"]),
        helper.make_node("Gemm", ["unit", "body", "body_bias"], ["linear"]),
        helper.make_node("Relu", ["linear"], ["hidden"]),
    ]
    weights: Weights = {
        "flat_shape": np.array([-1, 784], np.int64),
        "body": _normal(rng, (784, hidden), 784),
        "body_bias": np.zeros(hidden, np.float32),
    }
    return nodes, weights


def _conv(rng: np.random.Generator) -> tuple[list[onnx.NodeProto], Weights]:
    nodes = [
        helper.make_node("Cast", ["image"], ["float"], to=TensorProto.FLOAT),
        helper.make_node("Div", ["float", "white"], ["unit"]),
        helper.make_node("Transpose", ["unit"], ["x0"], perm=[0, 3, 1, 2]),
    ]
    weights: Weights = {"flat_shape": np.array([-1, 4096], np.int64)}
    for layer, (inputs, outputs) in enumerate(pairwise(CHANNELS)):
        weights[f"w{layer}"] = _normal(rng, (outputs, inputs, 4, 4), inputs * 16)
        nodes += [
            helper.make_node(
                "Conv",
                [f"x{layer}", f"w{layer}"],
                [f"c{layer}"],
                strides=[2, 2],
                pads=[1, 1, 1, 1],
            ),
            helper.make_node("Relu", [f"c{layer}"], [f"x{layer + 1}"]),
        ]
    nodes.append(helper.make_node("Reshape", [f"x{len(CHANNELS) - 1}", "flat_shape"], ["hidden"]))
    return nodes, weights


def _heads(
    rng: np.random.Generator, hidden: int, latent_dim: int
) -> tuple[list[onnx.NodeProto], Weights]:
    nodes: list[onnx.NodeProto] = []
    weights: Weights = {}
    for head, shift in (("spike_logit", -1.6), ("mu", 0.0), ("logvar", 0.0)):
        weights[f"{head}_weight"] = _normal(rng, (hidden, latent_dim), hidden)
        weights[f"{head}_bias"] = np.full(latent_dim, shift, np.float32)
        parts = ["hidden", f"{head}_weight", f"{head}_bias"]
        nodes.append(helper.make_node("Gemm", parts, [head]))
    nodes += [
        helper.make_node("Greater", ["spike_logit", "tau_logit"], ["is_on"]),
        helper.make_node("Where", ["is_on", "mu", "zero"], ["code"]),
    ]
    return nodes, weights | {"zero": np.array(0, np.float32), "white": np.array(255, np.float32)}


def _normal(rng: np.random.Generator, shape: tuple[int, ...], inputs: int) -> NDArray[np.float32]:
    return rng.normal(0, np.sqrt(2 / inputs), shape).astype(np.float32)


def _save(path: Path, spec: PixelSpec, nodes: list[onnx.NodeProto], weights: Weights) -> None:
    named = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes,
        "random",
        [
            named("image", TensorProto.UINT8, ["batch", *spec.shape]),
            named("tau_logit", TensorProto.FLOAT, []),
        ],
        [named(name, TensorProto.FLOAT, None) for name in ("code", "spike_logit", "mu", "logvar")],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    opset = helper.make_opsetid("", 20)
    onnx.save(helper.make_model(graph, ir_version=10, opset_imports=[opset]), path)
