"""Thresholds for a budget, and what a search finds with them, against plain calculations."""

from pathlib import Path

import numpy as np
import pytest

from vsc_export.budget import Budget, parse_budget, propose_thresholds
from vsc_export.comparison import Truth
from vsc_export.options import ExportOptions
from vsc_export.search_points import Neighbours, first_stage, measure_search, search_cost
from vsc_export.write import export_bundle
from vsc_serve.bundle import open_bundle
from vsc_serve.codes import threshold_logit
from vsc_serve.encoder import Encoder
from vsc_serve.errors import UsageError
from vsc_serve.linear_map import LinearMap
from vsc_training.checkpoint import load_samples

ROWS, LATENTS, DIMENSIONS = 400, 40, 12


@pytest.fixture
def linear_map() -> LinearMap:
    rng = np.random.default_rng(0)
    weights = rng.normal(size=(LATENTS, DIMENSIONS)).astype(np.float32)
    return LinearMap(weights, np.ones(DIMENSIONS, np.float32), np.zeros(DIMENSIONS, np.float32))


@pytest.fixture
def neighbours(linear_map: LinearMap) -> Neighbours:
    """Rows that are what their confident latents decode to, and a little noise."""
    rng = np.random.default_rng(1)
    logit = rng.normal(-3, 3, size=(ROWS, LATENTS))
    mu = rng.normal(size=(ROWS, LATENTS))
    gamma = 1 / (1 + np.exp(-logit))
    data = (gamma * mu) @ linear_map.weights + linear_map.bias
    noise = rng.normal(scale=0.3, size=data.shape)
    return Neighbours((data + noise).astype(np.float32), Truth(logit, mu, 0.0))


@pytest.mark.parametrize(
    "text", ["100", "bytes", "bytes=", "bytes=many", "cost=0", "tau=0.5", "cost=inf"]
)
def test_a_budget_that_is_neither_bytes_nor_cost_is_refused(text: str) -> None:
    assert parse_budget("bytes=100") == Budget("bytes", 100.0)
    assert parse_budget("cost=1.5") == Budget("cost", 1.5)
    with pytest.raises(UsageError, match="give bytes=NUMBER or cost=NUMBER, such as bytes=100"):
        parse_budget(text)


@pytest.mark.parametrize("limit", [16.0, 40.0, 64.0])
def test_rows_take_no_more_bytes_than_the_budget_and_hardly_less(
    neighbours: Neighbours, limit: float
) -> None:
    found = propose_thresholds(Budget("bytes", limit), neighbours)
    assert found.query_tau <= found.tau
    size = 8 * (neighbours.stored(found.tau) != 0).sum() / ROWS
    assert limit - 0.1 < size <= limit


@pytest.mark.parametrize("limit", [0.3, 1.0, 2.0])
def test_a_search_costs_no_more_than_the_budget_and_no_pair_finds_more(
    neighbours: Neighbours, limit: float
) -> None:
    found = propose_thresholds(Budget("cost", limit), neighbours)
    stored, queries = neighbours.stored(found.tau), neighbours.queries(found.query_tau)
    assert search_cost(stored, queries) <= limit
    recall = neighbours.recall(first_stage(stored, queries))
    for query_tau in (0.05, 0.1, 0.2, 0.3, 0.5):
        for tau in np.linspace(query_tau, 0.99, 30):
            other, asked = neighbours.stored(tau), neighbours.queries(query_tau)
            if search_cost(other, asked) <= limit:
                assert recall >= neighbours.recall(first_stage(other, asked)) - 0.01


def test_a_budget_that_leaves_nothing_or_takes_all_is_told_apart(neighbours: Neighbours) -> None:
    for budget in (Budget("bytes", 7.9), Budget("cost", 1e-4)):
        with pytest.raises(UsageError, match="on 400 rows fewer than one active latent per row"):
            propose_thresholds(budget, neighbours)
    assert propose_thresholds(Budget("bytes", 1e6), neighbours).tau == 0.05
    free = propose_thresholds(Budget("cost", 1e6), neighbours)
    assert free.tau == free.query_tau, "no threshold of rows but the order of the two is needed"


def test_the_cost_of_a_search_is_that_of_its_postings(neighbours: Neighbours) -> None:
    stored, queries = neighbours.stored(0.5), neighbours.queries(0.1)
    touched = [(stored[:, np.flatnonzero(query)] != 0).sum() for query in queries]
    assert search_cost(stored, queries) == pytest.approx(np.mean(touched) / ROWS)


def test_queries_weigh_what_is_likely_and_keep_more_than_rows(neighbours: Neighbours) -> None:
    gamma = 1 / (1 + np.exp(-neighbours.logit.astype(float)))
    is_on = neighbours.logit > threshold_logit(0.1)
    expected = np.where(is_on, np.sqrt(gamma) * neighbours.mu, 0)
    np.testing.assert_allclose(neighbours.queries(0.1), expected, rtol=1e-5)
    assert (neighbours.queries(0.1) != 0).sum() > (neighbours.stored(0.5) != 0).sum()


def test_what_a_search_finds_is_what_dense_calculations_find(
    neighbours: Neighbours, linear_map: LinearMap, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vsc_export.search_points.CANDIDATES", 50)
    point, other = measure_search(neighbours, linear_map, [0.5, 0.05], own_tau=0.5, query_tau=0.2)
    assert (point.tau, point.query_tau, other.query_tau) == (0.5, 0.2, 0.05)
    data = neighbours.data.astype(float)
    truth = _nearest(_cosines(data, data), 10)
    stored = neighbours.stored(0.5).astype(float)
    first = _cosines(neighbours.queries(0.2), stored)
    assert point.recall == pytest.approx(_overlap(truth, _nearest(first, 10)), abs=1e-3)
    candidates = _nearest(first, 50)
    again = _cosines(data, stored @ linear_map.weights + linear_map.bias)
    chosen = np.take_along_axis(again, candidates, 1)
    best = np.take_along_axis(candidates, np.argsort(-chosen, 1)[:, :10], 1)
    assert point.second_stage == pytest.approx(_overlap(truth, best), abs=1e-3)
    assert point.second_stage > point.recall + 0.1
    assert point.refitted is not None
    assert point.refitted > point.second_stage + 0.05
    assert other.refitted is None
    (bare,) = measure_search(neighbours, None, [0.5], own_tau=0.5, query_tau=None)
    assert (bare.query_tau, bare.second_stage, bare.refitted) == (0.1, None, None)


def _cosines(queries: np.ndarray, rows: np.ndarray) -> np.ndarray:
    def unit(array: np.ndarray) -> np.ndarray:
        return array / np.maximum(np.linalg.norm(array, axis=1, keepdims=True), 1e-12)

    scores = unit(queries) @ unit(rows).T
    np.fill_diagonal(scores, -np.inf)
    return scores


def _nearest(scores: np.ndarray, count: int) -> np.ndarray:
    return np.argsort(-scores, axis=1, kind="stable")[:, :count]


def _overlap(truth: np.ndarray, found: np.ndarray) -> float:
    return float(np.mean([len(set(a) & set(b)) for a, b in zip(truth, found, strict=True)]) / 10)


@pytest.mark.slow
@pytest.mark.usefixtures("cached_exports")
def test_an_export_for_a_budget_writes_both_thresholds(tiny_run: Path, tmp_path: Path) -> None:
    done = export_bundle(tiny_run, tmp_path / "out", ExportOptions(budget=Budget("bytes", 40.0)))
    manifest = open_bundle(tmp_path / "out").manifest
    assert manifest.query_tau is not None
    assert manifest.query_tau <= manifest.tau
    assert manifest.tau == done.manifest.tau
    codes = Encoder.open(tmp_path / "out", device="cpu").encode(load_samples(tiny_run))
    assert 8 * codes.nnz / codes.shape[0] <= 40.0
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| tau | tau of queries | search cost | neighbour recall@10 | second stage |\n" in card
    assert f"| **{manifest.tau:g}** | {manifest.query_tau:g} |" in card
    assert "with refitted\nvalues (`vsc encode --refit`) it finds 0." in card
