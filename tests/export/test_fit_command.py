"""`vsc fit`: what it chooses, what it keeps, and what it says of data that cannot be fitted."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vsc_export import fit_cli
from vsc_export.fit_run import run_of
from vsc_serve.codes import read_codes
from vsc_serve.errors import UsageError
from vsc_training.choices import FEWEST, choose, chosen_recipe, without

SMALL = ["steps=300", "latent_dim=16", "batch_size=32", "hidden=64", "pseudo_inputs=4"]
SMALL += ["alpha=0.2", "learning_rate=0.005", "precision=float32", "on_collapse=warn"]


def vsc(*words: object) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "vsc_serve", *map(str, words)], capture_output=True, text=True
    )


def fit(data: Path, out: Path, *words: object) -> "subprocess.CompletedProcess[str]":
    small = [word for field in SMALL for word in ("--set", field)]
    return vsc("fit", data, "--out", out, "--threads", 1, *small, *words)


def test_embeddings_get_latents_and_steps_by_their_number_and_pixels_keep_the_recipe() -> None:
    def overrides(count: int) -> list[str]:
        return [one.override for one in choose(count, is_vectors=True)]

    assert overrides(300) == ["latent_dim=256", "steps=1000"]
    assert overrides(3000) == ["latent_dim=256", "steps=3000"]
    assert choose(3000, is_vectors=False) == []
    features = choose(3000, is_vectors=True)
    assert chosen_recipe("features", features, [], active=None, seed=3).beta == 0.25


def test_what_the_user_sets_wins_over_a_choice() -> None:
    choices = choose(3000, is_vectors=True)
    given = ["latent_dim = 64", "alpha=0.1"]
    recipe = chosen_recipe("search", choices, given, active=None, seed=7)
    assert (recipe.latent_dim, recipe.alpha, recipe.seed, recipe.steps) == (64, 0.1, 7, 3000)
    assert "latent_dim=256" not in [one.override for one in without(choices, given)]
    plain = chosen_recipe("search", choices, [], active=None, seed=0)
    assert plain.active == pytest.approx(16)


def test_too_few_images_are_refused_with_what_to_do() -> None:
    with pytest.raises(UsageError, match="20 usable examples are too few"):
        choose(20, is_vectors=True)
    choose(FEWEST, is_vectors=True)


@pytest.mark.parametrize(
    ("mode", "has_photos", "said"),
    [("L", True, "images are grey"), ("RGB", False, r"pip install 'vsc-serve\[photos\]'")],
)
def test_pixels_are_taken_where_the_backbone_does_not_suit_and_that_is_said(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    mode: str,
    has_photos: bool,
    said: str,
) -> None:
    Image.new(mode, (80, 80)).save(tmp_path / "a.png")
    monkeypatch.setattr(fit_cli, "_has_photos", lambda: has_photos)
    assert fit_cli._choose_backbone(tmp_path, None) is None
    assert re.search(said, capsys.readouterr().err)


def test_colour_takes_the_backbone_unless_told_otherwise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Image.new("RGB", (80, 80)).save(tmp_path / "a.png")
    monkeypatch.setattr(fit_cli, "_has_photos", lambda: True)
    monkeypatch.setattr(fit_cli, "find_backbone", lambda given: Path(f"found-{given}"))
    assert fit_cli._choose_backbone(tmp_path, None) == Path("found-photos")
    assert fit_cli._choose_backbone(tmp_path, Path("none")) is None
    assert fit_cli._choose_backbone(tmp_path, Path("b.onnx")) == Path("found-b.onnx")


@pytest.mark.slow
def test_a_folder_becomes_a_model_that_encodes_and_a_second_fit_trains_nothing(
    tmp_path: Path, grey_folder: Path
) -> None:
    folder, out = tmp_path / "images", tmp_path / "model"
    shutil.copytree(grey_folder, folder)
    for number in range(20):
        pixels = np.random.default_rng(number).integers(0, 255, (8, 8), np.uint8)
        Image.fromarray(pixels).save(folder / "level" / f"more{number}.png")
    (folder / "level" / "broken.png").write_bytes(b"no image")
    first = fit(folder, out, "--json")
    assert first.returncode == 0, first.stderr
    assert "images are grey" in first.stderr
    assert "skipped  1 files that cannot be read" in first.stderr
    summary = json.loads(first.stdout)
    assert (summary["examples"], summary["skipped"], summary["backbone"]) == (220, 1, None)
    codes = tmp_path / "codes.npz"
    done = vsc("encode", folder, "--out", codes, "--model", out)
    assert done.returncode == 0, done.stderr
    assert read_codes(codes).codes.shape == (220, 16)

    refused = fit(folder, out)
    assert (refused.returncode, "exists already" in refused.stderr) == (2, True)
    log = (run_of(out) / "log.jsonl").read_text()
    again = fit(folder, out, "--force")
    assert again.returncode == 0, again.stderr
    assert (run_of(out) / "log.jsonl").read_text() == log

    shutil.rmtree(out)
    other = fit(folder, out, "--seed", 5)
    assert other.returncode == 2
    assert "--force replaces the run and the bundle" in other.stderr
    assert not out.exists()
    replaced = fit(folder, out, "--seed", 5, "--force")
    assert replaced.returncode == 0, replaced.stderr
    assert "seed = 5" in (run_of(out) / "recipe.toml").read_text()


@pytest.mark.slow
def test_twenty_images_leave_nothing_behind(tmp_path: Path, grey_folder: Path) -> None:
    folder, out = tmp_path / "images", tmp_path / "model"
    folder.mkdir()
    for path in sorted(grey_folder.rglob("*.png"))[:20]:
        shutil.copy(path, folder)
    found = fit(folder, out)
    assert found.returncode == 2
    assert "20 usable examples are too few" in found.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["images"]


@pytest.mark.slow
def test_a_collapsed_model_is_written_only_where_that_is_asked_for(tmp_path: Path) -> None:
    """Noise without structure leaves every latent off."""
    noise, out = tmp_path / "noise.npy", tmp_path / "model"
    np.save(noise, np.random.default_rng(0).normal(size=(240, 6)).astype(np.float32))
    words = ["fit", noise, "--out", out, "--threads", 1, "--set", "steps=60", "--set", "beta=50.0"]
    words += ["--set", "latent_dim=8", "--set", "pseudo_inputs=4"]
    stopped = vsc(*words)
    assert (stopped.returncode, out.exists()) == (1, False), stopped.stderr
    assert "collapsed" in stopped.stderr
    written = vsc(*words, "--allow-collapsed")
    assert written.returncode == 0, written.stderr
    assert (out / "manifest.json").is_file()


@pytest.mark.slow
def test_a_fit_that_is_killed_while_it_exports_trains_nothing_again(
    tmp_path: Path, grey_folder: Path
) -> None:
    out = tmp_path / "model"
    small = [word for field in SMALL for word in ("--set", field)]
    words = ["fit", str(grey_folder), "--out", str(out), "--threads", "1", *small]
    killed = subprocess.Popen(
        [sys.executable, "-m", "vsc_serve", *words], stderr=subprocess.PIPE, text=True
    )
    assert killed.stderr is not None
    for line in killed.stderr:
        if line.startswith("codes"):  # the training is done
            killed.kill()
            break
    killed.stderr.close()
    killed.wait()
    assert not out.exists()
    log = (run_of(out) / "log.jsonl").read_text()
    again = vsc(*words)
    assert again.returncode == 0, again.stderr
    assert (out / "manifest.json").is_file()
    assert (run_of(out) / "log.jsonl").read_text() == log
