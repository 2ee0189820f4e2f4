"""Variants of lower precision: float32 where it counts, judged by what codes are for."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest

from vsc_export import fidelity
from vsc_export.comparison import exact_codes
from vsc_export.fidelity import GATES, Fidelity, Gate, neighbour_recall
from vsc_export.graphs import example_rows
from vsc_export.options import ExportOptions
from vsc_export.precision import encoder_in, parse_precision
from vsc_export.write import export_bundle
from vsc_serve.bundle import Precision, open_bundle
from vsc_serve.encoder import Encoder
from vsc_serve.errors import ExportError, UsageError
from vsc_training.checkpoint import load_checkpoint, load_samples
from vsc_training.model import VSC

pytestmark = pytest.mark.usefixtures("cached_exports")

PERFECT = Fidelity(
    rows=10,
    flipped_share=0.0,
    support_jaccard=1.0,
    neighbour_recall=1.0,
    active_truth=5.0,
    active=5.0,
    squared_error_truth=2.0,
    squared_error=2.0,
)


@pytest.fixture(params=["fp16", "int8"])
def precision(request: pytest.FixtureRequest) -> Precision:
    return parse_precision(request.param)


@pytest.fixture
def loose_gates(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gates for a model of 16 latents that was trained for a second."""
    gate = Gate(
        max_flipped_share=0.05,
        min_support_jaccard=0.8,
        min_neighbour_recall=0.5,
        max_squared_error_rise=0.1,
    )
    for name in GATES:
        monkeypatch.setitem(GATES, name, gate)


def weight_types(encoder: onnx.ModelProto) -> dict[str, str]:
    return {
        part.name: onnx.TensorProto.DataType.Name(part.data_type)
        for part in encoder.graph.initializer
        if len(part.dims) == 2
    }


@pytest.mark.slow
def test_only_the_spike_head_keeps_float32(tiny_run: Path, precision: Precision) -> None:
    model = load_checkpoint(tiny_run).build_model()
    encoder = encoder_in(precision, model, 0.5, 20, load_samples(tiny_run))
    types = weight_types(encoder)
    assert types.pop("model.spike_head.weight") == "FLOAT"
    assert set(types.values()) == {"FLOAT16" if precision == "fp16" else "UINT8"}
    assert [value.name for value in encoder.graph.input] == ["image", "tau_logit"]


@pytest.mark.slow
def test_a_convolutional_encoder_is_quantised_and_computes_nearly_the_same(
    random_model: Callable[..., VSC],
) -> None:
    model = random_model("conv")
    rows = example_rows(model.data, 40).numpy()
    encoder = encoder_in("int8", model, 0.5, 20, rows)
    session = onnxruntime.InferenceSession(encoder.SerializeToString())
    kinds = {node.op_type for node in encoder.graph.node}
    assert {"Conv", "QuantizeLinear"} <= kinds
    found, mu = session.run(["spike_logit", "mu"], {"image": rows})
    truth = exact_codes(model, rows, 0.5)
    np.testing.assert_allclose(found, truth.spike_logit, atol=0.02)
    np.testing.assert_allclose(mu, truth.mu, atol=0.02)


def test_nothing_quantised_enters_the_spike_head(tiny_run: Path) -> None:
    model = load_checkpoint(tiny_run).build_model()
    encoder = encoder_in("int8", model, 0.5, 20, load_samples(tiny_run))
    makers = {output: node for node in encoder.graph.node for output in node.output}
    (head,) = [node for node in encoder.graph.node if "model.spike_head.weight" in node.input]
    assert makers[head.input[0]].op_type == "Relu"
    assert any(node.op_type == "QuantizeLinear" for node in encoder.graph.node)


@pytest.mark.slow
def test_a_variant_is_a_bundle_with_its_own_report(
    precision: Precision, tiny_run: Path, tmp_path: Path, loose_gates: None
) -> None:
    done = export_bundle(tiny_run, tmp_path / "out", ExportOptions(precision=precision))
    assert open_bundle(tmp_path / "out").manifest.precision == precision
    report = json.loads((tmp_path / "out" / "parity.json").read_text())
    assert report["precision"] == precision
    assert report["gate"] == dataclasses.asdict(GATES[precision])
    assert report["passed"]
    assert report["bytes_equal"]
    assert all(c["csr_equal"] for c in report["comparisons"])
    assert precision in (tmp_path / "out" / "README.md").read_text()
    codes = Encoder.open(tmp_path / "out", device="cpu").encode(load_samples(tiny_run))
    assert codes.nnz / codes.shape[0] == pytest.approx(done.parity.fidelity.active)


@pytest.mark.slow
def test_a_variant_is_the_same_bytes_every_time(
    tiny_run: Path, tmp_path: Path, loose_gates: None
) -> None:
    for name in ("one", "two"):
        export_bundle(tiny_run, tmp_path / name, ExportOptions(precision="int8"))
    for path in (tmp_path / "one").iterdir():
        if path.is_file():
            assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()


@pytest.mark.slow
def test_a_variant_beyond_its_gate_is_not_written(
    precision: Precision, tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    strict = dataclasses.replace(GATES[precision], min_support_jaccard=1.5)
    monkeypatch.setitem(fidelity.GATES, precision, strict)
    with pytest.raises(ExportError, match=rf"{precision}: support Jaccard is .* must be >= 1\.5"):
        export_bundle(tiny_run, tmp_path / "out", ExportOptions(precision=precision))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"flipped_share": 0.1}, "share of flipped spikes is 0.1, must be <= 0.002"),
        ({"support_jaccard": 0.9}, "support Jaccard is 0.9, must be >= 0.98"),
        ({"neighbour_recall": 0.5}, "neighbour recall@10 is 0.5, must be >= 0.95"),
        ({"squared_error": 2.2}, "rise of the squared error is 0.1, must be <= 0.02"),
        ({"squared_error": np.nan}, "rise of the squared error is nan, must be <= 0.02"),
        ({"support_jaccard": np.nan}, "support Jaccard is nan, must be >= 0.98"),
    ],
)
def test_the_gate_says_what_is_lost(changes: dict[str, float], line: str) -> None:
    assert GATES["int8"].failures(PERFECT) == []
    assert GATES["int8"].failures(dataclasses.replace(PERFECT, **changes)) == [line]


def test_neighbours_kept_counts_those_that_stay_among_the_nearest() -> None:
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(60, 5))
    assert neighbour_recall(rows, rows) == 1.0
    assert neighbour_recall(rows, 3.0 * rows) == 1.0
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    other = rng.normal(size=(60, 5))
    others = other / np.linalg.norm(other, axis=1, keepdims=True)
    kept = 0
    for i in range(60):
        order, found = np.argsort(-unit @ unit[i]), np.argsort(-others @ others[i])
        kept += len(set(order[order != i][:10]) & set(found[found != i][:10]))
    assert neighbour_recall(rows, other) == pytest.approx(kept / 600)


def test_copies_and_empty_rows_are_neighbours_whichever_comes_first() -> None:
    rows = np.repeat(np.eye(3), 8, axis=0)
    assert neighbour_recall(rows, rows[:, [2, 0, 1]], 3) == 1.0
    assert neighbour_recall(np.zeros((20, 3)), np.random.default_rng(0).normal(size=(20, 3))) == 1.0
    assert neighbour_recall(rows[:1], rows[:1]) == 1.0


def test_a_name_that_is_no_precision_is_refused() -> None:
    with pytest.raises(UsageError, match="`precision` fp8: give float32, fp16, int8"):
        parse_precision("fp8")
