"""Supports: which latents are on, and what that alone says about an image."""

from typing import Any, Final, NamedTuple

import numpy as np
import scipy.sparse
import scipy.special
from numpy.typing import NDArray

from vsc_serve.codes import Codes
from vsc_training.evaluation.retrieval import Array, Labels, firing_rates, support

_BLOCK_ROWS: Final = 65_536


class ClassJaccard(NamedTuple):
    """Mean overlap of the supports of two images."""

    same: float
    """Of one class; NaN when no class has two images."""
    same_pairs: int
    """Pairs behind it."""
    other: float
    """Of two classes; NaN when there is one class only."""
    other_pairs: int
    """Pairs behind it."""


def support_entropy_bits(codes: Array) -> float:
    """Return sum_j H(f_j) in bits, f_j the share of rows in which latent j is on.

    The entropy that supports would have if latents were independent: an upper bound on theirs, and
    so on what a support can say about an image. At most 1 bit a latent.

    Args:
        codes: Shape (rows, latents).
    """
    rates = firing_rates(codes)
    nats = scipy.special.entr(rates) + scipy.special.entr(1.0 - rates)
    return float(nats.sum() / np.log(2.0))


def distinct_supports(codes: Codes) -> int:
    """Return how many different supports the rows have.

    Args:
        codes: Shape (rows, latents).
    """
    packed = [
        np.packbits(codes[start : start + _BLOCK_ROWS].toarray() != 0, axis=1)
        for start in range(0, codes.shape[0], _BLOCK_ROWS)
    ]
    rows = np.ascontiguousarray(np.concatenate(packed))
    return len(np.unique(rows.view(f"V{rows.shape[1]}")))


def jaccard(first: Codes, second: Codes) -> NDArray[np.float64]:
    """Return the overlap of supports row by row: latents on in both over latents on in either.

    Two empty supports are the same: 1.

    Args:
        first: Shape (rows, latents).
        second: Same shape.

    Returns:
        Shape (rows,), in [0, 1].
    """
    of_first, of_second = (scipy.sparse.csr_array(support(codes)) for codes in (first, second))
    both = _counts(of_first.multiply(of_second))
    either = _counts(of_first) + _counts(of_second) - both
    overlap: NDArray[np.float64] = np.divide(both, either, out=np.ones_like(both), where=either > 0)
    return overlap


def jaccard_by_class(codes: Codes, labels: Labels, *, seed: int = 0) -> ClassJaccard:
    """Compare the overlap of supports within classes and between them.

    The rows are shuffled; each is paired with the next one of its class (the last one with the
    first), and with the next one of all, which counts where it is of another class.

    Args:
        codes: Shape (rows, latents).
        labels: One class per row.
        seed: Seed of the shuffling.
    """
    _, classes = np.unique(np.asarray(labels), return_inverse=True)
    order = np.random.default_rng(seed).permutation(codes.shape[0])
    by_class = order[np.argsort(classes[order], kind="stable")]
    groups = np.split(by_class, np.flatnonzero(np.diff(classes[by_class])) + 1)
    same = [(group, np.roll(group, -1)) for group in groups if len(group) > 1]
    partner = np.roll(order, -1)
    is_other = classes[order] != classes[partner]
    return ClassJaccard(
        *_mean_jaccard(codes, same),
        *_mean_jaccard(codes, [(order[is_other], partner[is_other])]),
    )


def _mean_jaccard(
    codes: Codes, pairs: list[tuple[NDArray[np.intp], NDArray[np.intp]]]
) -> tuple[float, int]:
    overlaps = [jaccard(codes[left], codes[right]) for left, right in pairs if len(left)]
    if not overlaps:
        return float("nan"), 0
    joined = np.concatenate(overlaps)
    return float(joined.mean()), len(joined)


def _counts(is_on: Any) -> NDArray[np.float64]:
    return np.asarray(is_on.sum(axis=1), np.float64).ravel()
