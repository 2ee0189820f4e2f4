"""The training loop: recipe and examples in, a run folder with a checkpoint out.

Everything random comes from the recipe's seed: weights, the order of the examples (a permutation of
each epoch, derived from the seed and the epoch's number) and the noise (one generator, saved in
checkpoints). So a run that was killed and resumed ends with the same weights as one that was not.
"""

import logging
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from vsc_serve.errors import CheckFailed, UsageError
from vsc_training.checkpoint import (
    Checkpoint,
    RunState,
    load_checkpoint,
    optimizer_tensors,
    restore_optimizer,
    save_checkpoint,
)
from vsc_training.config import Recipe
from vsc_training.data import Examples
from vsc_training.device import uses_bfloat16
from vsc_training.distributed import Group, gather_states, wait_for_all
from vsc_training.feed import Feed
from vsc_training.metrics import Health, find_collapse, find_overfit, measure_health
from vsc_training.model import VSC
from vsc_training.runlog import RunLog
from vsc_training.step import Objective, Terms
from vsc_training.warmup import warmup_factor

logger = logging.getLogger(__name__)

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
            UsageError: Fewer examples than a batch; or a compiled step that cannot be had.
        """
        self.recipe = recipe
        self.device = device
        self.group = group or Group()
        self.step = 0
        self.train_numbers, self.check_numbers = _split(examples, recipe)
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
        order = self._permutation(0)
        self.model.set_scaling(self.feed.take(self.train_numbers[order[:_CHECK_IMAGES]]))
        self.model.start_spikes(_spike_start(self.model))
        picked = order.repeat(-(-recipe.pseudo_inputs // len(order)))[: recipe.pseudo_inputs]
        self.model.start_pseudo_inputs(self.feed.take(self.train_numbers[picked]))
        if is_compiled and self.group.size > 1:
            raise UsageError("--compile is for one process: leave it away, or do without torchrun")
        self._objective: Objective | DistributedDataParallel = Objective(
            self.model, is_compiled=is_compiled
        )
        if self.group.size > 1:
            self._objective = DistributedDataParallel(self._objective, broadcast_buffers=False)

    def advance(self) -> Terms:
        """Do one optimiser step and return its terms."""
        examples = self.feed.take(self.group.share(self._batch_numbers()))
        is_late = self.step >= self.recipe.learning_rate_drop_at * self.recipe.steps
        for group in self.optimizer.param_groups:
            group["lr"] = self.recipe.learning_rate * (0.1 if is_late else 1.0)
        terms: Terms = self._objective(examples, self.step, self.generator, half=self.half)
        self.optimizer.zero_grad(set_to_none=True)
        terms.loss.backward()
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

    def _batch_numbers(self) -> Tensor:
        steps_per_epoch = len(self.train_numbers) // self.recipe.batch_size
        epoch, position = divmod(self.step, steps_per_epoch)
        if position == 0 or not hasattr(self, "_order"):
            self._order = self.train_numbers[self._permutation(epoch)]
        start = position * self.recipe.batch_size
        return self._order[start : start + self.recipe.batch_size]

    def _permutation(self, epoch: int) -> Tensor:
        """Return an epoch's order of the training examples: a function of seed and epoch."""
        seeds = np.random.SeedSequence((self.recipe.seed, epoch)).generate_state(1, np.uint64)
        generator = torch.Generator().manual_seed(int(seeds[0] >> np.uint64(1)))
        return torch.randperm(len(self.train_numbers), generator=generator)


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
    is_compiled: bool = False,
    name: str = "model",
    report: Callable[[int, str], None] = lambda step, text: None,
) -> Health:
    """Train a model and leave a run folder.

    Args:
        recipe: Every choice of the run; with `resume` it must be the one the run began with.
        examples: The data; with `resume` it must be the same data.
        run: Folder for checkpoint and logs.
        device: Where to compute.
        group: The processes that train together; only the first one writes.
        resume: Go on from the checkpoint in `run`, if there is one.
        is_compiled: Compile the step; see `Objective`.
        name: Name of the model.
        report: Called now and then with the steps done and a line of figures.

    Returns:
        The figures of the finished model on held-out examples.

    Raises:
        CheckFailed: The model has collapsed; the message says which figure and what to change.
        UsageError: The checkpoint belongs to another recipe or other data.
    """
    trainer = Trainer(recipe, examples, device, group, is_compiled=is_compiled)
    fingerprint = examples.fingerprint()
    if resume:
        _resume(trainer, run, fingerprint)
    every_check = max(1, recipe.steps // _CHECK_COUNT)
    every_log = max(1, recipe.steps // _LOG_COUNT)
    health = None
    is_first = trainer.group.is_first
    with RunLog(run, start_step=trainer.step) if is_first else nullcontext() as log:
        while trainer.step < recipe.steps:
            terms = trainer.advance()
            step = trainer.step
            if log and (step % every_log == 0 or step == recipe.steps):
                figures = terms.figures()
                log.add(step, figures, warmup_factor(step - 1, recipe))
                report(step, f"loss {figures['loss']:.1f}  active {figures['active']:.1f}")
            if step % every_check == 0 or step == recipe.steps:
                health = trainer.check()
                checkpoint = trainer.checkpoint(examples, name, fingerprint, health)
                if log:
                    log.add_health(step, health)
                    save_checkpoint(run, checkpoint)
                wait_for_all()
                _stop_on_collapse(health, recipe, step)
        if log and health and recipe.validation_share > 0:
            trained = trainer.check(trained=True)
            log.add_health(trainer.step, trained, kind="trained")
            if reason := find_overfit(health, trained, recipe):
                logger.warning("the model has learned its examples by heart: %s", reason)
    return health or trainer.check()


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


def _resume(trainer: Trainer, run: Path, fingerprint: str) -> None:
    checkpoint = load_checkpoint(run)
    if checkpoint.state.recipe != trainer.recipe:
        changed = [
            name
            for name, value in vars(checkpoint.state.recipe).items()
            if value != getattr(trainer.recipe, name)
        ]
        raise UsageError(
            f"{run}: began with another recipe (differs in {', '.join(changed)})."
            " Resume without --set and --recipe, or train into another --out."
        )
    if checkpoint.state.data_fingerprint != fingerprint:
        raise UsageError(
            f"{run}: began on other data (fingerprint {checkpoint.state.data_fingerprint}, now"
            f" {fingerprint})."
            " Give the same data, or train into another --out."
        )
    trainer.restore(checkpoint)
    logger.info("resumed %s at step %d of %d", run, trainer.step, trainer.recipe.steps)


def _stop_on_collapse(health: Health, recipe: Recipe, step: int) -> None:
    reason = find_collapse(health, recipe)
    is_last = step == recipe.steps
    if reason is None or (step < _SETTLED * recipe.steps and not is_last):
        return
    if recipe.on_collapse == "stop":
        raise CheckFailed(f"the model has collapsed at step {step}: {reason}")
    logger.warning("the model has collapsed at step %d: %s", step, reason)
