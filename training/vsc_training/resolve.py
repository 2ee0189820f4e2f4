"""Resolving a recipe: fields that are `auto` get the value that suits the data, once, at the start.

The run keeps the values, in its recipe.toml and its checkpoint: a later release that chooses
otherwise does not change what a run is. So a run that goes on takes its own.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any, Final, NamedTuple

from vsc_training.checkpoint import CHECKPOINT, load_state
from vsc_training.config import Recipe
from vsc_training.data import Examples
from vsc_training.model import choose_decoder, choose_encoder


class _Strength(NamedTuple):
    """Regularisers for examples that are seen so often."""

    exposures: float
    """From so many on: steps times batch size over the examples of the training."""
    input_dropout: float
    weight_decay: float


_STRENGTHS: Final = (
    _Strength(0.0, 0.0, 0.0),
    _Strength(20.0, 0.2, 0.1),
    _Strength(200.0, 0.3, 1.0),
)
"""Measured on digits, photographs' embeddings and text (docs/decisions/0010)."""


def resolve(recipe: Recipe, examples: Examples, run: Path | None = None) -> Recipe:
    """Return the recipe with a value for each field that is `auto` and decides what is fitted.

    Args:
        recipe: Any recipe; one that is resolved stays as it is.
        examples: What the model is fitted to.
        run: A run to go on with, if it has a checkpoint: its values are taken.

    Raises:
        UsageError: A value that the network cannot have.
        InputError: The checkpoint of the run is damaged.
    """
    is_begun = run is not None and (run / CHECKPOINT).is_file()
    own = load_state(run).recipe if run is not None and is_begun else None
    return replace(recipe, **_layers(recipe, examples, own), **_regularisers(recipe, examples, own))


def _layers(recipe: Recipe, examples: Examples, own: Recipe | None) -> dict[str, Any]:
    chosen = {
        "encoder": own.encoder if own else choose_encoder(recipe, examples.spec),
        "decoder": own.decoder if own else choose_decoder(recipe, examples.spec),
    }
    return {name: value for name, value in chosen.items() if getattr(recipe, name) == "auto"}


def _regularisers(recipe: Recipe, examples: Examples, own: Recipe | None) -> dict[str, Any]:
    if recipe.regularisation == "none":
        return {}
    count = max(1, round(len(examples.rows) * (1.0 - recipe.validation_share)))
    exposures = recipe.steps * recipe.batch_size / count
    found: Any = own or [one for one in _STRENGTHS if exposures >= one.exposures][-1]
    return {"regularisation": "none"} | {
        name: getattr(recipe, name) or getattr(found, name)
        for name in ("input_dropout", "weight_decay")
    }
