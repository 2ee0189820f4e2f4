"""The training loop: recipe and examples in, a run folder with a checkpoint out.

Everything random comes from the recipe's seed: weights, the order of the examples (a permutation of
each epoch, see `feed.BatchOrder`) and the noise (one generator, saved in
checkpoints). So a run that was killed and resumed ends with the same weights as one that was not.
"""

import logging
import os
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from vsc_serve.errors import CheckFailed, UsageError
from vsc_serve.locks import exclusive
from vsc_training.checkpoint import (
    CHECKPOINT,
    Checkpoint,
    RunState,
    load_checkpoint,
    optimizer_tensors,
    restore_optimizer,
    save_checkpoint,
    start_run,
)
from vsc_training.config import Recipe
from vsc_training.data import Examples
from vsc_training.device import uses_bfloat16
from vsc_training.distributed import Group, gather_states, wait_for_all
from vsc_training.feed import BatchOrder, Feed
from vsc_training.finite import FiniteGuard, NotFinite
from vsc_training.memory import require_memory
from vsc_training.metrics import Health, find_collapse, find_dead, find_overfit, measure_health
from vsc_training.model import VSC
from vsc_training.outliers import FAR, Bound
from vsc_training.resume import Changes, check_resume
from vsc_training.runlog import RunLog
from vsc_training.schedule import learning_rate
from vsc_training.step import Objective, Terms
from vsc_training.warmup import warmup_factor

logger = logging.getLogger(__name__)

_T = TypeVar("_T")

_LOG_COUNT: Final = 100
"""Lines in the log of a whole run."""
_CHECK_COUNT: Final = 10
"""Health checks, each followed by a checkpoint, in a whole run."""
_CHECK_IMAGES: Final = 2048
"""Examples a health check measures."""
_CHECK_BATCH: Final = 512
_SETTLED: Final = 0.6
"""Share of the steps before which a collapse is not judged: the spikes are still moving."""


class Trainer:
    """One run in progress: model, optimiser, noise and the place in the data."""

    def __init__(
        self,
        recipe: Recipe,
        examples: Examples,
        device: torch.device,
        group: Group | None = None,
        *,
        is_compiled: bool = False,
    ) -> None:
        """Start a run from its seed.

        Args:
            recipe: Every choice of the run.
            examples: The data.
            device: Where this process computes.
            group: The processes that train together; this one alone when None.
            is_compiled: Compile the step; see `Objective`.

        Raises:
            UsageError: Fewer examples than a batch; less memory than the model needs; or a compiled
                step that cannot be had.
        """
        self.recipe = recipe
        self.device = device
        self.group = group or Group()
        self.step = 0
        self.train_numbers, self.check_numbers = _split(examples, recipe)
        require_memory(recipe, examples.spec, device)
        self.feed = Feed.of(examples.rows, device)
        self.half = uses_bfloat16(recipe, device)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(recipe.seed)
            self.model = VSC(recipe, examples.spec)
        self.model.to(device)
        self.generator = torch.Generator(device).manual_seed(recipe.seed + self.group.rank)
        self.optimizer = torch.optim.AdamW(
            parameter_groups(self.model, recipe.weight_decay),
            lr=recipe.learning_rate,
            weight_decay=0.0,
            fused=device.type in ("cpu", "cuda"),
        )
        self.guard = FiniteGuard(recipe, device)
        self.order = BatchOrder(self.train_numbers, recipe.batch_size, recipe.seed)
        first = self.order.epoch(0)
        if examples.spec.modality == "vector":
            self.feed = self._bounded(self.feed.take(first[:_CHECK_IMAGES]))
        self.model.set_scaling(self.feed.take(first[:_CHECK_IMAGES]))
        self.model.start_spikes(_spike_start(self.model))
        picked = first.repeat(-(-recipe.pseudo_inputs // len(first)))[: recipe.pseudo_inputs]
        self.model.start_pseudo_inputs(self.feed.take(picked))
        if is_compiled and self.group.size > 1:
            raise UsageError("--compile is for one process: leave it away, or do without torchrun")
        self._objective: Objective | DistributedDataParallel = Objective(
            self.model, is_compiled=is_compiled
        )
        if self.group.size > 1:
            self._objective = DistributedDataParallel(self._objective, broadcast_buffers=False)

    def advance(self) -> Terms:
        """Do one optimiser step and return its terms. Raises NotFinite; see `FiniteGuard`."""
        examples = self.feed.take(self.group.share(self.order.batch(self.step)))
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.step, self.recipe)
        terms: Terms = self._objective(examples, self.step, self.generator, half=self.half)
        self.optimizer.zero_grad(set_to_none=True)
        terms.loss.backward()
        gradients = [weight.grad for weight in self.model.parameters() if weight.grad is not None]
        self.guard.watch(self.step + 1, terms, gradients)
        self.optimizer.step()
        self.step += 1
        return Terms(*(term.detach() for term in terms))

    def check(self, *, trained: bool = False) -> Health:
        """Measure the model on examples that it is not trained on, or on as many that it is."""
        numbers = self.train_numbers[: len(self.check_numbers)] if trained else self.check_numbers
        generator = torch.Generator(self.device).manual_seed(self.recipe.seed)
        self.model.eval()
        health = measure_health(self.model, self.feed.batches(numbers, _CHECK_BATCH), generator)
        self.model.train()
        return health

    def checkpoint(
        self, examples: Examples, name: str, fingerprint: str, health: Health
    ) -> Checkpoint:
        """Return everything that is needed to go on from here; every rank must call it."""
        states = gather_states(self.generator.get_state())
        state = RunState(
            step=self.step,
            recipe=self.recipe,
            data=examples.spec,
            data_fingerprint=fingerprint,
            figures=health.to_json(),
            name=name,
        )
        return Checkpoint(
            state,
            dict(self.model.state_dict()),
            optimizer_tensors(self.optimizer),
            {str(rank): state_of_rank for rank, state_of_rank in enumerate(states)},
        )

    def _bounded(self, sample: Tensor) -> Feed:
        """Return the feed with rows that are far drawn in, as a sample shows what that is."""
        bound = Bound.of(sample)
        if bound.far_share > 0 and self.group.is_first:
            logger.warning(
                "%.2g%% of the vectors lie more than %g times as far from the centre as the median"
                " one (the farthest %.3g times): training and its metrics see them drawn in to the"
                " median distance. An encoder takes them as they are; normalise or remove them if"
                " they are mistakes.",
                100 * bound.far_share,
                FAR,
                bound.farthest,
            )
        return replace(self.feed, bound=bound)

    def require_finite(self, checkpoint: Checkpoint, health: Health) -> None:
        """Raise NotFinite unless weights, moments and metrics are finite, all of them."""
        self.guard.check()
        tensors = {f"weight {name}": tensor for name, tensor in checkpoint.weights.items()}
        tensors |= {f"moment {name}": tensor for name, tensor in checkpoint.optimizer.items()}
        self.guard.check_tensors(self.step, tensors)
        self.guard.check_metrics(self.step, health)

    def restore(self, checkpoint: Checkpoint) -> None:
        """Go back to where a checkpoint was taken.

        Raises:
            UsageError: Another number of processes than then.
        """
        if len(checkpoint.random) != self.group.size:
            raise UsageError(
                f"the run began with {len(checkpoint.random)} processes, now there are"
                f" {self.group.size}: resume with the same number, or train into another --out"
            )
        self.model.load_state_dict(checkpoint.weights)
        restore_optimizer(self.optimizer, checkpoint.optimizer)
        self.generator.set_state(checkpoint.random[str(self.group.rank)])
        self.step = checkpoint.state.step


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Return what AdamW fits: the weights of layers decay, all else does not.

    Decay would draw biases to spikes of one half, and pseudo-inputs to grey.
    """
    if weight_decay == 0:
        return [{"params": list(model.parameters())}]
    parts: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for name, parameter in model.named_parameters():
        parts[name.endswith(".weight")].append(parameter)
    return [{"params": parts[True], "weight_decay": weight_decay}, {"params": parts[False]}]


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
        recipe: Every choice of the run; with `resume`, what may differ from the run's own is said
            in `resume`.
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
    trainer = Trainer(recipe, examples, device, group, is_compiled=is_compiled)
    fingerprint = examples.fingerprint()
    with ExitStack() as held:
        if trainer.group.is_first:
            held.enter_context(exclusive(run))
        resumes = resume and (run / CHECKPOINT).is_file()
        changes = _resume(trainer, run, fingerprint) if resumes else {}
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
            return f"There is no checkpoint yet: train again with another recipe into {self.path}."
        step = load_checkpoint(self.path).state.step
        return (
            f"The checkpoint of step {step} is kept: go on from it with --resume and a lower"
            " --set learning_rate=, or train again with --force."
        )

    def _tell(self, terms: Terms) -> None:
        if self.log is None:
            return
        step, metrics = self.trainer.step, terms.figures()
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
            logger.warning("the model has learned its examples by heart: %s", reason)


def _spike_start(model: VSC) -> float:
    """Return the share of latents that are on at the first step.

    From one half, an mlp ends with a better reconstruction; with convolutions the noise of the
    warm-up then drives every latent to 0 and hundreds of steps pass before one comes back
    (training/LOG.md).
    """
    if model.recipe.spike_start > 0:
        return model.recipe.spike_start
    return 0.5 if model.network == "mlp" else model.recipe.alpha


def _split(examples: Examples, recipe: Recipe) -> tuple[Tensor, Tensor]:
    """Return the row numbers for training, and those for health checks."""
    train, validation = examples.split(recipe.validation_share)
    if len(train) < recipe.batch_size:
        raise UsageError(
            f"{len(train)} training examples are fewer than a batch of {recipe.batch_size}:"
            f" add examples, or --set batch_size={max(1, len(train) // 2)}"
        )
    checked = validation if len(validation) else train
    return torch.from_numpy(train), torch.from_numpy(checked[:_CHECK_IMAGES])


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
