"""Parity is a gate: every kind of wrong export fails it, and the report says what and where."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from vsc_export import graphs, settings
from vsc_export.compaction import csr_graph
from vsc_export.comparison import Setting, Truth, compare, exact_codes
from vsc_export.fidelity import GATES
from vsc_export.graphs import EncoderGraph, decoder_graph, encoder_graph, example_rows
from vsc_export.parity import Parity, measure_parity, require_parity
from vsc_export.parity_inputs import OFFSETS, parity_inputs, push_to_threshold
from vsc_export.precision import encoder_in, parse_precision
from vsc_serve.bundle import Precision
from vsc_serve.errors import ExportError
from vsc_serve.options import GUARD_BAND
from vsc_serve.session import open_session
from vsc_training.checkpoint import load_checkpoint, load_samples
from vsc_training.model import VSC

pytestmark = pytest.mark.usefixtures("cached_exports")

MakeModel = Callable[..., VSC]


@pytest.fixture
def model(tiny_run: Path) -> VSC:
    return load_checkpoint(tiny_run).build_model()


@pytest.fixture
def inputs(tiny_run: Path, model: VSC) -> dict[str, np.ndarray]:
    return parity_inputs(model, load_samples(tiny_run), 0.5, np.random.default_rng(0))


def save_graphs(
    folder: Path, model: VSC, encoder: onnx.ModelProto, csr: onnx.ModelProto | None = None
) -> None:
    onnx.save(encoder, folder / "encoder.onnx")
    onnx.save(csr or csr_graph(encoder), folder / "encoder_csr.onnx")
    onnx.save(decoder_graph(model, 20), folder / "decoder.onnx")


def measure(
    model: VSC, folder: Path, inputs: dict[str, np.ndarray], precision: Precision = "float32"
) -> Parity:
    return measure_parity(model, folder, 0.5, inputs, precision=precision)


def test_the_report_says_what_was_compared(tiny_bundle: Path) -> None:
    report = json.loads((tiny_bundle / "parity.json").read_text())
    assert report["passed"]
    assert report["rows"] == {"examples": 200, "noise": 64, "constants": 6, "pushed": 60}
    settings = {(c["batch_size"], c["threads"], c["is_permuted"]) for c in report["comparisons"]}
    assert settings == {
        (size, threads, is_permuted)
        for size, is_permuted in [(1, False), (7, False), (64, False), (256, False), (256, True)]
        for threads in (1, 2)
    }
    assert all(c["decisions"] == 330 * 16 for c in report["comparisons"])
    assert all(c["csr_equal"] and c["not_finite"] == 0 for c in report["comparisons"])
    assert report["bytes_equal"]
    assert report["near_threshold"]["pushed"] >= 20
    assert report["fidelity"]["rows"] == 200
    assert report["fidelity"]["neighbour_recall"] == 1.0
    assert report["fidelity"]["active"] == report["fidelity"]["active_truth"]


@pytest.mark.parametrize("shift", [0.01, -0.01, 0.001])
def test_a_shifted_threshold_fails(
    shift: float, model: VSC, inputs: dict[str, np.ndarray], tmp_path: Path
) -> None:
    save_graphs(tmp_path, model, encoder_graph(model, 1 / (1 + np.exp(-shift)), 20))
    parity = measure(model, tmp_path, inputs)
    assert all(comparison.flips_outside_band >= 15 for comparison in parity.comparisons)
    assert json.loads(parity.to_json())["passed"] is False
    with pytest.raises(
        ExportError, match=r"batch 1, 1 threads on onnxruntime .* spikes flipped outside the guard"
    ):
        require_parity(parity)


@pytest.mark.slow
def test_a_layer_in_half_precision_fails(
    model: VSC, inputs: dict[str, np.ndarray], tmp_path: Path
) -> None:
    save_graphs(tmp_path, model, encoder_graph(model, 0.5, 20, body_type=torch.float16))
    parity = measure(model, tmp_path, inputs)
    assert parity.max_value_error > 1e-4
    with pytest.raises(ExportError, match="values differ by up to"):
        require_parity(parity)


@pytest.mark.slow
def test_a_product_with_the_mask_fails_where_a_mean_is_infinite(
    model: VSC,
    inputs: dict[str, np.ndarray],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class ProductGraph(EncoderGraph):
        def forward(self, rows: torch.Tensor, tau_logit: torch.Tensor) -> tuple[Any, ...]:
            _, spike_logit, mu, logvar = super().forward(rows, tau_logit)
            return mu * (spike_logit > tau_logit), spike_logit, mu, logvar

    model.spike_head.bias.data[3] = -1e4  # always off
    model.slab_head.bias.data[3] = torch.inf
    save_graphs(tmp_path, model, encoder_graph(model, 0.5, 20))
    assert not measure(model, tmp_path, inputs).failures
    monkeypatch.setattr(graphs, "EncoderGraph", ProductGraph)
    save_graphs(tmp_path, model, encoder_graph(model, 0.5, 20))
    parity = measure(model, tmp_path, inputs)
    assert all(comparison.not_finite == 330 for comparison in parity.comparisons)
    assert any("330 values are NaN or infinite" in line for line in parity.failures)


def test_a_compacting_graph_that_gives_other_entries_fails(
    model: VSC, inputs: dict[str, np.ndarray], tmp_path: Path
) -> None:
    save_graphs(tmp_path, model, encoder_graph(model, 0.5, 20), csr_graph(other_sign(model)))
    parity = measure(model, tmp_path, inputs)
    assert "encoder_csr.onnx gives other entries than encoder.onnx" in parity.failures[0]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["image", "vector", "fp16", "int8"])
def test_sparse_rows_that_are_not_those_of_the_dense_codes_fail_in_every_kind_of_bundle(
    kind: str, tmp_path: Path, random_model: MakeModel, break_csr: Callable[[str], None]
) -> None:
    """A moved row boundary, a shifted index, a lost row, a changed bit; see also test_backbone."""
    model = random_model(vectors=kind == "vector")
    rows = example_rows(model.data, 40).numpy()
    precision = parse_precision(kind) if kind in GATES else "float32"
    save_graphs(tmp_path, model, encoder_in(precision, model, 0.5, 20, rows))
    inputs = parity_inputs(model, rows, 0.5, np.random.default_rng(0))
    gates = measure(model, tmp_path, inputs, precision).failures
    break_csr(model.data.modality)
    failures = measure(model, tmp_path, inputs, precision).failures
    found = [line for line in failures if line not in gates]
    assert len(found) == 2
    assert all(line.startswith("batch 7, ") for line in found)
    assert all("encoder_csr.onnx gives other entries than encoder.onnx" in line for line in found)


def other_sign(model: VSC) -> onnx.ModelProto:
    """An encoder that gives all values with the other sign."""
    proto = encoder_graph(model, 0.5, 20)
    for node in proto.graph.node:
        if node.output[0] == "code":
            node.output[0] = "positive"
    proto.graph.node.append(onnx.helper.make_node("Neg", ["positive"], ["code"]))
    return proto


class Fickle:
    """A session whose values depend on the batch size."""

    engine = "fickle 1.0 cpu"

    def __init__(self, path: Path, **options: Any) -> None:
        self._session = open_session(path, **options)

    def run(self, outputs: Sequence[str], feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
        found = self._session.run(outputs, feeds)
        is_code = outputs[0] in ("code", "values") and len(feeds["image"]) == 7
        return [found[0] * np.float32(1 + 1e-6), *found[1:]] if is_code else found


class FickleCard(Fickle):
    engine = "fickle 1.0 cuda"


def test_codes_that_depend_on_the_batch_fail_on_a_cpu_and_are_reported_on_a_card(
    tiny_bundle: Path, model: VSC, inputs: dict[str, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(settings, "open_session", Fickle)
    parity = measure(model, tiny_bundle, inputs)
    assert parity.failures == ["codes change with batch size, order of the rows or thread count"]
    monkeypatch.setattr(settings, "open_session", FickleCard)
    parity = measure(model, tiny_bundle, inputs)
    assert not parity.bytes_equal
    assert not parity.failures


def test_a_wrong_decoder_fails(model: VSC, inputs: dict[str, np.ndarray], tmp_path: Path) -> None:
    save_graphs(tmp_path, model, encoder_graph(model, 0.5, 20))
    with torch.no_grad():
        last = [layer for layer in model.decoder if isinstance(layer, torch.nn.Linear)][-1]
        last.bias.data[0] += 0.01
    parity = measure(model, tmp_path, inputs)
    assert [line for line in parity.failures if line.startswith("decoder: values differ by up to")]


def test_a_nan_is_an_infinite_difference_and_never_hidden_by_the_band() -> None:
    truth = Truth(np.array([[1.0, 0.0]]), np.array([[2.0, 3.0]]), 0.0)
    setting = Setting(engine="test", batch_size=1, threads=1)
    logit = truth.spike_logit.astype(np.float32)
    found = compare(truth, np.array([[np.nan, 0.0]], np.float32), logit, setting, csr_equal=True)
    assert found.max_value_error == np.inf
    found = compare(truth, np.array([[2.0, np.nan]], np.float32), logit, setting, csr_equal=True)
    assert (found.flips_inside_band, found.flips_outside_band, found.not_finite) == (1, 0, 1)


def test_flips_are_counted_on_the_side_of_the_band_where_they_are() -> None:
    near = GUARD_BAND * 0.9
    truth = Truth(np.array([[near, -near, 0.2, -0.2, 0.0]]), np.ones((1, 5)), 0.0)
    code = np.array([[0.0, 1.0, 0.0, 1.0, 0.0]], np.float32)
    logit = truth.spike_logit.astype(np.float32)
    setting = Setting(engine="test", batch_size=1, threads=1)
    found = compare(truth, code, logit, setting, csr_equal=True)
    assert (found.flips_inside_band, found.flips_outside_band) == (2, 2)


@pytest.mark.parametrize("tau", [0.5, 0.2])
def test_pushed_images_stand_on_the_threshold_and_two_bands_beside_it(
    tau: float, tiny_run: Path, model: VSC
) -> None:
    samples = load_samples(tiny_run)
    pushed = push_to_threshold(model, samples, tau)
    assert pushed.dtype == np.uint8
    assert pushed.shape == (60, 8, 8, 1)
    truth = exact_codes(model, pushed, tau)
    goals = truth.limit + np.resize(OFFSETS, 60)
    missed = np.abs(truth.spike_logit - goals[:, None]).min(1)
    before = exact_codes(model, samples[:60], tau).spike_logit
    assert np.median(missed) < GUARD_BAND / 2
    assert np.median(np.abs(before - goals[:, None]).min(1)) > 100 * GUARD_BAND
    assert np.abs(pushed.astype(int) - samples[:60]).mean() < 20


def test_pushed_vectors_stand_on_the_threshold(random_model: MakeModel) -> None:
    model = random_model(vectors=True)
    rows = np.random.default_rng(0).normal(size=(9, 10)).astype(np.float32)
    pushed = push_to_threshold(model, rows, 0.5)
    assert pushed.dtype == np.float32
    truth = exact_codes(model, pushed, 0.5)
    missed = np.abs(truth.spike_logit - np.resize(OFFSETS, 9)[:, None]).min(1)
    assert missed.max() < GUARD_BAND / 10


@pytest.mark.slow
def test_vectors_far_from_zero_are_measured_in_units_of_their_scale(
    tmp_path: Path, random_model: MakeModel
) -> None:
    model = random_model(vectors=True)
    model.scale.fill_(1e4)
    save_graphs(tmp_path, model, encoder_graph(model, 0.5, 20))
    rows = np.random.default_rng(0).normal(scale=1e4, size=(40, 10)).astype(np.float32)
    parity = measure(model, tmp_path, parity_inputs(model, rows, 0.5, np.random.default_rng(0)))
    assert not parity.failures
