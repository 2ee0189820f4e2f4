"""Export: the graphs compute what was trained and say what they are; else nothing is written."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from vsc_export import parity, write
from vsc_export.graphs import EncoderGraph, decoder_graph, encoder_graph, example_rows
from vsc_export.options import ExportOptions
from vsc_export.write import export_bundle
from vsc_serve.bundle import open_bundle
from vsc_serve.codes import threshold, threshold_logit
from vsc_serve.decoder import Decoder
from vsc_serve.encoder import Encoder
from vsc_serve.errors import BundleError, ExportError, UsageError
from vsc_serve.images import read_images
from vsc_serve.sources import find_sources
from vsc_training.checkpoint import load_checkpoint, save_checkpoint
from vsc_training.model import VSC

MakeModel = Callable[..., VSC]


@pytest.fixture(scope="module")
def pixels(grey_folder: Path, tiny_bundle: Path) -> np.ndarray:
    spec = open_bundle(tiny_bundle).manifest.pixel_spec
    assert spec is not None
    return read_images(find_sources([str(grey_folder)]), spec)[0]


def test_the_bundle_gives_the_codes_of_the_checkpoint(
    tiny_run: Path, tiny_bundle: Path, pixels: np.ndarray
) -> None:
    model = load_checkpoint(tiny_run).build_model()
    with torch.no_grad():
        posterior = model.encode(torch.from_numpy(pixels).float() / 255.0)
    expected = threshold(posterior.spike_logit.numpy(), posterior.mu.numpy(), 0.5)
    codes = Encoder.open(tiny_bundle, device="cpu").encode(pixels)
    np.testing.assert_allclose(codes.toarray(), expected, atol=1e-5)
    assert codes.nnz > 100


def test_one_image_has_one_code_whatever_the_batch_its_order_and_the_threads(
    tiny_bundle: Path, pixels: np.ndarray
) -> None:
    expected = Encoder.open(tiny_bundle, device="cpu").encode(pixels).toarray()
    order = np.random.default_rng(0).permutation(len(pixels))
    for threads in (1, 2):
        encoder = Encoder.open(tiny_bundle, device="cpu", threads=threads)
        assert encoder.encode(pixels[order]).toarray().tobytes() == expected[order].tobytes()
        for size in (1, 7, 64):
            parts = [encoder.encode(pixels[i : i + size]).toarray() for i in range(0, 128, size)]
            assert (
                np.concatenate(parts)[:128].tobytes()
                == expected[: len(np.concatenate(parts))][:128].tobytes()
            )
    assert Encoder.open(tiny_bundle).encode(pixels[:0]).shape == (0, 16)


def test_tau_can_be_overridden_and_lowers_or_raises_the_active_count(
    tiny_bundle: Path, pixels: np.ndarray
) -> None:
    encoder = Encoder.open(tiny_bundle, device="cpu")
    counts = [encoder.encode(pixels, tau=tau).nnz for tau in (0.1, 0.5, 0.9)]
    assert counts[0] > counts[1] > counts[2]
    assert encoder.encode(pixels).nnz == counts[1]


def test_the_decoder_draws_what_the_model_draws(
    tiny_run: Path, tiny_bundle: Path, pixels: np.ndarray
) -> None:
    codes = Encoder.open(tiny_bundle, device="cpu").encode(pixels)
    drawn = Decoder.open(tiny_bundle, device="cpu").decode(codes)
    model = load_checkpoint(tiny_run).build_model()
    with torch.no_grad():
        expected = model.decode(torch.from_numpy(codes.toarray())).numpy()
    np.testing.assert_allclose(drawn, expected, atol=1e-5)
    assert drawn.shape == pixels.shape
    error = ((drawn - pixels / 255.0) ** 2).sum((1, 2, 3)).mean()
    blank = ((pixels.mean(0) / 255.0 - pixels / 255.0) ** 2).sum((1, 2, 3)).mean()
    assert error < 0.5 * blank


@pytest.mark.slow
def test_exporting_twice_gives_the_same_bytes(
    tiny_run: Path, tiny_bundle: Path, tmp_path: Path
) -> None:
    export_bundle(tiny_run, tmp_path / "again")
    for path in sorted(tiny_bundle.rglob("*")):
        if path.is_file():
            assert (
                path.read_bytes()
                == (tmp_path / "again" / path.relative_to(tiny_bundle)).read_bytes()
            )


def test_no_onnx_file_names_a_path_or_draws_a_random_number(tiny_bundle: Path) -> None:
    for path in tiny_bundle.glob("*.onnx"):
        content = path.read_bytes()
        assert b"site-packages" not in content
        assert b".py" not in content
        proto = onnx.load(path)
        assert not [n for n in proto.graph.node if n.op_type.startswith("Random")]
        assert all(not node.metadata_props for node in proto.graph.node)


def test_the_graph_applies_a_strict_threshold_and_never_gives_minus_zero(
    random_model: MakeModel,
) -> None:
    model = random_model("mlp")
    logit = torch.tensor([0.25, 0.25, 0.5, -1.0])
    mu = torch.tensor([-3.0, 2.0, -0.5, -4.0])
    graph = EncoderGraph(model)
    for head, values in ((model.spike_head, logit), (graph.mu_head, mu)):
        torch.nn.init.zeros_(head.weight)
        head.bias.data[:4] = values
    code = graph(example_rows(model.data, 1), torch.tensor(0.25))[0][:, :4]
    assert code.tolist() == [[0.0, 0.0, -0.5, 0.0]]
    assert not torch.signbit(code[0, [0, 1, 3]]).any()


@pytest.mark.slow
@pytest.mark.usefixtures("cached_exports")
@pytest.mark.parametrize(("network", "vectors"), [("mlp", False), ("conv", False), ("mlp", True)])
def test_every_form_of_the_model_exports_with_a_free_batch(
    network: str, vectors: bool, tmp_path: Path, random_model: MakeModel
) -> None:
    model = random_model(network, vectors=vectors)
    onnx.save(encoder_graph(model, 0.5, 20), tmp_path / "encoder.onnx")
    onnx.save(decoder_graph(model, 20), tmp_path / "decoder.onnx")
    encoder = onnxruntime.InferenceSession(tmp_path / "encoder.onnx")
    decoder = onnxruntime.InferenceSession(tmp_path / "decoder.onnx")
    for count in (0, 1, 2, 7, 33):
        rows = example_rows(model.data, count)
        with torch.no_grad():
            expected = EncoderGraph(model)(rows, torch.tensor(0.0))
        found = encoder.run(None, {model.data.modality: rows.numpy()})
        for one, other in zip(found, expected, strict=True):
            np.testing.assert_allclose(one, other.numpy(), atol=1e-4)
        assert decoder.run(None, {"code": found[0]})[0].shape == rows.shape


def test_the_tau_input_has_a_default_and_is_overridable(tiny_bundle: Path) -> None:
    session = onnxruntime.InferenceSession(tiny_bundle / "encoder.onnx")
    assert [value.name for value in session.get_overridable_initializers()] == ["tau_logit"]
    assert [value.name for value in session.get_inputs()] == ["image"]
    assert [value.name for value in session.get_outputs()] == [
        "code",
        "spike_logit",
        "mu",
        "logvar",
    ]


@pytest.mark.slow
@pytest.mark.usefixtures("cached_exports")
def test_a_failed_parity_writes_nothing(
    tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parity, "VALUE_TOLERANCE", -1.0)
    with pytest.raises(ExportError, match="does not compute what was trained"):
        export_bundle(tiny_run, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.usefixtures("cached_exports")
def test_a_collapsed_model_is_refused_unless_asked_for(tiny_run: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(tiny_run, run)
    checkpoint = load_checkpoint(run)
    metrics = checkpoint.state.metrics | {"active": 0.0, "empty_share": 1.0}
    state = dataclasses.replace(checkpoint.state, metrics=metrics)
    save_checkpoint(run, dataclasses.replace(checkpoint, state=state))
    with pytest.raises(ExportError, match=r"collapsed: codes are empty .* `allow_collapsed=True`"):
        export_bundle(run, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert export_bundle(run, tmp_path / "out", ExportOptions(allow_collapsed=True)).path.is_dir()


def test_a_tau_out_of_range_and_a_missing_run_are_refused(tiny_run: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="tau must be above 0 and below 1"):
        export_bundle(tiny_run, tmp_path / "out", ExportOptions(tau=1.0))
    with pytest.raises(UsageError, match="Train first"):
        export_bundle(tmp_path, tmp_path / "out")


@pytest.mark.slow
def test_a_layer_that_has_no_onnx_form_is_an_export_error(random_model: MakeModel) -> None:
    class Strange(torch.nn.Module):
        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            return torch.linalg.eigvals(hidden[:, :4, None] * hidden[:, None, :4]).real

    model = random_model("mlp")
    model.encoder.append(Strange())
    model.encoder.append(torch.nn.Linear(4, 32))
    with pytest.raises(ExportError, match="cannot be exported to ONNX"):
        encoder_graph(model, 0.5, 20)


def test_probes_stay_away_from_the_threshold_and_are_checked(
    tiny_bundle: Path, tmp_path: Path
) -> None:
    manifest = open_bundle(tiny_bundle).manifest
    assert len(manifest.probes) == 3
    assert all(probe.indices for probe in manifest.probes), "an empty code proves little"
    copy = tmp_path / "copy"
    shutil.copytree(tiny_bundle, copy)
    stored = json.loads((copy / "manifest.json").read_text())
    stored["probes"][0]["indices"] = [1, 2, 3, 4, 5]
    stored["probes"][0]["values"] = [0.0] * 5
    (copy / "manifest.json").write_text(json.dumps(stored))
    with pytest.raises(BundleError, match="gives another code than at export"):
        Encoder.open(copy, device="cpu")


@pytest.mark.usefixtures("cached_exports")
def test_tau_is_stored_as_the_float32_that_is_compared(random_model: MakeModel) -> None:
    limit = threshold_logit(0.3)
    graph = encoder_graph(random_model("mlp"), 0.3, 20)
    stored = next(part for part in graph.graph.initializer if part.name == "tau_logit")
    assert onnx.numpy_helper.to_array(stored).tobytes() == limit.tobytes()


@pytest.mark.slow
@pytest.mark.usefixtures("cached_exports")
def test_a_bundle_for_another_tau_says_how_many_latents_are_active_there(
    tiny_run: Path, tiny_bundle: Path, tmp_path: Path, pixels: np.ndarray
) -> None:
    manifest = export_bundle(tiny_run, tmp_path / "out", ExportOptions(tau=0.2)).manifest
    assert manifest.tau == 0.2
    assert manifest.active > open_bundle(tiny_bundle).manifest.active
    codes = Encoder.open(tmp_path / "out", device="cpu").encode(pixels)
    assert codes.nnz == Encoder.open(tiny_bundle, device="cpu").encode(pixels, tau=0.2).nnz
    assert codes.nnz / len(pixels) == pytest.approx(manifest.active)


def test_a_truncated_weights_file_is_refused_with_its_name(
    tiny_bundle: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(tiny_bundle, copy)
    weights = copy / "weights.bin"
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(BundleError, match=r"weights\.bin: changed since it was exported"):
        Encoder.open(copy, device="cpu")


def test_the_model_card_states_the_measured_metrics(tiny_bundle: Path, tiny_run: Path) -> None:
    card = (tiny_bundle / write.CARD).read_text()
    metrics = load_checkpoint(tiny_run).state.metrics
    assert f"{metrics['active']:.1f} per example" in card
    assert f"{metrics['live']} of {metrics['latents']}" in card
