"""Choices that fit the data: what `vsc fit` sets in a recipe where nobody said otherwise.

Measured on photographs through the backbone `photos` (training/LOG.md, 2026-11-26). For pixels the
recipe stays as it is; `resolve` adds what is against overfitting.
"""

from collections.abc import Sequence
from typing import Final, Literal, NamedTuple

from vsc_serve.errors import UsageError
from vsc_training.config import Recipe, load_recipe

Purpose = Literal["search", "features"]
"""What codes are for: to find neighbours, or to look at with an honest bound."""

FEWEST: Final = 200
"""Examples below which nothing is fitted: fewer than a batch would be left for the training."""

_RECIPES: Final[dict[Purpose, str]] = {"search": "search", "features": "sparse"}
_FEW: Final = 1_000
"""Examples below which the steps are a third: more of them find less."""
_LATENTS: Final = 256
_ACTIVE: Final = 16.0


class Choice(NamedTuple):
    """One field of the recipe that is set."""

    override: str
    """`key=value`."""
    why: str
    """The reason, for people."""


def recipe_name(purpose: Purpose) -> str:
    """Return the recipe for a purpose."""
    return _RECIPES[purpose]


def choose(count: int, *, is_vectors: bool) -> list[Choice]:
    """Return what is set in the recipe.

    Args:
        count: Examples.
        is_vectors: They are embeddings, of a backbone or of a file.

    Raises:
        UsageError: Fewer examples than a model can be fitted to.
    """
    if count < FEWEST:
        raise UsageError(
            f"{count} usable examples are too few to fit a model to; `vsc fit` wants {FEWEST}."
            " Add images, or encode them with a model that is there: `vsc encode`."
        )
    if not is_vectors:
        return []
    few = f"below {_FEW:,} examples" if count < _FEW else f"from {_FEW:,} examples on"
    return [
        Choice(f"latent_dim={_LATENTS}", "embeddings"),
        Choice(f"steps={1_000 if count < _FEW else 3_000}", few),
    ]


def without(choices: Sequence[Choice], overrides: Sequence[str]) -> list[Choice]:
    """Return the choices that no override of the user's takes back."""
    return [choice for choice in choices if _key(choice.override) not in map(_key, overrides)]


def chosen_recipe(
    purpose: Purpose,
    choices: Sequence[Choice],
    overrides: Sequence[str],
    *,
    active: float | None,
    seed: int,
) -> Recipe:
    """Return the recipe of a purpose with the choices, and over them what the user set.

    Args:
        purpose: What the codes are for.
        choices: As `choose` gives them; where there are some, 16 active latents are asked for.
        overrides: `key=value` texts of the user.
        active: Active latents to ask for; None leaves that to the choices and to `alpha`.
        seed: Seed of the run.

    Raises:
        UsageError: An unknown field, or a bad value.
    """
    if active is None and choices and "alpha" not in map(_key, overrides):
        active = _ACTIVE
    given = [f"seed={seed}", *(choice.override for choice in choices), *overrides]
    return load_recipe(recipe_name(purpose), given, active=active)


def _key(override: str) -> str:
    return override.partition("=")[0].strip()
