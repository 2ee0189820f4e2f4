"""What is measured of a model as a search index, on the same rows for every model."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from benchmarks.quality.search_models import SearchCoder
from vsc_serve.codes import Codes
from vsc_serve.index.exact import search_many
from vsc_serve.index.rerank import CANDIDATES, rerank
from vsc_serve.linear_map import LinearMap
from vsc_training.evaluation import retrieval

ACTIVE: Final = (16, 32, 64)
"""Active latents a row at which VSC is measured after one training."""
TOP: Final = 10
REFERENCES: Final = 20_000
"""Training rows that are searched, at most."""
QUERIES: Final = 5_000
"""Test rows that are asked, at most."""

_BYTES_PER_NORM: Final = 4
_CENTERED_FROM: Final = 0.25
"""Share of the mean square of rows that is their mean's, from which neighbours are of the centred
rows: above it all cosines are close to 1, as after a ReLU."""

Metrics = dict[str, float]


@dataclass(frozen=True)
class SearchData:
    """The rows of one comparison, and their true neighbours."""

    references: NDArray[np.float32]
    """What is searched, shape (references, dimensions)."""
    reference_labels: NDArray[np.int64]
    queries: NDArray[np.float32]
    """What is asked, shape (queries, dimensions)."""
    query_labels: NDArray[np.int64]
    true_neighbours: NDArray[np.intp]
    """Rows of the ten nearest references of each query, by the cosine of the vectors."""
    is_centered: bool
    """The mean was taken away before these cosines."""


class View(NamedTuple):
    """One way to search one set of codes."""

    name: str
    active: float
    """Active latents of a stored row."""
    found: NDArray[np.intp]
    """Rows found, best first, shape (queries, 10)."""
    search_cost: float
    """Multiplications of a query, per stored row."""
    bytes: float
    """Bytes of a stored row."""


def search_data(
    rows: tuple[NDArray[np.float32], NDArray[np.float32]],
    labels: tuple[NDArray[np.int64], NDArray[np.int64]],
) -> SearchData:
    """Choose rows by chance, the same in every call, and find their true neighbours.

    Args:
        rows: Training rows, of which references are chosen, and rows to ask about.
        labels: Their labels.
    """
    known, asked = (
        np.random.default_rng(0).permutation(len(part))[:most]
        for part, most in zip(rows, (REFERENCES, QUERIES), strict=True)
    )
    references, queries = rows[0][known], rows[1][asked]
    is_centered = needs_centering(references)
    middle = references.mean(0) if is_centered else np.zeros_like(references[0])
    true_neighbours = retrieval.nearest(references - middle, queries - middle, k=TOP)
    return SearchData(
        references, labels[0][known], queries, labels[1][asked], true_neighbours, is_centered
    )


def needs_centering(rows: NDArray[np.float32]) -> bool:
    """Return whether the mean makes up most of the rows."""
    return bool(np.square(rows.mean(0)).sum() > _CENTERED_FROM * np.square(rows).sum(1).mean())


def measure_views(coder: SearchCoder, active: int, data: SearchData) -> Iterator[View]:
    """Yield every view of a model at one active count.

    Plain: rows and queries coded alike. Wider query: for models that have one. Second stage: the
    best 200 of either query, scored again from their codes. Capped: the same number of active
    latents in every row, in place of that number on average. Refitted: the values of stored rows
    fitted once more, their latents as they were; queries are not changed.
    """
    plain, wide = coder.stored(data.queries, active), coder.wide_queries(data.queries)
    linear_map, stored = coder.linear_map(), coder.stored(data.references, active)
    asked = [(stored, plain, "plain", "second stage")]
    if wide is not None:
        asked = [
            (stored, plain, "plain", "second stage of plain"),
            (stored, wide, "wider query", "second stage"),
        ]
    capped = coder.capped(data.references, active)
    if wide is not None and capped is not None:
        asked.append((capped, wide, "capped, wider query", "capped, second stage"))
    for rows, queries, first, second in asked:
        for suffix, codes in (
            ("", rows),
            (", refitted", linear_map.refit(rows, data.references)),
        ):
            yield first_stage(first + suffix, codes, queries)
            yield second_stage(second + suffix, codes, queries, linear_map, data.queries)


def first_stage(name: str, stored: Codes, queries: Codes) -> View:
    """Search by the cosine of codes."""
    found = search_many(stored, queries, top=TOP).rows
    cost = asymmetric_cost(stored, queries)
    return View(name, _active(stored), found, cost, retrieval.bytes_per_row(stored))


def second_stage(
    name: str, stored: Codes, queries: Codes, linear_map: LinearMap, rows: NDArray[np.float32]
) -> View:
    """Search by the cosine of codes and score the best 200 rows again.

    The cost has 200 rows of so many active latents more, shared out over all stored rows; the
    product that makes u of a query, as large as a linear encoder, is left out, as encoding is.
    """
    depth = min(CANDIDATES, stored.shape[0])
    candidates = search_many(stored, queries, top=depth).rows
    u, c = linear_map.project(rows)
    hits = rerank(candidates, stored, linear_map.norms(stored), u, c, top=TOP)
    found = np.array([[hit.row for hit in best] for best in hits], np.intp)
    active = _active(stored)
    cost = asymmetric_cost(stored, queries) + depth * active / stored.shape[0]
    return View(name, active, found, cost, retrieval.bytes_per_row(stored) + _BYTES_PER_NORM)


def dense_view(data: SearchData) -> View:
    """Return the search of the vectors themselves, which the others are compared with."""
    dimensions = data.references.shape[1]
    width = retrieval.BYTES_PER_VALUE * dimensions
    return View("dense", dimensions, data.true_neighbours, dimensions, width)


def asymmetric_cost(stored: Codes, queries: Codes) -> float:
    """Return the postings that a query is expected to touch, per stored row: sum_j f_q,j f_d,j."""
    return float(retrieval.firing_rates(queries) @ retrieval.firing_rates(stored))


def metrics_of(view: View, data: SearchData) -> Metrics:
    """Return recall of the true neighbours, labels of the found ones, cost and bytes."""
    _, numbers = np.unique(
        np.concatenate([data.reference_labels, data.query_labels]), return_inverse=True
    )
    count = len(data.reference_labels)
    labels, truth = numbers[:count][view.found], numbers[count:]
    return {
        "recall_10": recall(view.found, data.true_neighbours),
        "knn": retrieval.vote_accuracy(labels, truth),
        "precision_10": retrieval.same_class_share(labels, truth),
        "active": view.active,
        "search_cost": view.search_cost,
        "bytes": view.bytes,
    }


def recall(found: NDArray[np.intp], true_neighbours: NDArray[np.intp]) -> float:
    """Return the mean share of the true neighbours that are among the found ones."""
    is_found = (found[:, :, None] == true_neighbours[:, None, :]).any(1)
    return float(is_found.mean())


def _active(codes: Codes) -> float:
    return codes.nnz / codes.shape[0]
