"""Scores of codes: what two codes are compared by.

All are computed from a sum over shared latents, the product, and the size of each code alone:

    dot       a . z
    cosine    a . z / (|a| |z|), and 0 where one of both is empty
    jaccard   |A and Z| / |A or Z| of the active latents, and 0 where both are empty
    hamming   1 - |A xor Z| / J, the share of all latents that are active in both or in none
"""

from typing import Final, Literal, get_args

import numpy as np
import scipy.sparse
from numpy.typing import NDArray

from vsc_serve.codes import Codes
from vsc_serve.errors import InputError

Metric = Literal["cosine", "dot", "jaccard", "hamming"]
METRICS: Final = get_args(Metric)

OF_SUPPORTS: Final = ("jaccard", "hamming")
"""Metrics that see which latents are active, and not their values."""


def sizes(codes: Codes, metric: Metric, name: str) -> NDArray[np.float64]:
    """Return what a metric needs of each code alone: its norm, or how many latents are active.

    Raises:
        InputError: Values are not finite; `name` says which codes.
    """
    norms = norms_of(codes, name)
    return np.diff(codes.indptr).astype(np.float64) if metric in OF_SUPPORTS else norms


def norms_of(codes: Codes, name: str) -> NDArray[np.float64]:
    """Return the norm of each row. Raises InputError for values that are not finite."""
    rows = rows_between(codes, 0, codes.shape[0])
    np.square(rows.data, out=rows.data)
    squares = np.asarray(rows @ np.ones(codes.shape[1]), np.float64)
    bad = np.flatnonzero(~np.isfinite(squares))
    if len(bad):
        raise InputError(
            f"row {bad[0]} of the {name} holds values that are not finite (NaN or infinity)."
            " Encode again.",
            kind="not finite",
            row=int(bad[0]),
        )
    return np.sqrt(squares)


def scores(
    metric: Metric,
    products: NDArray[np.float64],
    of_rows: NDArray[np.float64],
    of_queries: NDArray[np.float64] | float,
    latents: int,
) -> NDArray[np.float64]:
    """Turn products into scores; the arguments are broadcast against one another.

    Args:
        metric: The metric.
        products: Sums over shared latents, of the values or for supports of ones. Overwritten.
        of_rows: `sizes` of the rows.
        of_queries: `sizes` of the queries.
        latents: Latents J.
    """
    if metric == "dot":
        return products
    if metric == "hamming":
        return 1 - (of_rows + of_queries - 2 * products) / latents
    scale = of_rows * of_queries if metric == "cosine" else of_rows + of_queries - products
    return np.divide(products, scale, out=products, where=scale > 0)  # of empty codes it is 0


def rows_between(codes: Codes, start: int, stop: int) -> "scipy.sparse.csr_array[np.float64]":
    """Return consecutive rows in float64, without a copy of their indices."""
    bounds = codes.indptr[start : stop + 1]
    entries = slice(bounds[0], bounds[-1])
    data = codes.data[entries].astype(np.float64)
    shape = (len(bounds) - 1, codes.shape[1])
    return scipy.sparse.csr_array((data, codes.indices[entries], bounds - bounds[0]), shape=shape)


def supports(codes: Codes) -> Codes:
    """Return codes whose values are 1."""
    parts = (np.ones_like(codes.data), codes.indices, codes.indptr)
    return scipy.sparse.csr_array(parts, shape=codes.shape)
