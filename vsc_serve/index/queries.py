"""Queries of stored codes: the rule they are made by, and which go with which rows."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, Literal, get_args

import numpy as np

from vsc_serve.codes import CodeFile
from vsc_serve.errors import InputError, UsageError
from vsc_serve.manifest import Manifest
from vsc_serve.options import EncodeOptions, check_order, query_tau

QueryRule = Literal["auto", "wide", "symmetric"]
"""`wide` keeps more latents than the rows, `symmetric` the same; `auto` chooses by the rows."""

WIDE_FROM: Final = 0.3
"""Threshold of rows from which a wide query finds more on every data set that was measured; at 0.2
it costs recall on text, but not where `max_active` cuts the rows."""

_OF_ALL: Final = ("latents", "model_digest", "sign")
"""What must be the same in queries and rows."""
_OF_ROWS: Final = ("view", "tau", "max_active", "values")
"""What else must be, where queries are codes of rows themselves."""


def query_options(
    rows: Mapping[str, Any], manifest: Manifest, rule: QueryRule = "auto"
) -> EncodeOptions:
    """Return how the queries of stored rows are encoded.

    By `auto`, queries are wide where that is measured to help: rows hold slab means, and their
    threshold is known, not below that of queries, and at least 0.3 or with `max_active`.

    Args:
        rows: Provenance of the rows.
        manifest: That of the model which made them.
        rule: Which queries.

    Raises:
        UsageError: The rows were changed since they were encoded; or a wide query cannot be asked
            of them.
    """
    if rule not in get_args(QueryRule):
        raise UsageError(f"`query` must be one of {', '.join(get_args(QueryRule))}, not {rule}")
    symmetric = EncodeOptions.of_codes(rows)
    if rule == "symmetric":
        return symmetric
    if rule == "wide" and symmetric.view != "mean":
        raise UsageError(
            f'`query="wide"`: its values are slab means, but the rows hold the view'
            f' {symmetric.view}. Ask with `query="symmetric"`, or encode the rows with'
            ' `view="mean"`.'
        )
    is_wide = rule == "wide" or _is_measured(symmetric, query_tau(manifest))
    return EncodeOptions.for_query(rows) if is_wide else symmetric


def _is_measured(rows: EncodeOptions, tau_q: float) -> bool:
    if rows.view != "mean" or rows.tau is None or rows.tau < tau_q:
        return False
    return rows.tau >= WIDE_FROM or rows.max_active is not None


def check_rows(path: Path, rows: CodeFile) -> None:
    """Check that codes can be searched.

    Raises:
        InputError: A value is not finite.
        UsageError: They are queries.
    """
    if rows.meta.get("view") == "query":
        raise UsageError(
            f"{path}: holds queries, not the rows to search. Give the codes that `vsc encode` wrote"
            ' without `view="query"`, and these as `queries`.'
        )
    _check_finite(path, rows)


def check_same_rows(path: Path, rows: CodeFile, other: Path, others: Mapping[str, Any]) -> None:
    """Check that codes can stand beside others in one index.

    Args:
        path: File of the codes.
        rows: The codes.
        other: File or index of the others.
        others: Their provenance, with their number of `latents`.

    Raises:
        UsageError: They are of another model, or made with other options.
    """
    of_rows = {"latents": rows.codes.shape[1], **rows.meta}
    for name in (*_OF_ALL, *_OF_ROWS):
        if of_rows.get(name) != others.get(name):
            raise UsageError(
                f"{path}: {name} is {of_rows.get(name)}, but {others.get(name)} in {other}. The"
                " rows of an index are made by one model with the same options: encode alike, or"
                " build another index."
            )


def check_queries(path: Path, queries: CodeFile, rows_path: Path, rows: Mapping[str, Any]) -> None:
    """Check that the queries of a file can be asked of stored rows.

    A matrix that plain scipy wrote says nothing of itself, and is taken as it is.

    Args:
        path: File of the queries.
        queries: The queries.
        rows_path: File or index of the rows.
        rows: Provenance of the rows, with their number of `latents`.

    Raises:
        InputError: A value is not finite.
        UsageError: Both are not of one model, or do not go together.
    """
    of_queries = {"latents": queries.codes.shape[1], **queries.meta}
    is_wide = queries.meta.get("view") == "query"
    for name in (*_OF_ALL, *(() if is_wide else _OF_ROWS)) if queries.meta else _OF_ALL[:1]:
        _check_same(name, path, of_queries.get(name), rows_path, rows.get(name))
    if is_wide:
        _check_wide(path, of_queries, rows_path, rows)
    _check_finite(path, queries)


def _check_same(name: str, path: Path, found: Any, rows_path: Path, expected: Any) -> None:
    if found != expected:
        raise UsageError(
            f"{path}: {name} is {found}, but {expected} in {rows_path}. Encode queries with the"
            ' model of the rows, and with the options of the rows or with `view="query"`.'
        )


def _check_wide(
    path: Path, queries: Mapping[str, Any], rows_path: Path, rows: Mapping[str, Any]
) -> None:
    """Raise UsageError for queries that are meant for other values or another threshold."""
    if rows.get("view", "mean") != "mean":
        raise UsageError(
            f"{path}: queries for rows of slab means, but {rows_path} holds the view"
            f" {rows['view']}. Ask with codes that were encoded as the rows were."
        )
    tau_q, stored_tau, tau = queries.get("tau"), queries.get("stored_tau"), rows.get("tau")
    if tau_q is not None and tau is not None:
        check_order(tau_q, tau)
    if stored_tau != tau:
        raise UsageError(
            f"{path}: queries for rows of tau {stored_tau}, but {rows_path} has tau {tau}. Encode"
            f" them again with `stored_tau={tau}`."
        )


def _check_finite(path: Path, stored: CodeFile) -> None:
    codes = stored.codes
    bad = np.flatnonzero(~np.isfinite(codes.data))
    if len(bad):
        row = int(np.searchsorted(codes.indptr, bad[0], "right")) - 1
        raise InputError(
            f"{path}: row {row} ({stored.ids[row]}) holds values that are not finite (NaN or"
            " infinity). Leave it out, or encode again.",
            kind="not finite",
            row=row,
        )
