"""The runtime loads neither torch nor onnx, and the packages import in one direction only."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOTS = ("vsc_serve", "training/vsc_training", "export/vsc_export")
RUNTIME = ("vsc_serve.cli", "vsc_serve.encoder", "vsc_serve.service", "vsc_serve.pipeline")
FORBIDDEN = ("torch", "onnx", "onnxscript", "vsc_training", "vsc_export")


def loaded_by(modules: tuple[str, ...], forbidden: tuple[str, ...] = FORBIDDEN) -> set[str]:
    """Import modules in a fresh process and return which of the forbidden ones it loaded."""
    script = (
        "import importlib, sys\n"
        f"for name in {modules!r}: importlib.import_module(name)\n"
        f"print(*(name for name in {forbidden!r} if name in sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], check=True, capture_output=True, text=True, timeout=120
    )
    return set(done.stdout.split())


def lint_imports(tree: Path) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join(str((tree / root).parent) for root in ROOTS)
    return subprocess.run(
        [str(Path(sys.executable).with_name("lint-imports")), "--no-cache"],
        cwd=tree,
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of the packages that may be spoiled."""
    for root in ROOTS:
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / root, tmp_path / root, ignore=ignored)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


@pytest.mark.parametrize("module", RUNTIME)
def test_the_runtime_loads_neither_torch_nor_onnx(module):
    assert loaded_by((module,)) == set()


def test_the_check_above_sees_what_is_loaded():
    assert loaded_by(("onnx", "vsc_serve.encoder")) == {"onnx"}
    assert loaded_by(("vsc_serve.encoder",), ("scipy", "torch")) == {"scipy"}


def test_the_import_contracts_are_kept(tree):
    done = lint_imports(tree)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 broken" in done.stdout


@pytest.mark.parametrize(
    ("module", "statement", "contract"),
    [
        ("codes", "import torch", "the runtime never reaches torch or onnx"),
        ("codes", "from onnx import helper", "the runtime never reaches torch or onnx"),
        ("cli", "import vsc_training", "export -> training -> serve"),
        ("codes", "from vsc_serve import encoder", "the layers of the runtime"),
    ],
)
def test_an_import_hidden_in_a_function_breaks_its_contract(tree, module, statement, contract):
    with (tree / "vsc_serve" / f"{module}.py").open("a", encoding="utf-8") as file:
        file.write(f"\n\ndef _hidden() -> None:\n    {statement}\n")
    done = lint_imports(tree)
    assert done.returncode == 1
    assert f"{contract} BROKEN" in done.stdout
