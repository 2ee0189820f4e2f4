"""The models that VSC is compared with, and the tables of the comparison (benchmarks/quality)."""

import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2]))  # benchmarks is not installed

from benchmarks.quality import baselines, runs, tables
from benchmarks.quality.__main__ import main, read_results
from benchmarks.quality.data import read_sources
from vsc_serve.errors import UsageError
from vsc_training.config import Recipe, load_recipe
from vsc_training.data import Examples, load_examples


@pytest.fixture
def examples(grey_folder: Path) -> Examples:
    return load_examples(grey_folder)


def recipe(*overrides: str) -> Recipe:
    sizes = ["latent_dim=16", "hidden=32", "batch_size=32", "precision=float32", "steps=150"]
    return load_recipe("sparse", [*sizes, *overrides])


def pixels(examples: Examples) -> torch.Tensor:
    return torch.from_numpy(examples.rows).float() / 255.0


def error(coder: baselines.Coder, rows: torch.Tensor) -> float:
    with torch.no_grad():
        return float((coder.decode(coder.encode(rows)) - rows).square().sum() / len(rows))


def test_the_vae_bound_matches_the_likelihood_of_a_model_that_can_be_integrated(
    examples: Examples,
) -> None:
    """With a decoder that ignores its input, ln p(x) is the likelihood itself."""
    vae = baselines.DenseVae(baselines.make_layers(recipe(), examples), beta=1.0)
    rows = pixels(examples)[:8]
    with torch.no_grad():
        for parameter in vae.layers.decoder[0].parameters():
            parameter.zero_()
        exact = -vae.layers.nll(torch.zeros(8, 16), rows)
        bound = vae.iwae(rows, 4000, torch.Generator().manual_seed(0))
    torch.testing.assert_close(bound, exact, atol=0.15, rtol=0)


def test_the_vae_loss_is_the_negative_bound_of_one_draw(examples: Examples) -> None:
    vae = baselines.DenseVae(baselines.make_layers(recipe(), examples), beta=1.0)
    rows = pixels(examples)
    with torch.no_grad():
        vae.layers.slab_head.weight.mul_(6)  # or the divergence would be too small to be seen
        losses = [vae.loss(rows, None, torch.Generator().manual_seed(seed)) for seed in range(50)]
        bounds = [vae.iwae(rows, 1, torch.Generator().manual_seed(seed)) for seed in range(50)]
    assert np.mean(losses) == pytest.approx(-float(torch.stack(bounds).mean()), abs=0.1)


def test_topk_keeps_the_k_largest_and_nothing_negative(examples: Examples) -> None:
    model = baselines.TopK(baselines.make_layers(recipe(), examples), k=3)
    rows = pixels(examples)
    with torch.no_grad():
        codes, activations = model.encode(rows), model.layers.encode(rows).mu
    assert (codes >= 0).all()
    assert ((codes > 0).sum(1) <= 3).all()
    expected = activations.clamp_min(0).sort(dim=1, descending=True).values[:, :3]
    torch.testing.assert_close(codes.sort(dim=1, descending=True).values[:, :3], expected)


def test_the_auxiliary_loss_reaches_dead_latents_and_only_them(examples: Examples) -> None:
    model = baselines.TopK(baselines.make_layers(recipe(), examples), k=1)
    rows = pixels(examples)[:32]
    codes = model.encode(rows)
    silent = ~(codes > 0).any(0)
    before = head_gradient(model, rows)
    assert (before[silent] == 0).all()
    model.silent_steps.fill_(baselines.DEAD_AFTER_STEPS)
    after = head_gradient(model, rows)
    assert (after[silent] != 0).any()
    torch.testing.assert_close(after[~silent], before[~silent])


def head_gradient(model: baselines.TopK, rows: torch.Tensor) -> torch.Tensor:
    model.zero_grad()
    model.loss(rows, None, torch.Generator()).backward()
    gradient = model.layers.slab_head.bias.grad
    assert gradient is not None
    return gradient[: model.layers.recipe.latent_dim]


def test_a_latent_that_fires_is_not_dead(examples: Examples) -> None:
    model = baselines.TopK(baselines.make_layers(recipe(), examples), k=2)
    model.silent_steps.fill_(7.0)
    rows = pixels(examples)
    model.loss(rows, None, torch.Generator())
    fired = (model.encode(rows) > 0).any(0)
    assert set(model.silent_steps[fired].tolist()) == {0.0}
    assert set(model.silent_steps[~fired].tolist()) == {8.0}


def test_pca_is_the_best_linear_code_and_exact_with_all_components(examples: Examples) -> None:
    rows = pixels(examples)
    assert error(baselines.Pca(rows, 64), rows) == pytest.approx(0.0, abs=1e-4)
    variances = np.linalg.eigvalsh(np.cov(rows.flatten(1).numpy().T.astype(np.float64), ddof=0))
    assert error(baselines.Pca(rows, 5), rows) == pytest.approx(variances[:-5].sum(), rel=1e-3)


@pytest.mark.parametrize("kind", ["vae", "topk"])
def test_fitting_lowers_the_error_and_depends_on_the_seed_alone(
    examples: Examples, kind: str
) -> None:
    def fitted(seed: int, steps: int) -> baselines.DenseVae | baselines.TopK:
        chosen = recipe(f"seed={seed}", f"steps={steps}")
        layers = baselines.make_layers(chosen, examples)
        model = baselines.DenseVae(layers, 1.0) if kind == "vae" else baselines.TopK(layers, 3)
        baselines.fit_baseline(model, chosen, examples)
        return model

    rows = pixels(examples)
    first, again, other = fitted(0, 150), fitted(0, 150), fitted(1, 150)
    assert error(first, rows) < 0.8 * error(fitted(0, 1), rows)
    torch.testing.assert_close(first.encode(rows), again.encode(rows), rtol=0, atol=0)
    assert not torch.equal(first.encode(rows), other.encode(rows))


def test_all_models_share_sizes_and_schedule() -> None:
    names = ("hidden", "batch_size", "steps", "learning_rate", "learning_rate_drop_at")
    names += ("latent_dim", "validation_share", "precision", "seed")
    recipes = [
        runs.recipe_of(runs.Run(data="x", model=model, seed=4, steps=50))
        for model in ("vsc", "vsc-paper", "topk-11", "vae")
    ]
    for name in names:
        assert len({getattr(recipe, name) for recipe in recipes}) == 1, name
    assert recipes[1].sparsity == "global"


def test_over_j_the_sparse_recipe_asks_for_the_same_count_of_latents() -> None:
    found = [run for run in runs.claim_runs("x", seeds=1, steps=9) if run.model == "vsc"]
    assert [run.latent_dim for run in found] == [18, 36, 60, 100, 200, 400]
    assert [runs.recipe_of(run).active for run in found] == pytest.approx([10.0] * 6)


def test_a_table_gives_mean_and_spread_over_the_seeds() -> None:
    results = [
        {"model": "vsc", "view": view, "metrics": {"knn": 0.9 + 0.01 * seed, "active": 10.0}}
        for seed in (0, 2)
        for view in ("tau 0.5", "tau 0.1")
    ]
    text = tables.comparison_table(results)
    assert text.splitlines()[0] == "| model | seeds | active | kNN |"
    assert text.splitlines()[2:] == ["| vsc | 2 | 10.0 | 0.910 ± 0.010 |"]


@pytest.mark.slow
def test_a_run_that_is_in_the_results_file_is_not_done_again(
    grey_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "results.jsonl"
    arguments = ["--data", f"bars={grey_folder},{grey_folder}", "--models", "pca-8,vae"]
    arguments += ["--seeds", "1", "--steps", "3", "--out", str(out)]
    assert main(arguments) == 0
    first = capsys.readouterr()
    assert "2/2" in first.err
    written = out.read_bytes()
    assert main(arguments) == 0
    second = capsys.readouterr()
    assert second.err == ""
    assert out.read_bytes() == written
    assert first.out == second.out
    (pca,) = [found for run, found in read_results(out).items() if run.model == "pca-8"]
    assert pca[0]["metrics"]["active"] == pytest.approx(8.0)
    assert math.isclose(pca[0]["metrics"]["bytes"], 32.0)


def test_a_data_argument_without_a_source_says_what_is_expected() -> None:
    assert read_sources(["smiley", "a=b,c"]) == {"smiley": "smiley", "a": "b,c"}
    with pytest.raises(UsageError, match="expected NAME=TRAIN,TEST"):
        read_sources(["mnist"])


def test_baselines_are_kept_from_overfitting_as_vsc_is(examples: Examples) -> None:
    """Dropout of the input and weight decay, where the recipe asks for them."""

    def fitted(*overrides: str) -> baselines.DenseVae:
        chosen = recipe("steps=30", *overrides)
        model = baselines.DenseVae(baselines.make_layers(chosen, examples), beta=1.0)
        baselines.fit_baseline(model, chosen, examples)
        return model

    def first_layer(model: baselines.DenseVae) -> torch.Tensor:
        return model.layers.encoder[1].weight.detach()

    plain = first_layer(fitted())
    assert torch.equal(plain, first_layer(fitted()))
    assert not torch.equal(plain, first_layer(fitted("input_dropout=0.3")))
    decayed = first_layer(fitted("weight_decay=20.0"))
    assert decayed.norm() < 0.8 * plain.norm()


def test_fields_that_are_set_reach_every_model_that_has_a_recipe() -> None:
    made = runs.comparison_runs(
        "x", ["vsc", "vsc-paper", "topk-8", "vae", "pca-8"], seeds=1, steps=9, overrides=["seed=1"]
    )
    assert {run.model for run in made if run.overrides} == {"vsc", "topk-8", "vae"}
