"""Exact search against a dense calculation, and explanations that add up."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from vsc_serve.codes import dense_to_csr
from vsc_serve.errors import InputError, UsageError
from vsc_serve.index import exact
from vsc_serve.index.exact import explain, search, search_many


def random_codes(rows: int, latents: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    values = rng.normal(size=(rows, latents)) * (rng.uniform(size=(rows, latents)) < 0.3)
    return values.astype(np.float32)


@given(st.integers(0, 10_000), st.sampled_from(["cosine", "dot"]), st.integers(1, 40))
@settings(max_examples=40, deadline=None)
def test_hits_are_those_of_a_dense_calculation(seed: int, metric: str, top: int) -> None:
    dense, query = random_codes(30, 12, seed), random_codes(1, 12, seed + 1)
    scores = dense.astype(np.float64) @ query[0].astype(np.float64)
    if metric == "cosine":
        norms = np.linalg.norm(dense.astype(float), axis=1) * np.linalg.norm(query.astype(float))
        scores = np.divide(scores, norms, out=np.zeros_like(scores), where=norms > 0)
    hits = search(dense_to_csr(dense), dense_to_csr(query), top=top, metric=metric)
    expected = np.argsort(-scores, kind="stable")[:top]
    np.testing.assert_allclose([hit.score for hit in hits], scores[expected], atol=1e-9)
    assert len(hits) == min(top, 30)


def small_integers(rows: int) -> st.SearchStrategy[np.ndarray]:
    """Codes whose sums are exact, with many equal scores, equal rows and empty rows."""
    values = st.sampled_from([0, 0, 0, 0, 1, 2, -1])
    return hnp.arrays(np.float32, st.tuples(st.integers(0, rows), st.just(5)), elements=values)


@given(
    small_integers(60),
    small_integers(9),
    st.sampled_from(["cosine", "dot"]),
    st.integers(1, 70),
    st.integers(1, 4),
    st.integers(1, 40),
)
@settings(max_examples=300, deadline=None)
def test_many_queries_find_what_a_dense_calculation_finds_whatever_the_blocks(
    dense: np.ndarray, asked: np.ndarray, metric: str, top: int, queries: int, scores: int
) -> None:
    expected = asked.astype(np.float64) @ dense.astype(np.float64).T
    if metric == "cosine":
        norms = np.linalg.norm(asked.astype(float), axis=1)[:, None] * np.linalg.norm(
            dense.astype(float), axis=1
        )
        expected = np.divide(expected, norms, out=np.zeros_like(expected), where=norms > 0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exact, "_QUERY_BLOCK", queries)
        patch.setattr(exact, "_SCORE_BLOCK", scores)
        patch.setattr(exact, "_SAMPLE", 3)
        found = search_many(dense_to_csr(dense), dense_to_csr(asked), top=top, metric=metric)
    order = np.argsort(-expected, axis=1, kind="stable")[:, :top]
    np.testing.assert_array_equal(found.rows, order)
    np.testing.assert_array_equal(found.scores, np.take_along_axis(expected, order, 1))


def test_one_query_scores_as_it_does_among_many() -> None:
    codes = dense_to_csr(random_codes(3000, 40, 0))
    queries = dense_to_csr(random_codes(100, 40, 1))
    found = search_many(codes, queries, top=20)
    for number in range(100):
        assert search(codes, queries[[number]], top=20) == found.hits(number)


def test_rows_without_a_shared_latent_are_between_positive_and_negative_scores() -> None:
    codes = dense_to_csr(np.array([[-1, 0], [0, 1], [2, 0], [0, 0]], np.float32))
    hits = search(codes, dense_to_csr(np.array([[1, 0]], np.float32)), top=4)
    assert [(hit.row, hit.score) for hit in hits] == [(2, 1.0), (1, 0.0), (3, 0.0), (0, -1.0)]


@pytest.mark.parametrize("metric", ["cosine", "dot"])
def test_a_wider_query_is_explained_and_ranks_as_by_the_norm_of_the_row_alone(metric: str) -> None:
    dense = random_codes(40, 20, 0)
    wide = np.random.default_rng(5).normal(size=(1, 20)).astype(np.float32)
    codes, query = dense_to_csr(dense), dense_to_csr(wide)
    hits = search(codes, query, top=40, metric=metric)
    for hit in hits:
        shared = explain(codes, hit.row, query, metric=metric)
        assert sum(feature.score for feature in shared) == pytest.approx(hit.score)
    if metric == "cosine":
        by_row_norm = (dense @ wide[0]) / np.maximum(np.linalg.norm(dense, axis=1), 1e-9)
        assert [hit.row for hit in hits] == np.argsort(-by_row_norm, kind="stable").tolist()
        itself = search(codes, codes[[3]], top=1)[0]
        assert (itself.row, itself.score) == (3, pytest.approx(1.0))


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("metric", ["cosine", "dot"])
def test_values_that_are_not_finite_are_refused_with_their_row(value: float, metric: str) -> None:
    codes = dense_to_csr(random_codes(8, 20, 0))
    broken = codes.copy()
    broken.data[broken.indptr[5]] = value
    for pair, name in (((broken, codes), "codes"), ((codes, broken), "queries")):
        with pytest.raises(InputError, match=f"^row 5 of the {name} holds values that are not"):
            search_many(*pair, metric=metric)


def test_equal_scores_are_in_row_order() -> None:
    dense = np.tile(np.array([[0.0, 2.0, -1.0]], np.float32), (50, 1))
    hits = search(dense_to_csr(dense), dense_to_csr(dense[:1]), top=7)
    assert [hit.row for hit in hits] == list(range(7))


@pytest.mark.parametrize("metric", ["cosine", "dot"])
def test_the_shared_features_sum_to_the_score(metric: str) -> None:
    codes, query = dense_to_csr(random_codes(40, 20, 0)), dense_to_csr(random_codes(1, 20, 1))
    for hit in search(codes, query, top=5, metric=metric):
        shared = explain(codes, hit.row, query, metric=metric)
        assert sum(feature.score for feature in shared) == pytest.approx(hit.score)
        sizes = [abs(feature.score) for feature in shared]
        assert sizes == sorted(sizes, reverse=True)


def test_signs_matter() -> None:
    codes = dense_to_csr(np.array([[1.0, -1.0], [-1.0, 1.0]], np.float32))
    hits = search(codes, codes[[0]], top=2)
    assert [(hit.row, round(hit.score, 6)) for hit in hits] == [(0, 1.0), (1, -1.0)]


def test_an_empty_code_is_like_nothing() -> None:
    codes = dense_to_csr(np.array([[0.0, 0.0], [1.0, 0.0]], np.float32))
    assert [hit.score for hit in search(codes, codes[[0]], top=2)] == [0.0, 0.0]
    assert search(codes, codes[[1]], top=1)[0].row == 1
    assert explain(codes, 1, codes[[0]]) == []


def test_no_rows_give_no_hits() -> None:
    empty = dense_to_csr(np.empty((0, 3), np.float32))
    assert search(empty, dense_to_csr(np.ones((1, 3), np.float32))) == []
    assert search_many(empty, dense_to_csr(np.ones((2, 3), np.float32))).rows.shape == (2, 0)
    assert search_many(dense_to_csr(np.ones((2, 3), np.float32)), empty).rows.shape == (0, 2)


def test_a_query_of_another_model_and_a_top_of_nothing_are_refused() -> None:
    codes = dense_to_csr(np.ones((2, 3), np.float32))
    with pytest.raises(InputError, match="the query has 4 latents, the codes have 3"):
        search(codes, dense_to_csr(np.ones((1, 4), np.float32)))
    with pytest.raises(
        UsageError, match="`metric` must be one of cosine, dot, jaccard, hamming, not l2"
    ):
        search(codes, codes[[0]], metric="l2")
    with pytest.raises(UsageError, match="`top` must be at least 1"):
        search(codes, codes[[0]], top=0)
