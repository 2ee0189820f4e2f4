"""`vsc demo`: it runs, what it prints can be typed again, and a failing step ends it honestly."""

import os
import shlex
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vsc_export import demo
from vsc_export.demo import Step, plan, run_demo
from vsc_serve.codes import read_codes
from vsc_serve.errors import CheckFailed, ExportError, InputError, UsageError

needs_commands = pytest.mark.skipif(
    not any(entry.name == "export" for entry in entry_points(group="vsc.commands")),
    reason="vsc-serve is not installed, so `vsc train` and `vsc export` are not there",
)

# Too few steps for a good model: enough for one that is not refused as collapsed.
SHORT_RUN = "from pathlib import Path; from vsc_export.demo import run_demo; "
SHORT_RUN += "run_demo(Path('made here'), count=400, steps=400)"


def run_python(arguments: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def python_step(code: str) -> Step:
    return Step("do something", ("python", "-c", code))


@needs_commands
@pytest.mark.slow
def test_a_short_demo_makes_everything_and_its_commands_can_be_typed_again(tmp_path):
    done = run_python(["-c", SHORT_RUN], tmp_path)
    assert done.returncode == 0, done.stderr
    commands = done.stdout.splitlines()
    assert len(commands) == 6
    for command in commands:
        assert f"$ {command}\n" in done.stderr
    assert "Done in" in done.stderr
    out = tmp_path / "made here"
    assert len(read_codes(out / "codes.npz").ids) == 400
    with Image.open(out / "sheet.png") as sheet:
        assert sheet.height > 10 * 96

    for command in commands:
        program, *rest = shlex.split(command.replace("made here", "by hand"))
        module = [] if program == "python" else ["-m", "vsc_serve"]
        again = run_python([*module, *rest], tmp_path)
        assert again.returncode == 0, again.stderr
    first, second = (read_codes(tmp_path / name / "codes.npz") for name in ("made here", "by hand"))
    assert first.ids == second.ids
    np.testing.assert_array_equal(first.codes.toarray(), second.codes.toarray())


def test_every_command_reads_what_an_earlier_one_made(tmp_path):
    steps = plan(tmp_path / "demo", count=5, steps=7, seed=3)
    made = set()
    for step in steps:
        named = {word for word in step.words if word.startswith(str(tmp_path))}
        target = {
            step.words[place + 1]
            for place, word in enumerate(step.words)
            if word in ("--out", "--sheet")
        }
        read = named - target
        assert all(any(path.startswith(one) for one in made) for path in read), step
        made |= target
    assert {Path(path).name for path in made} < {*demo._FOLDERS, *demo._FILES}


def test_a_path_with_a_space_stays_one_word(tmp_path):
    step = plan(tmp_path / "my demo", count=5, steps=7, seed=0)[1]
    assert tuple(shlex.split(step.typed)) == step.words


def test_commands_run_in_this_python_whatever_the_path_holds():
    make, train, *_ = plan(Path("demo"), count=5, steps=7, seed=0)
    assert make.arguments[:3] == [sys.executable, "-m", "vsc_training.smiley"]
    assert train.arguments[:4] == [sys.executable, "-m", "vsc_serve", "train"]


@pytest.mark.parametrize(
    ("exit_code", "kind"), [(3, InputError), (6, ExportError), (1, CheckFailed), (77, CheckFailed)]
)
def test_a_failing_step_ends_the_demo_with_its_exit_code_and_nothing_is_claimed(
    exit_code, kind, tmp_path, monkeypatch, capfd
):
    said = "import sys; sys.stderr.write('vsc: no luck\\n'); "
    steps = [
        python_step("print('fine')"),
        python_step(f"{said}sys.exit({exit_code})"),
        python_step("print('never')"),
    ]
    monkeypatch.setattr(demo, "plan", lambda *_args, **_kwargs: steps)
    with pytest.raises(kind, match=f"step 2/3 failed with exit code {exit_code}") as raised:
        run_demo(tmp_path / "demo")
    assert type(raised.value).exit_code == (exit_code if exit_code < 7 else 1)
    printed = capfd.readouterr()
    assert printed.out == ""
    assert "fine" in printed.err
    assert "vsc: no luck" in printed.err
    assert "never" not in printed.err
    assert "Done" not in printed.err


def test_only_the_commands_go_to_stdout(tmp_path, monkeypatch, capfd):
    steps = [python_step("print('found')")]
    monkeypatch.setattr(demo, "plan", lambda *_args, **_kwargs: steps)
    run_demo(tmp_path / "demo")
    printed = capfd.readouterr()
    assert printed.out == f"{steps[0].typed}\n"
    assert "found" in printed.err
    assert f"$ {steps[0].typed}" in printed.err


def test_a_folder_that_is_there_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(UsageError, match="exists already"):
        run_demo(tmp_path)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "precious").touch()
    with pytest.raises(UsageError, match="not a folder of the demo that vsc wrote"):
        run_demo(tmp_path, force=True)
    assert (tmp_path / "run" / "precious").exists()


def test_force_removes_what_a_demo_made_and_leaves_the_rest(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "plan", lambda *_args, **_kwargs: [])
    run_demo(tmp_path / "demo")
    (tmp_path / "demo" / "run" / "tensorboard").mkdir(parents=True)
    (tmp_path / "demo" / "sheet.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    (tmp_path / "demo" / "thesis.tex").write_text("kept?")
    run_demo(tmp_path / "demo", force=True)
    kept = sorted(path.name for path in (tmp_path / "demo").iterdir())
    assert kept == [".vsc-serve.json", "thesis.tex"]


def test_a_missing_package_is_one_line_with_the_install_command(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "_NEEDS", ("numpy", "torch_is_not_here"))
    with pytest.raises(UsageError) as raised:
        run_demo(tmp_path / "demo")
    text = str(raised.value)
    assert "torch_is_not_here" in text
    assert "pip install 'vsc-serve[export,cpu]'" in text
    assert len(text.splitlines()) == 1
    assert not (tmp_path / "demo").exists()
