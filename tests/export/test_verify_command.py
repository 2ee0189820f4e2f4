"""`vsc verify` measures a bundle against its run; `vsc export` reads its options."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from vsc_export.cli import export, verify
from vsc_export.options import ExportOptions
from vsc_export.write import export_bundle
from vsc_serve.errors import BundleError, CheckFailed, InputError, UsageError
from vsc_training.checkpoint import load_checkpoint, save_checkpoint

pytestmark = pytest.mark.usefixtures("cached_exports")


def test_a_bundle_is_verified_on_any_data(
    tiny_run: Path, tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rng = np.random.default_rng(0)
    np.save(tmp_path / "rows.npy", rng.integers(0, 256, (150, 8, 8), dtype=np.uint8))
    verify(tiny_bundle, tiny_run, tmp_path / "rows.npy", rows=100, as_json=True)
    captured = capsys.readouterr()
    report = json.loads(captured.out)
    assert report["rows"]["examples"] == 100
    assert report["passed"]
    assert report["bytes_equal"]
    verify(tiny_bundle, tiny_run)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "330 inputs x 10 settings: 0 spikes flipped outside the band" in captured.err
    assert "batch 7, 2 threads on onnxruntime" in captured.err


def test_a_bundle_of_other_weights_fails_with_exit_code_1(
    tiny_run: Path, tiny_bundle: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(tiny_run, run)
    checkpoint = load_checkpoint(run)
    checkpoint.weights["spike_head.bias"] += 0.01
    save_checkpoint(run, checkpoint)
    with pytest.raises(CheckFailed, match=r"bars: does not compute what was trained: batch 1, "):
        verify(tiny_bundle, run)


def test_a_bundle_of_another_kind_of_model_is_refused(
    tiny_run: Path, tiny_bundle: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(tiny_bundle, copy)
    stored = json.loads((copy / "manifest.json").read_text())
    (copy / "manifest.json").write_text(json.dumps(stored | {"latent_dim": 17}))
    with pytest.raises(
        InputError, match=r"copy: 17 latents of 8x8 grey, .*, but .* has 16 latents of 8x8 grey"
    ):
        verify(copy, tiny_run)


def test_a_damaged_bundle_is_refused(tiny_run: Path, tiny_bundle: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(tiny_bundle, copy)
    (copy / "weights.bin").write_bytes(b"")
    with pytest.raises(BundleError, match=r"weights\.bin: changed since it was exported"):
        verify(copy, tiny_run)


def test_a_bundle_without_the_compacting_graph_is_verified_as_well(
    tiny_run: Path, tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(tiny_bundle, copy)
    (copy / "encoder_csr.onnx").unlink()
    stored = json.loads((copy / "manifest.json").read_text())
    del stored["files"]["encoder_csr.onnx"]
    (copy / "manifest.json").write_text(json.dumps(stored))
    verify(copy, tiny_run)
    assert "0 spikes flipped outside" in capsys.readouterr().err


@pytest.mark.slow
def test_export_takes_a_goal_or_a_tau_and_says_what_it_chose(
    tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UsageError, match="--tau, --calibrate-tau and --budget: give one of them"):
        export(tiny_run, tmp_path / "out", tau=0.5, calibrate_tau="active=4")
    export(tiny_run, tmp_path / "out", calibrate_tau="active=4")
    said = capsys.readouterr().err
    assert "tau      " in said
    assert "gives 4.0" in said


@pytest.mark.slow
def test_the_parity_line_of_a_variant_says_what_is_kept(
    tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    export_bundle(tiny_run, tmp_path / "out", ExportOptions(precision="fp16"))
    verify(tmp_path / "out", tiny_run)
    assert "supports agree to 1.0000, neighbour recall@10 1.000" in capsys.readouterr().err
