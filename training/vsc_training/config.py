"""Recipes: every choice of a training run, as one flat table that TOML files and `--set` fill in.

The recipes that ship, `sparse`, `search` and `paper`, are TOML files in `recipes/`; each documents
every field.
"""

import difflib
import logging
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from importlib.resources import files
from pathlib import Path
from typing import Any, Final, Literal, get_args, get_type_hints

from vsc_serve.errors import UsageError

Network = Literal["auto", "mlp", "conv"]
Encoder = Literal["auto", "mlp", "linear", "skip"]
Decoder = Literal["auto", "mlp", "linear"]
EncoderKind = Literal["mlp", "linear", "skip"]
DecoderKind = Literal["mlp", "linear"]
Likelihood = Literal["auto", "bernoulli", "gaussian"]
SpikeEstimator = Literal["straight_through", "relaxed", "hard_concrete"]
Classifier = Literal["softmax", "sigmoid"]
Sparsity = Literal["per_latent", "global"]
Interpolation = Literal["variance", "standard_deviation", "geometric"]
Precision = Literal["auto", "float32", "bfloat16"]
Pairs = Literal["graph", "views"]
Regularisation = Literal["auto", "none"]
OnCollapse = Literal["stop", "warn"]

logger = logging.getLogger(__name__)

BUILT_IN: Final = ("sparse", "search", "paper")

_SIZE: Final = 2**31 - 1
_MOST: Final = {
    "hidden": _SIZE,
    "layers": 1000,
    "width": _SIZE,
    "latent_dim": _SIZE,
    "pseudo_inputs": _SIZE,
    "batch_size": _SIZE,
    "steps": 2**53,
}
"""Largest values of the sizes; `memory` refuses what this machine cannot hold."""
_SEEDS: Final = 2**63
_LARGEST: Final = 3e38
"""Largest number that float32 holds, which is what the model computes in."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Every choice of a training run. The defaults are the `sparse` recipe."""

    network: Network = "auto"
    """Layers of encoder and decoder. `auto`: mlp for vectors and small grey images, else conv."""
    encoder: Encoder = "auto"
    """What the heads see: `mlp` hidden units, `linear` the input, `skip` both; see `resolve`."""
    decoder: Decoder = "auto"
    """`mlp`: through hidden layers; `linear`: one matrix from latents to data; see `resolve`."""
    hidden: int = 400
    """Units of each hidden layer (mlp), or of the layer between convolutions and code (conv)."""
    layers: int = 1
    """Hidden layers of the mlp encoder, and of its decoder."""
    width: int = 32
    """Channels after the first convolution; doubled by each one that follows."""
    latent_dim: int = 200
    """Latents J: columns of a code."""
    likelihood: Likelihood = "auto"
    """`bernoulli` for values in [0, 1], `gaussian` (learned log-variance) for vectors."""

    spike: SpikeEstimator = "straight_through"
    """How gradients pass the on/off choice of a latent."""
    spike_start: float = 0.0
    """Share of latents that are on at the first step; 0: one half (mlp) or alpha (conv)."""
    sharpness_start: float = 50.0
    """Slope c of the relaxed spike at the first step."""
    sharpness_end: float = 200.0
    """Slope c of the relaxed spike at the last step."""

    pseudo_inputs: int = 64
    """Pseudo-inputs U of the prior."""
    classifier: Classifier = "softmax"
    """How the classifier's scores become the weights of the pseudo-inputs."""
    prior_sharpness: float = 10.0
    """Slope nu that keeps the prior's spike probabilities off 0 and 1."""

    alpha: float = 0.05
    """Share of active latents that is asked for, above 0 and below 1."""
    beta: float = 0.25
    """Weight of the KL divergence to the prior."""
    sparsity: Sparsity = "per_latent"
    """`per_latent`: each latent is held to alpha; `global`: only the average of all is."""
    sparsity_weight: float = 1.0
    """Weight of the sparsity term."""
    balance_weight: float = 2.0
    """Weight of the term that keeps all pseudo-inputs in use."""

    neighbour_weight: float = 0.0
    """Weight of the neighbour term (InfoNCE); 0: none. Experimental."""
    neighbour_pairs: Pairs = "graph"
    """Partners: `graph`, one of the ten nearest examples; `views`, a changed copy of the image."""
    neighbour_temperature: float = 0.2
    """Divides the cosines of the neighbour term."""

    warmup_start: float = 0.1
    """Share of the steps up to which lambda is 0: an active latent is pure noise."""
    warmup_end: float = 0.2
    """Share of the steps from which lambda is 1."""
    interpolation: Interpolation = "variance"
    """What warm-up interpolates between 1 and the slab's own."""

    steps: int = 5000
    """Optimiser steps."""
    batch_size: int = 128
    """Images per step."""
    regularisation: Regularisation = "auto"
    """`auto`: what follows and is 0 gets what suits how often an example is seen; see `resolve`."""
    input_dropout: float = 0.0
    """Share of each example that training hides from the encoder, against overfitting."""
    weight_decay: float = 0.0
    """Share of the layers' weights that a step at learning rate 1 would take away."""
    learning_rate: float = 1.5e-3
    """Step size of Adam."""
    learning_rate_drop_at: float = 0.8
    """Share of the steps after which the learning rate is a tenth."""
    validation_share: float = 0.1
    """Share of the images that is kept out of training, chosen by their content."""
    precision: Precision = "auto"
    """`auto`: bfloat16 matrix products where the processor has them; the bound stays float32."""
    on_collapse: OnCollapse = "stop"
    """What a collapsed model does to the run."""
    seed: int = 0
    """Seed of weights, order and noise."""

    def __post_init__(self) -> None:
        for name, hint in get_type_hints(type(self)).items():
            _check_type(name, getattr(self, name), hint)
        self._check_ranges()

    def _check_ranges(self) -> None:
        for name, most in _MOST.items():
            value = getattr(self, name)
            _require(value >= 1, name, value, "at least 1")
            _require(value <= most, name, value, f"at most {most}")
        _require(0 <= self.seed < _SEEDS, "seed", self.seed, f"from 0 to {_SEEDS - 1}")
        for name in ("alpha", "learning_rate_drop_at"):
            _require(0 < getattr(self, name) < 1, name, getattr(self, name), "above 0 and below 1")
        for name in (
            "beta",
            "sparsity_weight",
            "balance_weight",
            "neighbour_weight",
            "weight_decay",
        ):
            _require(getattr(self, name) >= 0, name, getattr(self, name), "0 or more")
        for name in (
            "sharpness_start",
            "sharpness_end",
            "prior_sharpness",
            "neighbour_temperature",
            "learning_rate",
        ):
            _require(getattr(self, name) > 0, name, getattr(self, name), "above 0")
        for name in ("spike_start", "input_dropout", "validation_share"):
            _require(0 <= getattr(self, name) < 1, name, getattr(self, name), "in [0, 1)")
        _require(
            self.weight_decay * self.learning_rate < 1,
            "weight_decay",
            self.weight_decay,
            f"below {1 / self.learning_rate:g} (1 / learning_rate, which takes all away)",
        )
        _require(
            0 <= self.warmup_start <= self.warmup_end <= 1,
            "warmup_start, warmup_end",
            (self.warmup_start, self.warmup_end),
            "0 <= start <= end <= 1, so that lambda reaches 1",
        )

    @property
    def active(self) -> float:
        """Active latents per image that alpha asks for: alpha J."""
        return self.alpha * self.latent_dim

    def to_toml(self) -> str:
        """Return the recipe as TOML, one field a line."""
        lines = [f"{name} = {_toml_value(value)}" for name, value in asdict(self).items()]
        return "\n".join(lines) + "\n"


def load_recipe(name: str, overrides: Sequence[str] = (), *, active: float | None = None) -> Recipe:
    """Read a recipe and override single fields.

    Args:
        name: `sparse`, `search`, `paper`, or the path of a TOML file.
        overrides: `key=value` texts.
        active: Active latents per image to ask for; sets alpha to active / J.

    Returns:
        The checked recipe.

    Raises:
        UsageError: No such recipe, an unknown field (the nearest name is suggested) or a bad value.
    """
    given = dict(_parse_override(text) for text in overrides)
    if given.keys() & {"input_dropout", "weight_decay"}:
        given = {"regularisation": "none"} | given  # who sets one of them has chosen
    values = _read_toml(name) | given
    recipe = recipe_from(values, where=f"recipe {name}")
    if active is None:
        return recipe
    if not 0 < active < recipe.latent_dim:
        raise UsageError(
            f"`active` must be above 0 and below {recipe.latent_dim} (the latents), not {active:g}"
        )
    return replace(recipe, alpha=active / recipe.latent_dim)


def recipe_from(values: Mapping[str, Any], *, where: str) -> Recipe:
    """Build a recipe from a table of fields. Raises UsageError; `where` says which table."""
    values = _renamed(values)
    known = [field.name for field in fields(Recipe)]
    for key in values:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"Did you mean {near[0]}?" if near else f"Known: {', '.join(known)}."
            raise UsageError(f"{where}: no field {key!r}. {hint}")
    return Recipe(**values)


def _renamed(values: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the fields with the names of today, for recipes of an earlier release."""
    if values.get("interpolation") != "deviation":
        return values
    logger.warning("recipe: interpolation = deviation is called standard_deviation now")
    return {**values, "interpolation": "standard_deviation"}


def _read_toml(name: str) -> dict[str, Any]:
    if name in BUILT_IN:
        text = (files("vsc_training") / "recipes" / f"{name}.toml").read_text(encoding="utf-8")
    else:
        try:
            text = Path(name).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(
                f"`recipe` {name}: not one of {', '.join(BUILT_IN)}, and no readable file"
                f" ({error})."
            ) from error
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"`recipe` {name}: not TOML ({error}).") from error


def _parse_override(text: str) -> tuple[str, Any]:
    """Read `key=value`; the value is TOML, a number as one writes it (`.01`), or a plain word."""
    key, separator, value = text.partition("=")
    if not separator:
        raise UsageError(f"`overrides` {text}: expected key=value, for example alpha=0.02")
    try:
        return key.strip(), tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        return key.strip(), _number_or_word(value.strip())


def _number_or_word(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


def _check_type(name: str, value: object, hint: Any) -> None:
    choices = get_args(hint)
    if choices:
        _require(value in choices, name, value, f"one of {', '.join(choices)}")
    elif hint is float:
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise UsageError(f"recipe: {name} must be a number, not {value!r}")
        _require(abs(value) <= _LARGEST, name, value, "a finite number that float32 can hold")
    else:
        _require(type(value) is hint, name, value, "a whole number" if hint is int else "text")


def _require(is_met: object, name: str, value: object, rule: str) -> None:
    if not is_met:
        raise UsageError(f"recipe: {name} must be {rule}, not {value!r}")


def _toml_value(value: object) -> str:
    return f'"{value}"' if isinstance(value, str) else repr(value)
