"""What goes wrong in a training run, and what is left of it: the last good checkpoint, always."""

import errno
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from vsc_serve.errors import CheckFailed, InputError, UsageError
from vsc_serve.locks import exclusive
from vsc_training import memory, runlog, trainer
from vsc_training.checkpoint import CHECKPOINT, load_checkpoint, save_checkpoint
from vsc_training.config import Recipe, load_recipe
from vsc_training.data import Examples
from vsc_training.fit import fit
from vsc_training.model import DataSpec
from vsc_training.resolve import resolve
from vsc_training.trainer import Trainer

CPU = torch.device("cpu")


def small_recipe(*overrides: str) -> Recipe:
    fields = ["latent_dim=8", "hidden=16", "pseudo_inputs=4", "batch_size=32", "alpha=0.2"]
    return load_recipe("sparse", [*fields, "steps=60", "on_collapse=warn", *overrides])


@pytest.fixture
def vectors() -> Examples:
    rng = np.random.default_rng(0)
    active = rng.standard_normal((400, 20)) * (rng.random((400, 20)) < 0.2)
    rows = (active @ rng.standard_normal((20, 12))).astype(np.float32)
    return Examples(rows, [str(number) for number in range(400)], DataSpec(input_dim=12))


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def lines_of(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def explode_at(step: int) -> Callable[[int, Recipe], float]:
    """Return a schedule with a learning rate that nothing survives, at one step."""
    return lambda at, recipe: 1e30 if at == step else recipe.learning_rate


@pytest.mark.parametrize("step", [33, 35])  # 35: the weights that step 36 saves would be finite
def test_a_loss_that_is_not_finite_ends_the_run_and_keeps_the_last_good_checkpoint(
    vectors: Examples, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    run = tmp_path / "run"
    monkeypatch.setattr(trainer, "learning_rate", explode_at(step))
    with pytest.raises(CheckFailed) as caught:
        fit(small_recipe(), vectors, run, device=CPU)
    message = str(caught.value)
    assert f"at step {step + 2 if step == 33 else 36}" in message
    assert "not finite" in message or "nan" in message or "inf" in message
    assert "lower learning_rate (now 0.0015)" in message
    assert "The checkpoint of step 30 is kept: go on from it with `resume=True`" in message
    checkpoint = load_checkpoint(run)
    assert checkpoint.state.step == 30
    tensors = (*checkpoint.weights.values(), *checkpoint.optimizer.values())
    assert all(torch.isfinite(tensor).all() for tensor in tensors)
    monkeypatch.undo()
    fit(small_recipe("learning_rate=0.001"), vectors, run, device=CPU, resume=True)
    assert load_checkpoint(run).state.step == 60


def test_weights_that_are_not_finite_are_never_saved_although_the_loss_is(
    vectors: Examples, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A weight that no example reaches, say, or one that a GPU has spoiled."""
    advance = Trainer.advance

    def spoil(self: Trainer) -> object:
        terms = advance(self)
        if self.step == 18:
            moments = self.optimizer.state[self.model.pseudo_logits]
            moments["exp_avg_sq"][0] = math.inf  # its weight no longer moves; the loss is finite
        return terms

    monkeypatch.setattr(Trainer, "advance", spoil)
    with pytest.raises(CheckFailed, match=r"moment .*exp_avg_sq is not finite at step 18"):
        fit(small_recipe(), vectors, tmp_path / "run", device=CPU)
    assert load_checkpoint(tmp_path / "run").state.step == 12


def test_a_number_that_is_too_large_is_found_before_the_old_run_is_removed(
    vectors: Examples, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    fit(small_recipe("steps=3"), vectors, run, device=CPU)
    before = contents(run)
    with pytest.raises(CheckFailed, match=r"step 1: nothing has been learned yet, .*beta 1e\+38"):
        fit(small_recipe("beta=1e38"), vectors, run, device=CPU, force=True)
    assert contents(run) == before


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["batch_size=9999"], "fewer than a batch of 9999"),
        (["network=conv"], "network=conv is for images, and the data are vectors"),
        (["latent_dim=2000000000"], r"needs at least [\d,.]+ GiB of memory, .*latent_dim \(now 2,"),
        (["hidden=2147483647", "layers=1000"], "lower one of latent_dim"),
    ],
)
def test_a_start_that_is_refused_leaves_the_run_that_force_would_replace(
    vectors: Examples, tmp_path: Path, overrides: list[str], message: str
) -> None:
    run = tmp_path / "run"
    fit(small_recipe("steps=3"), vectors, run, device=CPU)
    before = contents(run)
    with pytest.raises(UsageError, match=message):
        fit(small_recipe(*overrides), vectors, run, device=CPU, force=True)
    assert contents(run) == before
    fit(small_recipe("steps=2"), vectors, run, device=CPU, force=True)
    assert load_checkpoint(run).state.step == 2


def test_a_run_is_replaced_with_force_alone_and_only_a_run(
    vectors: Examples, tmp_path: Path
) -> None:
    run, other = tmp_path / "run", tmp_path / "other"
    fit(small_recipe("steps=3"), vectors, run, device=CPU)
    other.mkdir()
    (other / "thesis.txt").write_text("years of work")
    for place, force in ((run, False), (other, True), (other, False)):
        with pytest.raises(UsageError, match=r"exists already|not a training run that vsc wrote"):
            fit(small_recipe("steps=3"), vectors, place, device=CPU, force=force)
    (run / "thesis.txt").write_text("years of work")
    with pytest.raises(UsageError, match=r"it also holds 'thesis.txt', which vsc did not write"):
        fit(small_recipe("steps=3"), vectors, run, device=CPU, force=True)
    assert load_checkpoint(run).state.step == 3


def test_a_run_behind_a_link_is_replaced_and_the_link_stays(
    vectors: Examples, tmp_path: Path
) -> None:
    link, run = tmp_path / "link", tmp_path / "run"
    fit(small_recipe("steps=3"), vectors, run, device=CPU)
    link.symlink_to("run")
    fit(small_recipe("steps=4"), vectors, link, device=CPU, force=True)
    assert link.is_symlink()
    assert load_checkpoint(run).state.step == 4
    fit(small_recipe("steps=5"), vectors, link, device=CPU, resume=True)
    assert load_checkpoint(run).state.step == 5


@pytest.mark.parametrize("option", ["force", "resume"])
def test_two_trainings_do_not_write_into_one_folder(
    vectors: Examples, tmp_path: Path, option: str
) -> None:
    run = tmp_path / "run"
    fit(small_recipe("steps=3"), vectors, run, device=CPU)
    before = contents(run)
    with exclusive(run), pytest.raises(UsageError, match="another run is writing there"):
        fit(small_recipe("steps=9"), vectors, run, device=CPU, **{option: True})
    assert contents(run) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"], "the lock is gone"


def test_a_folder_that_cannot_be_written_is_one_line(
    vectors: Examples, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"run: cannot be written"):
        fit(small_recipe(), vectors, tmp_path / "file" / "run", device=CPU)

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(InputError, match=r"run: cannot be written .*Permission denied"):
        fit(small_recipe(), vectors, tmp_path / "run", device=CPU)


@pytest.mark.parametrize("damage", ["cut", "binary", "no step", "foreign", "empty", "missing"])
def test_a_log_that_was_cut_does_not_stop_a_resume(
    vectors: Examples, tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    run = tmp_path / "run"
    fit(small_recipe("steps=20"), vectors, run, device=CPU)
    log = run / "log.jsonl"
    whole = log.read_bytes()
    damaged = {
        "cut": whole[:-30],
        "binary": whole + b"\xff\x00\xfe\n",
        "no step": whole + b'{"kind": "train"}\n',
        "foreign": whole + b"[1, 2]\n",
        "empty": b"",
        "missing": None,
    }[damage]
    log.unlink() if damaged is None else log.write_bytes(damaged)
    fit(small_recipe("steps=30"), vectors, run, device=CPU, resume=True)
    has_warned = "1 lines were cut off" in caplog.text
    assert has_warned == (damage not in ("empty", "missing"))
    steps = [line["step"] for line in lines_of(run)]
    assert steps == sorted(steps)
    assert steps[-1] == 30
    assert load_checkpoint(run).state.step == 30


def test_a_disk_that_fills_ends_the_run_in_one_line_and_it_resumes_to_the_same_weights(
    vectors: Examples, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, whole = tmp_path / "run", tmp_path / "whole"
    fit(small_recipe(), vectors, whole, device=CPU)
    write = runlog.RunLog._write_line

    def fill(self: runlog.RunLog, line: dict[str, Any]) -> None:
        if line["step"] == 40:
            self._file.write('{"step": 40, "ki')  # what a full disk leaves
            self._file.flush()
            raise self._cannot_write(OSError(errno.ENOSPC, "No space left on device"))
        write(self, line)

    monkeypatch.setattr(runlog.RunLog, "_write_line", fill)
    with pytest.raises(InputError, match=r"No space left on device\). Make room .*`resume=True`"):
        fit(small_recipe(), vectors, run, device=CPU)
    monkeypatch.undo()
    fit(small_recipe(), vectors, run, device=CPU, resume=True)
    expected, found = load_checkpoint(whole).weights, load_checkpoint(run).weights
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert [line["step"] for line in lines_of(run)] == [line["step"] for line in lines_of(whole)]


def test_a_stream_that_is_full_is_told_once(tmp_path: Path) -> None:
    """`/dev/full` fails at the first flush, and again when it is closed."""
    log = runlog.RunLog(tmp_path, start_step=0)
    log._file.close()
    log._file = Path("/dev/full").open("a", encoding="utf-8")  # noqa: SIM115  # the log closes it
    with pytest.raises(InputError, match="No space left on device"), log:
        log.add_resume(3, {})


def test_a_resume_may_be_longer_and_goes_on_as_the_longer_run_does(
    vectors: Examples, tmp_path: Path
) -> None:
    """The checkpoint and the new recipe are all that the steps after it depend on."""
    run = tmp_path / "run"
    fit(small_recipe("steps=40"), vectors, run, device=CPU)
    half = load_checkpoint(run)
    asked = small_recipe("steps=80", "learning_rate=0.002")
    longer = resolve(asked, vectors, run)
    fit(asked, vectors, run, device=CPU, resume=True)
    assert load_checkpoint(run).state.recipe == longer
    assert load_recipe(str(run / "recipe.toml")) == longer
    resumes = [line for line in lines_of(run) if line["kind"] == "resume"]
    changed = {"steps": [40, 80], "learning_rate": [0.0015, 0.002]}
    assert resumes == [{"step": 40, "kind": "resume", "recipe": changed}]
    expected = Trainer(longer, vectors, CPU)
    expected.restore(half)
    while expected.step < 80:
        expected.advance()
    found, weights = load_checkpoint(run).weights, expected.model.state_dict()
    assert all(torch.equal(found[name], weights[name]) for name in weights)


def test_what_defines_a_run_may_not_change_and_steps_not_fall_below_what_is_done(
    vectors: Examples, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    fit(small_recipe("steps=20"), vectors, run, device=CPU)
    before = contents(run)
    for overrides, message in (
        (
            ["steps=30", "beta=0.1", "seed=2"],
            r"\(differs in beta, seed\); only steps, ",
        ),
        (["steps=19"], "20 steps are done, so steps=19 is too few"),
    ):
        with pytest.raises(UsageError, match=message):
            fit(small_recipe(*overrides), vectors, run, device=CPU, resume=True)
    assert contents(run) == before


def test_a_resume_without_a_checkpoint_starts_anew(vectors: Examples, tmp_path: Path) -> None:
    """A run that was killed before its first checkpoint is a run all the same."""
    run = tmp_path / "run"
    fit(small_recipe("steps=3"), vectors, run, device=CPU)
    (run / CHECKPOINT).unlink()
    (run / "run.json").unlink()
    fit(small_recipe("steps=4"), vectors, run, device=CPU, resume=True)
    assert load_checkpoint(run).state.step == 4


def test_a_run_of_another_folder_that_was_copied_resumes_there(
    vectors: Examples, tmp_path: Path
) -> None:
    fit(small_recipe("steps=20"), vectors, tmp_path / "a", device=CPU)
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    fit(small_recipe("steps=21"), vectors, tmp_path / "b", device=CPU, resume=True)
    assert load_checkpoint(tmp_path / "b").state.step == 21
    save_checkpoint(tmp_path / "b", load_checkpoint(tmp_path / "a"))


def test_memory_that_is_not_there_is_found_before_it_is_asked_for(
    vectors: Examples, monkeypatch: pytest.MonkeyPatch
) -> None:
    needed = memory.model_bytes(small_recipe(), vectors.spec, CPU)
    model = Trainer(small_recipe(), vectors, CPU).model
    assert needed > 28 * sum(weight.numel() for weight in model.parameters())
    monkeypatch.setattr(memory, "free_bytes", lambda device: needed - 1)
    with pytest.raises(UsageError, match=r"and this machine has 0\.0 GiB free"):
        Trainer(small_recipe(), vectors, CPU)
    monkeypatch.setattr(memory, "free_bytes", lambda device: needed)
    Trainer(small_recipe(), vectors, CPU)


def test_free_memory_is_at_most_what_a_container_allows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "meminfo").write_text("MemTotal: 9000 kB\nMemAvailable:    4000 kB\n")
    monkeypatch.setattr(memory, "_MEMINFO", tmp_path / "meminfo")
    for limit, expected in (("max", 4_096_000), ("1000000", 1_000_000), (None, 4_096_000)):
        (tmp_path / "limit").unlink(missing_ok=True)
        if limit:
            (tmp_path / "limit").write_text(limit + "\n")
        monkeypatch.setattr(memory, "_CONTAINER", (tmp_path / "limit",))
        assert memory.free_bytes(CPU) == expected
    monkeypatch.setattr(memory, "_MEMINFO", tmp_path / "nothing")
    assert memory.free_bytes(CPU) is None
