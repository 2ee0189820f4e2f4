"""The neighbour term: who is a partner, what the term is, and that a run resumes with it."""

from pathlib import Path

import numpy as np
import pytest
import torch

from vsc_serve.errors import UsageError
from vsc_serve.images import PixelSpec
from vsc_training import pairs
from vsc_training.config import Recipe, load_recipe
from vsc_training.data import Examples
from vsc_training.dataset import DeviceDataset
from vsc_training.fit import fit
from vsc_training.model import DataSpec
from vsc_training.objective import Posterior
from vsc_training.pairs import draw_neighbours, draw_views, info_nce, nearest_examples
from vsc_training.step import draw_noise, objective_terms
from vsc_training.trainer import Trainer

CPU = torch.device("cpu")


def recipe_of(*overrides: str) -> Recipe:
    fields = ["latent_dim=16", "hidden=12", "pseudo_inputs=4", "batch_size=16", "alpha=0.2"]
    own = ["steps=40", "on_collapse=warn", "validation_share=0.2", "regularisation=none"]
    return load_recipe("sparse", [*fields, *own, *overrides])


@pytest.fixture
def vectors() -> Examples:
    rows = np.random.default_rng(0).normal(size=(120, 6)).astype(np.float32)
    return Examples(rows, [str(i) for i in range(120)], DataSpec(input_dim=6))


@pytest.fixture
def images() -> Examples:
    rows = np.random.default_rng(0).integers(0, 256, (60, 8, 8, 3), dtype=np.uint8)
    spec = DataSpec(pixel_spec=PixelSpec(height=8, width=8, channels=3))
    return Examples(rows, [str(i) for i in range(60)], spec)


def posterior(logits: torch.Tensor, mu: torch.Tensor) -> Posterior:
    return Posterior(logits, mu, torch.zeros_like(mu))


def test_neighbours_are_the_nearest_of_the_training_by_the_centred_cosine(
    vectors: Examples, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pairs, "_QUERY_BLOCK", 7)
    monkeypatch.setattr(pairs, "_REFERENCE_BYTES", 4 * 6 * 9)  # nine references in a block
    numbers = torch.arange(0, 120, 2)
    dataset = DeviceDataset.of(vectors.rows + 5.0, CPU)
    found = nearest_examples(dataset, numbers, seed=0)
    rows = vectors.rows[::2].astype(np.float64) + 5.0
    rows -= rows.mean(0)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    products = rows @ rows.T
    np.fill_diagonal(products, -np.inf)
    expected = 2 * np.argsort(-products, axis=1)[:, :10]
    assert [set(row) for row in found[::2].tolist()] == [set(row) for row in expected.tolist()]


def test_of_many_examples_neighbours_are_among_some(
    vectors: Examples, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pairs, "_REFERENCES", 30)
    dataset, numbers = DeviceDataset.of(vectors.rows, CPU), torch.arange(120)
    found = nearest_examples(dataset, numbers, seed=3)
    assert len(found.unique()) <= 30
    assert torch.equal(found, nearest_examples(dataset, numbers, seed=3))
    assert not torch.equal(found, nearest_examples(dataset, numbers, seed=4))


def test_each_of_the_neighbours_is_drawn_and_no_other(vectors: Examples) -> None:
    found = nearest_examples(DeviceDataset.of(vectors.rows, CPU), torch.arange(120), seed=0)
    generator = torch.Generator().manual_seed(0)
    drawn = {int(draw_neighbours(found, torch.tensor([5]), generator)) for _ in range(200)}
    assert drawn == set(found[5].tolist())


def test_the_term_is_the_cross_entropy_of_soft_codes_both_ways() -> None:
    generator = torch.Generator().manual_seed(0)
    logits, mu = torch.randn(2, 5, 7, generator=generator).unbind()
    other = torch.randn(2, 5, 7, generator=generator).unbind()
    soft = [
        np.sqrt(1 / (1 + np.exp(-one[0].double().numpy()))) * one[1].double().numpy()
        for one in ((logits, mu), other)
    ]
    unit = [rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in soft]
    cosines = unit[0] @ unit[1].T / 0.2
    ways = [cosines - np.log(np.exp(cosines).sum(axis, keepdims=True)) for axis in (0, 1)]
    expected = -np.mean([np.diag(way).mean() for way in ways])
    found = info_nce(posterior(logits, mu), posterior(*other), 0.2)
    assert float(found) == pytest.approx(expected, rel=1e-5)


def test_an_empty_code_gives_finite_gradients() -> None:
    logits = torch.full((4, 3), -12.0, requires_grad=True)
    mu = torch.zeros(4, 3, requires_grad=True)
    info_nce(posterior(logits, mu), posterior(logits, mu), 0.2).backward()
    assert logits.grad is not None
    assert mu.grad is not None
    assert torch.isfinite(logits.grad).all()
    assert torch.isfinite(mu.grad).all()


def test_views_are_images_that_differ_a_little_and_follow_from_the_seed() -> None:
    image = torch.zeros(8, 32, 32, 3)
    image[:, 12:20, 12:20] = 0.7
    one, same, other = (
        draw_views(image, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)
    )
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    assert one.shape == image.shape
    assert float(one.min()) >= 0.0
    assert float(one.max()) <= 1.0
    per_image = (one - image).abs().mean((1, 2, 3))
    assert float(per_image.min()) > 0.0
    assert float(one[:, 8:24, 8:24].mean()) > 4 * float(one.mean()) / 2


def test_grey_views_are_neither_flipped_nor_recoloured() -> None:
    image = torch.zeros(64, 16, 16, 1)
    image[:, 4:12, 2:6] = 1.0  # left of the middle
    views = draw_views(image, torch.Generator().manual_seed(0))
    columns = torch.arange(16.0)
    weight = (views.sum((1, 3)) * columns).sum(1) / views.sum((1, 2, 3))
    assert float(weight.max()) < 7.5
    assert float(views.max()) == 1.0


@pytest.mark.parametrize("way", ["graph", "views"])
def test_the_term_is_part_of_the_loss_after_the_warm_up(way: str, images: Examples) -> None:
    recipe = recipe_of("neighbour_weight=3", f"neighbour_pairs={way}", "steps=10")
    trainer = Trainer(recipe, images, CPU)
    partners = trainer._partners(trainer._batch(0), torch.Generator().manual_seed(0))
    assert partners is not None
    examples = trainer._batch(0)
    assert partners.shape == examples.shape
    for step, lam in ((0, 0.0), (9, 1.0)):
        draw = draw_noise(recipe, examples.shape, step, torch.Generator().manual_seed(0))
        plain = objective_terms(trainer.model, examples, draw, bf16=False)
        terms = objective_terms(trainer.model, examples, draw, bf16=False, partners=partners)
        assert terms.neighbour is not None
        found = float((terms.loss - plain.loss).detach())
        assert found == pytest.approx(3 * lam * float(terms.neighbour.detach()), abs=1e-4)
    assert "neighbour" in trainer.advance().metrics()
    assert "neighbour" not in Trainer(recipe_of(), images, CPU).advance().metrics()


@pytest.mark.parametrize("way", ["graph", "views"])
def test_a_run_with_the_term_goes_on_to_the_same_weights(
    way: str, images: Examples, tmp_path: Path
) -> None:
    recipe = recipe_of("neighbour_weight=2", f"neighbour_pairs={way}", "steps=12")
    whole = Trainer(recipe, images, CPU)
    for _ in range(12):
        whole.advance()
    half = Trainer(recipe, images, CPU)
    for _ in range(5):
        half.advance()
    kept = half.checkpoint(images, "x", "y", half.check())
    other = Trainer(recipe, images, CPU)
    other.restore(kept)
    for _ in range(7):
        other.advance()
    for name, weight in whole.model.state_dict().items():
        assert torch.equal(weight, other.model.state_dict()[name]), name


def test_views_of_vectors_are_refused(vectors: Examples, tmp_path: Path) -> None:
    recipe = recipe_of("neighbour_weight=1", "neighbour_pairs=views")
    with pytest.raises(UsageError, match="neighbour_pairs=views is for images"):
        fit(recipe, vectors, tmp_path / "run", device=CPU)
    assert not (tmp_path / "run").exists()
