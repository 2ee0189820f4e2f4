"""Backbones: images are embedded in training and in production by the same file and rule."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from vsc_export import backbone_graph
from vsc_export.backbone import export_with_backbone
from vsc_export.options import ExportOptions
from vsc_export.verify import verify_bundle
from vsc_serve.bundle import open_bundle
from vsc_serve.codes import threshold
from vsc_serve.decoder import Decoder
from vsc_serve.encoder import Encoder
from vsc_serve.errors import ExportError, InputError, UsageError
from vsc_serve.images import PixelSpec
from vsc_serve.sources import find_sources
from vsc_training.backbone import Backbone, BackboneSpec, digest
from vsc_training.checkpoint import load_checkpoint, load_images, load_samples
from vsc_training.config import load_recipe
from vsc_training.data import embed_examples, find_images
from vsc_training.fit import fit

SIDE = 16
DIM = 24
MakeBackbone = Callable[..., Path]

COMMAND_FIELDS = ["steps=60", "latent_dim=16", "batch_size=32", "hidden=32", "on_collapse=warn"]
STATED = {"height": SIDE, "width": SIDE, "mean": [0.5, 0.4, 0.3], "std": [0.25, 0.2, 0.3]}


@pytest.fixture(scope="module")
def backbone_file(tmp_path_factory: pytest.TempPathFactory, conv_backbone: MakeBackbone) -> Path:
    return conv_backbone(tmp_path_factory.mktemp("backbone") / "conv.onnx")


def fit_behind(run: Path, folder: Path, file: Path) -> Path:
    """Train on embeddings of a folder, and return the run."""
    torch.set_num_threads(1)
    fields = ["latent_dim=16", "hidden=64", "pseudo_inputs=4", "batch_size=32", "alpha=0.2"]
    fields += ["steps=300", "learning_rate=0.005", "precision=float32", "validation_share=0.2"]
    recipe = load_recipe("sparse", [*fields, "on_collapse=warn"])
    examples = embed_examples(folder, find_images(folder), Backbone.open(file), lambda _: None)
    fit(recipe, examples, run, device=torch.device("cpu"), name="behind")
    return run


def forgetting_the_offset(
    scaling: Callable[[BackboneSpec], list[onnx.TensorProto]],
) -> Callable[[BackboneSpec], list[onnx.TensorProto]]:
    def forget(spec: BackboneSpec) -> list[onnx.TensorProto]:
        factor, offset = scaling(spec)
        return [factor, numpy_helper.from_array(np.zeros(3, np.float32), offset.name)]

    return forget


@pytest.fixture(scope="module")
def backbone_run(
    tmp_path_factory: pytest.TempPathFactory, grey_folder: Path, backbone_file: Path
) -> Path:
    """A run on embeddings of `grey_folder`."""
    return fit_behind(tmp_path_factory.mktemp("runs") / "behind", grey_folder, backbone_file)


@pytest.fixture(scope="module")
def behind(
    tmp_path_factory: pytest.TempPathFactory, backbone_run: Path, backbone_file: Path
) -> Path:
    """The bundle of `backbone_run`: images to codes."""
    out = tmp_path_factory.mktemp("bundles") / "behind"
    export_with_backbone(
        backbone_run, out, backbone_file, ExportOptions(allow_collapsed=True, top_k=4)
    )
    return out


@pytest.fixture(scope="module")
def paths(grey_folder: Path) -> list[Path]:
    return sorted(grey_folder.rglob("*.png"))[:40]


def by_hand(pixels: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Scale pixels as the JSON says, written down independently."""
    scaled = (pixels.astype(np.float64) / 255.0 - STATED["mean"]) / STATED["std"]
    return scaled.transpose(0, 3, 1, 2)


def test_images_give_the_codes_of_backbone_and_model_one_after_the_other(
    behind: Path, backbone_run: Path, backbone_file: Path, paths: list[Path]
) -> None:
    import onnxruntime

    encoder = Encoder.open(behind, device="cpu")
    spec = encoder.manifest.pixel_spec
    assert spec == PixelSpec(height=SIDE, width=SIDE, channels=3)
    codes = encoder.encode(paths).toarray()
    from vsc_serve.images import read_pixels

    pixels = np.stack([read_pixels(path, spec) for path in paths])
    session = onnxruntime.InferenceSession(backbone_file)
    (embedded,) = session.run(None, {"pixel_values": by_hand(pixels).astype(np.float32)})
    model = load_checkpoint(backbone_run).build_model()
    with torch.no_grad():
        posterior = model.encode(torch.from_numpy(embedded))
    expected = threshold(posterior.spike_logit.numpy(), posterior.mu.numpy(), 0.5)
    np.testing.assert_allclose(codes, expected, atol=1e-4)
    assert (codes != 0).sum() > 40


def test_training_embeds_with_the_very_numbers_of_the_exported_graph(
    behind: Path, backbone_run: Path, backbone_file: Path
) -> None:
    """The embedding inside the bundle, taken out of the graph, is training's, to the bit."""
    import onnxruntime

    images = load_images(backbone_run)
    graph = onnx.load(behind / "encoder.onnx")
    shape = ["batch", DIM]
    graph.graph.output.append(helper.make_tensor_value_info("vector", TensorProto.FLOAT, shape))
    session = onnxruntime.InferenceSession(graph.SerializeToString())
    (inside,) = session.run(["vector"], {"image": images})
    np.testing.assert_array_equal(inside, Backbone.open(backbone_file).embed(images))
    kept = load_samples(backbone_run)
    assert all((np.abs(kept - row).max(1) < 1e-5).any() for row in inside)


def test_the_bundle_says_which_backbone_is_inside(
    behind: Path, backbone_file: Path, backbone_run: Path
) -> None:
    manifest = open_bundle(behind).manifest
    assert manifest.modality == "image"
    assert manifest.input_dim is None
    assert manifest.backbone is not None
    assert manifest.backbone["sha256"] == digest(backbone_file)
    assert (
        BackboneSpec.from_json(manifest.backbone)
        == load_checkpoint(backbone_run).state.data.backbone
    )
    assert len(manifest.probes) == 3
    assert all(probe.file.endswith((".jpg", ".png")) for probe in manifest.probes)
    report = json.loads((behind / "parity.json").read_text())
    assert report["end_to_end"]["passed"]
    assert report["end_to_end"]["rows"]["examples"] == len(load_images(backbone_run)) > 30
    assert digest(backbone_file) in (behind / "README.md").read_text()
    names = {one.key: one.value for one in onnx.load(behind / "encoder.onnx").metadata_props}
    assert names["vsc.modality"] == "image"


def test_the_other_graphs_take_images_as_well(behind: Path, paths: list[Path]) -> None:
    import onnxruntime

    encoder = Encoder.open(behind, device="cpu")
    codes = encoder.encode(paths)
    from vsc_serve.images import read_pixels

    spec = encoder.manifest.pixel_spec
    assert spec is not None
    pixels = np.stack([read_pixels(path, spec) for path in paths])
    csr = onnxruntime.InferenceSession(behind / "encoder_csr.onnx")
    values, indices, row_counts = csr.run(None, {"image": pixels})
    np.testing.assert_array_equal(values, codes.data)
    np.testing.assert_array_equal(indices, codes.indices)
    np.testing.assert_array_equal(row_counts, np.diff(codes.indptr))
    topk = onnxruntime.InferenceSession(behind / "encoder_topk.onnx")
    np.testing.assert_array_equal(
        topk.run(["count"], {"image": pixels})[0][:, 0], np.diff(codes.indptr)
    )


@pytest.mark.slow
def test_exporting_twice_gives_the_same_bytes(
    behind: Path, backbone_run: Path, backbone_file: Path, tmp_path: Path
) -> None:
    again = tmp_path / "again"
    export_with_backbone(
        backbone_run, again, backbone_file, ExportOptions(allow_collapsed=True, top_k=4)
    )
    for path in sorted(behind.rglob("*")):
        if path.is_file():
            assert path.read_bytes() == (again / path.relative_to(behind)).read_bytes(), path.name


def test_its_decoder_gives_embeddings_and_draws_nothing(
    behind: Path, paths: list[Path], tmp_path: Path
) -> None:
    from vsc_serve.analysis.reconstruct import write_contact_sheet, write_reconstructions
    from vsc_serve.codes import CodeFile

    codes = Encoder.open(behind, device="cpu").encode(paths)
    decoder = Decoder.open(behind, device="cpu")
    assert decoder.decode(codes).shape == (len(paths), DIM)
    stored = CodeFile(codes, [path.name for path in paths], {})
    message = "decodes to the backbone's vectors: there is nothing to draw"
    with pytest.raises(InputError, match=message):
        write_reconstructions(decoder, stored, rows=range(2), out=tmp_path / "out")
    with pytest.raises(InputError, match=message):
        write_contact_sheet(
            decoder, stored, rows=range(2), images=None, path=tmp_path / "sheet.png"
        )
    assert list(tmp_path.iterdir()) == []


def test_another_backbone_than_the_runs_is_refused(
    backbone_run: Path, backbone_file: Path, tmp_path: Path, conv_backbone: MakeBackbone
) -> None:
    other = conv_backbone(tmp_path / "other.onnx", seed=1)
    with pytest.raises(ExportError, match=r"not the backbone that .* was trained with: sha256"):
        export_with_backbone(
            backbone_run, tmp_path / "out", other, ExportOptions(allow_collapsed=True)
        )
    shifted = tmp_path / "shifted.onnx"
    shutil.copy(backbone_file, shifted)
    shifted.with_suffix(".json").write_text(json.dumps(STATED | {"mean": [0.5, 0.5, 0.3]}))
    with pytest.raises(
        ExportError, match=r"trained with: mean \[0.5, 0.5, 0.3\], there \[0.5, 0.4"
    ):
        export_with_backbone(
            backbone_run, tmp_path / "out", shifted, ExportOptions(allow_collapsed=True)
        )
    assert not (tmp_path / "out").exists()


def test_a_run_on_images_has_no_place_for_a_backbone(
    tiny_run: Path, backbone_file: Path, tmp_path: Path
) -> None:
    with pytest.raises(ExportError, match="fitted to images of 8x8 grey, crop, not to embedd"):
        export_with_backbone(tiny_run, tmp_path / "out", backbone_file)


@pytest.mark.slow
def test_a_graph_that_scales_otherwise_than_training_is_not_written(
    backbone_run: Path, backbone_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backbone_graph, "_scaling", forgetting_the_offset(backbone_graph._scaling))
    with pytest.raises(ExportError, match=r"from pixels to codes .* Nothing was written"):
        export_with_backbone(
            backbone_run, tmp_path / "out", backbone_file, ExportOptions(allow_collapsed=True)
        )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_moved_row_boundary_is_not_written(
    backbone_run: Path, backbone_file: Path, tmp_path: Path, move_boundary: Callable[[str], None]
) -> None:
    move_boundary("image")
    message = r"from pixels to codes .*: batch 7, .* encoder_csr.onnx gives other entries"
    with pytest.raises(ExportError, match=message):
        export_with_backbone(
            backbone_run, tmp_path / "out", backbone_file, ExportOptions(allow_collapsed=True)
        )
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def fp16_file(tmp_path_factory: pytest.TempPathFactory, conv_backbone: MakeBackbone) -> Path:
    """A backbone of float16 layers, float16 in and out."""
    return conv_backbone(tmp_path_factory.mktemp("half") / "h.onnx", kind="FLOAT16", fp16=True)


@pytest.fixture(scope="module")
def fp16_run(tmp_path_factory: pytest.TempPathFactory, grey_folder: Path, fp16_file: Path) -> Path:
    return fit_behind(tmp_path_factory.mktemp("runs") / "half", grey_folder, fp16_file)


@pytest.mark.slow
def test_a_backbone_of_float16_is_held_to_the_gate_of_fp16_and_to_a_stated_tolerance(
    fp16_run: Path, fp16_file: Path, grey_folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    done = export_with_backbone(fp16_run, out, fp16_file, ExportOptions(allow_collapsed=True))
    assert done.end_to_end is not None
    # More than two programs in float32 may differ: the last rounding to float16 is left out.
    assert 1e-4 < done.end_to_end.max_value_error < 1e-2
    report = json.loads((out / "parity.json").read_text())
    found = report["end_to_end"]
    assert (report["guard_band"], report["value_tolerance"]) == (1e-4, 1e-4)
    assert (found["guard_band"], found["value_tolerance"]) == (2e-2, 1e-2)
    assert found["gate"]["min_support_jaccard"] == 0.999
    assert found["fidelity"]["support_jaccard"] >= 0.999
    assert found["passed"]
    assert all(one["flips_outside_band"] == 0 for one in found["comparisons"])
    assert open_bundle(out).manifest.precision == "fp16"
    assert "fp16 in the backbone; the model is float32" in (out / "README.md").read_text()
    assert Encoder.open(out, device="cpu").encode(sorted(grey_folder.rglob("*.png"))[:5]).nnz > 5
    parity = verify_bundle(out, fp16_run, grey_folder, row_count=60, backbone=fp16_file)
    assert parity.failures == []
    assert parity.rule.tolerance.value == 1e-2


@pytest.mark.slow
def test_a_backbone_of_float16_that_is_fed_otherwise_than_in_training_is_not_written(
    fp16_run: Path, fp16_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backbone_graph, "_scaling", forgetting_the_offset(backbone_graph._scaling))
    with pytest.raises(ExportError, match=r"spikes flipped outside the guard band of 0\.02"):
        export_with_backbone(
            fp16_run, tmp_path / "out", fp16_file, ExportOptions(allow_collapsed=True)
        )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_backbone_from_a_hubs_cache_gives_the_bundle_of_its_plain_copy(
    backbone_run: Path, backbone_file: Path, behind: Path, tmp_path: Path
) -> None:
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshot"
    blobs.mkdir()
    snapshot.mkdir()
    for file in (backbone_file, backbone_file.with_suffix(".json")):
        shutil.copy(file, blobs / f"hash-of-{file.name}")
        (snapshot / file.name).symlink_to(f"../blobs/hash-of-{file.name}")
    out = tmp_path / "out"
    options = ExportOptions(allow_collapsed=True, top_k=4)
    export_with_backbone(backbone_run, out, snapshot / backbone_file.name, options)
    assert (out / "manifest.json").read_bytes() == (behind / "manifest.json").read_bytes()


# verify


def test_a_bundle_with_a_backbone_inside_is_verified_from_pixels_to_codes(
    behind: Path, backbone_run: Path, backbone_file: Path, grey_folder: Path
) -> None:
    parity = verify_bundle(behind, backbone_run, grey_folder, row_count=50, backbone=backbone_file)
    assert parity.failures == []
    assert parity.rows == {"examples": 50, "noise": 16, "constants": 3}
    assert {found.batch_size for found in parity.comparisons} == {1, 7, 64, 256}


def test_sparse_rows_that_are_not_those_of_the_dense_codes_fail_behind_a_backbone(
    behind: Path, backbone_run: Path, backbone_file: Path, break_csr: Callable[[str], None]
) -> None:
    """A moved row boundary, a shifted index, a lost row, a changed bit; as in test_parity."""
    break_csr("image")
    parity = verify_bundle(behind, backbone_run, None, row_count=50, backbone=backbone_file)
    assert len(parity.failures) == 2
    for line in parity.failures:
        assert line.startswith("batch 7, ")
        assert line.endswith("encoder_csr.onnx gives other entries than encoder.onnx")


def test_a_bundle_is_verified_with_the_backbone_that_is_inside(
    behind: Path, backbone_run: Path, backbone_file: Path, tiny_bundle: Path, tiny_run: Path
) -> None:
    with pytest.raises(UsageError, match=r"has a backbone inside\. Give its ONNX file"):
        verify_bundle(behind, backbone_run, None, row_count=50)
    with pytest.raises(UsageError, match="the backbone inside is not the one of `backbone`"):
        verify_bundle(tiny_bundle, backbone_run, None, row_count=50, backbone=backbone_file)
    with pytest.raises(ExportError, match="fitted to images of 8x8 grey"):
        verify_bundle(behind, tiny_run, None, row_count=50, backbone=backbone_file)


@pytest.mark.slow
def test_a_newer_operator_set_of_the_backbone_is_taken_for_the_whole(
    backbone_run: Path,
    tmp_path: Path,
    backbone_file: Path,
    edit_run: Callable[..., Path],
    conv_backbone: MakeBackbone,
) -> None:
    newer = conv_backbone(tmp_path / "newer.onnx", opset=21)
    run = edit_run(backbone_run, backbone=None)
    done = export_with_backbone(run, tmp_path / "out", newer, ExportOptions(allow_collapsed=True))
    assert done.manifest.opset == 21
    assert done.end_to_end is not None
    assert done.end_to_end.rows == {"noise": 16, "constants": 3}


@pytest.fixture
def edit_run(tmp_path: Path) -> Callable[..., Path]:
    """Copy a run with other fields of its data, as if its vectors had come from a file."""
    import dataclasses

    from vsc_training.checkpoint import save_checkpoint

    def edit(run: Path, **fields: Any) -> Path:
        copied = tmp_path / "edited"
        shutil.copytree(run, copied)
        checkpoint = load_checkpoint(copied)
        data = dataclasses.replace(checkpoint.state.data, **fields)
        state = dataclasses.replace(checkpoint.state, data=data)
        save_checkpoint(copied, dataclasses.replace(checkpoint, state=state))
        return copied

    return edit


@pytest.mark.slow
def test_the_commands_say_what_they_embed_compare_and_write(
    grey_folder: Path, backbone_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import vsc_export.cli
    import vsc_training.cli

    run, model = tmp_path / "run", tmp_path / "model"
    vsc_training.cli.train(
        grey_folder, run, overrides=COMMAND_FIELDS, backbone=backbone_file, threads=1
    )
    said = capsys.readouterr().err
    assert f"{backbone_file}: 16x16 RGB, crop to 24, sha256 {digest(backbone_file)[:12]}" in said
    assert "200 examples, vectors of 24, 2 classes" in said
    assert f"vsc export {run} --out model/ --backbone {backbone_file}" in said
    vsc_export.cli.export(run, model, backbone=backbone_file, allow_collapsed=True)
    said = capsys.readouterr().err
    assert "from pixels to codes: 0 spikes flipped outside the band of 0.0001, 0 inside" in said
    assert "codes are the same bytes at every batch size" in said
    assert f"vsc encode images/ --out codes.npz --model {model}" in said
    with pytest.raises(UsageError, match="--size: the file beside --backbone says"):
        vsc_training.cli.train(grey_folder, tmp_path / "no", backbone=backbone_file, size=8)


@pytest.mark.slow
def test_a_run_behind_a_backbone_is_evaluated_on_images(
    backbone_run: Path,
    backbone_file: Path,
    grey_folder: Path,
    tmp_path: Path,
    conv_backbone: MakeBackbone,
) -> None:
    from vsc_training.evaluation.dataset import load_labelled

    data = load_checkpoint(backbone_run).state.data
    labelled = load_labelled(grey_folder, data, Backbone.open(backbone_file))
    assert labelled.examples.rows.shape == (200, DIM)
    assert labelled.labels is not None
    assert set(labelled.labels) == {"upright", "level"}
    with pytest.raises(InputError, match="or `backbone` with what embeds images"):
        load_labelled(grey_folder, data)
    other = conv_backbone(tmp_path / "other.onnx", seed=1)
    with pytest.raises(UsageError, match="not the one of this model"):
        load_labelled(grey_folder, data, Backbone.open(other))


def test_the_images_that_are_kept_lie_all_over_the_folder(
    grey_folder: Path, backbone_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vsc_training import data

    monkeypatch.setattr(data, "_KEPT_IMAGES", 10)
    monkeypatch.setattr(data, "_EMBEDDED_AT_ONCE", 7)
    sources = list(find_sources([str(grey_folder)]))
    done: list[int] = []
    examples = embed_examples(grey_folder, sources, Backbone.open(backbone_file), done.append)
    assert examples.images is not None
    assert len(examples.images) == 10
    assert done[-1] == len(sources) == len(examples.rows) == 200
    assert examples.labels is not None
    backbone = Backbone.open(backbone_file)
    np.testing.assert_allclose(backbone.embed(examples.images), examples.rows[::20], atol=1e-5)
