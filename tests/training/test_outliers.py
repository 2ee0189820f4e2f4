"""Vectors far from all others, and the guard for latents that died."""

import logging
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from vsc_serve.errors import CheckFailed
from vsc_training import trainer
from vsc_training.config import Recipe, load_recipe
from vsc_training.data import Examples
from vsc_training.fit import fit
from vsc_training.metrics import Health, find_collapse, find_dead
from vsc_training.model import DataSpec
from vsc_training.outliers import Bound
from vsc_training.trainer import Trainer

CPU = torch.device("cpu")


def small_recipe(*overrides: str) -> Recipe:
    fields = ["latent_dim=32", "hidden=64", "pseudo_inputs=8", "batch_size=64"]
    return load_recipe("sparse", [*fields, "steps=700", "precision=float32", *overrides], active=4)


def sparse_vectors(count: int = 2000, dim: int = 24) -> np.ndarray:
    rng = np.random.default_rng(0)
    active = rng.standard_normal((count, 20)) * (rng.random((count, 20)) < 0.15)
    noise = 0.1 * rng.standard_normal((count, dim))
    return (active @ rng.standard_normal((20, dim)) + noise).astype(np.float32)


def with_sinks(rows: np.ndarray, share: float = 0.01, factor: float = 100.0) -> np.ndarray:
    """Return rows of which some are one and the same vector, a hundred times as long as others."""
    rng = np.random.default_rng(1)
    chosen = rng.choice(len(rows), int(share * len(rows)), replace=False)
    changed = rows.copy()
    lengths = np.linalg.norm(rows, axis=1)
    changed[chosen] = factor * np.median(lengths) * rows[chosen[0]] / lengths[chosen[0]]
    changed[chosen] += rng.standard_normal(changed[chosen].shape).astype(np.float32)
    return changed


def examples(rows: np.ndarray) -> Examples:
    return Examples(rows, [str(at) for at in range(len(rows))], DataSpec(input_dim=rows.shape[1]))


def test_data_without_far_rows_are_seen_as_they_are_to_the_bit(
    caplog: pytest.LogCaptureFixture,
) -> None:
    rows = torch.from_numpy(sparse_vectors())
    bound = Bound.of(rows)
    assert bound.far_share == 0
    assert torch.equal(bound.draw_in(rows), rows)
    Trainer(small_recipe(), examples(sparse_vectors()), CPU)
    assert not caplog.records


def test_a_far_row_is_drawn_in_to_the_median_distance_in_its_own_direction() -> None:
    rows = torch.from_numpy(with_sinks(sparse_vectors()))
    bound = Bound.of(rows)
    drawn = bound.draw_in(rows)
    is_far = (rows != drawn).any(1)
    assert is_far.sum() == 20
    away, before = (x[is_far].double() - bound.center for x in (drawn, rows))
    torch.testing.assert_close(away.norm(dim=1), bound.typical.expand(20), rtol=1e-5, atol=0)
    assert torch.cosine_similarity(away, before).min() > 0.99999


@pytest.mark.parametrize("rows", [torch.zeros(50, 3), torch.eye(3).repeat(2, 1) * 1e15])
def test_rows_that_are_alike_or_huge_are_bounded_without_nan(rows: torch.Tensor) -> None:
    bound = Bound.of(rows)
    assert torch.isfinite(bound.draw_in(rows)).all()
    assert bound.far_share == 0


def test_most_rows_alike_and_one_away_is_no_division_by_zero() -> None:
    rows = torch.zeros(100, 3)
    rows[7] = 1.0
    bound = Bound.of(rows)
    assert torch.equal(bound.draw_in(rows), rows)


def test_scale_and_centre_are_those_of_the_rows_that_are_not_far(
    caplog: pytest.LogCaptureFixture,
) -> None:
    rows = sparse_vectors()
    clean = Trainer(small_recipe(), examples(rows), CPU).model
    robust = Trainer(small_recipe(), examples(with_sinks(rows)), CPU).model
    assert float(robust.scale) == pytest.approx(float(clean.scale), rel=0.1)
    assert (robust.center - clean.center).norm() < 0.1 * clean.scale
    (warning,) = caplog.messages
    assert "1% of the vectors lie more than 5 times as far from the centre" in warning
    assert "normalise or remove them" in warning


@pytest.mark.slow
@pytest.mark.parametrize("share", [0.0, 0.01])
def test_a_hundredth_of_long_rows_leaves_the_latents_alive(share: float, tmp_path: Path) -> None:
    rows = with_sinks(sparse_vectors(), share) if share else sparse_vectors()
    health = fit(small_recipe("learning_rate=0.004"), examples(rows), tmp_path / "run", device=CPU)
    assert health.live >= 24
    assert health.active > 1.5


@pytest.mark.slow
def test_without_that_the_guard_ends_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainer.Trainer, "_bounded", lambda self, sample: self.dataset)
    rows = with_sinks(sparse_vectors())
    with pytest.raises(CheckFailed, match=r"collapsed at step \d+: .*(dead|empty)"):
        fit(small_recipe("learning_rate=0.004"), examples(rows), tmp_path / "run", device=CPU)


@pytest.fixture
def healthy() -> Health:
    health = Trainer(small_recipe(), examples(sparse_vectors()), CPU).check()
    return replace(health, active=4.0, empty_share=0.0, always_on=0, live=32, latents=32)


def test_few_latents_that_live_are_a_collapse_and_half_of_them_a_warning(healthy: Health) -> None:
    recipe = small_recipe()
    assert find_collapse(healthy, recipe) is None
    assert find_dead(healthy, recipe) is None
    few = replace(healthy, live=3)
    assert str(find_collapse(few, recipe)).startswith(
        "29 of 32 latents are dead (off for more than"
    )
    assert "look for a few examples that are unlike all others" in str(find_collapse(few, recipe))
    half = replace(healthy, live=15)
    assert find_collapse(half, recipe) is None
    assert "17 of 32 latents are dead" in str(find_dead(half, recipe))


def test_latents_that_so_few_examples_cannot_show_are_not_called_dead(healthy: Health) -> None:
    recipe = replace(small_recipe(), alpha=0.01)
    assert find_dead(replace(healthy, images=10, live=2), recipe) is None
    assert find_dead(replace(healthy, images=1000, live=2), recipe) is not None


def test_a_run_that_ends_with_many_dead_latents_warns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    check = Trainer.check

    def half_dead(self: Trainer, *, trained: bool = False) -> Health:
        measured = check(self, trained=trained)
        return replace(measured, active=4.0, empty_share=0.0, always_on=0, live=12)

    monkeypatch.setattr(Trainer, "check", half_dead)
    with caplog.at_level(logging.WARNING):
        fit(small_recipe("steps=4"), examples(sparse_vectors(400)), tmp_path / "run", device=CPU)
    assert any("20 of 32 latents are dead" in message for message in caplog.messages)
