"""Formats of one or two lines a row, UTF-8. Each function turns a block of rows into lines.

Values are the shortest decimals that are read back as the same float32. JSON is pure ASCII, so that
no reader can take a character of an id for the end of a line.
"""

import json
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from vsc_serve.convert.rows import Block

Lines: TypeAlias = Iterator[str]

POINT_NAMESPACE: Final = uuid.uuid5(uuid.NAMESPACE_OID, "vsc-serve id of a row")
"""Names of points are made in it; another one would make other points of the same ids."""


@dataclass(frozen=True, kw_only=True)
class Target:
    """Settings of the text formats."""

    latent_dim: int
    """Latents J of the model; after a split there are twice as many columns."""
    columns: int
    field: str = "code"
    """Name of the field or vector that holds the code."""
    scale: float = 100.0
    """What values are multiplied with before they are rounded to integers."""


class _Row(NamedTuple):
    id: str
    columns: list[int]
    values: list[str]
    """Decimals."""


def jsonl(block: Block, target: Target) -> Lines:
    """Yield `{"id", "indices", "values"}`, and `gamma` and `sigma` where the codes have them."""
    extras = {
        name: _decimals(values)
        for name, values in (("gamma", block.gamma), ("sigma", block.sigma))
        if values is not None
    }
    bounds = block.codes.indptr.tolist()
    for number, row in enumerate(_rows(block)):
        entries = slice(bounds[number], bounds[number + 1])
        more = "".join(
            f', "{name}": [{", ".join(values[entries])}]' for name, values in extras.items()
        )
        yield f'{{"id": {json.dumps(row.id)}, {_indices_and_values(row)}{more}}}\n'


def qdrant(block: Block, target: Target) -> Lines:
    """Yield points as Qdrant's REST interface takes them, one a line.

    A point's name is a UUID made from the id, so that writing a row again replaces it.
    """
    for number, row in enumerate(_rows(block), block.start):
        vector = f"{{{json.dumps(target.field)}: {{{_indices_and_values(row)}}}}}"
        payload = json.dumps({"id": row.id, "row": number})
        yield f'{{"id": "{point_name(row.id)}", "vector": {vector}, "payload": {payload}}}\n'


def point_name(id_: str) -> str:
    """Return the UUID of the point for a row's id."""
    return str(uuid.uuid5(POINT_NAMESPACE, id_))


def elasticsearch(block: Block, target: Target) -> Lines:
    """Yield the two lines of a `_bulk` request that index a row; features are `f7p` and `f7n`."""
    names = _feature_names(target)
    return _bulk(block, target, names)


def opensearch(block: Block, target: Target) -> Lines:
    """Yield the same with column numbers for features, which `sparse_vector` there asks for."""
    return _bulk(block, target, [str(column) for column in range(target.columns)])


def _bulk(block: Block, target: Target, names: list[str]) -> Lines:
    field = json.dumps(target.field)
    for row in _rows(block):
        name = json.dumps(row.id)
        pairs = zip(row.columns, row.values, strict=True)
        weights = ", ".join(f'"{names[column]}": {value}' for column, value in pairs)
        code = f", {field}: {{{weights}}}" if weights else ""
        yield f'{{"index": {{"_id": {name}}}}}\n{{"id": {name}{code}}}\n'


def anserini(block: Block, target: Target) -> Lines:
    """Yield `{"id", "contents", "vector"}` with integer weights, leaving out those that are 0."""
    names = _feature_names(target)
    weights = integer_weights(block.codes.data, target.scale).tolist()
    bounds = block.codes.indptr.tolist()
    for number, row in enumerate(_rows(block)):
        pairs = zip(row.columns, weights[bounds[number] : bounds[number + 1]], strict=True)
        vector = {names[column]: weight for column, weight in pairs if weight}
        yield json.dumps({"id": row.id, "contents": "", "vector": vector}) + "\n"


def integer_weights(values: NDArray[np.float32], scale: float) -> NDArray[np.int64]:
    """Return values times `scale`, rounded to the nearest integer, of two the even one."""
    return np.rint(values.astype(np.float64) * scale).astype(np.int64)


def pgvector(block: Block, target: Target) -> Lines:
    """Yield lines for `COPY table (id, code) FROM STDIN`; columns count from 1."""
    for row in _rows(block):
        pairs = zip(row.columns, row.values, strict=True)
        entries = ",".join(f"{column + 1}:{value}" for column, value in pairs)
        yield f"{_copy_escape(row.id)}\t{{{entries}}}/{target.columns}\n"


_COPY_ESCAPES: Final = str.maketrans(
    {"\\": r"\\", "\t": r"\t", "\n": r"\n", "\r": r"\r", "\b": r"\b", "\f": r"\f", "\v": r"\v"}
)


def _copy_escape(text: str) -> str:
    """Escape text for PostgreSQL's COPY."""
    return text.translate(_COPY_ESCAPES)


def _feature_names(target: Target) -> list[str]:
    """Name the columns: `f7p` is latent 7 where it is positive, `f7n` where it is negative.

    Without a dot, which Elasticsearch takes for a path. The names of positive values do not depend
    on whether codes were split.
    """
    names = [f"f{latent}p" for latent in range(target.latent_dim)]
    if target.columns > target.latent_dim:
        names += [f"f{latent}n" for latent in range(target.latent_dim)]
    return names


def _indices_and_values(row: _Row) -> str:
    return f'"indices": {row.columns}, "values": [{", ".join(row.values)}]'


def _rows(block: Block) -> Iterator[_Row]:
    columns, values = block.codes.indices.tolist(), _decimals(block.codes.data)
    bounds = block.codes.indptr.tolist()
    for row, name in enumerate(block.ids):
        entries = slice(bounds[row], bounds[row + 1])
        yield _Row(name, columns[entries], values[entries])


def _decimals(values: NDArray[np.float32]) -> list[str]:
    """Return the shortest decimals that are read back as the same float32, all at once."""
    texts: list[str] = values.astype(np.str_).tolist()
    return texts
