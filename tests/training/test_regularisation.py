"""Regularisers that follow from how often an example is seen."""

from pathlib import Path

import numpy as np
import pytest
import torch

from vsc_training.checkpoint import load_checkpoint
from vsc_training.config import Recipe, load_recipe
from vsc_training.data import Examples
from vsc_training.fit import fit
from vsc_training.model import DataSpec
from vsc_training.resolve import resolve

CPU = torch.device("cpu")


def recipe_of(*overrides: str) -> Recipe:
    return load_recipe("sparse", ["validation_share=0.0", *overrides])


def examples_of(count: int) -> Examples:
    rows = np.random.default_rng(0).normal(size=(count, 4)).astype(np.float32)
    return Examples(rows, [str(i) for i in range(count)], DataSpec(input_dim=4))


@pytest.mark.parametrize(
    ("count", "expected"),
    [(64_000, (0.0, 0.0)), (32_000, (0.2, 0.1)), (3_300, (0.2, 0.1)), (3_200, (0.3, 1.0))],
)
def test_strength_follows_from_how_often_an_example_is_seen(
    count: int, expected: tuple[float, float]
) -> None:
    found = resolve(recipe_of(), examples_of(count))  # 640,000 examples in all steps
    assert (found.input_dropout, found.weight_decay) == expected
    assert found.regularisation == "none"


def test_what_is_kept_out_of_training_does_not_count() -> None:
    found = resolve(recipe_of("validation_share=0.5"), examples_of(64_000))
    assert found.input_dropout == 0.2


def test_what_is_asked_for_is_kept() -> None:
    for asked in ("weight_decay=0.7", "weight_decay=0"):
        one = resolve(recipe_of(asked), examples_of(1000))
        assert (one.input_dropout, one.weight_decay) == (0.0, recipe_of(asked).weight_decay)
    both = resolve(recipe_of("weight_decay=0.7", "regularisation=auto"), examples_of(1000))
    assert (both.input_dropout, both.weight_decay) == (0.3, 0.7)
    none = resolve(recipe_of("regularisation=none"), examples_of(1000))
    assert (none.input_dropout, none.weight_decay) == (0.0, 0.0)
    paper = resolve(load_recipe("paper"), examples_of(1000))
    assert (paper.input_dropout, paper.weight_decay) == (0.0, 0.0)


def test_a_run_goes_on_with_its_own_strength(tmp_path: Path) -> None:
    small = ["latent_dim=8", "hidden=8", "pseudo_inputs=2", "batch_size=16", "on_collapse=warn"]
    examples = examples_of(100)
    fit(recipe_of(*small, "steps=10"), examples, tmp_path / "run", device=CPU)
    began = load_checkpoint(tmp_path / "run").state.recipe
    assert (began.input_dropout, began.weight_decay) == (0.0, 0.0)
    fit(recipe_of(*small, "steps=30"), examples, tmp_path / "longer", device=CPU)
    assert load_checkpoint(tmp_path / "longer").state.recipe.input_dropout == 0.0
    longer = recipe_of(*small, "steps=200")  # 32 times each
    assert resolve(longer, examples).input_dropout == 0.2
    fit(longer, examples, tmp_path / "run", device=CPU, resume=True)
    assert load_checkpoint(tmp_path / "run").state.recipe.input_dropout == 0.0
