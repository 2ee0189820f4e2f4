"""`vsc search --vector`: dense vectors of the space that codes decode to, as queries."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from vsc_serve.cli.answers import Answer, Found
from vsc_serve.cli.options import find_model
from vsc_serve.errors import InputError, UsageError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from vsc_serve.codes import Codes
    from vsc_serve.index.base import Searchable
    from vsc_serve.index.exact import Hit, SharedFeature
    from vsc_serve.linear_map import LinearMap

_BLOCK: Final = 1024
"""Vectors that are answered together."""


def refuse_other_options(**given: tuple[Any, Any]) -> None:
    """Raise UsageError for options that say how codes are compared: each as given, and usual."""
    for name, (value, usual) in given.items():
        if value != usual:
            raise UsageError(
                f"--{name} {value}: is for queries that are codes. The score of --vector is the"
                f" cosine of the vector and the decoded row: leave --{name} out."
            )


def answer_vectors(
    path: Path, rows_path: Path, rows: "Searchable", model: Path | None, top: int, *, explain: bool
) -> Iterator[list[Answer]]:
    """Answer the vectors of a file, block by block; those that cannot be asked come last.

    Raises:
        BundleError: The bundle has no linear map.
        InputError: The file holds no vectors of that space.
        UsageError: The rows are of another model, or hold other values than slab means.
    """
    linear_map = _open_map(rows_path, rows, model)
    vectors = _read(path, linear_map)
    return _answers(_decodable(rows, linear_map), vectors, top, explain=explain)


def _open_map(path: Path, rows: "Searchable", model: Path | None) -> "LinearMap":
    from vsc_serve.bundle import open_bundle
    from vsc_serve.cli.options import refuse_other_model
    from vsc_serve.linear_map import read_linear_map

    if rows.meta.get("view", "mean") != "mean" or rows.meta.get("sign") is not None:
        raise UsageError(
            f"--vector: {path} holds other values than slab means (or refitted values), and only"
            " these can be decoded. Encode the rows with --view mean."
        )
    bundle = find_model(model)
    opened = open_bundle(bundle)
    refuse_other_model(rows, opened.manifest.digest, bundle)
    return read_linear_map(opened)


def _read(path: Path, linear_map: "LinearMap") -> "NDArray[Any]":
    import numpy as np

    from vsc_serve.index.dense import check_dimensions

    try:
        with path.open("rb") as file:
            vectors: NDArray[Any] = np.lib.format.read_array(file, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{path}: no .npy file of vectors ({reason}).") from error
    vectors = vectors[None] if vectors.ndim == 1 else vectors
    try:
        check_dimensions(vectors, linear_map)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    return vectors


class _Decodable(NamedTuple):
    """Rows that can be found, and what they decode by."""

    rows: "Searchable"
    numbers: "NDArray[np.intp]"
    """Row number of each code."""
    codes: "Codes"
    linear_map: "LinearMap"
    norms: "NDArray[np.float64]"
    """Length of each decoded row."""


def _decodable(rows: "Searchable", linear_map: "LinearMap") -> _Decodable:
    # All of them are scored, so those of an index are read whole.
    numbers = rows.numbers()
    codes = rows.rows[numbers]
    return _Decodable(rows, numbers, codes, linear_map, linear_map.norms(codes))


def _answers(
    among: _Decodable, vectors: "NDArray[Any]", top: int, *, explain: bool
) -> Iterator[list[Answer]]:
    import numpy as np

    from vsc_serve.index.dense import search_vectors, unusable

    bad, active = unusable(vectors), len(among.linear_map.weights)
    asked = np.array([row for row in range(len(vectors)) if row not in bad], np.intp)
    for start in range(0, len(asked), _BLOCK):
        chosen = asked[start : start + _BLOCK]
        block = vectors[chosen]
        found = search_vectors(among.codes, among.linear_map, block, norms=among.norms, top=top)
        yield [
            Answer(
                str(number),
                active,
                [_found(among, block[place], hit, explain=explain) for hit in found.hits(place)],
            )
            for place, number in enumerate(chosen.tolist())
        ]
    yield [Answer(str(row), 0, [], reason) for row, reason in sorted(bad.items())]


def _found(among: _Decodable, vector: "NDArray[Any]", hit: "Hit", *, explain: bool) -> Found:
    from vsc_serve.index.rerank import explain_linear

    number = int(among.numbers[hit.row])
    shared: list[SharedFeature] | None = None
    bias = None
    if explain:
        u, c = among.linear_map.project(vector[None])
        norm = float(among.norms[hit.row])
        shared, bias = explain_linear(among.codes, hit.row, norm, u[0], float(c[0]))
    return Found(among.rows.id_of(number), replace(hit, row=number), shared, bias)
