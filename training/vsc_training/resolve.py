"""Resolving a recipe: fields that are `auto` get the value that suits the data, once, at the start.

The run keeps the values, in its recipe.toml and its checkpoint: a later release that chooses
otherwise does not change what a run is. So a run that goes on takes its own.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from vsc_training.checkpoint import CHECKPOINT, load_state
from vsc_training.config import Recipe
from vsc_training.model import DataSpec, choose_decoder, choose_encoder

_AUTO: Final = ("encoder", "decoder")
"""Fields that are resolved."""


def resolve(recipe: Recipe, data: DataSpec, run: Path | None = None) -> Recipe:
    """Return the recipe with a value for each field that is `auto` and decides what is fitted.

    Args:
        recipe: Any recipe; one that is resolved stays as it is.
        data: What the model is fitted to.
        run: A run to go on with, if it has a checkpoint: its values are taken.

    Raises:
        UsageError: A value that the network cannot have.
        InputError: The checkpoint of the run is damaged.
    """
    is_begun = run is not None and (run / CHECKPOINT).is_file()
    chosen = vars(load_state(run).recipe) if run and is_begun else _choices(recipe, data)
    return replace(recipe, **{name: chosen[name] for name in _AUTO if _is_auto(recipe, name)})


def _choices(recipe: Recipe, data: DataSpec) -> dict[str, Any]:
    return {"encoder": choose_encoder(recipe, data), "decoder": choose_decoder(recipe, data)}


def _is_auto(recipe: Recipe, name: str) -> bool:
    return bool(getattr(recipe, name) == "auto")
