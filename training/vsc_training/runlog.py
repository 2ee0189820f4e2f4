"""The figures of a run, as JSON lines and for TensorBoard."""

import json
import time
from pathlib import Path
from typing import Any

from vsc_training.checkpoint import LOG
from vsc_training.metrics import Health


class RunLog:
    """Writes the figures of a run as JSON lines and for TensorBoard."""

    def __init__(self, run: Path, *, start_step: int) -> None:
        """Open the logs; lines of steps that will be done again are dropped."""
        from torch.utils.tensorboard import SummaryWriter

        path = run / LOG
        kept = [line for line in _lines(path) if json.loads(line)["step"] <= start_step]
        path.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
        self._file = path.open("a", encoding="utf-8")
        self._board = SummaryWriter(str(run / "tensorboard"), purge_step=start_step)
        self._start = (time.monotonic(), start_step)

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
        self._board.close()

    def add(self, step: int, terms: dict[str, float], lam: float) -> None:
        """Write the terms of one step."""
        began, start_step = self._start
        rate = (step - start_step) / max(time.monotonic() - began, 1e-9)
        figures = terms | {"elbo_paper": -terms["reconstruction"] - terms["kl"]}
        self._write(step, "train", figures | {"lam": lam, "steps_per_s": round(rate, 2)})

    def add_health(self, step: int, health: Health, kind: str = "check") -> None:
        """Write the figures of a health check, `trained` where it was of training examples."""
        self._write(step, kind, health.to_json())

    def _write(self, step: int, kind: str, figures: dict[str, Any]) -> None:
        self._file.write(json.dumps({"step": step, "kind": kind} | figures) + "\n")
        self._file.flush()
        for name, value in figures.items():
            self._board.add_scalar(f"{kind}/{name}", value, step)


def _lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
