"""Neighbours by code: how often they have the right class, and what finding them costs.

Everything takes dense arrays or scipy's CSR. The neighbours are exact: every query is compared with
every reference, a block of queries at a time.
"""

from collections.abc import Sequence
from typing import Any, Final, Literal, TypeAlias

import numpy as np
import scipy.sparse
import torch
from numpy.typing import NDArray

from vsc_serve.errors import UsageError

Array: TypeAlias = "NDArray[Any] | scipy.sparse.csr_array[Any, tuple[int, int]]"
"""Rows of numbers or booleans, dense or CSR, shape (rows, columns)."""
Labels: TypeAlias = "NDArray[Any] | Sequence[Any]"
"""One class per row: numbers or texts."""
Metric = Literal["cosine", "dot", "euclidean"]

TAUS: Final = (0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 0.9)
"""Spike thresholds of a trade-off curve."""
BYTES_PER_VALUE: Final = 4
"""A stored value is float32."""
_BLOCK_ENTRIES: Final = 4_000_000
"""Similarities held at a time."""


def knn_accuracy(
    reference: Array,
    reference_labels: Labels,
    queries: Array,
    query_labels: Labels,
    *,
    k: int = 10,
    metric: Metric = "cosine",
) -> float:
    """Return the share of queries whose class is that of most of their k nearest references.

    Each neighbour has one vote; of classes with equally many votes the first in sorted order wins.

    Args:
        reference: Codes to search, shape (references, latents).
        reference_labels: Their classes.
        queries: Codes to look for, none of them among the references, shape (queries, latents).
        query_labels: Their classes.
        k: Neighbours.
        metric: Similarity; the cosine with a zero vector is 0.

    Returns:
        A share in [0, 1].

    Raises:
        UsageError: Fewer references than k, no query, or labels that do not fit the rows.
    """
    found = neighbour_labels(reference, reference_labels, queries, query_labels, k=k, metric=metric)
    return vote_accuracy(*found)


def precision_at(
    reference: Array,
    reference_labels: Labels,
    queries: Array,
    query_labels: Labels,
    *,
    k: int = 10,
    metric: Metric = "cosine",
) -> float:
    """Return the share of the k nearest references that have the class of the query.

    Args:
        reference: Codes to search, shape (references, latents).
        reference_labels: Their classes.
        queries: Codes to look for, none of them among the references, shape (queries, latents).
        query_labels: Their classes.
        k: Neighbours.
        metric: Similarity; the cosine with a zero vector is 0.

    Returns:
        The mean over the queries, in [0, 1].

    Raises:
        UsageError: Fewer references than k, no query, or labels that do not fit the rows.
    """
    found = neighbour_labels(reference, reference_labels, queries, query_labels, k=k, metric=metric)
    return same_class_share(*found)


def neighbour_labels(
    reference: Array,
    reference_labels: Labels,
    queries: Array,
    query_labels: Labels,
    *,
    k: int = 10,
    metric: Metric = "cosine",
) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Return the classes of each query's neighbours, and of the queries, as numbers from 0.

    The search behind `knn_accuracy` and `precision_at`, for callers who want both. Classes are
    numbered in sorted order.

    Returns:
        Classes of the neighbours, shape (queries, k), and of the queries, shape (queries,).

    Raises:
        UsageError: Fewer references than k, no query, or labels that do not fit the rows.
    """
    known, asked = np.asarray(reference_labels), np.asarray(query_labels)
    if (len(known), len(asked)) != (reference.shape[0], queries.shape[0]):
        raise UsageError(
            f"{len(known)} labels for {reference.shape[0]} references and {len(asked)} for"
            f" {queries.shape[0]} queries. Give one label per row."
        )
    _, numbers = np.unique(np.concatenate([known, asked]), return_inverse=True)
    found = nearest(reference, queries, k=k, metric=metric)
    return numbers[: len(known)][found], numbers[len(known) :]


def vote_accuracy(neighbours: NDArray[np.intp], truth: NDArray[np.intp]) -> float:
    """Return the share of rows whose most frequent number is the true one; ties go to the lowest.

    Args:
        neighbours: Classes of the neighbours, shape (queries, k).
        truth: Class of each query.
    """
    rows = np.arange(len(truth))
    votes = np.zeros((len(truth), max(int(neighbours.max()), int(truth.max())) + 1), np.int64)
    for column in neighbours.T:
        votes[rows, column] += 1
    return float((votes.argmax(1) == truth).mean())


def same_class_share(neighbours: NDArray[np.intp], truth: NDArray[np.intp]) -> float:
    """Return the share of neighbours that have the true class.

    Args:
        neighbours: Classes of the neighbours, shape (queries, k).
        truth: Class of each query.
    """
    return float((neighbours == truth[:, None]).mean())


def nearest(
    reference: Array, queries: Array, *, k: int = 10, metric: Metric = "cosine"
) -> NDArray[np.intp]:
    """Return the k references most similar to each query.

    Of references that are equally similar, those that come first are taken. The dot product of two
    supports is a whole number and exact, so supports of one size that share as much do tie.

    Args:
        reference: Shape (references, latents).
        queries: Shape (queries, latents).
        k: Neighbours.
        metric: `cosine` (0 with a zero vector), `dot`, or `euclidean` (the smallest distance).

    Returns:
        Row numbers in the reference, in rising order, shape (queries, k).

    Raises:
        UsageError: Fewer references than k, no query, or different widths.
    """
    _check(reference, queries, k)
    scale, offset = _ranking(reference, metric)
    reference = _as_float32(reference)
    height = max(1, _BLOCK_ENTRIES // reference.shape[0])
    parts = []
    for start in range(0, queries.shape[0], height):
        block = _dense(queries[start : start + height])
        products = np.ascontiguousarray(block @ reference.T)
        parts.append(_largest(products * scale + offset, k))
    return np.concatenate(parts)


def support(codes: Array) -> Array:
    """Return which latents are on (not 0), as booleans, dense or CSR as the codes are."""
    is_on: Array = codes != 0  # type: ignore[assignment]  # scipy's stubs call it a bool
    return is_on


def firing_rates(codes: Array) -> NDArray[np.float64]:
    """Return the share of rows in which each latent is on (not 0), shape (latents,)."""
    counts = np.asarray(support(codes).sum(axis=0), np.float64).ravel()
    rates: NDArray[np.float64] = counts / max(codes.shape[0], 1)
    return rates


def search_cost(codes: Array) -> float:
    """Return the postings a query is expected to touch, per row of an inverted file: sum_j f_j^2.

    A query has latent j with probability f_j and then meets the share f_j of the rows. Codes of k
    active latents that are spread evenly over J cost k^2 / J; a dense code costs J.

    Args:
        codes: Shape (rows, latents).
    """
    return float(np.square(firing_rates(codes)).sum())


def bytes_per_row(codes: Array, *, index_bytes: int = 4) -> float:
    """Return the bytes of values and indices of a row: (4 + index_bytes) per active latent.

    What is stored once per row (a bound, an id) is left out. A dense code takes 4 bytes a latent.

    Args:
        codes: Shape (rows, latents).
        index_bytes: Bytes of an index: 4 (int32, as in codes.npz), or 2 where an engine stores 16
            bits (up to 65,536 latents).
    """
    return (BYTES_PER_VALUE + index_bytes) * float(firing_rates(codes).sum())


def _check(reference: Array, queries: Array, k: int) -> None:
    if reference.shape[1] != queries.shape[1]:
        raise UsageError(
            f"references have {reference.shape[1]} columns, queries {queries.shape[1]}."
            " Encode both with the same model."
        )
    if queries.shape[0] == 0 or not 1 <= k <= reference.shape[0]:
        raise UsageError(
            f"{k} neighbours of {queries.shape[0]} queries among {reference.shape[0]} references:"
            " give at least one query and as many references as neighbours."
        )


def _ranking(reference: Array, metric: Metric) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Return scale and offset per reference that turn dot products into a rank for any one query.

    The length of the query changes no rank, so it is left out: dot / |r| ranks as the cosine does,
    and dot - |r|^2 / 2 as the negative distance.
    """
    rows = _as_float32(reference)
    squares = rows.power(2) if scipy.sparse.issparse(rows) else np.square(rows)
    square: NDArray[np.float32] = np.asarray(squares.sum(axis=1), np.float32).ravel()
    if metric == "cosine":
        length = np.sqrt(square)
        scale = np.divide(1.0, length, out=np.zeros_like(length), where=length > 0)
        return scale, np.zeros_like(square)
    if metric == "euclidean":
        return np.ones_like(square), -0.5 * square
    if metric == "dot":
        return np.ones_like(square), np.zeros_like(square)
    raise UsageError(f"metric must be cosine, dot or euclidean, not {metric!r}")


def _largest(scores: NDArray[np.float32], k: int) -> NDArray[np.intp]:
    """Return the columns of the k largest scores of each row; of equal ones the first columns.

    torch finds the k-th score (four times as fast as numpy on rows with many ties); which of the
    equal ones it would take is undefined, so that is settled here.
    """
    limit = torch.from_numpy(scores).topk(k, dim=1, sorted=False).values.amin(1).numpy()
    rows, columns = np.divmod(np.flatnonzero(scores >= limit[:, None]), scores.shape[1])
    is_tied = scores[rows, columns] == limit[rows]
    free = k - np.bincount(rows[~is_tied], minlength=len(scores))
    tie_number = np.cumsum(is_tied)
    ties_before = np.concatenate([[0], np.cumsum(np.bincount(rows, is_tied))])[rows]
    is_chosen = ~is_tied | (tie_number - ties_before <= free[rows])
    found: NDArray[np.intp] = columns[is_chosen].reshape(len(scores), k)
    return found


def _as_float32(rows: Array) -> Array:
    return rows.astype(np.float32, copy=False)


def _dense(rows: Array) -> NDArray[np.float32]:
    if scipy.sparse.issparse(rows):
        return np.asarray(rows.toarray(), np.float32)
    return np.asarray(rows, np.float32)
