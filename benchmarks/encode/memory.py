"""Peak memory of `vsc encode`, all its processes together."""

import subprocess
import sys
import time
from pathlib import Path

INTERVAL_S = 0.1


def peak_of_command(folder: Path, model: Path, out: Path) -> tuple[float, float, float]:
    """Run the command; return MiB of all processes, MiB of the parent, and seconds."""
    line = [sys.executable, "-m", "vsc_serve", "encode", str(folder), "--out", str(out)]
    line += ["--model", str(model), "--force", "--device", "cpu"]
    began = time.perf_counter()
    process = subprocess.Popen(line, stderr=subprocess.DEVNULL)
    peak = parent = 0.0
    while process.poll() is None:
        sizes = [_pss_mib(number) for number in _tree(process.pid)]
        peak = max(peak, sum(sizes))
        parent = max(parent, sizes[0])
        time.sleep(INTERVAL_S)
    if process.returncode:
        raise RuntimeError(f"vsc encode ended with {process.returncode}")
    return peak, parent, time.perf_counter() - began


def _tree(process_id: int) -> list[int]:
    found = [process_id]
    for number in found:
        try:
            listed = Path(f"/proc/{number}/task/{number}/children").read_text(encoding="ascii")
        except OSError:
            continue
        found += [int(child) for child in listed.split()]
    return found


def _pss_mib(process_id: int) -> float:
    """Return what a process holds, memory shared with others divided among them."""
    try:
        text = Path(f"/proc/{process_id}/smaps_rollup").read_text(encoding="ascii")
    except OSError:
        return 0.0
    lines = [line.split() for line in text.splitlines() if line.startswith("Pss:")]
    return int(lines[0][1]) / 1024 if lines else 0.0
