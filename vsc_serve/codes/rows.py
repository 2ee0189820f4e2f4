"""Sparse codes in memory: scipy CSR, and how dense rows become it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

import numpy as np
import scipy.sparse
from numpy.typing import NDArray

from vsc_serve.errors import UsageError

Codes: TypeAlias = "scipy.sparse.csr_array[np.float32, tuple[int, int]]"
"""Sparse codes, shape (images, latents), float32, sorted indices, no stored zero."""

_INT32_MAX: Final = 2**31 - 1


@dataclass(frozen=True, kw_only=True)
class CodeRows:
    """Codes, and what the model says about each entry."""

    codes: Codes
    """One row per image."""
    gamma: NDArray[np.float32] | None = None
    """Spike probability of each entry of `codes.data`, if asked for."""
    sigma: NDArray[np.float32] | None = None
    """Standard deviation of the slab of each entry of `codes.data`, if asked for."""
    targets: NDArray[np.float32] | None = None
    """What the decoder is to draw for each row, if asked for and there is a row: see
    `Encoder.targets`."""


def threshold_logit(tau: float) -> np.float32:
    """Return the spike logit that a probability of `tau` corresponds to: ln(tau / (1 - tau)).

    Computed in float64 and rounded once, so that every program compares against the same number.

    Args:
        tau: Spike threshold in (0, 1).

    Raises:
        UsageError: `tau` is not in (0, 1).
    """
    if not 0.0 < tau < 1.0:
        raise UsageError(f"tau must be above 0 and below 1, not {tau}")
    return np.float32(np.log(np.float64(tau)) - np.log1p(-np.float64(tau)))


def threshold(
    spike_logit: NDArray[np.float32], mu: NDArray[np.float32], tau: float
) -> NDArray[np.float32]:
    """Turn spike logits and slab means into deterministic codes: the reference of the graph's rule.

    Latent j of image i is `mu[i, j]` where `spike_logit[i, j] > logit(tau)`, and 0 elsewhere.
    Nothing is sampled: the same image gives the same code.

    Args:
        spike_logit: Log-odds of the spike, shape (images, latents).
        mu: Slab means, shape (images, latents). May be negative.
        tau: Spike threshold in (0, 1).

    Returns:
        Dense codes, shape (images, latents).
    """
    return np.where(spike_logit > threshold_logit(tau), mu, np.float32(0.0))


def dense_to_csr(dense: NDArray[np.float32]) -> Codes:
    """Compact dense codes, several times faster than `csr_array(dense)` on sparse rows.

    Args:
        dense: Codes, shape (images, latents).

    Returns:
        The same codes, with sorted indices and no stored zero.
    """
    positions = active_positions(dense)
    return csr_at(positions, dense.ravel()[positions], dense.shape)


def active_positions(dense: NDArray[np.float32]) -> NDArray[np.intp]:
    """Return where dense codes are not zero, as positions in `dense.ravel()`, ascending.

    Searching a mask of bytes is several times faster than searching the floats.
    """
    return np.flatnonzero(dense != 0)


def csr_at(
    positions: NDArray[np.intp], values: NDArray[np.float32], shape: tuple[int, ...]
) -> Codes:
    """Build codes of `shape` from ascending positions in their dense form, and the values there."""
    image_count, latent_dim = shape
    indptr = np.searchsorted(positions, np.arange(image_count + 1) * latent_dim)
    return build_csr(values, positions % latent_dim, indptr, latent_dim)


def build_csr(
    data: NDArray[np.float32], indices: NDArray[Any], indptr: NDArray[Any], latent_dim: int
) -> Codes:
    """Put CSR parts together with int32 indices, or int64 where the number of entries needs it."""
    integer = index_type(len(data))
    columns = indices.astype(integer, copy=False)
    bounds = indptr.astype(integer, copy=False)
    return scipy.sparse.csr_array((data, columns, bounds), shape=(len(indptr) - 1, latent_dim))


def index_type(entries: int) -> type[np.signedinteger]:
    """Return the type of indices and pointers: int32, or int64 where the count needs it."""
    return np.int32 if entries <= _INT32_MAX else np.int64


def canonical(matrix: Any) -> Codes:
    """Return a sparse matrix as codes are: float32, sorted, no stored zero, narrow indices.

    Codes that are so already are not copied. Raises ValueError for values that are no real numbers.
    """
    if matrix.dtype.kind not in "fiub":
        raise ValueError(f"values are {matrix.dtype}, not real numbers")
    codes = scipy.sparse.csr_array(matrix).astype(np.float32, copy=False)
    if not (codes.has_canonical_format and codes.data.all()):
        codes = codes.copy()
        codes.sum_duplicates()
        codes.eliminate_zeros()
    return build_csr(codes.data, codes.indices, codes.indptr, codes.shape[1])


def stack_codes(parts: Sequence[Codes], latent_dim: int) -> Codes:
    """Put codes below one another. An empty sequence gives no rows."""
    if not parts:
        return dense_to_csr(np.empty((0, latent_dim), np.float32))
    data = np.concatenate([part.data for part in parts])
    indices = np.concatenate([part.indices for part in parts])
    row_counts = np.concatenate([np.diff(part.indptr) for part in parts])
    indptr = np.zeros(len(row_counts) + 1, np.int64)
    np.cumsum(row_counts, out=indptr[1:])
    return build_csr(data, indices, indptr, latent_dim)


def empty_rows(latent_dim: int, *, aligned: bool = False) -> CodeRows:
    """Return the codes of no images, with gamma and sigma where `aligned` says so."""
    none = np.empty(0, np.float32) if aligned else None
    codes = dense_to_csr(np.empty((0, latent_dim), np.float32))
    return CodeRows(codes=codes, gamma=none, sigma=none)


def stack_rows(parts: Sequence[CodeRows], latent_dim: int) -> CodeRows:
    """Put rows below one another. An empty sequence gives no rows.

    Raises:
        ValueError: Some parts have gamma or sigma, and others have not.
    """
    if len(parts) == 1:
        return parts[0]
    return CodeRows(
        codes=stack_codes([part.codes for part in parts], latent_dim),
        gamma=concatenate_aligned("gamma", [part.gamma for part in parts]),
        sigma=concatenate_aligned("sigma", [part.sigma for part in parts]),
        targets=concatenate_aligned(
            "targets", [part.targets for part in parts if part.codes.shape[0]]
        ),
    )


def take_rows(rows: CodeRows, order: NDArray[np.int64]) -> CodeRows:
    """Return the given rows in the given order."""
    codes = rows.codes
    lengths = np.diff(codes.indptr)[order]
    bounds = np.zeros(len(order) + 1, np.int64)
    np.cumsum(lengths, out=bounds[1:])
    entries = np.repeat(codes.indptr[:-1][order] - bounds[:-1], lengths) + np.arange(bounds[-1])
    return CodeRows(
        codes=build_csr(codes.data[entries], codes.indices[entries], bounds, codes.shape[1]),
        gamma=None if rows.gamma is None else rows.gamma[entries],
        sigma=None if rows.sigma is None else rows.sigma[entries],
        targets=None if rows.targets is None else rows.targets[order],
    )


def concatenate_aligned(
    name: str, parts: Sequence[NDArray[np.float32] | None]
) -> NDArray[np.float32] | None:
    """Put gamma, sigma or targets together. Raises ValueError where only some parts have them."""
    given = [part for part in parts if part is not None]
    if given and len(given) < len(parts):
        raise ValueError(f"{len(given)} of {len(parts)} parts have {name}: all or none must")
    return np.concatenate(given) if given else None
