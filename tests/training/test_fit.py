"""The training loop: resume, collapse, checkpoints that survive, and the model's two forms."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from vsc_serve.errors import CheckFailed, DeviceError, InputError, UsageError
from vsc_serve.images import PixelSpec
from vsc_training.checkpoint import CHECKPOINT, load_checkpoint, save_checkpoint
from vsc_training.config import Recipe, load_recipe
from vsc_training.data import Examples, load_examples
from vsc_training.device import choose_device
from vsc_training.fit import fit
from vsc_training.metrics import find_overfit
from vsc_training.model import VSC, DataSpec, choose_network
from vsc_training.trainer import Trainer

CPU = torch.device("cpu")


FIXED = ["regularisation=none"]  # a few examples, seen often


def small_recipe(*overrides: str) -> Recipe:
    fields = ["latent_dim=16", "hidden=32", "pseudo_inputs=4", "batch_size=32", "alpha=0.2"]
    return load_recipe("sparse", [*fields, "steps=60", "on_collapse=warn", *FIXED, *overrides])


def weights_of(run: Path) -> dict[str, torch.Tensor]:
    return load_checkpoint(run).weights


def test_training_leaves_a_healthy_model_with_logs(tiny_run: Path) -> None:
    checkpoint = load_checkpoint(tiny_run)
    assert checkpoint.state.metrics["active"] > 0.5
    assert checkpoint.state.metrics["live"] >= 12
    assert checkpoint.state.metrics["always_on"] == 0
    lines = [json.loads(line) for line in (tiny_run / "log.jsonl").read_text().splitlines()]
    last = [line for line in lines if line["kind"] == "train"][-1]
    assert last["step"] == 300
    assert last["lam"] == 1.0
    assert {"reconstruction", "kl", "sparsity", "balance", "elbo_paper", "active"} <= set(last)
    assert any((tiny_run / "tensorboard").iterdir())


def test_the_loss_goes_down(tiny_run: Path) -> None:
    lines = [json.loads(line) for line in (tiny_run / "log.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if line["kind"] == "train"]
    assert np.mean(losses[-5:]) < 0.8 * losses[0]


def test_the_same_seed_gives_the_same_weights_and_another_seed_others(
    grey_folder: Path, tmp_path: Path
) -> None:
    examples = load_examples(grey_folder)
    runs = {"a": 0, "b": 0, "c": 1}
    for name, seed in runs.items():
        recipe = small_recipe(f"seed={seed}")
        fit(recipe, examples, tmp_path / name, device=CPU)
    a, b, c = (weights_of(tmp_path / name) for name in runs)
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert not all(torch.equal(a[key], c[key]) for key in a)


@pytest.mark.slow
def test_a_killed_run_resumes_to_the_same_weights(grey_folder: Path, tmp_path: Path) -> None:
    fields = ["latent_dim=16", "hidden=256", "steps=1500", "batch_size=32", "alpha=0.2"]
    fields += ["input_dropout=0.1", "weight_decay=0.1"]
    sets = [part for field in fields for part in ("--set", field)]

    def command(run: str, *more: str) -> list[str]:
        start = [sys.executable, "-m", "vsc_serve", "train", str(grey_folder), "--threads", "1"]
        return [*start, "--out", run, *more]

    whole, cut = tmp_path / "whole", tmp_path / "cut"
    subprocess.run(command(str(whole), *sets), check=True, capture_output=True)
    process = subprocess.Popen(command(str(cut), *sets), stderr=subprocess.DEVNULL)
    give_up = time.monotonic() + 120
    while not (cut / CHECKPOINT).is_file() and time.monotonic() < give_up:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert 0 < load_checkpoint(cut).state.step < 1500
    # The run's own recipe is taken: the settings need not be given again.
    subprocess.run(command(str(cut), "--resume"), check=True, capture_output=True)
    first, second = weights_of(whole), weights_of(cut)
    assert all(torch.equal(first[key], second[key]) for key in first)
    steps = [json.loads(line)["step"] for line in (cut / "log.jsonl").read_text().splitlines()]
    assert steps == sorted(steps)


def test_a_resume_with_another_recipe_or_other_data_is_refused(
    tiny_run: Path, grey_folder: Path, image_folder: Path
) -> None:
    recipe = load_checkpoint(tiny_run).state.recipe
    changed = load_recipe(str(tiny_run / "recipe.toml"), ["beta=0.5"])
    with pytest.raises(UsageError, match=r"another recipe \(differs in beta\)"):
        fit(changed, load_examples(grey_folder), tiny_run, device=CPU, resume=True)
    other = load_examples(grey_folder)
    shifted = Examples(other.rows[::-1].copy(), other.ids, other.spec)
    with pytest.raises(UsageError, match="began on other data"):
        fit(recipe, shifted, tiny_run, device=CPU, resume=True)


def test_a_collapsed_model_ends_the_run_with_metric_and_remedy(
    grey_folder: Path, tmp_path: Path
) -> None:
    recipe = small_recipe("on_collapse=stop", "alpha=0.001", "sparsity_weight=1000", "steps=200")
    examples = load_examples(grey_folder)
    with pytest.raises(CheckFailed, match=r"collapsed at step \d+: codes are empty .* raise alpha"):
        fit(recipe, examples, tmp_path / "run", device=CPU)


def test_fewer_examples_than_a_batch_says_what_to_set(image_folder: Path) -> None:
    with pytest.raises(UsageError, match=r"fewer than a batch of 32.*`recipe.batch_size="):
        Trainer(small_recipe(), load_examples(image_folder), CPU)


def test_cuda_that_is_not_there_is_a_device_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(DeviceError, match="sees no CUDA device"):
        choose_device("cuda")
    assert choose_device("auto").type == "cpu"


def test_a_full_disk_keeps_the_last_good_checkpoint(
    tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    checkpoint = load_checkpoint(tiny_run)
    save_checkpoint(run, checkpoint)
    before = (run / CHECKPOINT).read_bytes()

    def full(_descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(InputError, match="No space left"):
        save_checkpoint(run, checkpoint)
    assert (run / CHECKPOINT).read_bytes() == before
    assert sorted(path.name for path in run.iterdir()) == [CHECKPOINT, "run.json"]


def test_a_damaged_or_foreign_checkpoint_is_named(tmp_path: Path, tiny_run: Path) -> None:
    with pytest.raises(UsageError, match="Train first"):
        load_checkpoint(tmp_path)
    content = (tiny_run / CHECKPOINT).read_bytes()
    (tmp_path / CHECKPOINT).write_bytes(content[: len(content) // 2])
    with pytest.raises(InputError, match="damaged"):
        load_checkpoint(tmp_path)


def test_the_network_follows_the_data() -> None:
    recipe = load_recipe("sparse")
    grey = DataSpec(pixel_spec=PixelSpec(height=28, width=28, channels=1))
    colour = DataSpec(pixel_spec=PixelSpec(height=32, width=32, channels=3))
    assert choose_network(recipe, grey) == "mlp"
    assert choose_network(recipe, colour) == "conv"
    assert choose_network(recipe, DataSpec(input_dim=384)) == "mlp"


@pytest.mark.parametrize("network", ["mlp", "conv"])
@pytest.mark.parametrize("likelihood", ["bernoulli", "gaussian"])
def test_every_form_of_the_model_trains(network: str, likelihood: str) -> None:
    recipe = small_recipe(
        f"network={network}", f"likelihood={likelihood}", "width=4", "batch_size=8"
    )
    rows = np.random.default_rng(0).integers(0, 256, (24, 16, 16, 3), dtype=np.uint8)
    spec = DataSpec(pixel_spec=PixelSpec(height=16, width=16, channels=3))
    trainer = Trainer(recipe, Examples(rows, [str(i) for i in range(24)], spec), CPU)
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    terms = trainer.advance()
    assert torch.isfinite(terms.loss)
    after = trainer.model.state_dict()
    still = [name for name in before if torch.equal(before[name], after[name])]
    assert still == ["center", "scale"]
    assert trainer.model.decode(torch.zeros(2, 16)).shape == (2, 16, 16, 3)


def test_a_size_that_cannot_be_halved_names_the_remedy() -> None:
    spec = DataSpec(pixel_spec=PixelSpec(height=30, width=30, channels=3))
    with pytest.raises(UsageError, match="`size`"):
        VSC(load_recipe("sparse"), spec)


def test_vectors_are_scaled_inside_and_come_back_in_their_own_units() -> None:
    rng = np.random.default_rng(0)
    rows = (100.0 + 7.0 * rng.normal(size=(200, 5))).astype(np.float32)
    trainer = Trainer(
        small_recipe(), Examples(rows, [str(i) for i in range(200)], DataSpec(input_dim=5)), CPU
    )
    model = trainer.model
    assert float(model.scale) == pytest.approx(7.0, rel=0.1)
    assert torch.all((model.pseudo_inputs > 50) & (model.pseudo_inputs < 150))
    assert model.decode(torch.zeros(1, 16)).mean().item() == pytest.approx(100.0, abs=7.0)


def test_weight_decay_takes_from_the_weights_of_layers_alone() -> None:
    """Beside the same run without: after one step, weights differ by their share, no more."""
    rows = np.random.default_rng(0).integers(0, 256, (64, 8, 8, 1), dtype=np.uint8)
    spec = DataSpec(pixel_spec=PixelSpec(height=8, width=8, channels=1))
    examples = Examples(rows, [str(number) for number in range(64)], spec)
    plain, decayed = (
        Trainer(small_recipe(f"weight_decay={decay}", "precision=float32"), examples, CPU)
        for decay in (0.0, 10.0)
    )
    start = {name: weight.detach().clone() for name, weight in plain.model.named_parameters()}
    plain.advance(), decayed.advance()
    shrunk = plain.recipe.learning_rate * 10.0
    names = []
    for (name, weight), other in zip(
        plain.model.named_parameters(), decayed.model.parameters(), strict=True
    ):
        is_matrix = name.endswith(".weight")
        expected = weight - shrunk * start[name] if is_matrix else weight
        torch.testing.assert_close(other, expected, msg=name)
        names += [name] if is_matrix else []
    assert {"spike_head.weight", "slab_head.weight", "classifier.weight"} < set(names)
    assert "pseudo_logits" not in names


NOISE_BY_HEART = ("alpha=0.4", "beta=0.05", "learning_rate=0.01", "steps=400", "hidden=128")


def test_a_model_that_overfits_says_so_and_what_to_do(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Images of noise can be remembered; nothing of one is in another."""
    rows = np.random.default_rng(0).integers(0, 256, (64, 8, 8, 1), dtype=np.uint8)
    spec = DataSpec(pixel_spec=PixelSpec(height=8, width=8, channels=1))
    examples = Examples(rows, [str(number) for number in range(64)], spec)
    recipe = small_recipe("validation_share=0.4", *NOISE_BY_HEART)
    health = fit(recipe, examples, tmp_path, device=CPU)
    (warning,) = (line.getMessage() for line in caplog.records if line.levelname == "WARNING")
    assert "the model overfits: squared error is 0." in warning
    assert f"and {health.squared_error:.3g} on the {health.images} kept out" in warning
    assert "`recipe.input_dropout=0.3` (now 0) and `recipe.weight_decay=1` (now 0)" in warning
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    check, trained = lines[-2:]
    assert (check["kind"], trained["kind"]) == ("check", "trained")
    assert trained["squared_error"] < 0.2 * check["squared_error"]


def test_a_model_as_good_on_held_out_examples_does_not_overfit() -> None:
    rows = np.random.default_rng(0).integers(0, 256, (64, 8, 8, 1), dtype=np.uint8)
    spec = DataSpec(pixel_spec=PixelSpec(height=8, width=8, channels=1))
    examples = Examples(rows, [str(number) for number in range(64)], spec)
    recipe = small_recipe("input_dropout=0.3", "weight_decay=0.5", "validation_share=0.4")
    health = Trainer(recipe, examples, CPU).check()

    def held_out(error: float, images: int = 100) -> str | None:
        measured = replace(health, squared_error=error, images=images)
        return find_overfit(measured, replace(health, squared_error=2.0), recipe)

    assert held_out(2.9) is None
    assert held_out(9.0, images=19) is None
    assert held_out(3.1) == (
        "squared error is 2 on the examples of the training and 3.1 on the 100 kept out; try"
        " `recipe.weight_decay=1` (now 0.5)"
    )
    recipe = replace(recipe, weight_decay=1.0)
    assert str(held_out(3.1)).endswith("try more examples, or fewer steps")
