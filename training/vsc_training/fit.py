"""The training loop: recipe and examples in, a run folder with a checkpoint out.

A run that was killed and resumed ends with the same weights as one that was not; see `trainer`.
"""

import logging
import os
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TypeVar

import torch

from vsc_serve.errors import CheckFailed
from vsc_serve.locks import exclusive
from vsc_training.checkpoint import CHECKPOINT, load_checkpoint, save_checkpoint, start_run
from vsc_training.config import Recipe
from vsc_training.data import Examples
from vsc_training.distributed import Group, wait_for_all
from vsc_training.finite import NotFinite
from vsc_training.metrics import Health, find_collapse, find_dead, find_overfit
from vsc_training.resolve import resolve
from vsc_training.resume import Changes, check_resume
from vsc_training.runlog import RunLog
from vsc_training.step import Terms
from vsc_training.trainer import Trainer
from vsc_training.warmup import warmup_factor

logger = logging.getLogger(__name__)

_T = TypeVar("_T")

_LOG_COUNT: Final = 100
"""Lines in the log of a whole run."""
_CHECK_COUNT: Final = 10
"""Health checks, each followed by a checkpoint, in a whole run."""
_SETTLED: Final = 0.6
"""Share of the steps before which a collapse is not judged: the spikes are still moving."""


def fit(
    recipe: Recipe,
    examples: Examples,
    run: Path,
    *,
    device: torch.device,
    group: Group | None = None,
    resume: bool = False,
    force: bool = False,
    is_compiled: bool = False,
    name: str = "model",
    report: Callable[[int, str], None] = lambda step, text: None,
) -> Health:
    """Train a model and leave a run folder.

    Nothing is written or removed before everything that could refuse the run has been looked at,
    and no other training writes into the folder meanwhile.

    Args:
        recipe: Every choice of the run; `auto` is resolved (see `resolve`). With `resume`, what
            may differ from the run's own is said in `resume`.
        examples: The data; with `resume` it must be the same data.
        run: Folder for checkpoint and logs.
        device: Where to compute.
        group: The processes that train together; only the first one writes.
        resume: Go on from the checkpoint in `run`, if there is one.
        force: Replace a run that is there.
        is_compiled: Compile the step; see `Objective`.
        name: Name of the model.
        report: Called now and then with the steps done and a line of metrics.

    Returns:
        The metrics of the finished model on held-out examples.

    Raises:
        CheckFailed: The model has collapsed, or is not finite; the message says what to change.
        UsageError: The checkpoint belongs to another recipe or other data, or another training is
            writing there.
        InputError: The folder cannot be written.
    """
    run = Path(os.path.realpath(run))
    recipe = resolve(recipe, examples, run if resume else None)
    trainer = Trainer(recipe, examples, device, group, is_compiled=is_compiled)
    fingerprint = examples.fingerprint()
    with ExitStack() as held:
        if trainer.group.is_first:
            held.enter_context(exclusive(run))
        resumes = resume and (run / CHECKPOINT).is_file()
        changes = _resume(trainer, run, fingerprint) if resumes else {}
        trainer.rehearse()
        log = None
        if trainer.group.is_first:
            start_run(run, recipe, examples, resume=resumes, force=force or resume)
            log = held.enter_context(RunLog(run, start_step=trainer.step))
        if log and changes:
            log.add_resume(trainer.step, changes)
        wait_for_all()
        return _Run(trainer, examples, run, name, fingerprint, log, report).finish()


@dataclass
class _Run:
    """A run in progress and the folder it is kept in."""

    trainer: Trainer
    examples: Examples
    path: Path
    name: str
    fingerprint: str
    log: RunLog | None
    """Where this process writes; None where another one does."""
    report: Callable[[int, str], None]

    def finish(self) -> Health:
        """Do the steps that are left and return the metrics at the end."""
        trainer, recipe = self.trainer, self.trainer.recipe
        every_check = max(1, recipe.steps // _CHECK_COUNT)
        every_log = max(1, recipe.steps // _LOG_COUNT)
        health = None
        while trainer.step < recipe.steps:
            terms = self._guarded(trainer.advance)
            is_last = trainer.step == recipe.steps
            if trainer.step % every_log == 0 or is_last:
                self._guarded(trainer.guard.check)
                self._tell(terms)
            if trainer.step % every_check == 0 or is_last:
                health = self._check_and_save()
        if health is None:
            return trainer.check()
        self._warn(health)
        return health

    def _guarded(self, act: Callable[[], _T]) -> _T:
        """Do something that may find the run not finite; say then what is left of it."""
        try:
            return act()
        except NotFinite as error:
            raise CheckFailed(f"{error}. {self._what_is_left()}") from error

    def _what_is_left(self) -> str:
        if not (self.path / CHECKPOINT).is_file():
            return "There is no checkpoint yet: train again with another recipe and `force=True`."
        step = load_checkpoint(self.path).state.step
        return (
            f"The checkpoint of step {step} is kept: go on from it with `resume=True` and a lower"
            " `recipe.learning_rate`, or train again with `force=True`."
        )

    def _tell(self, terms: Terms) -> None:
        if self.log is None:
            return
        step, metrics = self.trainer.step, terms.metrics()
        self.log.add(step, metrics, warmup_factor(step - 1, self.trainer.recipe))
        self.report(step, f"loss {metrics['loss']:.1f}  active {metrics['active']:.1f}")

    def _check_and_save(self) -> Health:
        """Measure the model, and save it unless it is not finite."""
        trainer, step = self.trainer, self.trainer.step
        health = trainer.check()
        checkpoint = trainer.checkpoint(self.examples, self.name, self.fingerprint, health)
        self._guarded(lambda: trainer.require_finite(checkpoint, health))
        if self.log is not None:
            self.log.add_health(step, health)
            save_checkpoint(self.path, checkpoint)
        wait_for_all()
        _stop_on_collapse(health, trainer.recipe, step)
        return health

    def _warn(self, health: Health) -> None:
        """Say what is wrong with a model that has not collapsed."""
        trainer = self.trainer
        if self.log is None:
            return
        if not find_collapse(health, trainer.recipe) and (
            reason := find_dead(health, trainer.recipe)
        ):
            logger.warning("%s", reason)
        if trainer.recipe.validation_share == 0:
            return
        trained = trainer.check(trained=True)
        self.log.add_health(trainer.step, trained, kind="trained")
        if reason := find_overfit(health, trained, trainer.recipe):
            logger.warning("the model overfits: %s", reason)


def _resume(trainer: Trainer, run: Path, fingerprint: str) -> Changes:
    """Go on from the checkpoint of a run, and return the fields of the recipe that have changed."""
    checkpoint = load_checkpoint(run)
    changes = check_resume(run, checkpoint.state, trainer.recipe, fingerprint)
    trainer.restore(checkpoint)
    logger.info("resumed %s at step %d of %d", run, trainer.step, trainer.recipe.steps)
    return changes


def _stop_on_collapse(health: Health, recipe: Recipe, step: int) -> None:
    reason = find_collapse(health, recipe)
    is_last = step == recipe.steps
    if reason is None or (step < _SETTLED * recipe.steps and not is_last):
        return
    if recipe.on_collapse == "stop":
        raise CheckFailed(f"the model has collapsed at step {step}: {reason}")
    logger.warning("the model has collapsed at step %d: %s", step, reason)
