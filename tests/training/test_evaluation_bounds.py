"""The bounds against quadrature: with two latents every support can be integrated."""

import itertools
import math

import numpy as np
import pytest
import torch
from torch import Tensor

from vsc_serve.errors import UsageError
from vsc_serve.images import PixelSpec
from vsc_training.config import load_recipe
from vsc_training.evaluation import bounds
from vsc_training.evaluation.bounds import iwae, mixture_log_density
from vsc_training.model import VSC, DataSpec
from vsc_training.objective import Posterior

GRID = np.linspace(-9.0, 9.0, 361)
STEP = GRID[1] - GRID[0]


def toy(modality: str) -> tuple[VSC, Tensor]:
    """A model of two latents with strong random weights, and one row."""
    fields = ["latent_dim=2", "hidden=6", "pseudo_inputs=3", "network=mlp", "prior_sharpness=4.0"]
    fields += ["encoder=mlp", "decoder=mlp"]
    spec = DataSpec(pixel_spec=PixelSpec(height=2, width=2, channels=1))
    if modality == "vector":
        spec = DataSpec(input_dim=3)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = VSC(load_recipe("sparse", fields), spec).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(2.0)
            model.pseudo_logits.normal_()
        row = torch.rand(1, *spec.shape)
    return model, row


def log_density(of: Posterior, row: int, is_on: tuple[bool, ...], values: list[Tensor]) -> Tensor:
    """ln of one spike-and-slab density, term by term as the paper writes it."""
    total = torch.zeros((), dtype=torch.float64)
    for latent, on in enumerate(is_on):
        gamma = torch.sigmoid(of.spike_logit[row, latent].double())
        if not on:
            total = total + torch.log1p(-gamma)
            continue
        std = torch.exp(0.5 * of.logvar[row, latent].double())
        slab = torch.distributions.Normal(of.mu[row, latent].double(), std)
        total = total + torch.log(gamma) + slab.log_prob(values[latent])
    return total


@torch.no_grad()
def by_quadrature(model: VSC, row: Tensor) -> tuple[float, float]:
    """Return ln p(x) and E_q[ln p(x|z) + ln p(z) - ln q(z|x)], summed over all four supports."""
    q, prior = model.encode(row), model.prior()
    evidence = bound = mass = 0.0
    for is_on in itertools.product([False, True], repeat=2):
        axes = [torch.from_numpy(GRID if on else np.zeros(1)) for on in is_on]
        first, second = torch.meshgrid(*axes, indexing="ij")
        values = [first.flatten(), second.flatten()]
        z = torch.stack(values, 1).float()
        log_x = -model.nll(z, row.expand(len(z), *row.shape[1:])).double()
        parts = [log_density(prior, u, is_on, values) for u in range(3)]
        log_p = torch.logsumexp(torch.stack([part.expand(len(z)) for part in parts]), 0)
        log_p = log_p - math.log(3)
        log_q = log_density(q, 0, is_on, values).expand(len(z))
        cell = STEP ** sum(is_on)
        evidence += float((log_x + log_p).exp().sum()) * cell
        bound += float((log_q.exp() * (log_x + log_p - log_q)).sum()) * cell
        mass += float(log_q.exp().sum()) * cell
    assert mass == pytest.approx(1.0, abs=1e-6), "the grid does not cover q"
    return math.log(evidence), bound


@pytest.mark.parametrize("modality", ["image", "vector"])
def test_the_mean_weight_is_the_likelihood_and_the_mean_log_weight_the_bound(modality: str) -> None:
    model, row = toy(modality)
    evidence, bound = by_quadrature(model, row)
    generator = torch.Generator().manual_seed(0)
    copies = row.expand(4000, *row.shape[1:])
    found = iwae(model, copies, 10, generator)
    ratio = np.exp(found.iwae - evidence)
    error = ratio.std(ddof=1) / math.sqrt(len(ratio))
    assert error < 0.02
    assert ratio.mean() == pytest.approx(1.0, abs=5 * error)
    error = found.elbo.std(ddof=1) / math.sqrt(len(found.elbo))
    assert found.elbo.mean() == pytest.approx(bound, abs=5 * error)
    assert evidence - bound > 0.05, "the toy's posterior is exact: nothing would be tested"


@pytest.mark.parametrize("modality", ["image", "vector"])
def test_the_bound_rises_with_the_samples_and_stays_below_the_likelihood(modality: str) -> None:
    model, row = toy(modality)
    evidence, bound = by_quadrature(model, row)
    copies = row.expand(3000, *row.shape[1:])
    means = []
    for samples in (1, 4, 40):
        found = iwae(model, copies, samples, torch.Generator().manual_seed(samples))
        assert (found.iwae >= found.elbo - 1e-9).all()
        means.append(found.iwae.mean())
    assert bound - 0.05 < means[0] < means[1] < means[2] < evidence + 0.01


def test_one_sample_makes_both_bounds_the_same() -> None:
    model, row = toy("image")
    found = iwae(model, row.expand(20, 2, 2, 1), 1, torch.Generator().manual_seed(0))
    np.testing.assert_allclose(found.iwae, found.elbo)


def test_the_same_noise_gives_the_same_metrics_and_leaves_the_model_alone() -> None:
    model, row = toy("image")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    rows = row.expand(7, 2, 2, 1)
    first, second = (iwae(model, rows, 3, torch.Generator().manual_seed(5)) for _ in range(2))
    np.testing.assert_array_equal(first.iwae, second.iwae)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_blocks_of_images_are_put_together_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    def sums(
        model: VSC, rows: Tensor, prior: Posterior, samples: int, noise: object
    ) -> list[Tensor]:
        return [rows.flatten(1).sum(1)] * samples

    model, _ = toy("image")
    rows = torch.rand(10, 2, 2, 1, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(bounds, "_log_weights", sums)
    monkeypatch.setattr(bounds, "_BLOCK_IMAGES", 3)
    found = iwae(model, rows, 2, torch.Generator())
    np.testing.assert_allclose(found.iwae, rows.flatten(1).sum(1).numpy(), rtol=1e-6)


def test_the_density_of_the_mixture_is_exact_where_squares_cancel() -> None:
    generator = torch.Generator().manual_seed(0)
    mu = 3.0 + torch.randn(4, 5, generator=generator)
    prior = Posterior(torch.randn(4, 5, generator=generator), mu, torch.full((4, 5), -10.0))
    is_on = (torch.rand(6, 5, generator=generator) < 0.5).float()
    value = mu[0] + 0.005 * torch.randn(6, 5, generator=generator)
    found = mixture_log_density(prior, is_on, value)
    for row in range(6):
        on = tuple(bool(entry) for entry in is_on[row])
        values = [entry.double() for entry in value[row]]
        parts = torch.stack([log_density(prior, u, on, values) for u in range(4)])
        expected = torch.logsumexp(parts, 0) - math.log(4)
        assert found[row].item() == pytest.approx(expected.item(), abs=1e-6)


def test_no_samples_is_an_error() -> None:
    model, row = toy("image")
    with pytest.raises(UsageError, match="samples must be at least 1, not 0"):
        iwae(model, row, 0, torch.Generator())
