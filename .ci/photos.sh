#!/usr/bin/env bash
# The commands of the README on ten thousand real photographs, as a user types them.
#
#   bash .ci/photos.sh BIN WORK
#
#   BIN   folder of the `vsc` command
#   WORK  folder to make
#
# Needs VSC_DATA (docs/development.md); skipped with the reason without it.
set -euo pipefail

if [ "$#" -ne 2 ]; then
    echo "usage: bash .ci/photos.sh BIN WORK" >&2
    exit 2
fi
if [ -z "${VSC_DATA:-}" ]; then
    echo "photos: skipped, VSC_DATA is not set (docs/development.md says what belongs there)"
    exit 0
fi
if [ ! -f "$VSC_DATA/photos.tar.xz" ]; then
    echo "photos: skipped, $VSC_DATA holds no photos.tar.xz"
    exit 0
fi

python=$1/python
PATH=$1:$PATH
export PATH
mkdir -p "$2"
cd "$2"

# Show a command, and run it.
run() {
    echo "$ $*" >&2
    "$@"
}
fail() {
    echo "photos: $*" >&2
    exit 1
}

# Python 3.11.3 and older have no filter.
"$python" - "$VSC_DATA/photos.tar.xz" <<'PYTHON'
import sys
import tarfile

safely = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}
tarfile.open(sys.argv[1]).extractall(".", **safely)
PYTHON
[ -f photos/cat/0000.jpg ] || fail "photos.tar.xz holds no photos/cat/0000.jpg"

# One thread: two that wait for each other on a busy machine are ten times slower.
run vsc train photos --out run --set steps=400 --threads 1
run vsc export run --out model
run vsc encode photos --out codes.npz --model model
# As rows were made: a wide query of a photograph may like another one better.
run vsc search codes.npz --like photos/cat/0000.jpg --query symmetric --explain --model model | tee hits.txt
run vsc decode codes.npz --out drawn --rows 0:100 --model model
run vsc info codes.npz

run vsc encode photos --out again.npz --model model
cmp codes.npz again.npz || fail "the same photographs gave other bytes"
[ ! -e codes.errors.jsonl ] || fail "photographs were left out: $(head -n 1 codes.errors.jsonl)"
[ "$(find drawn -name '*.png' | wc -l)" -eq 100 ] || fail "not every row was drawn"
head -n 1 hits.txt | grep -q 'cat/0000.jpg$' || fail "the photograph most like a photograph is another"
"$python" - <<'PYTHON'
from pathlib import Path

from vsc_serve import read_codes

stored = read_codes(Path("codes.npz"))
assert stored.codes.shape[0] == len(stored.ids) == 10_000, stored.codes.shape
assert stored.ids == sorted(stored.ids), "ids are not in the order of their paths"
assert stored.ids[0] == "airplane/0000.jpg", stored.ids[0]
PYTHON
echo "photos: 10,000 rows, the same bytes twice"
