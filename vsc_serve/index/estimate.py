"""What an index of codes would take, before it is built."""

from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from vsc_serve.codes import CodeStatistics, read_parts
from vsc_serve.errors import InputError

_ENTRY_BYTES: Final = 16
"""Each entry of a code is stored by row and by latent, with its number and value."""
_ROW_BYTES: Final = 20
"""Norm, row bound and id bound of a row."""


def cost(firing: NDArray[np.int64], rows: int) -> dict[str, Any]:
    """Return the active latents of a row, and what a query like the rows reads, on average.

    Args:
        firing: In how many rows each latent is active.
        rows: Rows.
    """
    squares = float((firing.astype(np.float64) ** 2).sum())
    return {
        "active": int(firing.sum()) / rows if rows else 0.0,
        "postings_per_query": squares / rows if rows else 0.0,
    }


def estimate(path: Path) -> dict[str, Any]:
    """Estimate the index of a file or folder of codes. Raises InputError."""
    total, id_bytes = None, 0
    for part in read_parts(path):
        found = CodeStatistics.of(part.codes)
        if total is not None and total.latents != found.latents:
            raise InputError(f"{path}: shards of {total.latents} and {found.latents} latents")
        id_bytes += sum(len(name.encode("utf-8", "surrogatepass")) for name in part.ids)
        if total is None:
            total = found
        else:
            total.add(found)
    if total is None:
        raise InputError(f"{path}: no codes")
    size = total.entries * _ENTRY_BYTES + total.images * _ROW_BYTES + id_bytes
    return {
        "rows": total.images,
        "latents": total.latents,
        **cost(total.firing, total.images),
        "bytes": size,
    }
