"""Codes of the GPU beside those of the CPU: TF32 off and on, batch sizes, two processes.

Each cell is a process of its own, twice: kernels may be chosen by timing, so that two processes
could give different bits.
"""

import hashlib
import itertools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.encode.models import make_bundle
from benchmarks.gpu.sizes import Sizes
from vsc_serve.bundle import ENCODER
from vsc_serve.codes import threshold_logit
from vsc_serve.models import builtin_model
from vsc_serve.options import GUARD_BAND
from vsc_serve.session import BoundSession, Device, open_session

OUTPUTS = ("code", "spike_logit")


def run(sizes: Sizes, work: Path) -> dict[str, Any]:
    """Compare every bundle, precision and batch size with the CPU, twice each."""
    make_bundle(work / "mlp", "mlp")
    bundles = {"mlp, random weights": (work / "mlp", (28, 28, 1))}
    bundles["built-in, conv"] = (builtin_model(), (32, 32, 3))
    rows = []
    for (name, (bundle, shape)), tf32 in itertools.product(bundles.items(), (False, True)):
        inputs = work / f"{name}.npy"
        rng = np.random.default_rng(0)
        np.save(inputs, rng.integers(0, 256, (sizes.parity_inputs, *shape), np.uint8))
        expected = compute(bundle, np.load(inputs), "cpu", 256, tf32=False)
        digests = set()
        for batch in sizes.parity_batches:
            settings = (str(bundle), str(inputs), sizes.device, str(batch), str(int(tf32)))
            cells = [_in_process(*settings) for _ in range(2)]
            digests |= {cell["digest"] for cell in cells}
            found = np.load(cells[0]["file"])
            rows.append(
                {
                    "bundle": name,
                    "TF32": "on" if tf32 else "off",
                    "batch": batch,
                    **_compare(found, expected),
                    "two processes": "equal" if cells[0]["digest"] == cells[1]["digest"] else "no",
                }
            )
    strict = [row for row in rows if row["TF32"] == "off"]
    passed = all(
        not row["flips outside the band"]
        and row["largest value error"] <= 1e-4
        and row["two processes"] == "equal"
        for row in strict
    )
    return {"rows": rows, "passed": passed}


def compute(
    bundle: Path, inputs: NDArray[np.uint8], device: Device, batch: int, *, tf32: bool
) -> dict[str, NDArray[np.float32]]:
    """Return the dense outputs of all inputs."""
    session = BoundSession(
        open_session(bundle / ENCODER, device=device, threads=0, allows_tf32=tf32), batch
    )
    limit = np.array(threshold_logit(0.5))
    parts: dict[str, list[NDArray[np.float32]]] = {name: [] for name in OUTPUTS}
    for start in range(0, len(inputs), batch):
        chunk = inputs[start : start + batch]
        found = session.run(OUTPUTS, {"image": chunk, "tau_logit": limit})
        for name, output in zip(OUTPUTS, found, strict=True):
            parts[name].append(output[: len(chunk)].copy())
    return {name: np.concatenate(found) for name, found in parts.items()}


def _compare(found: Any, expected: dict[str, NDArray[np.float32]]) -> dict[str, Any]:
    limit = threshold_logit(0.5)
    differs = (found["code"] != 0) != (expected["code"] != 0)
    is_near = np.abs(expected["spike_logit"] - limit) <= GUARD_BAND
    both = (found["code"] != 0) & (expected["code"] != 0)
    error = np.abs(found["code"] - expected["code"])[both]
    logit_error = np.abs(found["spike_logit"] - expected["spike_logit"])
    return {
        "flips outside the band": int((differs & ~is_near).sum()),
        "inside": int((differs & is_near).sum()),
        "largest value error": float(error.max(initial=0.0)),
        "largest logit error": float(logit_error.max(initial=0.0)),
    }


def _in_process(*settings: str) -> dict[str, str]:
    command = [sys.executable, "-m", "benchmarks.gpu.parity", *settings]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr[-2000:]}")
    found: dict[str, str] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    """Compute one cell in this process: write the outputs and print their digest."""
    bundle, inputs, device, batch, tf32 = sys.argv[1:]
    found = compute(
        Path(bundle),
        np.load(inputs),
        device,  # type: ignore[arg-type]  # one of the names: the parent gives it
        int(batch),
        tf32=tf32 == "1",
    )
    digest = hashlib.sha256(b"".join(found[name].tobytes() for name in OUTPUTS)).hexdigest()
    file = Path(inputs).with_suffix(f".{batch}-{tf32}.npz")
    np.savez(file, **found)  # type: ignore[arg-type]  # numpy's stub wants bools beside arrays
    print(json.dumps({"digest": digest, "file": str(file)}))


if __name__ == "__main__":
    main()
