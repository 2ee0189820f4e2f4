"""Groups of near-duplicates against a comparison of all pairs."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse.csgraph import connected_components

from vsc_serve.codes import CodeFile, dense_to_csr
from vsc_serve.errors import UsageError
from vsc_serve.index import duplicates
from vsc_serve.index.base import Part
from vsc_serve.index.duplicates import duplicate_groups
from vsc_serve.index.in_memory import InMemory
from vsc_serve.index.inverted import ExactIndex


def stored(dense: np.ndarray) -> CodeFile:
    return CodeFile(dense_to_csr(dense), [str(row) for row in range(len(dense))], {"view": "mean"})


def all_pairs(dense: np.ndarray, cosine: float) -> list[list[int]]:
    norms = np.linalg.norm(dense.astype(float), axis=1)
    unit = dense.astype(float)[norms > 0] / norms[norms > 0, None]
    labels = connected_components(unit @ unit.T >= cosine - 1e-9, directed=False)[1]
    rows = np.flatnonzero(norms > 0)
    groups = [rows[labels == label].tolist() for label in range(labels.max(initial=-1) + 1)]
    return sorted(group for group in groups if len(group) > 1)


def noisy(seed: int, active: float) -> np.ndarray:
    """Rows near to a few others, of both signs, some of them empty or alone."""
    rng = np.random.default_rng(seed)
    shape = (12, 10)
    seeds = rng.normal(size=shape) * (rng.uniform(size=shape) < active)
    rows = seeds[rng.integers(0, 12, 40)]
    rows = rows + rng.normal(size=rows.shape) * rng.uniform(0, 0.2) * (rows != 0)
    return rows.astype(np.float32)


@given(st.integers(0, 10_000), st.floats(0.51, 1), st.floats(0.05, 1))
@settings(max_examples=150, deadline=None)
def test_groups_are_those_of_all_pairs(seed: int, cosine: float, active: float) -> None:
    dense = noisy(seed, active)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(duplicates, "_TILE", 64)
        patch.setattr(duplicates, "_READ_ROWS", 7)
        patch.setattr(duplicates, "_EDGES", 5)
        found = duplicate_groups(InMemory(stored(dense)), cosine)
    assert found == all_pairs(dense, cosine)


def test_rows_that_were_removed_are_in_no_group(tmp_path: Path) -> None:
    dense = np.tile(noisy(0, 0.5)[:4], (3, 1))
    index = ExactIndex.build([Part(Path("c"), stored(dense))], tmp_path / "idx")
    assert duplicate_groups(index, 0.99) == all_pairs(dense, 0.99)
    index.remove(["0", "5"])
    dense[[0, 5]] = 0
    assert duplicate_groups(index, 0.99) == all_pairs(dense, 0.99)


@pytest.mark.parametrize("cosine", [0.5, 1.01, float("nan")])
def test_a_cosine_out_of_range_is_refused(cosine: Any) -> None:
    with pytest.raises(UsageError, match=r"`duplicates` is a cosine above 0\.5"):
        duplicate_groups(InMemory(stored(noisy(0, 0.5))), cosine)
