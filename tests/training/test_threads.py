"""Threads of torch that wait sleep: one that spins takes the processor of another."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

TRAIN = ("train", "v.npy", "--out", "run", "--device", "cpu", "--set", "steps=2")
SMALL = ("--set", "latent_dim=8", "--set", "batch_size=16", "--set", "on_collapse=warn")


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="OMP_DISPLAY_ENV of GNU's OpenMP")
@pytest.mark.parametrize(("given", "expected"), [(None, "PASSIVE"), ("ACTIVE", "ACTIVE")])
def test_openmp_waits_without_spinning_unless_the_environment_says_otherwise(
    tmp_path: Path, given: str | None, expected: str
) -> None:
    """OpenMP prints what it read when torch loaded it; what is set later has no effect."""
    rows = np.random.default_rng(0).standard_normal((64, 6)).astype(np.float32)
    np.save(tmp_path / "v.npy", rows)
    environment = {key: value for key, value in os.environ.items() if key != "OMP_WAIT_POLICY"}
    environment |= {"OMP_DISPLAY_ENV": "TRUE"} | ({"OMP_WAIT_POLICY": given} if given else {})
    done = subprocess.run(
        [sys.executable, "-m", "vsc_serve", *TRAIN, *SMALL, "--active", "2"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert f"OMP_WAIT_POLICY = '{expected}'" in done.stderr
