"""Codes against the true factors of the data: MIG, DCI, SAP and the paper's correlation.

All functions take codes (images, latents), dense or CSR, and factors (images, factors), where NaN
says that a factor has no effect on that image (the curl of a mouth that is not there). Such images
are left out for that factor alone. A factor that is the same wherever it has an effect is refused:
nothing can be said about it. docs/metrics.md gives the definitions beside those of the papers.
"""

import math
from typing import Final, NamedTuple

import numpy as np
import scipy.sparse
import scipy.special
from numpy.typing import ArrayLike, NDArray

from vsc_serve.errors import UsageError
from vsc_training.evaluation.retrieval import Array

BINS: Final = 20
"""Parts of equal count that a continuous column is cut into, as in disentanglement_lib."""
_PENALTY_COUNT: Final = 20
_SMALLEST_PENALTY: Final = 1e-3
"""As a share of the penalty at which all coefficients are 0."""
_MAX_STEPS: Final = 3000
_TOLERANCE: Final = 1e-6
"""Largest change of a coefficient (of standardised columns) in a step that ends the descent."""


class Dci(NamedTuple):
    """Disentanglement, completeness and informativeness, each in [0, 1]."""

    disentanglement: float
    """Whether a latent tells of one factor only; latents weighted by their importance."""
    completeness: float
    """Whether one latent is enough for a factor; mean over the factors."""
    informativeness: float
    """Share of a factor's variance that the codes predict on images not fitted; mean."""


class FactorCorrelation(NamedTuple):
    """How the size of each latent goes with the size of each factor."""

    matrix: NDArray[np.float64]
    """|correlation of |code_j| and |factor_k||, shape (latents, factors)."""
    strongest: float
    """Mean over the factors of the largest entry."""
    contrast: float
    """Mean over the factors of the largest entry less the same latent's mean entry elsewhere."""


def mig(codes: Array, factors: ArrayLike) -> float:
    """Return the mutual information gap (Chen et al. 2018, arXiv:1802.04942, equation 6).

    Mean over the factors of [I(z_1; f) - I(z_2; f)] / H(f), with z_1 and z_2 the two latents that
    know most about f. 1 when one latent determines each factor and no other knows of it; 0 when two
    know the same. Continuous columns are cut into `BINS` parts of equal count; the zeros of a
    latent that is off are a value of their own.

    Args:
        codes: Shape (images, latents).
        factors: Shape (images, factors); NaN where a factor has no effect.

    Raises:
        UsageError: Rows do not match, or a factor is constant.
    """
    dense, values = _checked(codes, factors)
    information, entropy = _mutual_information(dense, values)
    return float(np.mean(_gap(information) / entropy))


def sap(codes: Array, factors: ArrayLike) -> float:
    """Return the separated attribute predictability (Kumar et al. 2018, arXiv:1711.00848, 3.1).

    Mean over the factors of the gap between the two latents that predict it best by themselves: by
    squared correlation for a factor of many values, by the best threshold for one of two values.
    That accuracy is balanced and counted from chance, 2 * (accuracy - 1/2), so that 1 is perfect
    for both kinds (in the paper the second kind ends at 1/2).

    Args:
        codes: Shape (images, latents).
        factors: Shape (images, factors); NaN where a factor has no effect.

    Raises:
        UsageError: Rows do not match, or a factor is constant.
    """
    return float(np.mean(_gap(_scores_alone(codes, factors))))


def best_alone(codes: Array, factors: ArrayLike) -> float:
    """Return how well one latent predicts a factor: the mean of the best scores behind `sap`.

    With supports for codes and attributes that are there or not for factors: 1 when each attribute
    has a latent that is on just where it is there. The gap of `sap` is no measure of that, as all
    latents that an attribute switches on tell it.

    Args:
        codes: Shape (images, latents).
        factors: Shape (images, factors); NaN where a factor has no effect.

    Raises:
        UsageError: Rows do not match, or a factor is constant.
    """
    return float(_scores_alone(codes, factors).max(0).mean())


def dci(codes: Array, factors: ArrayLike, *, seed: int = 0) -> Dci:
    """Return disentanglement, completeness and informativeness (Eastwood, Williams, ICLR 2018).

    A lasso predicts each factor from all latents (the first of the paper's two regressors); the
    importance R_jk of latent j for factor k is the size of its coefficient, both standardised.
    Disentanglement of a latent is 1 - entropy of its row of R as shares, in base of the factors,
    weighted by the row's sum; completeness of a factor is 1 - entropy of its column, in base of the
    latents, and 0 when no latent has a coefficient.

    Half of the images fit the coefficients, a quarter chooses the penalty (the largest one within a
    standard error of the best), a quarter gives the informativeness.

    Args:
        codes: Shape (images, latents).
        factors: Shape (images, factors); NaN where a factor has no effect.
        seed: Seed of the parts.

    Raises:
        UsageError: Rows do not match, or a factor is constant.
    """
    dense, values = _checked(codes, factors)
    order = np.random.default_rng(seed).permutation(len(dense))
    fits = [_predict(dense[order], column) for column in values[order].T]
    importance = np.stack([np.abs(coefficients) for coefficients, _ in fits], axis=1)
    per_latent = 1.0 - _entropy_of_shares(importance, axis=1)
    per_factor = 1.0 - _entropy_of_shares(importance, axis=0)
    weight = importance.sum(1)
    total = float(weight.sum())
    return Dci(
        disentanglement=float(weight @ per_latent) / total if total else 0.0,
        completeness=float(per_factor.mean()),
        informativeness=float(np.mean([explained for _, explained in fits])),
    )


def factor_correlation(codes: Array, factors: ArrayLike) -> FactorCorrelation:
    """Correlate latents with factors (UAI 2019, supplement F, figure 9).

    As in the authors' notebook: sizes on both sides (|z| and |f|), a factor without effect counts
    as 0, and the result as an absolute value. A latent that never changes correlates with nothing.

    Args:
        codes: Shape (images, latents).
        factors: Shape (images, factors); NaN where a factor has no effect.

    Raises:
        UsageError: Rows do not match, or a factor is constant.
    """
    dense, values = _checked(codes, factors)
    size = np.abs(np.nan_to_num(values, nan=0.0))
    matrix = np.abs(_standardised(np.abs(dense)).T @ _standardised(size)) / len(dense)
    best = matrix.argmax(0)
    own = matrix[best, np.arange(matrix.shape[1])]
    other_count = max(matrix.shape[1] - 1, 1)
    elsewhere = (matrix[best].sum(1) - own) / other_count
    return FactorCorrelation(matrix, float(own.mean()), float((own - elsewhere).mean()))


def discretise(column: NDArray[np.float64]) -> NDArray[np.int64]:
    """Number the values of a column from 0, for counting.

    At most `BINS` different values stay as they are. Else 0 is a value of its own (a latent that is
    off), and what is left is cut into `BINS` parts of equal count; equal values stay together.

    Args:
        column: Finite values, shape (rows,).
    """
    different = np.unique(column)
    if len(different) <= BINS:
        return np.searchsorted(different, column)
    others = column[column != 0]
    limits = np.unique(np.quantile(others, np.linspace(0, 1, BINS + 1)[1:-1]))
    numbers = np.searchsorted(limits, column, side="left") + 1
    return np.where(column == 0, 0, numbers)


def _checked(codes: Array, factors: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    dense = codes.toarray() if scipy.sparse.issparse(codes) else codes
    values = np.asarray(factors, np.float64)
    if values.ndim != 2 or values.shape[1] == 0 or len(values) != dense.shape[0]:
        raise UsageError(
            f"factors of shape {values.shape} for codes of {dense.shape[0]} images."
            " Give one row per image and one column per factor."
        )
    for number, column in enumerate(values.T):
        if len(np.unique(column[~np.isnan(column)])) < 2:
            raise UsageError(f"factor {number} is the same in all images. Leave it out.")
    return np.asarray(dense, np.float64), values


def _gap(scores: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the largest score less the second largest of each column (0 for a missing second)."""
    padded = np.vstack([scores, np.zeros((1, scores.shape[1]))])
    second, first = np.partition(padded, -2, axis=0)[-2:]
    return np.asarray(first - second)


def _mutual_information(
    codes: NDArray[np.float64], factors: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return I(latent; factor), shape (latents, factors), and H(factor), in nats.

    One sparse product counts how often each value of a latent meets each value of a factor.
    """
    latents, starts = _indicators(codes)
    information = np.empty((codes.shape[1], factors.shape[1]))
    entropy = np.empty(factors.shape[1])
    for number, column in enumerate(factors.T):
        is_there = ~np.isnan(column)
        known, _ = _indicators(column[is_there, None])
        joint = np.asarray((latents[is_there].T @ known).toarray()) / known.shape[0]
        entropy[number] = -_sum_of_logs(joint[starts[0] : starts[1]].sum(0))
        of_values = _x_log_x(joint).sum(1) - _x_log_x(joint.sum(1))
        information[:, number] = np.add.reduceat(of_values, starts[:-1]) + entropy[number]
    return np.maximum(information, 0.0), entropy


def _indicators(
    columns: NDArray[np.float64],
) -> tuple["scipy.sparse.csr_array[np.float64, tuple[int, int]]", NDArray[np.int64]]:
    """Return one 0/1 column for each value of each column, and where each column's values start."""
    numbers = np.stack([discretise(column) for column in columns.T], axis=1)
    starts = np.concatenate([[0], np.cumsum(numbers.max(0) + 1)])
    row_count, column_count = columns.shape
    places = (numbers + starts[:-1]).ravel()
    bounds = np.arange(0, row_count * column_count + 1, column_count)
    shape = (row_count, int(starts[-1]))
    return scipy.sparse.csr_array((np.ones(places.size), places, bounds), shape=shape), starts


def _x_log_x(shares: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.asarray(scipy.special.xlogy(shares, shares))


def _sum_of_logs(shares: NDArray[np.float64]) -> float:
    return float(_x_log_x(shares).sum())


def _scores_alone(codes: Array, factors: ArrayLike) -> NDArray[np.float64]:
    """Return how well each latent by itself predicts each factor, shape (latents, factors)."""
    dense, values = _checked(codes, factors)
    return np.stack([_score_alone(dense, column) for column in values.T], axis=1)


def _score_alone(codes: NDArray[np.float64], column: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return how well each latent by itself predicts a factor, in [0, 1], shape (latents,)."""
    is_there = ~np.isnan(column)
    known, rows = column[is_there], codes[is_there]
    if len(np.unique(known)) > 2:
        correlation = _standardised(rows).T @ _standardised(known[:, None]) / len(rows)
        return np.square(correlation[:, 0])
    is_high = known == known.max()
    return np.array([_best_threshold(latent, is_high) for latent in rows.T])


def _best_threshold(latent: NDArray[np.float64], is_high: NDArray[np.bool_]) -> float:
    """Return 2 * (balanced accuracy of the best threshold - 1/2).

    A threshold that a share a of one group and a share b of the other exceed has the balanced
    accuracy (1 + |a - b|) / 2; so this is the largest distance between their distributions.
    """
    values = np.unique(latent)
    low, high = np.sort(latent[~is_high]), np.sort(latent[is_high])
    below_low = np.searchsorted(low, values, side="right") / len(low)
    below_high = np.searchsorted(high, values, side="right") / len(high)
    return float(np.abs(below_low - below_high).max())


def _entropy_of_shares(importance: NDArray[np.float64], *, axis: int) -> NDArray[np.float64]:
    """Return the entropy of each row's (axis 1) or column's (axis 0) shares; 1 without importance.

    In the base that makes equal shares 1. With a single place to go the entropy is 0.
    """
    total = importance.sum(axis, keepdims=True)
    shares = np.divide(importance, total, out=np.zeros_like(importance), where=total > 0)
    base = math.log(max(importance.shape[axis], 2))
    return np.where(total.squeeze(axis) > 0, -_x_log_x(shares).sum(axis) / base, 1.0)


def _predict(
    codes: NDArray[np.float64], column: NDArray[np.float64]
) -> tuple[NDArray[np.float64], float]:
    """Return the lasso's coefficients for one factor, and the share of variance they explain."""
    is_there = ~np.isnan(column)
    rows, known = codes[is_there], column[is_there]
    half, three_quarters = len(rows) // 2, 3 * len(rows) // 4
    mean, std = rows[:half].mean(0), rows[:half].std(0)
    scaled = np.divide(rows - mean, std, out=np.zeros_like(rows), where=std > 0)
    middle, spread = known[:half].mean(), known[:half].std() or 1.0
    target = (known - middle) / spread
    path = lasso_path(scaled[:half], target[:half])
    chosen = _simplest_good(path, scaled[half:three_quarters], target[half:three_quarters])
    return chosen, _explained(target[three_quarters:], scaled[three_quarters:] @ chosen)


def lasso_path(rows: NDArray[np.float64], target: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return lasso coefficients for falling penalties, shape (penalties, columns).

    Each minimises |target - rows @ w|^2 / (2 count) + penalty |w|_1. The penalties fall from the
    smallest one that leaves only zeros to a thousandth of it.

    Args:
        rows: Standardised columns, shape (count, columns).
        target: Standardised, shape (count,).
    """
    gram, product = rows.T @ rows / len(rows), rows.T @ target / len(rows)
    highest = float(np.abs(product).max())
    penalties = highest * np.geomspace(1.0, _SMALLEST_PENALTY, _PENALTY_COUNT)
    return _descend(gram, product[:, None], penalties).T


def _descend(
    gram: NDArray[np.float64], product: NDArray[np.float64], penalties: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Solve all penalties at once by accelerated proximal descent (Beck, Teboulle 2009, FISTA).

    The momentum starts again whenever it points uphill (O'Donoghue, Candes 2015).
    """
    weights = ahead = np.zeros((len(gram), len(penalties)))
    momentum = np.ones(len(penalties))
    pace = 1.0 / max(float(np.linalg.eigvalsh(gram)[-1]), 1e-12)
    for _ in range(_MAX_STEPS):
        moved = ahead - pace * (gram @ ahead - product)
        new = np.sign(moved) * np.maximum(np.abs(moved) - pace * penalties, 0.0)
        change = new - weights
        if np.abs(change).max() < _TOLERANCE:
            return new
        is_uphill = ((ahead - new) * change).sum(0) > 0
        momentum = np.where(is_uphill, 1.0, momentum)
        next_momentum = 0.5 * (1.0 + np.sqrt(1.0 + 4.0 * momentum**2))
        ahead = new + (momentum - 1.0) / next_momentum * change
        weights, momentum = new, next_momentum
    return weights


def _simplest_good(
    path: NDArray[np.float64], rows: NDArray[np.float64], target: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Return the first coefficients of the path within one standard error of the best."""
    errors = np.square(target - path @ rows.T)
    mean = errors.mean(1)
    best = int(mean.argmin())
    margin = errors[best].std() / math.sqrt(len(target))
    return np.asarray(path[int(np.argmax(mean <= mean[best] + margin))])


def _explained(target: NDArray[np.float64], predicted: NDArray[np.float64]) -> float:
    """Return 1 - squared error / variance, at least 0."""
    variance, error = float(np.var(target)), float(np.mean(np.square(target - predicted)))
    return max(0.0, 1.0 - error / variance) if variance > 0 else 0.0


def _standardised(columns: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return columns of mean 0 and variance 1; a column that never changes becomes 0."""
    std = columns.std(0)
    centred = columns - columns.mean(0)
    is_constant = std <= 1e-12 * np.maximum(np.abs(columns).max(0, initial=0.0), 1.0)
    scaled: NDArray[np.float64] = np.zeros_like(centred)
    np.divide(centred, std, out=scaled, where=~is_constant)
    return scaled
