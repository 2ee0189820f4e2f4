"""What `vsc_serve` offers by name, and what a light start does not load."""

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest
from public_surface import Name, home, needed

import vsc_serve
from vsc_serve import errors

HEAVY = ("numpy", "scipy", "PIL", "onnxruntime", "fastapi", "torch", "onnx")


def loaded_after(script: str) -> set[str]:
    """Run a script in a fresh process and return which heavy modules it loaded."""
    ending = f"\nimport sys; print('HEAVY', *(name for name in {HEAVY!r} if name in sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", script + ending],
        check=True,
        capture_output=True,
        text=True,
        timeout=120,
    )
    return set(done.stdout.splitlines()[-1].split()[1:])


@pytest.mark.parametrize("name", vsc_serve.__all__)
def test_every_public_name_can_be_imported(name):
    assert getattr(vsc_serve, name) is not None
    namespace: dict[str, object] = {}
    exec(f"from vsc_serve import {name}", namespace)
    assert namespace[name] is getattr(vsc_serve, name)


def test_the_public_names_are_those_that_type_checkers_see():
    tree = ast.parse(Path(vsc_serve.__file__).read_text(encoding="utf-8"))
    guard = next(node for node in tree.body if isinstance(node, ast.If))
    seen = {
        alias.name: statement.module
        for statement in guard.body
        if isinstance(statement, ast.ImportFrom)
        for alias in statement.names
    }
    assert sorted(vsc_serve.__all__) == vsc_serve.__all__
    assert seen.keys() | {"__version__"} == set(vsc_serve.__all__)
    for name, module in seen.items():
        assert getattr(importlib.import_module(str(module)), name) is getattr(vsc_serve, name)


def public(module: str) -> set[Name]:
    """Where the public names of a module are defined."""
    names = set(importlib.import_module(module).__all__) - {"__version__"}
    found = {home("vsc_serve", module, name) for name in names}
    assert None not in found
    return {place for place in found if place is not None}


@pytest.mark.parametrize(
    "module", ["vsc_serve", "vsc_serve.codes", "vsc_serve.convert", "vsc_serve.service"]
)
def test_every_type_that_a_public_signature_needs_is_public(module):
    offered = public("vsc_serve") | public(module)
    missing = needed("vsc_serve", public(module)) - offered
    assert not missing, f"{module}.__all__ lacks {sorted(missing)}"


def test_every_error_is_public():
    tree = ast.parse(Path(errors.__file__).read_text(encoding="utf-8"))
    classes = {node.name for node in tree.body if isinstance(node, ast.ClassDef)}
    assert classes <= set(vsc_serve.__all__)


def test_the_comparison_of_signatures_sees_fields_methods_aliases_and_quoted_types():
    found = {name for _, name in needed("vsc_serve", {Name("vsc_serve.encoder", "Encoder")})}
    assert "Session" in found  # of __init__
    assert "Manifest" in found  # of __init__ too
    assert "ImageLike" in found  # an alias, in `encode`
    assert "Device" in found  # behind a default
    assert "CodeRows" in found  # returned
    assert "Codes" in found  # a field of CodeRows
    assert "Probe" in found  # inside list[...], in a field of Manifest
    assert "GUARD_BAND" not in found
    assert needed("vsc_serve", {Name("vsc_serve.decoder", "Decoder")}) > {
        Name("vsc_serve.session", "Session")
    }


def test_a_name_that_does_not_exist_is_an_ordinary_attribute_error():
    with pytest.raises(AttributeError, match="module 'vsc_serve' has no attribute 'Encodr'"):
        _ = vsc_serve.Encodr


def test_importing_the_package_loads_nothing_heavy():
    assert loaded_after("import vsc_serve") == set()


@pytest.mark.parametrize("arguments", [["--help"], ["encode", "--help"], ["--version"]])
def test_help_and_version_load_nothing_heavy(arguments):
    script = (
        "import sys\n"
        "from vsc_serve.cli import main\n"
        f"sys.argv = ['vsc', *{arguments!r}]\n"
        "try: main()\n"
        "except SystemExit as end: assert not end.code, end.code"
    )
    assert loaded_after(script) == set()


def test_the_check_above_sees_what_is_loaded():
    assert loaded_after("import vsc_serve; vsc_serve.Encoder") >= {"numpy", "scipy", "PIL"}
