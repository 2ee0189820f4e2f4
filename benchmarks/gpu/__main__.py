"""Everything that only a GPU can show, in one command of under nine minutes.

    make gpu                                       # every part; those that are done are kept
    python -m benchmarks.gpu --parts parity train  # these parts
    python -m benchmarks.gpu --again               # from the beginning
    python -m benchmarks.gpu --dry                 # small sizes on the CPU: the script itself runs

Writes `results.json` and `results.md` in `--out`, after every part. docs/gpu.md says how packages
are brought to a machine without a network, and what each number means.
"""

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

from benchmarks.gpu import checks, encoding, parity, serving, training
from benchmarks.gpu.machine import describe_machine, require_gpu
from benchmarks.gpu.results import Results
from benchmarks.gpu.sizes import DRY, FULL, Sizes
from vsc_serve.errors import VscError

Part = Callable[[Sizes, Path], dict[str, Any]]

PARTS: Final[dict[str, Part]] = {
    "tests": checks.run,
    "parity": parity.run,
    "train": training.run,
    "encode": encoding.run,
    "serve": serving.run,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the parts; returns the exit code."""
    given = _parser().parse_args(arguments)
    sizes = DRY if given.dry else FULL
    try:
        if not given.dry or os.environ.get("VSC_REQUIRE_GPU") == "1":
            require_gpu(given.parts)
    except VscError as error:
        print(f"gpu: {error}", file=sys.stderr)
        return error.exit_code
    results = Results.open(given.out, describe_machine(), sizes, again=given.again)
    failed = []
    for name in given.parts:
        if results.has(name):
            print(f"{name}: kept from an earlier run (--again measures it once more)")
            continue
        began = time.perf_counter()
        with tempfile.TemporaryDirectory(prefix="vsc-gpu-") as work:
            found = PARTS[name](sizes, Path(work))
        found["seconds"] = round(time.perf_counter() - began, 1)
        results.add(name, found)
        if not found.get("passed", True):
            failed.append(name)
        print(f"{name}: {found['seconds']} s", flush=True)
    print(results.table())
    if failed:
        print(f"gpu: failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description="Prove the GPU.")
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--out", type=Path, default=Path("build/gpu"), help="folder for results")
    parser.add_argument("--again", action="store_true", help="measure what is there once more")
    parser.add_argument("--dry", action="store_true", help="small sizes, on the CPU")
    return parser


if __name__ == "__main__":
    sys.exit(main())
