"""Exact search against a dense calculation, and explanations that add up."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vsc_serve.codes import dense_to_csr
from vsc_serve.errors import InputError, UsageError
from vsc_serve.index.exact import explain, search


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


def test_a_query_of_another_model_and_a_top_of_nothing_are_refused() -> None:
    codes = dense_to_csr(np.ones((2, 3), np.float32))
    with pytest.raises(InputError, match="the query has 4 latents, the codes have 3"):
        search(codes, dense_to_csr(np.ones((1, 4), np.float32)))
    with pytest.raises(UsageError, match="`top` must be at least 1"):
        search(codes, codes[[0]], top=0)
