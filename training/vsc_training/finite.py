"""A run ends at the first step whose loss or gradient is not finite: nothing after it means much.

On a CPU every step is looked at before its gradient is applied, so the weights stay those of the
step before. A GPU would have to be waited for in every step; there the losses are kept on the
device and looked at when something is logged or saved, and every thousand steps. One step that is
not finite makes all that follow so, and what is saved has been looked at.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import Final

import torch
from torch import Tensor, nn

from vsc_serve.errors import CheckFailed
from vsc_training.config import Recipe
from vsc_training.metrics import Health
from vsc_training.step import Terms

_KEPT_LOSSES: Final = 1024
"""Losses that are kept on a GPU before they are looked at."""
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
        self._losses = torch.zeros(_KEPT_LOSSES, device=device)
        self._steps: list[int] = []

    def watch(self, step: int, terms: Terms, weights: Iterable[nn.Parameter]) -> None:
        """Look at a step before its gradient is applied. On a GPU this only takes note.

        Raises:
            NotFinite: On a CPU, where loss or gradient is not finite; on a GPU, where the loss of
                an earlier step was not.
        """
        if self._is_waiting:
            self.look(step, terms, weights)
            return
        self._losses[len(self._steps)] = terms.loss.detach()
        self._steps.append(step)
        if len(self._steps) == _KEPT_LOSSES:
            self.check()

    def look(self, step: int, terms: Terms, weights: Iterable[nn.Parameter]) -> None:
        """Raise NotFinite when loss or gradient of a step is not finite; a GPU is waited for."""
        # A sum shows what is not finite in what is added. Squares, since Adam keeps those.
        gradients = (weight.grad.flatten() for weight in weights if weight.grad is not None)
        squares = (torch.dot(gradient, gradient) for gradient in gradients)
        if not math.isfinite(float(torch.stack([terms.loss.detach(), *squares]).sum())):
            raise NotFinite(step, _describe(terms), self._recipe)

    def check(self) -> None:
        """Raise NotFinite when the loss of a step that was watched on a GPU was not finite."""
        losses, steps = self._losses[: len(self._steps)].tolist(), self._steps
        self._steps = []
        for step, loss in zip(steps, losses, strict=True):
            if not math.isfinite(loss):
                raise NotFinite(step, f"the loss is not finite ({loss})", self._recipe)

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
    values = {name: float(getattr(terms, name).detach()) for name in _TERMS}
    bad = [f"{name} {value}" for name, value in values.items() if not math.isfinite(value)]
    loss = float(terms.loss.detach())
    if bad or not math.isfinite(loss):
        return f"the loss is not finite ({', '.join(bad) or loss})"
    return "the gradient is not finite, or its square is not"


def _advice(step: int, recipe: Recipe) -> str:
    if step == 1:
        return (
            "nothing has been learned yet, so a number of the recipe is too large for float32"
            f" (beta {recipe.beta:g}, sparsity_weight {recipe.sparsity_weight:g}, balance_weight"
            f" {recipe.balance_weight:g}, prior_sharpness {recipe.prior_sharpness:g})"
        )
    return f"lower learning_rate (now {recipe.learning_rate:g})"
