"""`vsc demo`: the whole way from images to search results, offline, in commands to type again.

Every step is the real command in a process of its own, so what the demo shows is what a user gets.
"""

import os
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final, NamedTuple

from vsc_serve.bundle import BUNDLE_FOLDER
from vsc_serve.codes import CODES_FILE, ERROR_FILE
from vsc_serve.console import require_extra
from vsc_serve.errors import (
    BundleError,
    CheckFailed,
    DeviceError,
    ExportError,
    InputError,
    Interrupted,
    UsageError,
    VscError,
)
from vsc_serve.outputs import PNG, check_output, marked, remove_folder, write_marker
from vsc_training.checkpoint import RUN_FOLDER
from vsc_training.smiley import FOLDER as SMILEY_FOLDER

IMAGE_COUNT: Final = 4000
"""Faces that the demo makes."""

STEPS: Final = 2000
"""Training steps: enough for codes that say something, in well under a minute."""

_NEEDS: Final = ("torch", "safetensors", "tensorboard", "onnx", "onnxscript", "onnxruntime")

_KIND: Final = "demo"

FOLDER: Final = marked("a folder of the demo", _KIND, "*")

_FOLDERS: Final = {"smiley": SMILEY_FOLDER, "run": RUN_FOLDER, "model": BUNDLE_FOLDER}
_FILES: Final = {"codes.npz": CODES_FILE, "codes.errors.jsonl": ERROR_FILE, "sheet.png": PNG}
"""What the demo leaves in its folder, and all that `force` removes from it."""

_BY_EXIT_CODE: Final[dict[int, type[VscError]]] = {
    kind.exit_code: kind
    for kind in (
        CheckFailed,
        UsageError,
        InputError,
        BundleError,
        DeviceError,
        ExportError,
        Interrupted,
    )
}

_STDERR: Final = 2


class Step(NamedTuple):
    """One command of the demo."""

    title: str
    """What it does, for people."""
    words: tuple[str, ...]
    """The command as a user types it."""

    @property
    def typed(self) -> str:
        """The command as a line for a shell."""
        return shlex.join(self.words)

    @property
    def arguments(self) -> list[str]:
        """The same command for this very Python, whatever `vsc` and `python` are on the path."""
        program, *rest = self.words
        return [sys.executable, *(rest if program == "python" else ["-m", "vsc_serve", *rest])]


def run_demo(
    out: Path, *, count: int = IMAGE_COUNT, steps: int = STEPS, seed: int = 0, force: bool = False
) -> None:
    """Make images, train, export, encode, search and draw, showing each command and its output.

    What the commands say goes to stderr. Only when all have succeeded, the commands themselves go
    to stdout, as lines to copy.

    Args:
        out: Folder for everything that the demo makes.
        count: Images to make.
        steps: Training steps.
        seed: Seed of the images and of the training.
        force: Replace what an earlier demo left in `out`.

    Raises:
        UsageError: `out` is there already, or a package is missing.
        VscError: A command failed; the error has its exit code.
    """
    require_extra("export,cpu", *_NEEDS)
    check_output(out, FOLDER, force=force)
    _clear(out)
    out.mkdir(parents=True, exist_ok=True)
    write_marker(out, _KIND)
    began = time.monotonic()
    chosen = plan(out, count=count, steps=steps, seed=seed)
    for number, step in enumerate(chosen, start=1):
        _run(step, f"{number}/{len(chosen)}", out)
    _conclude(out, chosen, time.monotonic() - began)


def plan(out: Path, *, count: int, steps: int, seed: int) -> list[Step]:
    """Return the commands of the demo, in order.

    Args:
        out: Folder for everything that they make.
        count: Images to make.
        steps: Training steps.
        seed: Seed of the images and of the training.
    """
    faces, run, model, codes = (str(out / name) for name in ("smiley", "run", "model", "codes.npz"))
    images = str(out / "smiley" / "images")
    first = str(out / "smiley" / "images" / "000000.png")
    make = ("python", "-m", "vsc_training.smiley", "--out", faces)
    # Few latents are all in use after few steps. One thread is not slowed down by other programs.
    size = ("--set", f"steps={steps}", "--set", "latent_dim=64", "--active", "8")
    fit = (*size, "--set", f"seed={seed}", "--threads", "1")
    sheet = ("--sheet", str(out / "sheet.png"), "--rows", "0:10")
    return [
        Step("make images of faces", (*make, "--count", str(count), "--seed", str(seed))),
        Step("train a model on them", ("vsc", "train", images, "--out", run, *fit)),
        Step("export it to ONNX", ("vsc", "export", run, "--out", model, "--name", "smiley")),
        Step("encode the images", ("vsc", "encode", images, "--out", codes, "--model", model)),
        Step(
            "find the images most like the first, and why",
            ("vsc", "search", codes, "--like", first, "--top", "3", "--explain", "--model", model),
        ),
        Step(
            "draw what the features of ten images mean",
            ("vsc", "decode", codes, "--model", model, "--images", images, *sheet),
        ),
    ]


def _clear(out: Path) -> None:
    """Remove what an earlier demo left in `out`, and nothing else that may lie there."""
    for name, folder_kind in _FOLDERS.items():
        remove_folder(out / name, folder_kind)
    for name, file_kind in _FILES.items():
        if os.path.lexists(out / name):
            check_output(out / name, file_kind, force=True)
            (out / name).unlink()


def _run(step: Step, position: str, out: Path) -> None:
    """Run one command, its output on stderr. Raises what its exit code stands for."""
    _say(f"\n{position}  {step.title}\n$ {step.typed}\n")
    began = time.monotonic()
    code = subprocess.run(step.arguments, stdout=_STDERR, check=False).returncode
    if code != 0:
        raise _failure(code)(
            f"demo: step {position} failed with exit code {code}; its message is above."
            f" What was made so far is in {out}. Try again with --force."
        )
    _say(f"({time.monotonic() - began:.1f} s)\n")


def _failure(code: int) -> type[VscError]:
    """Return the error of an exit code; a crash or a signal is a check that did not pass."""
    return _BY_EXIT_CODE.get(code, CheckFailed)


def _conclude(out: Path, steps: Sequence[Step], total_s: float) -> None:
    _say(
        f"\nDone in {total_s:.0f} s. Open {out / 'sheet.png'}: each row is an image, its"
        f" reconstruction,\nand what each active feature draws in it. Also in {out}: the images"
        " and their true\nfactors (smiley/), the run (run/), the bundle (model/) and the codes"
        " (codes.npz).\nThe same by hand:\n\n"
    )
    sys.stdout.write("".join(f"{step.typed}\n" for step in steps))
    sys.stdout.flush()


def _say(text: str) -> None:
    sys.stderr.write(text)
    sys.stderr.flush()
