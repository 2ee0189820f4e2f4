"""Schedules: what changes over the steps of a run.

All are shares of the recipe's `steps`, so they depend on the recipe and the number of the step
alone. A run that is resumed with more steps goes on, from there, as a run of that many steps does.
"""

from typing import Final

from vsc_training.config import Recipe

LATE_FACTOR: Final = 0.1
"""Of the learning rate, from `learning_rate_drop_at` on."""


def learning_rate(step: int, recipe: Recipe) -> float:
    """Return the learning rate of a step: the recipe's, and late in the run a tenth of it.

    Args:
        step: Steps that are done.
        recipe: Says how large it is and when it falls.
    """
    is_late = step >= recipe.learning_rate_drop_at * recipe.steps
    return recipe.learning_rate * (LATE_FACTOR if is_late else 1.0)
