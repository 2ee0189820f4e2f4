"""The compacting encoder gives the entries of the dense codes, from the same weights file."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from vsc_export import shapes
from vsc_export.compaction import csr_graph
from vsc_export.graphs import decoder_graph, encoder_graph, example_rows
from vsc_serve.bundle import open_bundle
from vsc_serve.codes import dense_to_csr
from vsc_serve.errors import BundleError, ExportError
from vsc_training.checkpoint import load_samples
from vsc_training.model import VSC

pytestmark = pytest.mark.usefixtures("cached_exports")

MakeModel = Callable[..., VSC]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("network", "vectors", "opset"),
    [("mlp", False, 20), ("conv", False, 20), ("mlp", True, 20), ("mlp", False, 18)],
)
def test_the_entries_are_those_of_the_dense_codes_at_every_batch_size(
    network: str, vectors: bool, opset: int, tmp_path: Path, random_model: MakeModel
) -> None:
    model = random_model(network, vectors=vectors)
    encoder = encoder_graph(model, 0.5, opset)
    compacting = csr_graph(encoder)
    onnx.checker.check_model(compacting, full_check=True)
    assert encoder.opset_import[0].version == opset
    dense = onnxruntime.InferenceSession(encoder.SerializeToString())
    csr = onnxruntime.InferenceSession(compacting.SerializeToString())
    for count in (0, 1, 2, 7, 33):
        rows = {model.data.modality: example_rows(model.data, count).numpy()}
        expected = dense_to_csr(dense.run(["code"], rows)[0])
        values, indices, row_counts = csr.run(None, rows)
        assert values.tobytes() == expected.data.tobytes()
        assert indices.dtype == row_counts.dtype == np.int32
        np.testing.assert_array_equal(indices, expected.indices)
        np.testing.assert_array_equal(row_counts, np.diff(expected.indptr))
    assert expected.nnz > 0


@pytest.mark.slow
def test_a_mean_of_exactly_zero_is_no_entry_and_nan_stays_visible(random_model: MakeModel) -> None:
    model = random_model()
    for head, values in ((model.spike_head, [5.0, 5.0, -5.0]), (model.slab_head, [0.0, -0.0, 1.0])):
        torch.nn.init.zeros_(head.weight)
        torch.nn.init.constant_(head.bias, -5.0)
        head.bias.data[:3] = torch.tensor(values)
    model.spike_head.bias.data[3] = 5.0
    model.slab_head.bias.data[3] = torch.nan
    session = onnxruntime.InferenceSession(
        csr_graph(encoder_graph(model, 0.5, 20)).SerializeToString()
    )
    values, indices, row_counts = session.run(None, {"image": example_rows(model.data, 2).numpy()})
    assert indices.tolist() == [3, 3]
    assert row_counts.tolist() == [1, 1]
    assert np.isnan(values).all()


def test_both_encoders_read_one_weights_file(tiny_bundle: Path) -> None:
    places = []
    for name in ("encoder.onnx", "encoder_csr.onnx"):
        proto = onnx.load(tiny_bundle / name, load_external_data=False)
        places.append(
            {
                part.name: {entry.key: entry.value for entry in part.external_data}
                for part in proto.graph.initializer
                if part.external_data
            }
        )
        assert all(place["location"] == "weights.bin" for place in places[-1].values())
    dense, compacting = places
    assert compacting
    assert all(dense[name] == place for name, place in compacting.items())
    assert not any("logvar" in name for name in compacting), "weights that it does not need"


def test_tau_can_be_overridden_as_in_the_dense_graph(tiny_run: Path, tiny_bundle: Path) -> None:
    rows = {"image": load_samples(tiny_run)}
    dense = onnxruntime.InferenceSession(tiny_bundle / "encoder.onnx")
    csr = onnxruntime.InferenceSession(tiny_bundle / "encoder_csr.onnx")
    assert [value.name for value in csr.get_overridable_initializers()] == ["tau_logit"]
    counts = []
    for limit in (-2.0, 0.0, 2.0):
        feeds = rows | {"tau_logit": np.array(limit, np.float32)}
        values, _, row_counts = csr.run(None, feeds)
        assert values.tobytes() == dense_to_csr(dense.run(["code"], feeds)[0]).data.tobytes()
        counts.append(int(row_counts.sum()))
    assert counts[0] > counts[1] > counts[2]


def test_the_bundle_lists_the_compacting_graph_and_notices_a_change(
    tiny_bundle: Path, tmp_path: Path
) -> None:
    manifest = open_bundle(tiny_bundle).manifest
    assert manifest.has_csr
    assert manifest.graphs["encoder_csr.onnx"]["outputs"] == {
        "values": "float32 (nnz)",
        "indices": "int32 (nnz)",
        "row_counts": "int32 (batch)",
    }
    copy = tmp_path / "copy"
    shutil.copytree(tiny_bundle, copy)
    graph = copy / "encoder_csr.onnx"
    graph.write_bytes(graph.read_bytes()[:-1])
    with pytest.raises(BundleError, match=r"encoder_csr\.onnx: changed since"):
        open_bundle(copy)
    graph.unlink()
    with pytest.raises(BundleError, match=r"encoder_csr\.onnx: listed in the manifest but"):
        open_bundle(copy)


@pytest.mark.slow
def test_a_graph_with_a_fixed_batch_is_not_exported(
    tmp_path: Path, random_model: MakeModel
) -> None:
    model = random_model()
    encoder = encoder_graph(model, 0.5, 20)
    onnx.save(csr_graph(encoder), tmp_path / "encoder_csr.onnx")
    onnx.save(decoder_graph(model, 20), tmp_path / "decoder.onnx")
    encoder.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 2
    onnx.save(encoder, tmp_path / "encoder.onnx")
    with pytest.raises(ExportError, match=r"encoder\.onnx: does not run on a batch of 0 .*Nothing"):
        shapes.check_shapes(model, tmp_path)


@pytest.mark.slow
def test_a_graph_of_another_size_is_named_with_what_it_gives(
    tmp_path: Path, random_model: MakeModel
) -> None:
    model = random_model()
    encoder = encoder_graph(model, 0.5, 20)
    onnx.save(encoder, tmp_path / "encoder.onnx")
    onnx.save(csr_graph(encoder), tmp_path / "encoder_csr.onnx")
    onnx.save(decoder_graph(model, 20), tmp_path / "decoder.onnx")
    shapes.check_shapes(model, tmp_path)
    onnx.save(decoder_graph(random_model(vectors=True), 20), tmp_path / "decoder.onnx")
    with pytest.raises(
        ExportError, match=r"on a batch of 0, mean is float32 \(0, 10\) and should be float32 \(0, "
    ):
        shapes.check_shapes(model, tmp_path)


def test_every_graph_says_what_it_is_and_nothing_of_where_or_when(tiny_bundle: Path) -> None:
    for kind in ("encoder", "encoder_csr", "decoder"):
        session = onnxruntime.InferenceSession(tiny_bundle / f"{kind}.onnx")
        facts = session.get_modelmeta().custom_metadata_map
        assert facts.pop("vsc.pixel_spec")
        assert facts == {
            "vsc.format": "1",
            "vsc.kind": kind,
            "vsc.latent_dim": "16",
            "vsc.modality": "image",
            "vsc.name": "bars",
            "vsc.precision": "float32",
            "vsc.rule": "code_j = mu_j where spike_logit_j > tau_logit, else 0",
            "vsc.tau": "0.5",
            "vsc.tau_logit": "0.0",
        }
    stored = json.loads(session.get_modelmeta().custom_metadata_map["vsc.pixel_spec"])
    spec = open_bundle(tiny_bundle).manifest.pixel_spec
    assert spec is not None
    assert stored == spec.to_json()
