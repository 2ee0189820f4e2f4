"""The encoder with fixed capacity: what fits is there, what does not is counted."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper

from vsc_export import topk
from vsc_export.options import ExportOptions
from vsc_export.topk import TOPK_OUTPUTS, check_topk, keep_largest, topk_graph
from vsc_export.write import export_bundle
from vsc_serve.bundle import ENCODER_TOPK, open_bundle
from vsc_serve.encoder import Encoder
from vsc_serve.errors import ExportError, UsageError
from vsc_serve.images import PixelSpec, read_pixels

LATENTS = 16


def identity_encoder() -> onnx.ModelProto:
    """An encoder whose code is its input, so that a test chooses the codes."""
    shape = ["batch", LATENTS]
    graph = helper.make_graph(
        [helper.make_node("Identity", ["vector"], ["code"])],
        "identity",
        [helper.make_tensor_value_info("vector", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("code", TensorProto.FLOAT, shape)],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def select(dense: NDArray[np.float32], capacity: int) -> dict[str, NDArray[Any]]:
    graph = topk_graph(identity_encoder(), LATENTS, capacity)
    onnx.checker.check_model(graph, full_check=True)
    session = onnxruntime.InferenceSession(graph.SerializeToString())
    return dict(zip(TOPK_OUTPUTS, session.run(None, {"vector": dense}), strict=True))


def sparse_rows(count: int, share: float) -> NDArray[np.float32]:
    rng = np.random.default_rng(count)
    dense = rng.normal(size=(count, LATENTS)).astype(np.float32)
    return np.where(rng.random(dense.shape) < share, dense, np.float32(0.0))


def test_entries_that_fit_are_all_there_in_rising_order_and_then_padding() -> None:
    dense = np.zeros((2, LATENTS), np.float32)
    dense[0, [2, 5, 11]] = [1.5, -3.0, 0.25]
    found = select(dense, capacity=4)
    np.testing.assert_array_equal(found["indices"], [[2, 5, 11, -1], [-1] * 4])
    np.testing.assert_array_equal(found["values"], [[1.5, -3.0, 0.25, 0.0], [0.0] * 4])
    np.testing.assert_array_equal(found["count"], [[3], [0]])
    np.testing.assert_array_equal(found["overflow"], [[0], [0]])


def test_of_too_many_the_largest_magnitudes_are_kept_and_the_others_counted() -> None:
    dense = np.zeros((1, LATENTS), np.float32)
    dense[0, [1, 4, 7, 9]] = [0.5, -2.0, 1.0, -1.0]
    found = select(dense, capacity=2)
    np.testing.assert_array_equal(found["indices"], [[4, 7]])  # of the equals 7 and 9 the lower
    np.testing.assert_array_equal(found["values"], [[-2.0, 1.0]])
    np.testing.assert_array_equal(found["count"], [[4]])
    np.testing.assert_array_equal(found["overflow"], [[2]])


@pytest.mark.parametrize("capacity", [1, 5, LATENTS])
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("count", [0, 1, 33])
def test_the_graph_does_what_the_rule_in_numpy_says(
    count: int, share: float, capacity: int
) -> None:
    dense = sparse_rows(count, share)
    expected, found = keep_largest(dense, capacity), select(dense, capacity)
    for name in TOPK_OUTPUTS:
        assert found[name].dtype == expected[name].dtype
        assert found[name].shape == (count, capacity if name in ("indices", "values") else 1)
        np.testing.assert_array_equal(found[name], expected[name])


@pytest.mark.parametrize("capacity", [0, LATENTS + 1])
def test_more_slots_than_latents_are_refused(capacity: int) -> None:
    with pytest.raises(UsageError, match=f"`top_k` must be from 1 to 16 .* not {capacity}"):
        topk_graph(identity_encoder(), LATENTS, capacity)


PLACES = 3
"""Fewer than some images have entries."""


@pytest.fixture(scope="module")
def pixels(grey_folder: Path) -> NDArray[np.uint8]:
    spec = PixelSpec(height=8, width=8, channels=1)
    return np.stack([read_pixels(path, spec) for path in sorted(grey_folder.rglob("*.png"))])


@pytest.fixture(scope="module")
def topk_bundle(tmp_path_factory: pytest.TempPathFactory, tiny_run: Path) -> Path:
    out = tmp_path_factory.mktemp("topk") / "bars"
    done = export_bundle(tiny_run, out, ExportOptions(top_k=PLACES))
    assert done.overflow is not None
    assert done.overflow.rows > 200
    return out


def test_a_bundle_with_fixed_capacity_gives_the_codes_of_the_dense_graph(
    topk_bundle: Path, pixels: NDArray[np.uint8]
) -> None:
    manifest = open_bundle(topk_bundle).manifest
    assert manifest.graphs[ENCODER_TOPK]["outputs"] == {
        "indices": "int32 (batch, 3)",
        "values": "float32 (batch, 3)",
        "count": "int32 (batch, 1)",
        "overflow": "int32 (batch, 1)",
    }
    codes = Encoder.open(topk_bundle, device="cpu").encode(pixels).toarray()
    session = onnxruntime.InferenceSession(topk_bundle / ENCODER_TOPK)
    found = dict(zip(TOPK_OUTPUTS, session.run(None, {"image": pixels}), strict=True))
    for name, expected in keep_largest(codes, PLACES).items():
        assert found[name].tobytes() == expected.tobytes()


def test_the_slots_follow_another_tau(topk_bundle: Path, pixels: NDArray[np.uint8]) -> None:
    session = onnxruntime.InferenceSession(topk_bundle / ENCODER_TOPK)
    feeds = {"image": pixels, "tau_logit": np.array(-3.0, np.float32)}
    few, many = (session.run(["count"], one)[0].sum() for one in ({"image": pixels}, feeds))
    assert many > few


def test_the_triton_repository_gets_a_model_for_it(topk_bundle: Path, tmp_path: Path) -> None:
    from vsc_export.triton import write_repository

    names = write_repository(topk_bundle, tmp_path / "repository")
    assert names == ["bars", "bars_sparse", "bars_topk"]
    config = (tmp_path / "repository" / "bars_topk" / "config.pbtxt").read_text()
    assert '{ name: "indices" data_type: TYPE_INT32 dims: [3] }' in config
    assert '{ name: "overflow" data_type: TYPE_INT32 dims: [1] }' in config


@pytest.mark.slow
def test_a_graph_that_keeps_other_entries_is_not_written(
    tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def keep_first(dense: NDArray[np.float32], capacity: int) -> dict[str, NDArray[Any]]:
        return keep_largest(np.where(np.arange(LATENTS) < 8, dense, np.float32(0.0)), capacity)

    monkeypatch.setattr(topk, "keep_largest", keep_first)
    with pytest.raises(ExportError, match=r"encoder_topk.onnx: indices is not what encoder.onnx"):
        export_bundle(tiny_run, tmp_path / "out", ExportOptions(top_k=PLACES))
    assert list(tmp_path.iterdir()) == []


def test_the_check_counts_rows_that_overflow(topk_bundle: Path, pixels: NDArray[np.uint8]) -> None:
    counts = np.diff(Encoder.open(topk_bundle, device="cpu").encode(pixels).indptr)
    overflow = check_topk(topk_bundle, "image", pixels, PLACES)
    assert (overflow.overflowing, overflow.most) == ((counts > PLACES).sum(), counts.max())
    assert 0 < overflow.overflowing < len(pixels)
