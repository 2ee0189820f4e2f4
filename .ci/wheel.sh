#!/usr/bin/env bash
# What `pip install vsc-serve` gives: builds the wheel, looks into it, and uses it where nothing else is.
#
#   bash .ci/wheel.sh BUNDLE IMAGE
#
#   BUNDLE  folder that `vsc export` wrote
#   IMAGE   an image file to encode
set -euo pipefail

if [ "$#" -ne 2 ]; then
    echo "usage: bash .ci/wheel.sh BUNDLE IMAGE" >&2
    exit 2
fi
bundle=$(cd "$1" && pwd)
image=$(cd "$(dirname "$2")" && pwd)/$(basename "$2")
root=$(cd "$(dirname "$0")/.." && pwd)
python=$root/.venv/bin/python
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

say() { echo "wheel: $* (${SECONDS} s)"; }
fail() {
    say "$*" >&2
    exit 1
}

build() {
    say "build the sdist, and the wheel from it"
    "$python" -m build --outdir "$work/dist" "$root" > "$work/build.log" 2>&1 \
        || { tail -n 30 "$work/build.log" >&2; fail "the build failed"; }
    wheel=$(echo "$work"/dist/*.whl)
}

check_contents() {
    say "contents"
    "$python" - "$root" "$wheel" "$work"/dist/*.tar.gz <<'PYTHON'
import sys
import tarfile
import zipfile
from pathlib import Path, PurePosixPath

root, wheel, sdist = map(Path, sys.argv[1:])
places = {"vsc_serve": root, "vsc_training": root / "training", "vsc_export": root / "export"}
expected = {
    path.relative_to(place).as_posix()
    for package, place in places.items()
    for path in (place / package).rglob("*")
    if path.is_file() and "__pycache__" not in path.parts
}
found = {name for name in zipfile.ZipFile(wheel).namelist() if not name.endswith("/")}
record = {name for name in found if ".dist-info/" in name}
assert found - record == expected, f"wheel against tree: {sorted((found - record) ^ expected)}"
for package in places:
    assert f"{package}/py.typed" in expected, f"{package} says nothing about its types"
for recipe in ("sparse", "search", "paper"):
    assert f"vsc_training/recipes/{recipe}.toml" in expected, f"no recipe {recipe}"
models = {name for name in expected if name.startswith("vsc_serve/models/photos32")}
assert "vsc_serve/models/photos32/manifest.json" in models, "no built-in model"
graph = {f"vsc_serve/photos/efficientnet_lite0.{kind}" for kind in ("json", "onnx")}
assert graph <= expected, "no graph of the backbone photos"
kinds = {PurePosixPath(name).suffix for name in expected - models - graph}
assert kinds <= {".py", ".typed", ".toml", ".html"}, f"odd files: {sorted(kinds)}"
assert any(name.endswith("licenses/LICENSE") for name in record), "no LICENSE in the wheel"

tops = {name.split("/")[1] for name in tarfile.open(sdist).getnames() if "/" in name}
allowed = {
    *("vsc_serve", "training", "export", "tests", "docs", "README.md", "CHANGELOG.md"),
    *("CONTRIBUTING.md", "LICENSE", "PKG-INFO", "Makefile", "constraints.txt", "pyproject.toml"),
    ".gitignore",
}
assert tops <= allowed, f"the sdist holds {sorted(tops - allowed)}"
print(f"{len(expected)} files in {len(places)} packages, {wheel.stat().st_size / 1000:.0f} kB")
PYTHON
}

# Run a command that must end with this exit code and one line on stderr that holds this text.
expect_one_line() {
    local code=$1 text=$2 found=0
    shift 2
    "$@" > "$work/stdout" 2> "$work/stderr" || found=$?
    if [ "$found" -ne "$code" ] || [ "$(wc -l < "$work/stderr")" -ne 1 ] \
        || ! grep -qF -- "$text" "$work/stderr"; then
        cat "$work/stderr" >&2
        fail "'${*##*/}' gave exit code $found; expected $code and one line with: $text"
    fi
}

check_runtime() {
    say "the wheel with [cpu] in an empty environment"
    "$python" -m venv "$work/runtime"
    "$work/runtime/bin/pip" install --quiet --disable-pip-version-check "${wheel}[cpu]"
    cd "$work"  # away from the checkout
    for absent in torch onnx onnxscript fastapi training export tests; do
        if "$work/runtime/bin/python" -c "import $absent" 2> /dev/null; then
            fail "$absent can be imported there"
        fi
    done
    local vsc=$work/runtime/bin/vsc
    "$vsc" --help > "$work/help"
    for command in train export encode search serve; do
        grep -qw -- "$command" "$work/help" || fail "vsc --help does not name $command"
    done
    expect_one_line 2 "pip install 'vsc-serve[train]'" "$vsc" train images --out run
    expect_one_line 2 "pip install 'vsc-serve[export]'" "$vsc" export run --out model
    expect_one_line 2 "pip install 'vsc-serve[serve]'" "$vsc" serve --model "$bundle"
    expect_one_line 4 "no model bundle there" "$vsc" encode "$image" --model none --out none.npz
    say "encode"
    "$vsc" encode "$image" --model "$bundle" --out codes.npz
    "$vsc" encode "$image" --out builtin.npz 2> builtin.log || { cat builtin.log; fail "without a model"; }
    grep -q photos32 builtin.log || fail "it does not say that it took the built-in model"
    [ ! -e run ] && [ ! -e model ] && [ ! -e none.npz ] || fail "a refused command wrote something"
}

check_plain_scipy() {
    say "the codes where only scipy is"
    "$python" -m venv "$work/plain"
    "$work/plain/bin/pip" install --quiet --disable-pip-version-check scipy
    "$work/plain/bin/python" - "$work/codes.npz" "$image" <<'PYTHON'
import importlib.util
import sys

import numpy
import scipy.sparse

assert importlib.util.find_spec("vsc_serve") is None
path, image = sys.argv[1:]
codes = scipy.sparse.load_npz(path)
ids = numpy.load(path, allow_pickle=False)["ids"].tolist()
assert codes.shape[0] == 1 and codes.nnz > 0, codes
assert codes.dtype == numpy.float32 and codes.has_sorted_indices
assert ids == [image], ids
print(f"{codes.shape[0]} row, {codes.shape[1]} latents, {codes.nnz} active")
PYTHON
}

build
check_contents
check_runtime
check_plain_scipy
say "passed"
