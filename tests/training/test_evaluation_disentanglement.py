"""MIG, DCI, SAP and correlation on codes whose right score is known, and against direct sums."""

import math
from collections import Counter

import numpy as np
import pytest
import scipy.sparse
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from vsc_serve.errors import UsageError
from vsc_training.evaluation.disentanglement import (
    BINS,
    best_alone,
    dci,
    discretise,
    factor_correlation,
    lasso_path,
    mig,
    sap,
)

Table = NDArray[np.float64]


def mixed_factors(count: int, seed: int = 0) -> Table:
    """Three continuous factors, two of them without effect on half of the rows, and two binary."""
    rng = np.random.default_rng(seed)
    values = np.hstack([rng.normal(size=(count, 3)), rng.random((count, 2)) < 0.5])
    values[rng.random(count) < 0.5, :2] = np.nan
    return values


def perfect_codes(factors: Table) -> Table:
    """One latent per factor, in another order, scaled and flipped; off where without effect."""
    codes = np.nan_to_num(factors[:, [3, 0, 4, 2, 1]], nan=0.0)
    return codes * np.array([2.0, -3.0, 0.5, 1.0, 10.0])


def random_codes(count: int, latents: int, seed: int = 5) -> Table:
    rng = np.random.default_rng(seed)
    return np.where(rng.random((count, latents)) < 0.3, rng.normal(size=(count, latents)), 0.0)


def test_perfect_codes_score_one() -> None:
    factors = mixed_factors(8000)
    codes = perfect_codes(factors)
    assert mig(codes, factors) > 0.97
    assert sap(codes, factors) > 0.97
    found = dci(codes, factors)
    assert found.disentanglement > 0.99
    assert found.completeness > 0.99
    assert found.informativeness > 0.99


def test_latents_that_never_fire_do_not_dilute_disentanglement() -> None:
    factors = mixed_factors(2000)
    codes = np.hstack([perfect_codes(factors), np.zeros((2000, 20))])
    assert dci(codes, factors).disentanglement > 0.98
    assert mig(codes, factors) > 0.9


def test_perfect_codes_correlate_with_their_own_factor_alone() -> None:
    factors = np.random.default_rng(0).normal(size=(8000, 4))
    found = factor_correlation(-3 * factors[:, ::-1], factors)
    assert found.strongest == pytest.approx(1.0)
    assert found.contrast > 0.97
    np.testing.assert_array_equal(found.matrix.argmax(0), [3, 2, 1, 0])


def test_codes_that_know_nothing_score_nearly_zero() -> None:
    factors, codes = mixed_factors(8000), random_codes(8000, 20)
    assert mig(codes, factors) < 0.01
    assert sap(codes, factors) < 0.02
    found = dci(codes, factors)
    assert found.informativeness < 0.01
    correlation = factor_correlation(codes, factors)
    assert correlation.strongest < 0.06
    assert correlation.contrast < 0.06


def test_two_latents_that_know_the_same_leave_no_gap() -> None:
    factors = np.random.default_rng(1).normal(size=(4000, 3))
    codes = np.hstack([factors, -2 * factors])
    assert mig(codes, factors) == pytest.approx(0.0, abs=1e-9)
    assert sap(codes, factors) == pytest.approx(0.0, abs=1e-9)


def test_a_factor_spread_evenly_over_latents_is_incomplete_by_their_entropy() -> None:
    rng = np.random.default_rng(2)
    halves = rng.normal(size=(8000, 2, 3))
    factors = halves.sum(1)
    found = dci(np.hstack([halves[:, 0], halves[:, 1]]), factors)
    assert found.completeness == pytest.approx(1 - math.log(2) / math.log(6), abs=0.02)
    assert found.disentanglement > 0.98
    assert found.informativeness > 0.99


def test_a_latent_that_tells_of_two_factors_is_entangled_by_their_entropy() -> None:
    factors = np.random.default_rng(3).normal(size=(8000, 4))
    turn = np.array([[1.0, 1.0], [-1.0, 1.0]])
    codes = np.hstack([factors[:, :2] @ turn, factors[:, 2:] @ turn])
    found = dci(codes, factors)
    assert found.disentanglement == pytest.approx(1 - math.log(2) / math.log(4), abs=0.02)
    assert found.completeness == pytest.approx(0.5, abs=0.02)
    assert found.informativeness > 0.99
    assert mig(codes, factors) < 0.02
    assert sap(codes, factors) < 0.05


def test_without_any_coefficient_dci_is_zero() -> None:
    factors = np.random.default_rng(4).normal(size=(400, 2))
    assert dci(np.zeros((400, 3)), factors) == (0.0, 0.0, 0.0)


def entropy(counts: Counter[tuple[int, ...]], total: int) -> float:
    return -sum(n / total * math.log(n / total) for n in counts.values())


@given(st.integers(0, 2**16))
@settings(max_examples=20, deadline=None)
def test_mig_is_that_of_counting_pairs(seed: int) -> None:
    rng = np.random.default_rng(seed)
    factors = rng.integers(0, 4, (300, 2)).astype(np.float64)
    factors[rng.random(300) < 0.3, 1] = np.nan
    codes = rng.integers(-2, 2, (300, 3)) + np.nan_to_num(factors[:, [0, 1, 1]])
    gaps = []
    for factor in factors.T:
        rows = [i for i in range(300) if not math.isnan(factor[i])]
        of_factor = entropy(Counter((int(factor[i]),) for i in rows), len(rows))
        known = []
        for latent in codes.T:
            of_latent = entropy(Counter((int(latent[i]),) for i in rows), len(rows))
            joint = entropy(Counter((int(latent[i]), int(factor[i])) for i in rows), len(rows))
            known.append(of_factor + of_latent - joint)
        first, second = sorted(known)[:-3:-1]
        gaps.append((first - second) / of_factor)
    assert mig(codes, factors) == pytest.approx(np.mean(gaps), abs=1e-9)


def test_mig_looks_at_order_and_zeros_only() -> None:
    factors = mixed_factors(2000)
    codes = perfect_codes(factors) + random_codes(2000, 5)
    assert mig(codes**3, factors) == pytest.approx(mig(codes, factors), abs=1e-12)


def test_zeros_are_a_value_of_their_own_and_the_rest_is_cut_evenly() -> None:
    rng = np.random.default_rng(6)
    column = np.where(rng.random(4000) < 0.8, 0.0, rng.normal(size=4000))
    numbers = discretise(column)
    assert len(np.unique(numbers[column == 0])) == 1
    counts = np.bincount(numbers)
    assert len(counts) == BINS + 1
    assert counts[0] == (column == 0).sum()
    assert counts[1:].max() - counts[1:].min() <= 2
    order = np.argsort(column[column != 0])
    assert (np.diff(numbers[column != 0][order]) >= 0).all()


def test_few_different_values_are_kept() -> None:
    np.testing.assert_array_equal(discretise(np.array([3.0, 0.0, -1.0, 3.0])), [2, 1, 0, 2])


def test_the_support_of_a_value_tells_its_attribute_without_a_gap() -> None:
    factors = mixed_factors(2000)
    is_there = ~np.isnan(factors[:, :1])
    is_on = perfect_codes(factors) != 0
    assert best_alone(is_on, is_there) == 1.0
    assert sap(is_on, is_there) == 0.0
    assert best_alone(random_codes(2000, 5) != 0, is_there) < 0.1


@given(st.integers(0, 2**16))
@settings(max_examples=20, deadline=None)
def test_sap_of_a_binary_factor_is_that_of_trying_every_threshold(seed: int) -> None:
    rng = np.random.default_rng(seed)
    is_there = rng.random(80) < 0.4
    is_there[:2] = [True, False]
    codes = random_codes(80, 3, seed) + is_there[:, None] * np.array([1.0, 0.3, -0.5])
    scores = []
    for latent in codes.T:
        accuracies = [0.5]
        for limit in latent:
            hit = ((latent > limit) & is_there).sum() / is_there.sum()
            rejected = ((latent <= limit) & ~is_there).sum() / (~is_there).sum()
            accuracies += [(hit + rejected) / 2, 1 - (hit + rejected) / 2]
        scores.append(2 * max(accuracies) - 1)
    first, second = sorted(scores)[:-3:-1]
    assert sap(codes, is_there[:, None]) == pytest.approx(first - second)


def test_sap_of_a_continuous_factor_is_the_gap_of_squared_correlations() -> None:
    rng = np.random.default_rng(7)
    factor = rng.normal(size=500)
    codes = rng.normal(size=(500, 4)) + factor[:, None] * np.array([1.0, 0.5, 0.0, -0.7])
    squares = sorted(np.corrcoef(latent, factor)[0, 1] ** 2 for latent in codes.T)
    assert sap(codes, factor[:, None]) == pytest.approx(squares[-1] - squares[-2])


def test_correlation_is_that_of_sizes_with_absent_factors_at_zero() -> None:
    factors, codes = mixed_factors(600), random_codes(600, 7)
    codes[:, 2] = 0.0
    found = factor_correlation(codes, factors).matrix
    assert found.shape == (7, 5)
    for row in (0, 1, 3, 6):
        for column in range(5):
            size = np.abs(np.nan_to_num(factors[:, column]))
            expected = abs(np.corrcoef(np.abs(codes[:, row]), size)[0, 1])
            assert found[row, column] == pytest.approx(expected)
    np.testing.assert_array_equal(found[2], 0.0)


def test_the_lasso_meets_the_conditions_of_its_minimum() -> None:
    rng = np.random.default_rng(8)
    rows = rng.normal(size=(200, 30)) + rng.normal(size=(200, 1))  # all columns go together
    rows = (rows - rows.mean(0)) / rows.std(0)
    target = rows[:, :4] @ np.array([1.0, -0.5, 0.2, 0.1]) + rng.normal(size=200)
    target = (target - target.mean()) / target.std()
    path = lasso_path(rows, target)
    highest = np.abs(rows.T @ target / 200).max()
    assert not path[0].any()
    for weights, penalty in zip(path, highest * np.geomspace(1, 1e-3, len(path)), strict=True):
        slope = rows.T @ (target - rows @ weights) / 200
        assert (np.abs(slope) <= penalty + 1e-4).all()
        is_on = weights != 0
        np.testing.assert_allclose(slope[is_on], penalty * np.sign(weights[is_on]), atol=1e-4)
    assert np.count_nonzero(path[-1]) > np.count_nonzero(path[5])


def test_the_layout_of_the_codes_and_the_run_change_nothing() -> None:
    factors = mixed_factors(500)
    codes = perfect_codes(factors) + random_codes(500, 5)
    sparse = scipy.sparse.csr_array(codes)
    assert mig(sparse, factors) == mig(codes, factors)
    assert sap(sparse, factors) == sap(codes, factors)
    assert dci(sparse, factors) == dci(codes, factors)
    np.testing.assert_array_equal(
        factor_correlation(sparse, factors).matrix, factor_correlation(codes, factors).matrix
    )


@pytest.mark.parametrize("score", [mig, sap, best_alone, dci, factor_correlation])
def test_factors_that_cannot_be_scored_are_errors(score: object) -> None:
    assert callable(score)
    codes = random_codes(10, 3)
    with pytest.raises(UsageError, match=r"factors of shape \(9, 2\) for codes of 10 images"):
        score(codes, np.ones((9, 2)))
    constant = np.stack([np.arange(10.0), np.full(10, 3.0)], axis=1)
    constant[4, 1] = np.nan
    with pytest.raises(UsageError, match="factor 1 is the same in all images"):
        score(codes, constant)
