"""The second stage against dense calculations, whatever gave the first rows."""

from pathlib import Path

import numpy as np
import pytest

from vsc_serve.codes import dense_to_csr
from vsc_serve.decoder import Decoder
from vsc_serve.errors import UsageError
from vsc_serve.index.rerank import LinearStage, explain_linear, rerank, rerank_decoded
from vsc_serve.linear_map import LinearMap

LATENTS, DIMENSIONS, ROWS = 12, 30, 60


@pytest.fixture
def linear_map() -> LinearMap:
    rng = np.random.default_rng(0)
    shapes = ((LATENTS, DIMENSIONS), (DIMENSIONS,), (DIMENSIONS,))
    return LinearMap(*(rng.normal(size=shape).astype(np.float32) for shape in shapes))


@pytest.fixture
def dense() -> np.ndarray:
    rng = np.random.default_rng(1)
    values = rng.normal(size=(ROWS, LATENTS)) * (rng.random((ROWS, LATENTS)) < 0.3)
    values[7] = 0
    values[9] = values[40]
    return values.astype(np.float32)


@pytest.fixture
def queries() -> np.ndarray:
    return np.random.default_rng(2).normal(size=(5, DIMENSIONS)).astype(np.float32)


def cosines(queries: np.ndarray, dense: np.ndarray, linear_map: LinearMap) -> np.ndarray:
    moved = queries.astype(float) - linear_map.center
    decoded = dense.astype(float) @ linear_map.weights + linear_map.bias
    moved /= np.linalg.norm(moved, axis=1, keepdims=True)
    return moved @ (decoded / np.linalg.norm(decoded, axis=1, keepdims=True)).T


def test_over_all_rows_the_second_stage_is_the_search_in_decoded_rows(
    linear_map: LinearMap, dense: np.ndarray, queries: np.ndarray
) -> None:
    codes, expected = dense_to_csr(dense), cosines(queries, dense, linear_map)
    all_rows = [np.random.default_rng(q).permutation(ROWS) for q in range(len(queries))]
    hits = rerank(all_rows, codes, linear_map.norms(codes), *linear_map.project(queries), top=ROWS)
    for query, found in enumerate(hits):
        np.testing.assert_allclose(
            [hit.score for hit in found], np.sort(expected[query])[::-1], atol=1e-6
        )
        rows = [hit.row for hit in found]
        np.testing.assert_allclose([hit.score for hit in found], expected[query][rows], atol=1e-6)
        assert rows.index(9) == rows.index(40) - 1, "equal scores are in row order"


def test_only_candidates_are_hits_and_only_their_lengths_are_computed_once(
    linear_map: LinearMap, dense: np.ndarray, queries: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    codes, expected = dense_to_csr(dense), cosines(queries, dense, linear_map)
    measured, whole = [], LinearMap.norms
    monkeypatch.setattr(
        LinearMap,
        "norms",
        lambda self, codes: measured.append(codes.shape[0]) or whole(self, codes),
    )
    stage = LinearStage(codes, linear_map)
    for block in range(2):
        candidates = [np.arange(query + block, ROWS, 4) for query in range(2)]
        hits = stage.rerank([*candidates, np.empty(0, np.intp)], queries[:3], 6)
        for query, found in enumerate(hits[:2]):
            best = candidates[query][np.argsort(-expected[query][candidates[query]])][:6]
            assert [hit.row for hit in found] == best.tolist()
        assert hits[2] == []
    assert measured == [ROWS // 2, ROWS // 4]
    assert stage.explain([], queries[0]) == []
    (parts,) = stage.explain(hits[1][:1], queries[1])
    assert sum(one.score for one in parts[0]) + parts[1] == pytest.approx(hits[1][0].score)


def test_an_empty_code_has_the_score_of_the_bias(
    linear_map: LinearMap, dense: np.ndarray, queries: np.ndarray
) -> None:
    codes = dense_to_csr(dense[[7]])
    u, c = linear_map.project(queries[:1])
    (found,) = rerank([np.arange(1)], codes, linear_map.norms(codes), u, c, top=1)
    assert found[0].score == pytest.approx(c[0] / np.linalg.norm(linear_map.bias))
    bare = LinearMap(linear_map.weights, 0 * linear_map.bias, linear_map.center)
    u, c = bare.project(queries[:1])
    (found,) = rerank([np.arange(1)], codes, bare.norms(codes), u, c, top=1)
    assert found[0].score == 0.0


def test_fewer_candidates_than_hits_are_refused_unless_there_are_no_more_rows(
    linear_map: LinearMap, dense: np.ndarray, queries: np.ndarray
) -> None:
    codes = dense_to_csr(dense)
    norms, (u, c) = linear_map.norms(codes), linear_map.project(queries)
    for top in (6, 0):
        with pytest.raises(UsageError, match=r"`candidates`: 5 rows .* 6|`top` must be at least 1"):
            rerank([np.arange(5)] * 5, codes, norms, u, c, top=top)
    few = codes[:3]
    assert len(rerank([np.arange(3)], few, norms[:3], u[:1], c[:1], top=10)[0]) == 3
    assert rerank([], codes, norms, u[:0], c[:0]) == []


def test_what_features_and_bias_add_sums_to_the_score(
    linear_map: LinearMap, dense: np.ndarray, queries: np.ndarray
) -> None:
    codes = dense_to_csr(dense)
    norms, (u, c) = linear_map.norms(codes), linear_map.project(queries)
    for hit in rerank([np.arange(ROWS)], codes, norms, u[:1], c[:1], top=ROWS)[0]:
        features, rest = explain_linear(codes, hit.row, norms[hit.row], u[0], c[0])
        assert sum(one.score for one in features) + rest == pytest.approx(hit.score)
        assert {one.latent for one in features} == set(np.flatnonzero(dense[hit.row]))
        sizes = [abs(one.score) for one in features]
        assert sizes == sorted(sizes, reverse=True)


def test_the_decoded_score_is_the_cosine_of_query_and_drawn_row(tiny_bundle: Path) -> None:
    decoder = Decoder.open(tiny_bundle, device="cpu")
    rng = np.random.default_rng(3)
    values = rng.normal(size=(300, 6)) * (rng.random((300, 6)) < 0.5)
    codes = dense_to_csr(values.astype(np.float32))
    queries = rng.random((2, 16)).astype(np.float32)
    drawn = decoder.decode(codes).reshape(300, 16).astype(float)
    drawn /= np.linalg.norm(drawn, axis=1, keepdims=True)
    rows = rng.permutation(300)[:280]
    for query, found in enumerate(rerank_decoded([rows, rows], codes, decoder, queries, top=280)):
        expected = drawn[rows] @ queries[query] / np.linalg.norm(queries[query])
        assert [hit.row for hit in found] == rows[np.lexsort((rows, -expected))].tolist()
        np.testing.assert_allclose([hit.score for hit in found], np.sort(expected)[::-1])
    with pytest.raises(UsageError, match="`candidates`: 5 rows of a query"):
        rerank_decoded([np.arange(5)], codes, decoder, queries[:1])
