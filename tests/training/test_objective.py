"""The terms of the objective against quadrature, sampling, finite differences and limits."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import integrate, special, stats

from vsc_training.objective import (
    Posterior,
    balance,
    bernoulli_divergence,
    bernoulli_nll,
    gaussian_nll,
    kl_pairs,
    kl_prior,
    selection_cost,
    sharpen,
    sparsity_global,
    sparsity_per_latent,
)
from vsc_training.spike import spike_divergence


def posterior(rows: int, latents: int, seed: int, dtype: torch.dtype = torch.float64) -> Posterior:
    generator = torch.Generator().manual_seed(seed)
    draw = [torch.randn(rows, latents, generator=generator, dtype=dtype) for _ in range(3)]
    return Posterior(2.0 * draw[0], draw[1], 0.5 * draw[2])


def random_weights(rows: int, pseudo_count: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(rows, pseudo_count, generator=generator, dtype=torch.float64)
    return torch.softmax(scores, 1)


def test_kl_of_one_latent_agrees_with_quadrature() -> None:
    gamma, mu, std = 0.3, 0.7, 0.4
    gamma_u, mu_u, std_u = 0.6, -0.2, 1.3
    q, p = stats.norm(mu, std), stats.norm(mu_u, std_u)
    slab, _ = integrate.quad(lambda z: q.pdf(z) * (q.logpdf(z) - p.logpdf(z)), -6.0, 6.0)
    on, off = gamma * math.log(gamma / gamma_u), (1 - gamma) * math.log((1 - gamma) / (1 - gamma_u))
    expected = gamma * slab + on + off

    def one(probability: float, mean: float, scale: float) -> Posterior:
        values = (special.logit(probability), mean, 2 * math.log(scale))
        return Posterior(*(torch.tensor([[value]], dtype=torch.float64) for value in values))

    found = kl_pairs(one(gamma, mu, std), one(gamma_u, mu_u, std_u))
    assert found.item() == pytest.approx(expected, rel=1e-9)


def test_kl_agrees_with_sampling_from_the_spike_and_slab() -> None:
    q, p = posterior(1, 3, 0), posterior(1, 3, 1)
    generator = torch.Generator().manual_seed(2)
    draws = 400_000
    shape = (draws, 3)
    uniform = torch.rand(shape, generator=generator, dtype=torch.float64)
    noise = torch.randn(shape, generator=generator, dtype=torch.float64)
    is_on = uniform < torch.sigmoid(q.spike_logit)
    z = q.mu + noise * torch.exp(0.5 * q.logvar)

    def log_density(of: Posterior) -> torch.Tensor:
        slab = torch.distributions.Normal(of.mu, torch.exp(0.5 * of.logvar)).log_prob(z)
        log_on = torch.nn.functional.logsigmoid(of.spike_logit)
        log_off = torch.nn.functional.logsigmoid(-of.spike_logit)
        return torch.where(is_on, log_on + slab, log_off.expand(shape)).sum(1)

    ratios = log_density(q) - log_density(p)
    error = ratios.std() / math.sqrt(draws)
    assert kl_pairs(q, p).item() == pytest.approx(ratios.mean().item(), abs=5 * error.item())


@given(st.integers(0, 2**16), st.integers(1, 9), st.integers(1, 7))
@settings(max_examples=25, deadline=None)
def test_the_stacked_product_is_the_weighted_sum_over_pairs(
    seed: int, rows: int, pseudo: int
) -> None:
    q, p, weights = (
        posterior(rows, 11, seed),
        posterior(pseudo, 11, seed + 1),
        random_weights(rows, pseudo, seed),
    )
    expected = (weights * kl_pairs(q, p)).sum(1)
    torch.testing.assert_close(kl_prior(q, p, weights), expected, rtol=1e-10, atol=1e-10)


def test_the_stacked_product_keeps_its_precision_in_float32() -> None:
    q, p, weights = posterior(64, 200, 3), posterior(20, 200, 4), random_weights(64, 20, 5)
    exact = kl_prior(q, p, weights)
    narrow = kl_prior(
        Posterior(*(t.float() for t in q)), Posterior(*(t.float() for t in p)), weights.float()
    )
    torch.testing.assert_close(narrow.double(), exact, rtol=1e-5, atol=1e-3)


def test_the_divergence_of_a_posterior_from_itself_is_zero() -> None:
    q = posterior(4, 6, 0)
    assert kl_pairs(q, q).diagonal().abs().max() < 1e-12
    assert kl_pairs(q, posterior(4, 6, 1)).min() > 0


def test_the_gradient_agrees_with_finite_differences() -> None:
    p, weights = posterior(3, 4, 1), random_weights(2, 3, 2)
    inputs = tuple(part.requires_grad_() for part in (*posterior(2, 4, 0), *p, weights))

    def function(*parts: torch.Tensor) -> torch.Tensor:
        return kl_prior(Posterior(*parts[:3]), sharpen(Posterior(*parts[3:6]), 10.0), parts[6])

    assert torch.autograd.gradcheck(function, inputs)


@pytest.mark.parametrize("sign", [-1.0, 1.0])
def test_a_spike_that_is_sure_costs_its_log_odds_and_stays_finite(sign: float) -> None:
    sure, other = torch.tensor([sign * 50.0]), torch.tensor([0.3])
    expected = -torch.nn.functional.logsigmoid(sign * other)
    torch.testing.assert_close(spike_divergence(sure, other), expected)


def test_a_latent_that_is_off_pays_nothing_for_its_slab() -> None:
    off = Posterior(torch.tensor([[-60.0]]), torch.tensor([[9.0]]), torch.tensor([[3.0]]))
    prior = Posterior(torch.tensor([[-60.0]]), torch.zeros(1, 1), torch.zeros(1, 1))
    assert kl_pairs(off, prior).item() == pytest.approx(0.0, abs=1e-9)


@given(st.floats(0.001, 0.999), st.floats(0.001, 0.999))
def test_bernoulli_divergence_is_that_of_scipy(mean: float, target: float) -> None:
    expected = special.rel_entr(mean, target) + special.rel_entr(1 - mean, 1 - target)
    found = bernoulli_divergence(torch.tensor(mean, dtype=torch.float64), target)
    assert found.item() == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_both_sparsity_terms_are_zero_at_alpha_and_above_it_elsewhere() -> None:
    alpha, logit = 0.05, special.logit(0.05)
    assert sparsity_per_latent(torch.full((7,), alpha), alpha).item() == pytest.approx(
        0.0, abs=1e-6
    )
    assert sparsity_global(torch.full((3, 7), logit), alpha).item() == pytest.approx(0.0, abs=1e-5)
    pruned = torch.tensor([1.0, 1.0] + [0.0] * 38)  # two always on, the rest dead: 5 % on average
    pruned_logits = torch.where(pruned > 0, 40.0, -40.0)[None]
    assert sparsity_global(pruned_logits, alpha).item() == pytest.approx(0.0, abs=1e-4)
    assert sparsity_per_latent(pruned, alpha).item() > 5.0


def test_balance_is_zero_for_even_use_and_ln_u_for_a_single_one() -> None:
    assert balance(torch.full((8,), 1 / 8)).item() == pytest.approx(0.0, abs=1e-7)
    assert balance(torch.eye(8)[0]).item() == pytest.approx(math.log(8), rel=1e-6)


def test_selection_costs_between_nothing_and_ln_u() -> None:
    costs = selection_cost(torch.stack([torch.full((5,), 0.2), torch.eye(5)[2]]))
    torch.testing.assert_close(costs, torch.tensor([0.0, math.log(5)]), rtol=1e-6, atol=1e-6)


def test_likelihoods_are_those_of_scipy() -> None:
    rng = np.random.default_rng(0)
    raw, pixels = rng.normal(size=(2, 3, 4)), rng.uniform(size=(2, 3, 4))
    mean = special.expit(raw)
    expected = -(pixels * np.log(mean) + (1 - pixels) * np.log1p(-mean)).sum((1, 2))
    found = bernoulli_nll(torch.from_numpy(raw), torch.from_numpy(pixels))
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-10)
    logvar = rng.normal(size=(3, 4))
    expected = -stats.norm(raw, np.exp(0.5 * logvar)).logpdf(pixels).sum((1, 2))
    found = gaussian_nll(*(torch.from_numpy(part) for part in (raw, logvar, pixels)))
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-10)
