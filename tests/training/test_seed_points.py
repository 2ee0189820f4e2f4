"""Fifteen points on which published descriptions and code of VSC go wrong: one test each.

docs/model.md lists the points under the same numbers.
"""

import math

import pytest
import torch

from vsc_training.config import Recipe, load_recipe
from vsc_training.metrics import deterministic_code, find_collapse, measure_health
from vsc_training.model import VSC, DataSpec
from vsc_training.objective import (
    Posterior,
    bernoulli_divergence,
    kl_prior,
    selection_cost,
    sparsity_global,
    sparsity_per_latent,
)
from vsc_training.spike import draw_spike, hard_spike, relaxed_spike, straight_through_spike
from vsc_training.trainer import Trainer
from vsc_training.warmup import slab_std, warmup_factor

SPIKES = ("straight_through", "relaxed", "hard_concrete")


def uniform(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("interpolation", ["variance", "standard_deviation", "geometric"])
def test_point_01_the_warm_up_runs_at_every_lambda(interpolation: str) -> None:
    logvar = torch.tensor([[-2.0, 0.0, 1.0]])
    for lam in (0.0, 0.5, 1.0):
        assert torch.isfinite(slab_std(logvar, lam, interpolation)).all()


def test_point_02_the_warm_up_interpolates_the_variance_and_agrees_at_both_ends() -> None:
    logvar = torch.tensor([[-2.0, 0.7]])
    halfway = slab_std(logvar, 0.5, "variance")
    torch.testing.assert_close(halfway.square(), 0.5 * logvar.exp() + 0.5)
    for interpolation in ("variance", "standard_deviation", "geometric"):
        torch.testing.assert_close(slab_std(logvar, 0.0, interpolation), torch.ones(1, 2))
        torch.testing.assert_close(slab_std(logvar, 1.0, interpolation), (0.5 * logvar).exp())


@pytest.mark.parametrize("spike", SPIKES)
def test_point_03_the_reconstruction_gradient_reaches_the_spike_logits(spike: str) -> None:
    spike_logit = torch.zeros(64, 4, requires_grad=True)
    recipe = load_recipe("sparse", [f"spike={spike}"])
    draw_spike(spike_logit, uniform(64, 4), recipe, 0.0).sum().backward()
    assert spike_logit.grad is not None
    assert (spike_logit.grad > 0).any()


def test_point_04_the_sparsity_term_is_the_forward_divergence_of_the_average() -> None:
    alpha, mean = 0.01, torch.tensor([0.2], dtype=torch.float64)
    forward = 0.2 * math.log(0.2 / alpha) + 0.8 * math.log(0.8 / (1 - alpha))
    assert bernoulli_divergence(mean, alpha).item() == pytest.approx(forward)
    assert bernoulli_divergence(torch.tensor([alpha]), alpha).item() == pytest.approx(0, abs=1e-7)
    gammas = torch.tensor([[0.0, 0.02], [0.02, 0.0]])  # each latent meets alpha on average
    assert sparsity_per_latent(gammas.mean(0), alpha).item() == pytest.approx(0.0, abs=1e-6)


def test_point_05_an_inactive_latent_pays_no_slab_divergence() -> None:
    prior = Posterior(torch.full((1, 2), -4.0), torch.zeros(1, 2), torch.zeros(1, 2))
    near = Posterior(torch.full((1, 2), -30.0), torch.zeros(1, 2), torch.zeros(1, 2))
    far = near._replace(mu=torch.full((1, 2), 5.0))
    weights = torch.ones(1, 1)
    torch.testing.assert_close(kl_prior(near, prior, weights), kl_prior(far, prior, weights))


def test_point_06_the_pseudo_inputs_and_the_classifier_are_learned() -> None:
    trainer = tiny_trainer()
    before = (
        trainer.model.pseudo_logits.detach().clone(),
        trainer.model.classifier.weight.detach().clone(),
    )
    trainer.advance()
    assert not torch.equal(before[0], trainer.model.pseudo_logits)
    assert not torch.equal(before[1], trainer.model.classifier.weight)


@pytest.mark.parametrize("classifier", ["softmax", "sigmoid"])
def test_point_07_the_choice_of_pseudo_input_is_differentiable(classifier: str) -> None:
    model = VSC(tiny_recipe(classifier=classifier), DataSpec(input_dim=6))
    weights = model.weights(torch.randn(5, 6))
    torch.testing.assert_close(weights.sum(1), torch.ones(5))
    weights[:, 0].sum().backward()
    assert model.classifier.weight.grad is not None
    assert model.classifier.weight.grad.abs().sum() > 0


def test_point_08_the_bound_pays_for_choosing_the_pseudo_input() -> None:
    trainer = tiny_trainer()
    health = trainer.check()
    with torch.no_grad():
        rows = trainer.dataset.take(trainer.check_numbers)
        expected = selection_cost(trainer.model.weights(rows)).mean().item()
    assert health.elbo_paper - health.elbo == pytest.approx(expected, rel=1e-4)


def test_point_09_the_weight_of_the_sparsity_term_does_not_depend_on_the_batch() -> None:
    logits = torch.randn(4, 6)
    doubled = torch.cat([logits, logits])
    torch.testing.assert_close(sparsity_global(logits, 0.05), sparsity_global(doubled, 0.05))
    gammas = torch.sigmoid(logits)
    torch.testing.assert_close(
        sparsity_per_latent(gammas.mean(0), 0.05),
        sparsity_per_latent(torch.sigmoid(doubled).mean(0), 0.05),
    )


def test_point_10_alpha_is_the_share_of_active_latents() -> None:
    assert load_recipe("sparse", active=12).alpha == pytest.approx(12 / 200)
    assert load_recipe("sparse", ["alpha=0.01"]).active == pytest.approx(2.0)


@pytest.mark.parametrize("steps", [7, 100, 5000])
def test_point_11_lambda_has_a_plateau_at_zero_and_reaches_one(steps: int) -> None:
    recipe = tiny_recipe(steps=steps, warmup_start=0.3, warmup_end=0.6)
    factors = [warmup_factor(step, recipe) for step in range(steps)]
    assert factors[0] == 0.0
    assert factors[-1] == 1.0
    assert factors == sorted(factors)


def test_point_12_at_lambda_zero_an_active_latent_is_pure_noise() -> None:
    from vsc_training.warmup import draw_slab

    noise = torch.randn(3, 4)
    drawn = draw_slab(torch.full((3, 4), 7.0), torch.full((3, 4), -3.0), noise, 0.0, "variance")
    torch.testing.assert_close(drawn, noise)


def test_point_13_a_model_that_pruned_its_latents_is_called_collapsed() -> None:
    recipe = tiny_recipe()
    healthy = tiny_trainer().check()
    import dataclasses

    pruned = dataclasses.replace(
        healthy, active=8.0, always_on=8, live=8, latents=200, empty_share=0.0
    )
    assert "on in every image" in str(find_collapse(pruned, recipe))
    empty = dataclasses.replace(healthy, active=0.0, always_on=0, live=0, empty_share=1.0)
    assert "codes are empty" in str(find_collapse(empty, recipe))
    fine = dataclasses.replace(healthy, active=8.0, always_on=0, live=190, empty_share=0.0)
    assert find_collapse(fine, recipe) is None


def test_point_14_the_code_is_deterministic_with_exact_zeros() -> None:
    spike_logit = torch.tensor([[0.0, 1e-6, -3.0, 2.0]])
    mu = torch.tensor([[5.0, -1.5, 2.0, 0.25]])
    code = deterministic_code(spike_logit, mu)
    assert code.tolist() == [[0.0, -1.5, 0.0, 0.25]]


def test_point_15_the_recipes_leave_room_for_several_active_latents() -> None:
    for name in ("sparse", "paper"):
        recipe = load_recipe(name)
        assert recipe.latent_dim >= 100
        assert recipe.active >= 2.0


def test_reported_bounds_use_hard_spikes_whatever_the_estimator() -> None:
    """A relaxed mask leaks: a model trained with it must be measured without it."""
    spike_logit, noise = torch.zeros(1000, 8), uniform(1000, 8)
    assert set(hard_spike(spike_logit, noise).unique().tolist()) == {0.0, 1.0}
    assert len(relaxed_spike(spike_logit, noise, 50.0).unique()) > 100
    trainer = tiny_trainer(spike="relaxed")
    batches = [trainer.dataset.take(trainer.check_numbers)]
    generator = torch.Generator().manual_seed(0)
    health = measure_health(trainer.model, iter(batches), generator)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        q = trainer.model.encode(batches[0])
        mask = (torch.rand(q.mu.shape, generator=generator) < torch.sigmoid(q.spike_logit)).float()
        z = mask * (q.mu + torch.randn(q.mu.shape, generator=generator) * (0.5 * q.logvar).exp())
        expected = trainer.model.nll(z, batches[0]).mean().item()
    assert health.reconstruction == pytest.approx(expected, rel=1e-5)


def test_straight_through_is_hard_forwards_and_gamma_backwards() -> None:
    spike_logit = torch.randn(50, 3, requires_grad=True)
    noise = uniform(50, 3)
    drawn = straight_through_spike(spike_logit, noise)
    torch.testing.assert_close(drawn, hard_spike(spike_logit, noise))
    drawn.sum().backward()
    gamma = torch.sigmoid(spike_logit.detach())
    torch.testing.assert_close(spike_logit.grad, gamma * (1 - gamma))


@pytest.mark.parametrize("spike", SPIKES)
def test_spikes_are_on_with_probability_gamma(spike: str) -> None:
    recipe = load_recipe("sparse", [f"spike={spike}", "sharpness_start=5000"])
    spike_logit = torch.tensor([-2.0, 0.0, 1.0]).expand(40_000, 3)
    is_on = draw_spike(spike_logit, uniform(40_000, 3), recipe, 0.0) > 0.5
    torch.testing.assert_close(
        is_on.float().mean(0), torch.sigmoid(spike_logit[0]), atol=0.012, rtol=0
    )


def tiny_recipe(**changes: object) -> Recipe:
    fields: dict[str, object] = {
        "latent_dim": 12,
        "hidden": 16,
        "pseudo_inputs": 4,
        "steps": 20,
        "batch_size": 16,
        "precision": "float32",
        "network": "mlp",
    }
    return Recipe(**(fields | changes))  # type: ignore[arg-type]


def tiny_trainer(**changes: object) -> Trainer:
    import numpy as np

    from vsc_training.data import Examples

    rows = np.random.default_rng(0).normal(size=(80, 6)).astype(np.float32)
    examples = Examples(rows, [str(i) for i in range(80)], DataSpec(input_dim=6))
    return Trainer(tiny_recipe(**changes), examples, torch.device("cpu"))
