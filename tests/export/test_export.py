"""Export: the graphs compute what was trained and say what they are; else nothing is written."""

import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from vsc_export import verify, write
from vsc_export.graphs import EncoderGraph, decoder_graph, encoder_graph, example_rows
from vsc_export.verify import _compare, measure_parity, parity_inputs, require_parity
from vsc_export.write import export_bundle
from vsc_serve.bundle import open_bundle
from vsc_serve.codes import threshold, threshold_logit
from vsc_serve.encoder import Decoder, Encoder
from vsc_serve.errors import ExportError, UsageError
from vsc_serve.images import find_images, read_images
from vsc_serve.preprocess import PixelSpec
from vsc_training.checkpoint import load_checkpoint
from vsc_training.config import load_recipe
from vsc_training.model import VSC, DataSpec


def random_model(network: str, *, vectors: bool = False) -> VSC:
    torch.manual_seed(0)
    fields = ["latent_dim=24", "hidden=32", "width=4", f"network={network}"]
    data = DataSpec(pixel_spec=PixelSpec(height=16, width=16, channels=3))
    return VSC(load_recipe("sparse", fields), DataSpec(input_dim=10) if vectors else data).eval()


@pytest.fixture(scope="module")
def pixels(grey_folder: Path, tiny_bundle: Path) -> np.ndarray:
    spec = open_bundle(tiny_bundle).manifest.pixel_spec
    assert spec is not None
    return read_images(find_images([grey_folder]), spec)[0]


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


def test_the_graph_applies_a_strict_threshold_and_never_gives_minus_zero() -> None:
    model = random_model("mlp")
    logit = torch.tensor([[0.25, 0.25, 0.5, -1.0]])
    mu = torch.tensor([[-3.0, 2.0, -0.5, -4.0]])

    class Fixed(torch.nn.Module):
        def forward(self, _hidden: torch.Tensor) -> torch.Tensor:
            return logit

    class FixedSlab(torch.nn.Module):
        def forward(self, _hidden: torch.Tensor) -> torch.Tensor:
            return torch.cat([mu, torch.zeros_like(mu)], 1)

    graph = EncoderGraph(model)
    weight = model.spike_head.weight
    model.spike_head, model.slab_head = Fixed(), FixedSlab()  # type: ignore[assignment]
    model.spike_head.weight = weight
    code = graph(example_rows(model, 1), torch.tensor(0.25))[0]
    assert code.tolist() == [[0.0, 0.0, -0.5, 0.0]]
    assert not torch.signbit(code[0, [0, 1, 3]]).any()


@pytest.mark.parametrize(("network", "vectors"), [("mlp", False), ("conv", False), ("mlp", True)])
def test_every_form_of_the_model_exports_with_a_free_batch(
    network: str, vectors: bool, tmp_path: Path
) -> None:
    model = random_model(network, vectors=vectors)
    onnx.save(encoder_graph(model, 0.5, 20), tmp_path / "encoder.onnx")
    onnx.save(decoder_graph(model, 20), tmp_path / "decoder.onnx")
    encoder = onnxruntime.InferenceSession(tmp_path / "encoder.onnx")
    decoder = onnxruntime.InferenceSession(tmp_path / "decoder.onnx")
    for count in (0, 1, 2, 7, 33):
        rows = example_rows(model, count)
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


def test_the_parity_report_says_what_was_compared(tiny_bundle: Path) -> None:
    report = json.loads((tiny_bundle / "parity.json").read_text())
    assert report["passed"]
    assert report["rows"] == {"examples": 200, "noise": 64, "constants": 6}
    assert {(c["batch_size"], c["threads"]) for c in report["comparisons"]} == {
        (size, threads) for size in (1, 7, 64, 256) for threads in (1, 2)
    }
    assert all(c["decisions"] == 270 * 16 for c in report["comparisons"])


def test_a_threshold_that_is_off_by_a_hundredth_fails_parity(
    tiny_run: Path, tmp_path: Path
) -> None:
    model = load_checkpoint(tiny_run).build_model()
    shifted = 1 / (1 + np.exp(-0.01))
    onnx.save(encoder_graph(model, shifted, 20), tmp_path / "encoder.onnx")
    onnx.save(decoder_graph(model, 20), tmp_path / "decoder.onnx")
    rng = np.random.default_rng(0)
    rows = rng.integers(0, 256, (3000, *model.data.shape), dtype=np.uint8)
    parity = measure_parity(model, tmp_path, 0.5, {"noise": rows})
    assert parity.comparisons[0].flips_outside_band > 0
    with pytest.raises(
        ExportError, match=r"spikes flipped outside the guard band .* Nothing was written"
    ):
        require_parity(parity)


def test_a_layer_in_half_precision_fails_parity(tiny_run: Path, tmp_path: Path) -> None:
    model = load_checkpoint(tiny_run).build_model()
    exact = load_checkpoint(tiny_run).build_model()
    with torch.no_grad():
        model.slab_head.weight.copy_(model.slab_head.weight.bfloat16().float())
    onnx.save(encoder_graph(model, 0.5, 20), tmp_path / "encoder.onnx")
    onnx.save(decoder_graph(model, 20), tmp_path / "decoder.onnx")
    inputs = parity_inputs(exact, example_rows(exact, 64).numpy(), np.random.default_rng(0))
    with pytest.raises(ExportError, match="values differ by up to"):
        require_parity(measure_parity(exact, tmp_path, 0.5, inputs))


def test_a_nan_in_a_value_is_an_infinite_difference() -> None:
    truth = (np.array([[1.0, -1.0]]), np.array([[2.0, 3.0]]))
    code = np.array([[np.nan, 0.0]], np.float32)
    comparison = _compare(truth, (code, truth[0].astype(np.float32)), 0.0, 1, 1, "test")
    assert comparison.max_value_error == np.inf
    assert not comparison.passed


def test_a_failed_parity_writes_nothing(
    tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verify, "VALUE_TOLERANCE", -1.0)
    with pytest.raises(ExportError, match="does not compute what was trained"):
        export_bundle(tiny_run, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_collapsed_model_is_refused_unless_asked_for(tiny_run: Path, tmp_path: Path) -> None:
    import dataclasses

    from vsc_training.checkpoint import save_checkpoint

    run = tmp_path / "run"
    shutil.copytree(tiny_run, run)
    checkpoint = load_checkpoint(run)
    figures = checkpoint.state.figures | {"active": 0.0, "empty_share": 1.0}
    state = dataclasses.replace(checkpoint.state, figures=figures)
    save_checkpoint(run, dataclasses.replace(checkpoint, state=state))
    with pytest.raises(ExportError, match=r"collapsed: codes are empty .* --allow-collapsed"):
        export_bundle(run, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert export_bundle(run, tmp_path / "out", allow_collapsed=True).path.is_dir()


def test_a_tau_out_of_range_and_a_missing_run_are_refused(tiny_run: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="tau must be above 0 and below 1"):
        export_bundle(tiny_run, tmp_path / "out", tau=1.0)
    with pytest.raises(UsageError, match="Train first"):
        export_bundle(tmp_path, tmp_path / "out")


def test_a_layer_that_has_no_onnx_form_is_an_export_error() -> None:
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
    from vsc_serve.errors import BundleError

    manifest = open_bundle(tiny_bundle).manifest
    assert len(manifest.probes) == 3
    copy = tmp_path / "copy"
    shutil.copytree(tiny_bundle, copy)
    stored = json.loads((copy / "manifest.json").read_text())
    stored["probes"][0]["indices"] = [1, 2, 3, 4, 5]
    stored["probes"][0]["values"] = [0.0] * 5
    (copy / "manifest.json").write_text(json.dumps(stored))
    with pytest.raises(BundleError, match="gives another code than at export"):
        Encoder.open(copy, device="cpu")


def test_tau_is_stored_as_the_float32_that_is_compared() -> None:
    limit = threshold_logit(0.3)
    graph = encoder_graph(random_model("mlp"), 0.3, 20)
    stored = next(part for part in graph.graph.initializer if part.name == "tau_logit")
    assert onnx.numpy_helper.to_array(stored).tobytes() == limit.tobytes()


def test_the_model_card_states_the_measured_figures(tiny_bundle: Path, tiny_run: Path) -> None:
    card = (tiny_bundle / write.CARD).read_text()
    figures = load_checkpoint(tiny_run).state.figures
    assert f"{figures['active']:.1f} per example" in card
    assert f"{figures['live']} of {figures['latents']}" in card
