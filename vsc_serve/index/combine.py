"""Queries that are put together: like some codes and unlike others, or made of features."""

from collections.abc import Sequence

import numpy as np
import scipy.sparse
from numpy.typing import NDArray

from vsc_serve.codes import Codes, canonical, stack_codes
from vsc_serve.errors import UsageError
from vsc_serve.index.base import Searchable
from vsc_serve.index.metrics import norms_of


def combine(likes: Sequence[Codes], unlikes: Sequence[Codes] = ()) -> Codes:
    """Put codes together: the mean of some minus the mean of others, each scaled to length 1.

    Rocchio's rule with equal weights. One code alone stays as it is; empty ones add nothing.

    Args:
        likes: Codes of one row each, at least one.
        unlikes: Codes of what hits should not be like.
    """
    if len(likes) == 1 and not unlikes:
        return likes[0]
    latents = likes[0].shape[1]
    codes = stack_codes([*likes, *unlikes], latents)
    norms = norms_of(codes, "queries")
    shares = np.repeat([1 / len(likes), -1 / max(1, len(unlikes))], [len(likes), len(unlikes)])
    weights = np.divide(shares, norms, out=np.zeros(len(norms)), where=norms > 0)
    return canonical(scipy.sparse.csr_array(weights[None]) @ codes.astype(np.float64))


def are_equal(one: Codes, other: Codes) -> bool:
    """Tell whether two codes of one row each have the same latents and values."""
    same = np.array_equal(one.indices, other.indices) and np.array_equal(one.data, other.data)
    return bool(same)


def among_features(
    rows: Searchable, has: Sequence[int], has_not: Sequence[int]
) -> NDArray[np.bool_]:
    """Tell of each row whether all features of one list are active in it, and none of another.

    Raises:
        UsageError: No such feature, or one is in both lists.
    """
    count, latents = rows.rows.shape
    for feature in (*has, *has_not):
        if not 0 <= feature < latents:
            raise UsageError(f"no feature {feature}: the codes have latents 0 to {latents - 1}")
    both = sorted({*has} & {*has_not})
    if both:
        raise UsageError(f"feature {both[0]} is in `has` and in `not`: no row is like that")
    among = np.ones(count, np.bool_)
    for feature in has:
        active = np.zeros(count, np.bool_)
        active[rows.having(feature)] = True
        among &= active
    for feature in has_not:
        among[rows.having(feature)] = False
    return among


def feature_query(rows: Searchable, has: Sequence[int], among: NDArray[np.bool_]) -> Codes:
    """Return a code of features alone: each with the sign that it mostly has in the rows.

    Args:
        rows: What is searched.
        has: The features.
        among: The rows that have them.
    """
    found = rows.rows[np.flatnonzero(among)]
    totals = np.bincount(found.indices, found.data.astype(np.float64), found.shape[1])
    latents = np.unique(np.array(has, np.int64))
    values = np.where(totals[latents] < 0, -1, 1).astype(np.float32)
    shape = (1, found.shape[1])
    return canonical(
        scipy.sparse.csr_array((values, latents, np.array([0, len(latents)])), shape=shape)
    )
