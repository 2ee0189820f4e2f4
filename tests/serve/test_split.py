"""Split codes: the identities, and that only right answers are certain."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from vsc_serve.codes import Codes, dense_to_csr
from vsc_serve.errors import UsageError
from vsc_serve.index.exact import Nearest, search_many
from vsc_serve.index.split import Fetch, search_split, split, unsplit

values = st.floats(-8, 8, width=32, allow_subnormal=False)
matrices = hnp.arrays(np.float32, (9, 6), elements=st.one_of(st.just(0.0), values))


def engine(codes: Codes, metric: Any, *, without: int | None = None) -> Fetch:
    """An engine over split codes; a lossy one never finds one of the rows."""
    halves = split(codes)

    def fetch(asked: Codes, count: int) -> Nearest:
        assert not (asked.data < 0).any()
        found = search_many(halves, asked, top=count, metric=metric)
        kept = found.rows[0] != without
        return Nearest(found.rows[:, kept], found.scores[:, kept])

    return fetch


def random_codes(rows: int, seed: int) -> Codes:
    rng = np.random.default_rng(seed)
    dense = rng.normal(size=(rows, 64)) * (rng.uniform(size=(rows, 64)) < 0.15)
    return dense_to_csr(dense.astype(np.float32))


@given(matrices, matrices)
@settings(max_examples=200, deadline=None)
def test_the_split_keeps_norms_and_scores_the_mean_of_signed_and_absolute_products(
    some: np.ndarray, others: np.ndarray
) -> None:
    halves, asked = (split(dense_to_csr(one)).toarray().astype(float) for one in (some, others))
    left, right = some.astype(float), others.astype(float)
    signed, absolute = left @ right.T, np.abs(left) @ np.abs(right).T
    np.testing.assert_allclose(halves @ asked.T, (signed + absolute) / 2, rtol=1e-9, atol=1e-9)
    assert ((halves @ asked.T) >= signed - 1e-9).all()
    np.testing.assert_allclose(np.linalg.norm(halves, axis=1), np.linalg.norm(left, axis=1))
    both = np.concatenate([right, -right], axis=1)
    np.testing.assert_allclose(halves @ both.T, signed, rtol=1e-9, atol=1e-9)
    codes = dense_to_csr(some)
    assert split(codes).nnz == codes.nnz
    np.testing.assert_array_equal(unsplit(split(codes)).toarray(), some)


@given(matrices, matrices, st.sampled_from(["cosine", "dot"]), st.integers(1, 12))
@settings(max_examples=150, deadline=None)
def test_a_certain_answer_is_the_exact_one_and_all_become_certain(
    some: np.ndarray, others: np.ndarray, metric: Any, top: int
) -> None:
    codes, queries = dense_to_csr(some), dense_to_csr(others)
    found = search_split(engine(codes, metric), codes, queries, top=top, metric=metric)
    expected = search_many(codes, queries, top=top, metric=metric)
    assert found.is_certain.all()
    np.testing.assert_array_equal(found.nearest.rows, expected.rows)
    np.testing.assert_allclose(found.nearest.scores, expected.scores, rtol=1e-12)


@pytest.mark.parametrize("metric", ["cosine", "dot"])
def test_twice_the_rows_are_enough_to_be_certain_of_most_answers(metric: Any) -> None:
    codes, queries = random_codes(3000, 0), random_codes(50, 1)
    expected = search_many(codes, queries, metric=metric)
    found = search_split(engine(codes, metric), codes, queries, metric=metric, limit=160)
    certain = found.is_certain
    assert certain.mean() > 0.9
    np.testing.assert_array_equal(found.nearest.rows[certain], expected.rows[certain])
    raw = search_many(split(codes), split(queries), metric=metric)
    assert (raw.rows != expected.rows).any(axis=1).mean() > 0.5  # what the re-ranking is for


def test_an_engine_with_too_few_rows_is_never_certain() -> None:
    """As one that was cut off, or drops its weakest: fewer rows than were asked for."""
    codes, queries = random_codes(300, 0), random_codes(20, 1)
    whole = engine(codes, "dot")

    def lossy(asked: Codes, count: int) -> Nearest:
        found = whole(asked, count)
        return Nearest(found.rows[:, :4], found.scores[:, :4])

    found = search_split(lossy, codes, queries, top=10, metric="dot")
    assert not found.is_certain.any()
    assert found.nearest.rows.shape == (20, 10)
    assert (found.nearest.rows[:, 4:] == -1).all()


def test_scores_of_few_bits_are_certain_only_beyond_their_error() -> None:
    """Of a quantised engine: its order is wrong within its error, and that must be allowed for."""
    codes, queries = random_codes(2000, 0), random_codes(60, 1)
    rng, halves = np.random.default_rng(0), split(codes)
    expected = search_many(codes, queries, metric="dot")

    def quantised(asked: Codes, count: int) -> Nearest:
        exact = (halves.astype(np.float64) @ asked.toarray()[0].astype(np.float64)).astype(float)
        rough = exact + rng.uniform(-0.5, 0.5, len(exact)) * 0.1 * exact.max()
        order = np.argsort(-rough, kind="stable")[:count]
        return Nearest(order[None], rough[order][None])

    found = search_split(quantised, codes, queries, metric="dot", rounding=0.1, limit=1000)
    wrong = (found.nearest.rows != expected.rows).any(axis=1)
    assert not (wrong & found.is_certain).any()
    assert found.is_certain.any()
    naive = search_split(quantised, codes, queries, metric="dot", rounding=0, limit=20)
    refused = search_split(quantised, codes, queries, metric="dot", rounding=0.1, limit=20)
    assert naive.is_certain.sum() > refused.is_certain.sum()


def test_supports_are_not_split() -> None:
    codes = random_codes(5, 0)
    with pytest.raises(UsageError, match="`metric=jaccard`: supports have no signs to split"):
        search_split(engine(codes, "dot"), codes, codes, metric="jaccard")  # type: ignore[arg-type]
