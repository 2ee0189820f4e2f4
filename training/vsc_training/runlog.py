"""The metrics of a run, as JSON lines and for TensorBoard."""

import json
import logging
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from vsc_serve.atomic import atomic_file
from vsc_serve.errors import InputError
from vsc_training.checkpoint import LOG
from vsc_training.metrics import Health

logger = logging.getLogger(__name__)


class RunLog:
    """Writes the metrics of a run as JSON lines and for TensorBoard."""

    def __init__(self, run: Path, *, start_step: int) -> None:
        """Open the logs; lines of steps that will be done again are dropped.

        Lines that a full disk or a crash has cut are dropped as well, with a warning.

        Raises:
            InputError: The folder cannot be written.
        """
        from torch.utils.tensorboard import SummaryWriter

        self._path = run / LOG
        kept, cut_count = _read_lines(self._path, start_step)
        if cut_count:
            logger.warning(
                "%s: %d lines were cut off (a full disk, a crash) and are dropped; the others and"
                " the checkpoint are whole",
                self._path,
                cut_count,
            )
        with atomic_file(self._path) as file:
            file.writelines(f"{line}\n".encode() for line in kept)
        try:
            self._file = self._path.open("a", encoding="utf-8")
            self._board = SummaryWriter(str(run / "tensorboard"), purge_step=start_step)
        except OSError as error:
            raise self._cannot_write(error) from error
        self._start = (time.monotonic(), start_step)

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, *_: object) -> None:
        # What could not be written has been told already; closing tries it again.
        for opened in (self._file, self._board):
            with suppress(OSError):
                opened.close()

    def add(self, step: int, terms: dict[str, float], lam: float) -> None:
        """Write the terms of one step. Raises InputError (a full disk), as all that write."""
        began, start_step = self._start
        rate = (step - start_step) / max(time.monotonic() - began, 1e-9)
        metrics = terms | {"elbo_paper": -terms["reconstruction"] - terms["kl"]}
        self._write(step, "train", metrics | {"lam": lam, "steps_per_s": round(rate, 2)})

    def add_health(self, step: int, health: Health, kind: str = "check") -> None:
        """Write the metrics of a health check, `trained` where it was of training examples."""
        self._write(step, kind, health.to_json())

    def add_resume(self, step: int, changes: dict[str, list[Any]]) -> None:
        """Write which fields of the recipe have changed when the run went on."""
        self._write_line({"step": step, "kind": "resume", "recipe": changes})

    def _write(self, step: int, kind: str, metrics: dict[str, Any]) -> None:
        self._write_line({"step": step, "kind": kind} | metrics)
        try:
            for name, value in metrics.items():
                self._board.add_scalar(f"{kind}/{name}", value, step)
        except OSError as error:
            raise self._cannot_write(error) from error

    def _write_line(self, line: dict[str, Any]) -> None:
        try:
            self._file.write(json.dumps(line) + "\n")
            self._file.flush()
        except OSError as error:
            raise self._cannot_write(error) from error

    def _cannot_write(self, error: OSError) -> InputError:
        return InputError(
            f"{self._path.parent}: cannot be written ({error.strerror or error}). Make room there"
            " and go on with `resume=True`: the last checkpoint is whole."
        )


def _read_lines(path: Path, last_step: int) -> tuple[list[str], int]:
    """Return the lines of a log up to a step, and how many cannot be read."""
    if not path.is_file():
        return [], 0
    kept, cut_count = [], 0
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        step = _step_of(line)
        if step is None:
            cut_count += 1
        elif step <= last_step:
            kept.append(line)
    return kept, cut_count


def _step_of(line: str) -> int | None:
    try:
        step = json.loads(line)["step"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return step if isinstance(step, int) else None
