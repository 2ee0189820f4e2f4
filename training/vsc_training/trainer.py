"""One run in progress: model, optimiser, noise and the place in the data.

Everything random comes from the recipe's seed: weights, the order of the examples (a permutation of
each epoch, see `dataset.BatchOrder`) and the noise (one generator, saved in checkpoints).
"""

import logging
from dataclasses import replace
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from vsc_serve.errors import UsageError
from vsc_training.checkpoint import Checkpoint, RunState, optimizer_tensors, restore_optimizer
from vsc_training.config import Recipe
from vsc_training.data import Examples
from vsc_training.dataset import BatchOrder, DeviceDataset, batch_source
from vsc_training.device import repeatable_kernels, uses_bfloat16
from vsc_training.distributed import Group, gather_states
from vsc_training.finite import FiniteGuard
from vsc_training.memory import model_bytes, require_memory
from vsc_training.metrics import Health, measure_health
from vsc_training.model import VSC
from vsc_training.outliers import FAR, Bound
from vsc_training.pairs import draw_neighbours, draw_views, nearest_examples
from vsc_training.resolve import resolve
from vsc_training.schedule import learning_rate
from vsc_training.step import Objective, Terms

logger = logging.getLogger(__name__)

_CHECK_IMAGES: Final = 2048
"""Examples a health check measures."""
_CHECK_BATCH: Final = 512


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
        recipe = resolve(recipe, examples)
        self.recipe = recipe
        self.device = device
        self.group = group or Group()
        self.step = 0
        self.train_numbers, self.check_numbers = _split(examples, recipe)
        require_memory(recipe, examples.spec, device)
        needed = model_bytes(recipe, examples.spec, device)
        self.dataset = DeviceDataset.of(examples.rows, device, needed_bytes=needed)
        self.bf16 = uses_bfloat16(recipe, device)
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
        self.order = BatchOrder(
            self.train_numbers, recipe.batch_size, recipe.seed, self.dataset.index_device
        )
        first = self.order.epoch(0)
        if examples.spec.modality == "vector":
            self.dataset = self._bounded(self.dataset.take(first[:_CHECK_IMAGES]))
        self.model.set_scaling(self.dataset.take(first[:_CHECK_IMAGES]))
        self.model.start_spikes(_spike_start(self.model))
        picked = first.repeat(-(-recipe.pseudo_inputs // len(first)))[: recipe.pseudo_inputs]
        self.model.start_pseudo_inputs(self.dataset.take(picked))
        self._batch = batch_source(self.dataset, self._own_numbers)
        self._neighbours = self._search_neighbours()
        if is_compiled and self.group.size > 1:
            raise UsageError(
                "`is_compiled` is for one process: leave it away, or do without torchrun"
            )
        self._objective: Objective | DistributedDataParallel = Objective(
            self.model, is_compiled=is_compiled
        )
        if self.group.size > 1:
            self._objective = DistributedDataParallel(self._objective, broadcast_buffers=False)

    def advance(self) -> Terms:
        """Do one optimiser step and return its terms. Raises NotFinite; see `FiniteGuard`."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.step, self.recipe)
        terms = self._gradients(self.generator)
        self.guard.watch(self.step + 1, terms, self.model.parameters())
        self.optimizer.step()
        self.step += 1
        return terms.kept()

    def rehearse(self) -> None:
        """Compute the gradients of a step, and forget them.

        What fails in every step fails here, before anything is written.

        Raises:
            UsageError: A batch that the processes cannot share evenly, or that is too large for the
                memory; a compiler that fails.
            NotFinite: A number of the recipe that is too large.
        """
        generator = torch.Generator(self.device).manual_seed(self.recipe.seed)
        try:
            terms = self._gradients(generator)
        except torch.OutOfMemoryError as error:
            raise UsageError(
                f"a step does not fit into the memory of the GPU: lower batch_size (now"
                f" {self.recipe.batch_size}) or the sizes of the model"
            ) from error
        self.guard.look(self.step + 1, terms, self.model.parameters())
        self.optimizer.zero_grad(set_to_none=True)

    def _gradients(self, generator: torch.Generator) -> Terms:
        """Compute the terms of this step and their gradients."""
        examples = self._batch(self.step)
        # Before the forward pass: a compiled step on a GPU writes over the gradients of the last.
        self.optimizer.zero_grad(set_to_none=True)
        with repeatable_kernels():
            partners = self._partners(examples, generator)
            terms: Terms = self._objective(
                examples, self.step, generator, bf16=self.bf16, partners=partners
            )
            terms.loss.backward()
        return terms

    def _search_neighbours(self) -> Tensor | None:
        """Return the nearest examples of each one, where the neighbour term draws from them."""
        recipe = self.recipe
        if recipe.neighbour_weight == 0:
            return None
        if recipe.neighbour_pairs == "views":
            if self.model.data.modality == "vector":
                raise UsageError(
                    "neighbour_pairs=views is for images: `recipe.neighbour_pairs=graph`"
                )
            return None
        found = nearest_examples(self.dataset, self.train_numbers, recipe.seed)
        return found.to(self.dataset.index_device)

    def _partners(self, examples: Tensor, generator: torch.Generator) -> Tensor | None:
        """Draw a partner for each example of a batch; None without a neighbour term."""
        if self.recipe.neighbour_weight == 0:
            return None
        if self._neighbours is None:
            return draw_views(examples, generator)
        numbers = draw_neighbours(self._neighbours, self._own_numbers(self.step), generator)
        return self.dataset.take(numbers)

    def _own_numbers(self, step: int) -> Tensor:
        """Return the row numbers of this process's part of a batch."""
        return self.group.share(self.order.batch(step))

    def check(self, *, trained: bool = False) -> Health:
        """Measure the model on examples that it is not trained on, or on as many that it is."""
        numbers = self.train_numbers[: len(self.check_numbers)] if trained else self.check_numbers
        generator = torch.Generator(self.device).manual_seed(self.recipe.seed)
        self.model.eval()
        with repeatable_kernels():
            health = measure_health(
                self.model, self.dataset.batches(numbers, _CHECK_BATCH), generator
            )
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
            metrics=health.to_json(),
            name=name,
        )
        return Checkpoint(
            state,
            dict(self.model.state_dict()),
            optimizer_tensors(self.optimizer),
            {str(rank): state_of_rank for rank, state_of_rank in enumerate(states)},
        )

    def _bounded(self, sample: Tensor) -> DeviceDataset:
        """Return the data set with rows that are far drawn in, as a sample shows what that is."""
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
        return replace(self.dataset, bound=bound)

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
                f" {self.group.size}: resume with the same number, or train into another `out`"
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
            f" add examples, or `recipe.batch_size={max(1, len(train) // 2)}`"
        )
    checked = validation if len(validation) else train
    return torch.from_numpy(train), torch.from_numpy(checked[:_CHECK_IMAGES])
