"""Search codes by dense vectors of the space that they decode to.

A code decodes by the linear map of its bundle to z W + b. So any vector x of that space is a query,
whatever made it: an embedding of a text where the codes are of images and one encoder embeds both.
"""

from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from vsc_serve.codes import Codes
from vsc_serve.errors import InputError, UsageError
from vsc_serve.index.exact import Nearest
from vsc_serve.linear_map import LinearMap

_SCORES: Final = 2**21
"""Scores that are held at a time, 16 MiB."""
_QUERIES: Final = 32


def search_vectors(
    codes: Codes,
    linear_map: LinearMap,
    vectors: NDArray[Any],
    *,
    norms: NDArray[np.float64] | None = None,
    top: int = 10,
) -> Nearest:
    """Find the rows whose decoded codes are most like each vector, among all rows.

    The score of vector x and row z is the cosine of both: (u . z + b . x) / (|x| |z W + b|) with
    u = W x, so that a row costs a product per active latent. Of a row that decodes to nothing it is
    0. Equal scores are in row order.

    Args:
        codes: Slab means or refitted values, shape (rows, latents).
        linear_map: The map of the model that made them.
        vectors: In the units of the data, shape (vectors, dimensions).
        norms: Lengths of the decoded rows, as `LinearMap.norms` gives them, where they are known.
        top: Hits wanted of each vector, at least 1.

    Raises:
        InputError: Vectors of other dimensions, one that is not finite or 0 everywhere; or codes of
            another number of latents.
        UsageError: `top` is below 1.
    """
    if top < 1:
        raise UsageError(f"`top` must be at least 1, not {top}")
    check_dimensions(vectors, linear_map)
    for row, reason in unusable(vectors).items():
        raise InputError(f"row {row} of the vectors {reason}", kind="not finite", row=row)
    lengths = linear_map.norms(codes) if norms is None else norms
    parts = [
        _nearest(codes, lengths, *linear_map.project(vectors[start : start + _QUERIES]), top)
        for start in range(0, max(len(vectors), 1), _QUERIES)
    ]
    return Nearest(*map(np.concatenate, zip(*parts, strict=True)))


def check_dimensions(vectors: NDArray[Any], linear_map: LinearMap) -> None:
    """Raise InputError for what are no vectors of the space that a map decodes to."""
    wanted = len(linear_map.bias)
    if vectors.ndim != 2 or vectors.shape[1] != wanted or vectors.dtype.kind not in "fiu":
        raise InputError(
            f"{vectors.dtype} of shape {vectors.shape}, but the model decodes to vectors of"
            f" {wanted} numbers. Give vectors of the space that it was fitted to."
        )


def unusable(vectors: NDArray[Any]) -> dict[int, str]:
    """Return which vectors have no direction, and why."""
    bad = dict.fromkeys(np.flatnonzero(~np.isfinite(vectors).all(axis=1)).tolist(), _NOT_FINITE)
    return bad | dict.fromkeys(np.flatnonzero(~vectors.any(axis=1)).tolist(), _ZERO)


_NOT_FINITE: Final = "holds values that are not finite (NaN or infinity)"
_ZERO: Final = "is 0 everywhere, and nothing is like it"


def _nearest(
    codes: Codes,
    lengths: NDArray[np.float64],
    u: NDArray[np.float64],
    c: NDArray[np.float64],
    top: int,
) -> Nearest:
    rows = [np.empty(0, np.int64) for _ in u]
    scores = [np.empty(0) for _ in u]
    height = _SCORES // max(len(u), 1)
    for start in range(0, codes.shape[0], height):
        block = slice(start, start + height)
        products = np.asarray(codes[block] @ u.T, np.float64).T + c[:, None]
        scale = np.broadcast_to(lengths[block], products.shape)
        found = np.divide(products, scale, out=np.zeros_like(products), where=scale > 0)
        for query, of_query in enumerate(found):
            places = _best(of_query, top)
            rows[query] = np.concatenate([rows[query], places + start])
            scores[query] = np.concatenate([scores[query], of_query[places]])
    order = [_best(of_query, top) for of_query in scores]
    shape = len(u), min(top, codes.shape[0])
    return Nearest(
        np.array([part[best] for part, best in zip(rows, order, strict=True)]).reshape(shape),
        np.array([part[best] for part, best in zip(scores, order, strict=True)]).reshape(shape),
    )


def _best(scores: NDArray[np.float64], top: int) -> NDArray[np.intp]:
    """Return the places of the best scores, best first; of equal ones the first."""
    places = np.arange(len(scores))
    if top < len(scores):
        places = np.flatnonzero(scores >= np.partition(scores, -top)[-top])
    chosen: NDArray[np.intp] = places[np.argsort(-scores[places], kind="stable")[:top]]
    return chosen
