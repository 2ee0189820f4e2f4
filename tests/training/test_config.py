"""Recipes: what is refused, what is suggested, and what the shipped files say."""

import re
import tomllib
from dataclasses import fields
from importlib.resources import files
from pathlib import Path

import pytest

from vsc_serve.errors import UsageError
from vsc_training.config import BUILT_IN, Recipe, load_recipe


def recipe_text(name: str) -> str:
    return (files("vsc_training") / "recipes" / f"{name}.toml").read_text(encoding="utf-8")


def test_the_defaults_are_the_sparse_recipe() -> None:
    assert load_recipe("sparse") == Recipe()


@pytest.mark.parametrize("name", BUILT_IN)
def test_a_shipped_recipe_sets_and_documents_every_field(name: str) -> None:
    text = recipe_text(name)
    assert set(tomllib.loads(text)) == {field.name for field in fields(Recipe)}
    for paragraph in re.split(r"\n(?=#)", text):
        if "=" in paragraph.replace("---", ""):
            assert paragraph.startswith("#"), paragraph


def test_the_paper_recipe_is_the_papers() -> None:
    paper = load_recipe("paper")
    assert (paper.spike, paper.sparsity, paper.beta, paper.alpha) == (
        "relaxed",
        "global",
        1.0,
        0.01,
    )
    assert (paper.sharpness_start, paper.sharpness_end, paper.pseudo_inputs) == (50.0, 200.0, 20)
    assert (paper.hidden, paper.steps, paper.batch_size) == (3000, 70_000, 500)
    assert paper.balance_weight == 0.0


def test_a_recipe_survives_its_own_toml(tmp_path: Path) -> None:
    recipe = load_recipe("paper", ["alpha=0.03", "network=conv"])
    path = tmp_path / "mine.toml"
    path.write_text(recipe.to_toml(), encoding="utf-8")
    assert load_recipe(str(path)) == recipe


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("alhpa=0.1", "no field 'alhpa'. Did you mean alpha?"),
        ("alpha=1.5", "alpha must be above 0 and below 1, not 1.5"),
        ("alpha=many", "alpha must be a number, not 'many'"),
        ("steps=1.5", "steps must be a whole number, not 1.5"),
        ("steps=0", "steps must be at least 1, not 0"),
        ("spike=soft", "spike must be one of straight_through, relaxed, hard_concrete, not 'soft'"),
        ("warmup_end=0.05", "so that lambda reaches 1"),
        ("input_dropout=1", "input_dropout must be in [0, 1), not 1"),
        ("weight_decay=-0.1", "weight_decay must be 0 or more, not -0.1"),
        ("weight_decay=700", "weight_decay must be below 666.667 (1 / learning_rate"),
        ("alpha", "expected key=value"),
        ("seed=-1", "seed must be from 0 to 9223372036854775807, not -1"),
        ("seed=18446744073709551616", "seed must be from 0 to 9223372036854775807, not 184467"),
        ("latent_dim=2e9", "latent_dim must be a whole number, not 2000000000.0"),
        ("hidden=99999999999", "hidden must be at most 2147483647, not 99999999999"),
        ("layers=1001", "layers must be at most 1000, not 1001"),
        ("network=dense", "network must be one of auto, mlp, conv, not 'dense'"),
    ],
)
def test_a_bad_override_says_what_and_what_to_do(override: str, message: str) -> None:
    with pytest.raises(UsageError, match=re.escape(message)):
        load_recipe("sparse", [override])


@pytest.mark.parametrize("value", ["nan", "inf", "-inf", "1e400", "-1", "1e39", str(10**400)])
@pytest.mark.parametrize("name", [field.name for field in fields(Recipe) if field.type is float])
def test_no_number_of_a_recipe_may_be_nan_infinite_negative_or_too_large(
    name: str, value: str
) -> None:
    with pytest.raises(UsageError, match=f"recipe: .*{name}.* must be "):
        load_recipe("sparse", [f"{name}={value}"])


@pytest.mark.parametrize("name", [field.name for field in fields(Recipe) if field.type is int])
@pytest.mark.parametrize("value", ["-1", "nan", "inf", "true", "99999999999999999999999"])
def test_no_whole_number_of_a_recipe_may_be_negative_or_too_large(name: str, value: str) -> None:
    with pytest.raises(UsageError, match=f"recipe: {name} must be "):
        load_recipe("sparse", [f"{name}={value}"])


def test_a_number_may_be_written_without_its_zero() -> None:
    assert load_recipe("sparse", ["learning_rate=.001", "alpha=5e-2"]).learning_rate == 0.001


def test_an_unknown_recipe_names_the_known_ones() -> None:
    with pytest.raises(UsageError, match="not one of sparse, search, paper"):
        load_recipe("dense")


def test_a_file_that_is_not_toml_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "bad.toml"
    path.write_text("alpha: 0.1", encoding="utf-8")
    with pytest.raises(UsageError, match="not TOML"):
        load_recipe(str(path))


def test_more_active_latents_than_there_are_is_refused() -> None:
    with pytest.raises(UsageError, match="below 200"):
        load_recipe("sparse", active=200)
