"""Schedules: what changes over the steps of a run.

All are shares of the recipe's `steps`, so they depend on the recipe and the number of the step
alone. A run that is resumed with more steps goes on, from there, as a run of that many steps does.
"""

from typing import Final

import torch
from torch import Tensor

from vsc_training.config import Recipe
from vsc_training.warmup import warmup_factor

LATE_FACTOR: Final = 0.1
"""Of the learning rate, from `learning_rate_drop_at` on."""
_TABLE_STEPS: Final = 4096
"""Steps whose numbers go to the device at once: 128 KiB."""
_ALIGNMENT: Final = 4
"""float32 values between two numbers of the table: the compiler copies inputs that do not lie on
multiples of 16 bytes."""


def learning_rate(step: int, recipe: Recipe) -> float:
    """Return the learning rate of a step: the recipe's, and late in the run a tenth of it.

    Args:
        step: Steps that are done.
        recipe: Says how large it is and when it falls.
    """
    is_late = step >= recipe.learning_rate_drop_at * recipe.steps
    return recipe.learning_rate * (LATE_FACTOR if is_late else 1.0)


def progress(step: int, recipe: Recipe) -> float:
    """Return the share of the steps that is done."""
    return step / recipe.steps


class ScheduleTable:
    """Warm-up factor and progress as scalar tensors on a device.

    A number that is sent to a GPU makes the program wait until the GPU has done all that came
    before. So the numbers of thousands of steps are sent at once.

    Args:
        recipe: The schedule.
        device: Where the tensors lie.
    """

    def __init__(self, recipe: Recipe, device: torch.device) -> None:
        self._recipe, self._device = recipe, device
        self._first, self._table = 0, torch.empty(0, 2, _ALIGNMENT)

    def at(self, step: int) -> tuple[Tensor, Tensor]:
        """Return warm-up factor and progress of a step, counted from 0."""
        if not 0 <= step - self._first < len(self._table):
            self._first, self._table = step, self._fill(step)
        row = self._table[step - self._first]
        return row[0, 0], row[1, 0]

    def _fill(self, first: int) -> Tensor:
        steps = range(first, first + _TABLE_STEPS)
        pairs = [(warmup_factor(at, self._recipe), progress(at, self._recipe)) for at in steps]
        table = torch.zeros(len(pairs), 2, _ALIGNMENT)
        table[:, :, 0] = torch.tensor(pairs)
        return table.to(self._device)
