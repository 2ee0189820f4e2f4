"""Neighbours, their cost and their bytes against loops that compare one pair at a time."""

import numpy as np
import pytest
import scipy.sparse
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from vsc_serve.errors import UsageError
from vsc_training.evaluation import retrieval
from vsc_training.evaluation.retrieval import (
    Metric,
    bytes_per_row,
    firing_rates,
    knn_accuracy,
    nearest,
    precision_at,
    search_cost,
)

Rows = NDArray[np.float32]


def sparse_rows(count: int, latents: int, seed: int, share: float = 0.3) -> Rows:
    rng = np.random.default_rng(seed)
    values = rng.normal(size=(count, latents)).astype(np.float32)
    return np.where(rng.random((count, latents)) < share, values, np.float32(0))


def similarity(a: Rows, b: Rows, metric: str) -> float:
    a, b = a.astype(np.float64), b.astype(np.float64)
    if metric == "euclidean":
        return -float(np.linalg.norm(a - b))
    lengths = float(np.linalg.norm(a) * np.linalg.norm(b)) if metric == "cosine" else 1.0
    return float(a @ b) / lengths if lengths else 0.0


def nearest_by_loop(reference: Rows, query: Rows, k: int, metric: str) -> list[int]:
    ranked = sorted(
        range(len(reference)), key=lambda row: (-similarity(reference[row], query, metric), row)
    )
    return sorted(ranked[:k])


@pytest.mark.parametrize("metric", ["cosine", "dot", "euclidean"])
@pytest.mark.parametrize("layout", [np.asarray, scipy.sparse.csr_array])
def test_neighbours_are_those_of_a_loop_over_all_pairs(metric: Metric, layout: type) -> None:
    reference, queries = sparse_rows(60, 9, 0), sparse_rows(25, 9, 1)
    found = nearest(layout(reference), layout(queries), k=7, metric=metric)
    expected = [nearest_by_loop(reference, query, 7, metric) for query in queries]
    if metric == "cosine":
        is_empty = ~queries.any(1)
        assert found[is_empty].tolist() == [list(range(7))] * int(is_empty.sum())
    np.testing.assert_array_equal(found, expected)


@given(st.integers(0, 2**16), st.integers(1, 12))
@settings(max_examples=30, deadline=None)
def test_of_equally_similar_references_the_first_are_taken(seed: int, k: int) -> None:
    rng = np.random.default_rng(seed)
    rows = np.argsort(rng.random((40, 6)), axis=1) < 2  # two of six: many equal supports
    reference, queries = rows[:30], rows[30:]
    found = nearest(reference, queries, k=k)
    shared = queries.astype(int) @ reference.T.astype(int)
    expected = np.sort(np.argsort(-shared, axis=1, kind="stable")[:, :k], axis=1)
    np.testing.assert_array_equal(found, expected)
    sparse = nearest(scipy.sparse.csr_array(reference), scipy.sparse.csr_array(queries), k=k)
    np.testing.assert_array_equal(sparse, expected)


def test_the_size_of_a_block_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    reference, queries = sparse_rows(50, 8, 2), sparse_rows(33, 8, 3)
    whole = nearest(reference, queries, k=5)
    monkeypatch.setattr(retrieval, "_BLOCK_ENTRIES", 170)
    np.testing.assert_array_equal(nearest(reference, queries, k=5), whole)


def test_a_zero_vector_has_cosine_zero_with_everything() -> None:
    reference = np.array([[-1, 0], [0, 0], [1, 0]], np.float32)
    assert nearest(reference, np.array([[1, 0]], np.float32), k=2).tolist() == [[1, 2]]
    assert nearest(reference, np.zeros((1, 2), np.float32), k=2).tolist() == [[0, 1]]


@given(st.integers(0, 2**16))
@settings(max_examples=20, deadline=None)
def test_accuracy_and_precision_are_those_of_a_loop(seed: int) -> None:
    rng = np.random.default_rng(seed)
    reference, queries = sparse_rows(40, 6, seed, 0.9), sparse_rows(15, 6, seed + 1, 0.9)
    labels, truth = rng.integers(0, 4, 40), rng.integers(0, 4, 15)
    hits, shares = 0, []
    for query, true in zip(queries, truth, strict=True):
        chosen = labels[nearest_by_loop(reference, query, 10, "cosine")].tolist()
        counts = {label: chosen.count(label) for label in sorted(set(chosen))}
        hits += max(counts, key=lambda label: counts[label]) == true
        shares.append(chosen.count(true) / 10)
    assert knn_accuracy(reference, labels, queries, truth) == pytest.approx(hits / 15)
    assert precision_at(reference, labels, queries, truth) == pytest.approx(np.mean(shares))


def test_a_tied_vote_goes_to_the_class_that_sorts_first() -> None:
    reference = np.array([[1, 0], [1, 0], [1, 0], [1, 0]], np.float32)
    query = np.array([[1, 0]], np.float32)
    assert knn_accuracy(reference, [7, 7, 3, 3], query, [3], k=4) == 1.0
    assert knn_accuracy(reference, ["b", "b", "a", "a"], query, ["b"], k=4) == 0.0
    assert precision_at(reference, ["b", "b", "a", "a"], query, ["b"], k=4) == 0.5


def test_a_class_that_the_references_lack_is_never_found() -> None:
    reference, labels = np.eye(3, dtype=np.float32), [1, 1, 1]
    assert knn_accuracy(reference, labels, reference, [1, 2, 2], k=1) == pytest.approx(1 / 3)


def test_scaling_codes_changes_no_cosine_neighbour() -> None:
    reference, queries = sparse_rows(80, 10, 4), sparse_rows(20, 10, 5)
    np.testing.assert_array_equal(
        nearest(reference, queries), nearest(reference * 8, queries * np.float32(0.25))
    )


@given(st.integers(0, 2**16), st.floats(0.05, 0.95))
@settings(max_examples=25, deadline=None)
def test_search_cost_is_the_mean_number_of_latents_that_two_rows_share(
    seed: int, share: float
) -> None:
    codes = sparse_rows(30, 7, seed, share)
    shared = [int(((a != 0) & (b != 0)).sum()) for a in codes for b in codes]
    assert search_cost(codes) == pytest.approx(np.mean(shared))
    assert search_cost(scipy.sparse.csr_array(codes)) == pytest.approx(np.mean(shared))


def test_evenly_spread_codes_cost_k_squared_over_the_latents_and_dense_ones_all() -> None:
    evenly = np.stack([np.roll([1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0], step) for step in range(12)])
    assert search_cost(evenly) == pytest.approx(9 / 12)
    assert search_cost(np.ones((5, 12), np.float32)) == pytest.approx(12)


def test_bytes_are_those_of_the_arrays_of_a_csr_matrix() -> None:
    codes = scipy.sparse.csr_array(sparse_rows(50, 20, 6))
    stored = codes.data.nbytes + codes.indices.astype(np.int32).nbytes
    assert bytes_per_row(codes) == pytest.approx(stored / 50)
    short = codes.data.nbytes + codes.indices.astype(np.uint16).nbytes
    assert bytes_per_row(codes.toarray(), index_bytes=2) == pytest.approx(short / 50)


def test_firing_rates_do_not_depend_on_the_layout_and_ignore_stored_zeros() -> None:
    codes = sparse_rows(40, 5, 7)
    stored = scipy.sparse.csr_array(codes)
    stored.data[:3] = 0.0
    np.testing.assert_allclose(firing_rates(codes), (codes != 0).mean(0))
    np.testing.assert_allclose(firing_rates(stored), (stored.toarray() != 0).mean(0))


def test_a_matrix_that_plain_scipy_loads_gives_the_same_neighbours() -> None:
    reference, queries = sparse_rows(30, 8, 8), sparse_rows(9, 8, 9)
    found = nearest(
        scipy.sparse.csr_matrix(reference), scipy.sparse.csr_matrix(queries), metric="euclidean"
    )
    np.testing.assert_array_equal(found, nearest(reference, queries, metric="euclidean"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": 9}, "9 neighbours of 2 queries among 8 references: give at least one query"),
        ({"queries": np.ones((0, 3)), "query_labels": []}, "10 neighbours of 0 queries"),
        ({"queries": np.ones((2, 4)), "k": 1}, "references have 3 columns, queries 4"),
        ({"query_labels": [1]}, "8 labels for 8 references and 1 for 2 queries"),
        ({"metric": "taxi", "k": 1}, "metric must be cosine, dot or euclidean, not 'taxi'"),
    ],
)
def test_what_cannot_be_searched_is_an_error_that_says_why(
    change: dict[str, object], message: str
) -> None:
    given_arguments: dict[str, object] = {
        "reference": np.ones((8, 3)),
        "reference_labels": [0] * 8,
        "queries": np.ones((2, 3)),
        "query_labels": [0, 1],
    }
    with pytest.raises(UsageError, match=message):
        knn_accuracy(**(given_arguments | change))  # type: ignore[arg-type]  # on purpose
