"""Figures of supports against sets, and by hand."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vsc_serve.codes import Codes, dense_to_csr
from vsc_training.evaluation import supports
from vsc_training.evaluation.supports import (
    distinct_supports,
    jaccard,
    jaccard_by_class,
    support_entropy_bits,
)


def random_codes(count: int, latents: int, seed: int, share: float = 0.3) -> Codes:
    rng = np.random.default_rng(seed)
    values = rng.normal(size=(count, latents)).astype(np.float32)
    return dense_to_csr(np.where(rng.random((count, latents)) < share, values, np.float32(0)))


def sets_of(codes: Codes) -> list[frozenset[int]]:
    return [frozenset(np.flatnonzero(row).tolist()) for row in codes.toarray()]


def test_entropy_by_hand() -> None:
    rows = np.array([[1, 1, 0, 5], [1, 0, 0, 5], [0, 0, 0, 5], [0, 0, 0, 5]], np.float32)
    quarter = -(0.25 * math.log2(0.25) + 0.75 * math.log2(0.75))
    assert support_entropy_bits(rows) == pytest.approx(1.0 + quarter)


def test_entropy_bounds_that_of_the_supports_themselves() -> None:
    codes = random_codes(5000, 6, 0)
    counts = np.array(list({s: sets_of(codes).count(s) for s in set(sets_of(codes))}.values()))
    shares = counts / counts.sum()
    entropy = -(shares * np.log2(shares)).sum()
    assert entropy <= support_entropy_bits(codes) <= 6.0


@given(st.integers(0, 2**16), st.integers(1, 40), st.integers(1, 19), st.floats(0, 1))
@settings(max_examples=25, deadline=None)
def test_distinct_supports_are_counted_as_sets(
    seed: int, count: int, latents: int, share: float
) -> None:
    codes = random_codes(count, latents, seed, share)
    assert distinct_supports(codes) == len(set(sets_of(codes)))


def test_distinct_supports_are_counted_over_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    codes = random_codes(100, 4, 1)
    monkeypatch.setattr(supports, "_BLOCK_ROWS", 7)
    assert distinct_supports(codes) == len(set(sets_of(codes)))


@given(st.integers(0, 2**16))
@settings(max_examples=20, deadline=None)
def test_overlap_is_that_of_sets_and_two_empty_supports_are_the_same(seed: int) -> None:
    first, second = random_codes(25, 5, seed), random_codes(25, 5, seed + 1)
    expected = [
        len(a & b) / len(a | b) if a | b else 1.0
        for a, b in zip(sets_of(first), sets_of(second), strict=True)
    ]
    np.testing.assert_allclose(jaccard(first, second), expected)


def test_overlap_by_class_is_near_the_mean_over_all_pairs() -> None:
    rng = np.random.default_rng(2)
    labels = rng.integers(0, 3, 4000)
    rates = rng.random((3, 12))[labels]
    codes = dense_to_csr((rng.random(rates.shape) < rates).astype(np.float32))
    found = jaccard_by_class(codes, labels)
    few, classes = sets_of(codes)[:400], labels[:400]
    all_pairs: dict[bool, list[float]] = {True: [], False: []}
    for i, a in enumerate(few):
        for j, b in enumerate(few[:i]):
            overlap = len(a & b) / len(a | b) if a | b else 1.0
            all_pairs[bool(classes[i] == classes[j])].append(overlap)
    assert found.same == pytest.approx(np.mean(all_pairs[True]), abs=0.02)
    assert found.other == pytest.approx(np.mean(all_pairs[False]), abs=0.02)
    assert found.same > found.other + 0.05
    assert found.same_pairs == 4000
    assert 2000 < found.other_pairs < 3200
    assert jaccard_by_class(codes, labels) == found


def test_supports_that_are_the_class_overlap_wholly_within_and_not_at_all_between() -> None:
    codes = dense_to_csr(np.repeat(np.eye(3, dtype=np.float32), 4, axis=0))
    found = jaccard_by_class(codes, np.repeat(["a", "b", "c"], 4))
    assert (found.same, found.other, found.same_pairs) == (1.0, 0.0, 12)


def test_classes_of_one_image_and_one_class_give_no_number() -> None:
    codes = random_codes(3, 4, 3)
    alone = jaccard_by_class(codes, ["a", "b", "c"])
    assert math.isnan(alone.same)
    assert alone.same_pairs == 0
    together = jaccard_by_class(codes, ["a", "a", "a"])
    assert math.isnan(together.other)
    assert (together.same_pairs, together.other_pairs) == (3, 0)
