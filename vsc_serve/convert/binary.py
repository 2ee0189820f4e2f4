"""Formats of numbers: BigANN's `.csr`, Parquet and AnnData's `.h5ad`."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Final

import numpy as np
from numpy.typing import NDArray

from vsc_serve.convert.rows import Rows, Survey, gather

if TYPE_CHECKING:
    import pandas

_ROW_GROUP: Final = 50_000
"""Rows of a Parquet row group: what a reader loads at a time."""


def write_bigann(file: BinaryIO, rows: Rows, facts: Survey) -> None:
    """Write the sparse format of the BigANN benchmarks, all little-endian.

    Rows, columns and entries (int64); row bounds (int64); columns (int32); values (float32). The
    rows are gone through once for each of the three.
    """
    file.write(np.array([facts.rows, facts.columns, facts.entries], "<i8").tobytes())
    for bounds in _bounds(rows):
        file.write(bounds.astype("<i8").tobytes())
    for block in rows:
        file.write(block.codes.indices.astype("<i4").tobytes())
    for block in rows:
        file.write(block.codes.data.astype("<f4").tobytes())


def write_ids(file: BinaryIO, rows: Rows) -> None:
    """Write the ids as JSON strings, one a line, for a format that has no place for them."""
    for block in rows:
        file.write("".join(f"{json.dumps(name)}\n" for name in block.ids).encode())


def _bounds(rows: Rows) -> Iterator[NDArray[np.int64]]:
    yield np.zeros(1, np.int64)
    entries = 0
    for block in rows:
        yield block.codes.indptr[1:].astype(np.int64) + entries
        entries += block.codes.nnz


def write_parquet(file: BinaryIO, rows: Rows, facts: Survey) -> None:
    """Write `id`, `indices`, `values` (and `gamma`, `sigma`), one row group after the other.

    Provenance is in the schema's metadata, under `vsc`.
    """
    import pyarrow
    import pyarrow.parquet

    fields = [("id", pyarrow.string()), ("indices", pyarrow.list_(pyarrow.int32()))]
    fields += [(name, pyarrow.list_(pyarrow.float32())) for name in ("values", *facts.aligned)]
    schema = pyarrow.schema(fields, metadata={"vsc": _meta_text(facts)})
    with pyarrow.parquet.ParquetWriter(file, schema) as writer:
        for block in rows.blocks(_ROW_GROUP):
            bounds = block.codes.indptr.astype(np.int32)
            lists = [block.codes.indices.astype(np.int32), block.codes.data]
            lists += [getattr(block, name) for name in facts.aligned]
            columns = [pyarrow.array(block.ids, pyarrow.string())]
            columns += [pyarrow.ListArray.from_arrays(bounds, values) for values in lists]
            writer.write_batch(pyarrow.record_batch(columns, schema=schema))


def write_h5ad(path: Path, rows: Rows, facts: Survey) -> None:
    """Write an AnnData file: images are observations, latents are variables.

    All rows are in memory at once. `layers` holds `gamma` and `sigma` where the codes have them.
    """
    import anndata
    import pandas

    whole = gather(rows, facts)
    layers = {}
    for name in facts.aligned:
        layers[name] = whole.codes.copy()
        layers[name].data = getattr(whole, name)
    anndata.AnnData(
        X=whole.codes,
        obs=pandas.DataFrame(index=whole.ids),
        var=_variables(facts),
        layers=layers,
        uns={"vsc": {name: _simple(value) for name, value in facts.meta.items()}},
    ).write_h5ad(path)


def _variables(facts: Survey) -> "pandas.DataFrame":
    """Return a row for each column: its latent, and which sign of it after a split."""
    import pandas

    latents = np.arange(facts.columns) % max(facts.latent_dim, 1)
    is_negative = np.arange(facts.columns) >= facts.latent_dim
    suffixes = np.where(is_negative, "n", "p") if facts.is_split else np.full(facts.columns, "")
    names = [f"f{latent}{suffix}" for latent, suffix in zip(latents, suffixes, strict=True)]
    return pandas.DataFrame({"latent": latents}, index=names)


def _simple(value: Any) -> Any:
    """Return a value as HDF5 can hold it: what is no number or text becomes JSON."""
    return value if isinstance(value, str | int | float) else json.dumps(value)


def _meta_text(facts: Survey) -> str:
    return json.dumps(facts.meta, sort_keys=True)
