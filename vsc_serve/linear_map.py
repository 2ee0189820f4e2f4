"""The linear map of a bundle: from codes straight to the data, in one matrix product.

With it a row of codes can be compared with a query itself, and not with the query's code alone
(`index.rerank`), and the values of a code can be fitted once more (`LinearMap.refit`). It lies in
the bundle's optional `linear_map.npz`; docs/formats.md describes the file.
"""

import io
import math
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from vsc_serve.atomic import atomic_file
from vsc_serve.bundle import LINEAR_MAP, Bundle
from vsc_serve.codes import Codes, Member, build_csr, write_members
from vsc_serve.errors import BundleError, InputError
from vsc_serve.untrusted import inside, open_plain

MAX_BYTES: Final = 2**30
"""Weights, bias and center together; a file that holds more is refused."""

_BLOCK_VALUES: Final = 2**18
"""Decoded values, or weights of supports, held at a time: what stays in a cache."""
_HEADER_BYTES: Final = 1024
"""Header of an array in a file, at most."""
_RIDGE: Final = 1e-6
"""Ridge of refitted values, in units of the mean squared length of the weights involved."""
_SMALLEST: Final = np.finfo(np.float32).tiny


@dataclass(frozen=True)
class LinearMap:
    """A linear decoder: `codes @ weights + bias` approximates `rows - center`.

    Rows are in the units of the data: pixels / 255 for images, the vectors themselves, or the
    embedding that a backbone gives.
    """

    weights: NDArray[np.float32]
    """Shape (latents, dimensions)."""
    bias: NDArray[np.float32]
    """Shape (dimensions,)."""
    center: NDArray[np.float32]
    """Shape (dimensions,)."""

    def __post_init__(self) -> None:
        dimensions = self.weights.shape[1:]
        if len(dimensions) != 1 or not self.bias.shape == self.center.shape == dimensions:
            shapes = [part.shape for part in (self.weights, self.bias, self.center)]
            raise ValueError(f"weights, bias and center of shapes {shapes} do not go together")
        if not all(np.isfinite(part).all() for part in (self.weights, self.bias, self.center)):
            raise ValueError("holds values that are not finite")

    def project(self, rows: NDArray[Any]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Return what a query's score against any code is made of.

        With x the row less `center`, scaled to length 1: u = W x and c = b . x, so that
        (u . z + c) / |z W + b| is the cosine of x and the decoded code z. Of a row that is `center`
        itself both are 0.

        Args:
            rows: Data, flattened, shape (rows, dimensions).

        Returns:
            u, shape (rows, latents), and c, shape (rows,).
        """
        moved = rows.astype(np.float64) - self.center
        length = np.linalg.norm(moved, axis=1, keepdims=True)
        unit = np.divide(moved, length, out=np.zeros_like(moved), where=length > 0)
        return unit @ self.weights.T.astype(np.float64), unit @ self.bias.astype(np.float64)

    def norms(self, codes: Codes) -> NDArray[np.float64]:
        """Return the length of each decoded row, |z W + b|, in bounded memory."""
        self._check(codes)
        height = max(1, _BLOCK_VALUES // max(len(self.bias), 1))
        parts = [
            np.linalg.norm(codes[start : start + height] @ self.weights + self.bias, axis=1)
            for start in range(0, codes.shape[0], height)
        ]
        return np.concatenate(parts).astype(np.float64) if parts else np.empty(0)

    def refit(self, codes: Codes, rows: NDArray[Any]) -> Codes:
        """Return codes with the same entries, at the values that decode nearest to their rows.

        The values v of a row x on its active latents S minimise |x - center - b - v W_S|^2, with a
        ridge so small that it matters only where weights of S depend on one another. Which latents
        are active stays as it was: a value that comes out as 0, which a code cannot store, becomes
        the smallest positive float32. One that float32 cannot hold is infinite.

        Args:
            codes: Shape (rows, latents).
            rows: What was encoded, flattened, shape (rows, dimensions).
        """
        self._check(codes)
        values = np.empty(codes.nnz, np.float32)
        for chosen, entries in _equal_supports(codes, len(self.bias)):
            weights = self.weights[codes.indices[entries]].astype(np.float64)
            goal = rows[chosen].astype(np.float64) - self.center - self.bias
            found = _least_squares(weights, goal)
            values[entries] = np.where(found == 0, _SMALLEST, found)
        return build_csr(values, codes.indices, codes.indptr, codes.shape[1])

    def _check(self, codes: Codes) -> None:
        if codes.shape[1] != len(self.weights):
            raise InputError(
                f"codes have {codes.shape[1]} latents, the linear map has {len(self.weights)}."
                " Use the model that made the codes."
            )


def _equal_supports(
    codes: Codes, dimensions: int
) -> Iterator[tuple[NDArray[np.intp], NDArray[np.intp]]]:
    """Yield rows of equally many entries, and where these are in `codes.data`.

    Blocks are such that the weights of all entries fit into `_BLOCK_VALUES`, unless one row is
    larger.

    Yields:
        Rows, shape (rows,), and positions of their entries, shape (rows, entries).
    """
    counts = np.diff(codes.indptr)
    for count in np.unique(counts[counts > 0]).tolist():
        rows = np.flatnonzero(counts == count)
        height = max(1, _BLOCK_VALUES // (count * dimensions))
        for start in range(0, len(rows), height):
            chosen = rows[start : start + height]
            yield chosen, codes.indptr[chosen, None].astype(np.intp) + np.arange(count)


def _least_squares(weights: NDArray[np.float64], goal: NDArray[np.float64]) -> NDArray[np.float32]:
    """Return v that minimises |goal - v weights|^2 + ridge |v|^2, for each row on its own.

    A row's values do not depend on the rows beside it: every product is of one row.

    Args:
        weights: Shape (rows, entries, dimensions).
        goal: Shape (rows, dimensions).
    """
    gram = weights @ weights.transpose(0, 2, 1)
    diagonal = np.einsum("rii->ri", gram)
    diagonal += _RIDGE * diagonal.mean(axis=1, keepdims=True) + np.finfo(np.float64).tiny
    right = np.einsum("rid,rd->ri", weights, goal)
    found = np.linalg.solve(gram, right[:, :, None])[:, :, 0]
    with np.errstate(over="ignore"):
        return found.astype(np.float32)


def write_linear_map(path: Path, linear_map: LinearMap) -> None:
    """Write a `linear_map.npz`, whole or not at all. The same map gives the same bytes."""
    members = [
        Member(name, np.float32, array.shape, [array]) for name, array in vars(linear_map).items()
    ]
    with atomic_file(path) as file:
        write_members(file, members, compress=False)


def read_linear_map(bundle: Bundle) -> LinearMap:
    """Read the linear map of a bundle, which may be a stranger's.

    Raises:
        BundleError: The bundle has none, or its shapes are not those of the manifest, or values are
            not finite.
    """
    path, manifest = bundle.path / LINEAR_MAP, bundle.manifest
    require_linear_map(bundle)
    latents, dimensions = manifest.latent_dim, manifest.data_dim
    shapes = {"weights": (latents, dimensions), "bias": (dimensions,), "center": (dimensions,)}
    size = sum(4 * math.prod(shape) for shape in shapes.values())
    if size > MAX_BYTES:
        raise BundleError(f"{path}: {size:,} bytes, and up to {MAX_BYTES:,} are read.")
    try:
        with open_plain(inside(bundle.path, LINEAR_MAP)) as file, zipfile.ZipFile(file) as archive:
            return LinearMap(**{name: _read(archive, name, shapes[name]) for name in shapes})
    # zipfile, zlib and numpy have no common class for what they raise on damaged bytes.
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise BundleError(f"{path}: damaged ({reason}). Export again.") from error


def require_linear_map(bundle: Bundle) -> None:
    """Raise BundleError for a bundle without a linear map."""
    if LINEAR_MAP not in bundle.manifest.files:
        raise BundleError(
            f"{bundle.path}: no {LINEAR_MAP}, which a second stage and refitted values need."
            " Export the run again with this version, or use a bundle that has one."
        )


def _read(archive: zipfile.ZipFile, name: str, shape: tuple[int, ...]) -> NDArray[np.float32]:
    """Read one array, and no more than an array of this shape can take. Raises ValueError."""
    expected = 4 * math.prod(shape) + _HEADER_BYTES
    with archive.open(f"{name}.npy") as stream:
        content = stream.read(expected + 1)
    if len(content) > expected:
        raise ValueError(f"{name} is larger than the manifest says")
    array: NDArray[Any] = np.lib.format.read_array(io.BytesIO(content), allow_pickle=False)
    if array.dtype != np.float32 or array.shape != shape:
        raise ValueError(
            f"{name} is {array.dtype} of shape {array.shape}, but the manifest says float32 of"
            f" shape {shape}"
        )
    return np.ascontiguousarray(array)
