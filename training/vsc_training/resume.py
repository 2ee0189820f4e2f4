"""What may differ when a run goes on from its checkpoint, and what may not.

Fields that say how long and how fast the run goes on may change, and what a collapse does to it.
Schedules are shares of `steps`: from the checkpoint on, the run goes on as one of the new number of
steps does at that step (`schedule`, `warmup`). Everything else defines the model, its objective or
its data, and a run that changed it midway would be described by no recipe.
"""

from pathlib import Path
from typing import Any, Final

from vsc_serve.errors import UsageError
from vsc_training.checkpoint import RunState
from vsc_training.config import Recipe

CHANGEABLE: Final = ("steps", "learning_rate", "learning_rate_drop_at", "on_collapse")
"""Fields of the recipe that may differ from those the run began with."""

Changes = dict[str, list[Any]]
"""Fields that differ: the value before, and the value now."""


def check_resume(run: Path, state: RunState, recipe: Recipe, fingerprint: str) -> Changes:
    """Check that a run may go on with a recipe and data, and return what differs in the recipe.

    Args:
        run: The run.
        state: State of its checkpoint.
        recipe: The recipe to go on with.
        fingerprint: Digest of the data to go on with.

    Raises:
        UsageError: They are not those of the run; which, and what to do.
    """
    changes: Changes = {
        name: [value, getattr(recipe, name)]
        for name, value in vars(state.recipe).items()
        if value != getattr(recipe, name)
    }
    if fixed := [name for name in changes if name not in CHANGEABLE]:
        raise UsageError(
            f"{run}: began with another recipe (differs in {', '.join(fixed)}); only"
            f" {', '.join(CHANGEABLE)} may change. Resume without them in `overrides` and `recipe`,"
            " or train into another `out`."
        )
    if recipe.steps < state.step:
        raise UsageError(
            f"{run}: {state.step} steps are done, so steps={recipe.steps} is too few. Give more, or"
            " train into another `out`."
        )
    if state.data_fingerprint != fingerprint:
        raise UsageError(
            f"{run}: began on other data (fingerprint {state.data_fingerprint}, now"
            f" {fingerprint})."
            " Give the same data, or train into another `out`."
        )
    return changes
