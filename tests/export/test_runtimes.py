"""Other runtimes agree: the same graph gives the same code in all of them, by the rule of parity.

Supports are equal wherever the spike logit lies further from the threshold than the guard band,
values lie within the tolerance. The runtimes are ONNX Runtime, OpenVINO and the reference
evaluator of ONNX, which computes each operator in numpy.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray
from onnx.reference import ReferenceEvaluator

from vsc_export.comparison import VALUE_TOLERANCE
from vsc_export.graphs import TAU_INPUT, encoder_graph, example_rows
from vsc_serve.bundle import ENCODER, ENCODER_CSR
from vsc_serve.codes import build_csr, threshold_logit
from vsc_serve.images import PixelSpec, read_pixels
from vsc_serve.options import GUARD_BAND
from vsc_training.config import load_recipe
from vsc_training.model import VSC, DataSpec

Outputs = dict[str, NDArray[Any]]
Runtime = Callable[[onnx.ModelProto, dict[str, NDArray[Any]]], Outputs]

TAUS = (0.5, 0.2)


def run_onnxruntime(graph: onnx.ModelProto, feeds: dict[str, NDArray[Any]]) -> Outputs:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3  # it warns that tau_logit may be overridden, which is the point
    session = onnxruntime.InferenceSession(graph.SerializeToString(), options)
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, feeds), strict=True))


def run_reference(graph: onnx.ModelProto, feeds: dict[str, NDArray[Any]]) -> Outputs:
    evaluator = ReferenceEvaluator(graph)
    return dict(zip(evaluator.output_names, evaluator.run(None, feeds), strict=True))


def run_openvino(graph: onnx.ModelProto, feeds: dict[str, NDArray[Any]]) -> Outputs:
    openvino = pytest.importorskip("openvino", reason="openvino is not installed")
    core = openvino.Core()
    settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1}
    compiled = core.compile_model(core.read_model(_with_required_tau(graph)), "CPU", settings)
    tau = {TAU_INPUT: np.float32(threshold_logit(0.5))}
    results = compiled(tau | feeds)
    return {output.name: results[output.name] for output in graph.graph.output}


def _with_required_tau(graph: onnx.ModelProto) -> bytes:
    """Return the graph with no default of tau_logit, which OpenVINO takes for a constant."""
    copied = onnx.ModelProto()
    copied.CopyFrom(graph)
    (default,) = (part for part in copied.graph.initializer if part.name == TAU_INPUT)
    copied.graph.initializer.remove(default)
    return copied.SerializeToString()


OTHERS = {"reference": run_reference, "openvino": run_openvino}


def small_model(network: str, *, vectors: bool = False) -> VSC:
    """A random model whose spike logits lie around the threshold, where runtimes could differ."""
    torch.manual_seed(0)
    fields = ["latent_dim=48", "hidden=32", "width=4", f"network={network}"]
    data = DataSpec(pixel_spec=PixelSpec(height=16, width=16, channels=3))
    model = VSC(load_recipe("sparse", fields), DataSpec(input_dim=10) if vectors else data).eval()
    with torch.no_grad():
        for weight in (model.spike_head.weight, model.slab_head.weight):
            weight.mul_(10.0)
        model.spike_head.bias.normal_()
    return model


@pytest.fixture(
    scope="module",
    params=[("mlp", False), ("conv", False), ("mlp", True)],
    ids=["mlp pixels", "conv pixels", "vectors"],
)
def graph_and_rows(request: pytest.FixtureRequest) -> tuple[onnx.ModelProto, dict[str, Any]]:
    network, vectors = request.param
    model = small_model(network, vectors=vectors)
    return encoder_graph(model, 0.5, 20), {
        model.data.modality: example_rows(model.data, 40).numpy()
    }


def disagreements(one: Outputs, other: Outputs, limit: np.float32) -> list[str]:
    """Say what is not parity between two runtimes' dense outputs."""
    is_far = np.abs(one["spike_logit"] - limit) > GUARD_BAND
    is_on, was_on = one["code"] != 0, other["code"] != 0
    found = []
    if ((is_on != was_on) & is_far).any():
        found.append("supports")
    if np.abs(one["code"] - other["code"])[is_on & was_on].max(initial=0.0) > VALUE_TOLERANCE:
        found.append("values")
    return found


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("tau", TAUS)
def test_a_runtime_gives_the_supports_and_values_of_onnxruntime(
    name: str, tau: float, graph_and_rows: tuple[onnx.ModelProto, dict[str, Any]]
) -> None:
    graph, rows = graph_and_rows
    limit = threshold_logit(tau)
    feeds = rows | {TAU_INPUT: np.array(limit)}
    expected = run_onnxruntime(graph, feeds)
    found = OTHERS[name](graph, feeds)
    assert disagreements(expected, found, limit) == []
    assert 0.1 < (expected["code"] != 0).mean() < 0.98


@pytest.mark.parametrize("name", OTHERS)
def test_without_a_tau_a_runtime_applies_the_one_that_was_built_in(
    name: str, graph_and_rows: tuple[onnx.ModelProto, dict[str, Any]]
) -> None:
    graph, rows = graph_and_rows
    expected = run_onnxruntime(graph, rows)
    assert disagreements(expected, OTHERS[name](graph, rows), threshold_logit(0.5)) == []
    lower = run_onnxruntime(graph, rows | {TAU_INPUT: np.array(threshold_logit(0.2))})
    assert (lower["code"] != 0).sum() > (expected["code"] != 0).sum()


def test_the_rule_sees_a_shifted_threshold_and_a_changed_value() -> None:
    model = small_model("mlp")
    graph, rows = encoder_graph(model, 0.5, 20), {"image": example_rows(model.data, 40).numpy()}
    limit = threshold_logit(0.5)
    expected = run_onnxruntime(graph, rows)
    shifted = run_onnxruntime(graph, rows | {TAU_INPUT: np.array(limit + np.float32(0.01))})
    assert "supports" in disagreements(expected, shifted, limit)
    changed = expected | {"code": expected["code"] * np.float32(1.01)}
    assert disagreements(expected, changed, limit) == ["values"]


def load_bundled(path: Path) -> onnx.ModelProto:
    """Load a graph of a bundle with its weights, as every runtime finds them."""
    return onnx.load(path, load_external_data=True)


@pytest.mark.parametrize("name", OTHERS)
def test_the_compacted_graph_of_a_bundle_gives_the_same_rows_in_every_runtime(
    name: str, tiny_bundle: Path, grey_folder: Path
) -> None:
    spec = PixelSpec(height=8, width=8, channels=1)
    pixels = np.stack([read_pixels(path, spec) for path in sorted(grey_folder.rglob("*.png"))])
    graph = load_bundled(tiny_bundle / ENCODER_CSR)
    dense = run_onnxruntime(load_bundled(tiny_bundle / ENCODER), {"image": pixels})
    found = OTHERS[name](graph, {"image": pixels})
    compacted = build_csr(
        found["values"], found["indices"], np.cumsum([0, *found["row_counts"]]), 16
    )
    assert compacted.nnz > len(pixels)
    rebuilt = dense | {"code": compacted.toarray()}
    assert disagreements(dense, rebuilt, threshold_logit(0.5)) == []
