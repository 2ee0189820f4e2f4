"""A run ends at the first step whose loss or gradient is not finite: nothing after it means much.

On a CPU every step is looked at before its gradient is applied, so the weights stay those of the
step before. A GPU would have to be waited for in every step; there the number of the first bad step
is kept on the device, and asked for when something is logged or saved.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import Final

import torch
from torch import Tensor

from vsc_serve.errors import CheckFailed
from vsc_training.config import Recipe
from vsc_training.metrics import Health
from vsc_training.step import Terms

_NEVER: Final = 2**62
_TERMS: Final = ("reconstruction", "kl", "sparsity", "balance")


class NotFinite(CheckFailed):
    """Loss, gradients or weights of a run are NaN or infinite."""

    def __init__(self, step: int, what: str, recipe: Recipe) -> None:
        """Say what is not finite at which step, and what to change."""
        self.step = step
        super().__init__(f"{what} at step {step}: {_advice(step, recipe)}")


class FiniteGuard:
    """Watches loss and gradients of a run.

    Args:
        recipe: Says what to change when something is not finite.
        device: Where the run computes.
    """

    def __init__(self, recipe: Recipe, device: torch.device) -> None:
        self._recipe = recipe
        self._is_waiting = device.type == "cpu"
        self._first_bad = torch.full((), _NEVER, dtype=torch.int64, device=device)

    def watch(self, step: int, terms: Terms, gradients: Iterable[Tensor]) -> None:
        """Look at a step before its gradient is applied. On a GPU this only takes note.

        A sum shows what is not finite in what is added: infinity and NaN stay in it.

        Raises:
            NotFinite: On a CPU, where something is not finite.
        """
        total = torch.stack([terms.loss.detach(), *(part.sum() for part in gradients)]).sum()
        if self._is_waiting:
            if not math.isfinite(float(total)):
                raise NotFinite(step, _describe(terms), self._recipe)
            return
        bad = torch.where(torch.isfinite(total), _NEVER, step)
        self._first_bad = torch.minimum(self._first_bad, bad)

    def check(self) -> None:
        """Raise NotFinite when a step that was watched on a GPU was not finite."""
        if not self._is_waiting and (first := int(self._first_bad)) != _NEVER:
            raise NotFinite(first, "the loss or a gradient is not finite", self._recipe)

    def check_tensors(self, step: int, tensors: Mapping[str, Tensor]) -> None:
        """Raise NotFinite when a tensor that is about to be saved is not finite."""
        for name, tensor in tensors.items():
            if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                raise NotFinite(step, f"{name} is not finite", self._recipe)

    def check_metrics(self, step: int, health: Health) -> None:
        """Raise NotFinite when a metric of held-out examples is not finite."""
        bad = [
            f"{name} {value}"
            for name, value in asdict(health).items()
            if isinstance(value, float) and not math.isfinite(value)
        ]
        if bad:
            raise NotFinite(step, f"on held-out examples {', '.join(bad)}", self._recipe)


def _describe(terms: Terms) -> str:
    values = {name: float(getattr(terms, name)) for name in _TERMS}
    bad = [f"{name} {value}" for name, value in values.items() if not math.isfinite(value)]
    if bad or not math.isfinite(float(terms.loss)):
        return f"the loss is not finite ({', '.join(bad) or float(terms.loss)})"
    return "the gradient is not finite"


def _advice(step: int, recipe: Recipe) -> str:
    if step == 1:
        return (
            "nothing has been learned yet, so a number of the recipe is too large for float32"
            f" (beta {recipe.beta:g}, sparsity_weight {recipe.sparsity_weight:g}, balance_weight"
            f" {recipe.balance_weight:g}, prior_sharpness {recipe.prior_sharpness:g})"
        )
    return f"lower learning_rate (now {recipe.learning_rate:g})"
