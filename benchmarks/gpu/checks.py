"""The tests that need a GPU."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.gpu.sizes import Sizes

ROOT = Path(__file__).parents[2]
_MARK = "pytest.mark.gpu"


def run(sizes: Sizes, work: Path) -> dict[str, Any]:
    """Run the tests marked `gpu`; on a GPU none of them may be skipped."""
    environment = dict(os.environ)
    if sizes.device == "cuda":
        environment["VSC_REQUIRE_GPU"] = "1"
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", f"--basetemp={work / 'pytest'}"]
    # Only their files: the others import packages that a machine without a network may lack.
    tests = [str(file) for file in (ROOT / "tests").rglob("test_*.py") if _MARK in file.read_text()]
    done = subprocess.run(
        [*command, *tests],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    last = done.stdout.strip().splitlines()[-1] if done.stdout.strip() else done.stderr.strip()
    has_failed = re.search(r"\d+ (failed|error)", last) is not None or done.returncode not in (0, 5)
    if has_failed:
        print(done.stdout[-4000:], done.stderr[-2000:])
    return {"facts": {"pytest -m gpu": last}, "passed": not has_failed}
