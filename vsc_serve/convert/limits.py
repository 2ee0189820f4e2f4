"""Limits of each target, and the check of all rows against it before the first byte is written.

A value that a target does not take is refused there late, or dropped, or wrapped, or ranked wrong
without a word. docs/convert.md has the table.
"""

from dataclasses import dataclass
from typing import Final

import numpy as np

from vsc_serve.convert.rows import Survey
from vsc_serve.errors import InputError

SMALLEST_NORMAL: Final = float(np.finfo(np.float32).smallest_normal)


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Limits of a target. None means that it sets no limit that codes can reach."""

    is_signed: bool
    """Values may be negative."""
    max_entries: int | None = None
    """Entries in one row."""
    max_columns: int | None = None
    """Columns."""
    min_value: float = 0.0
    """Smallest |value| of an entry."""
    has_unique_ids: bool = False
    """A row replaces an earlier one of the same id."""
    max_id_bytes: int | None = None
    """Bytes of an id in UTF-8."""
    min_id_bytes: int = 0
    """1 where an id may not be empty."""
    has_text_ids: bool = True
    """Ids must be text that UTF-8 can hold; names of files need not be."""


def check(name: str, limits: Limits, survey: Survey) -> None:
    """Check all rows against what a target takes.

    Args:
        name: The target, for the message.
        limits: What it takes.
        survey: Statistics of the rows as they would be written.

    Raises:
        InputError: Some rows cannot be written: which limit, how many rows, what to do.
    """
    for problem in (
        _bad_values(name, limits, survey),
        _bad_sizes(name, limits, survey),
        _bad_ids(name, limits, survey),
    ):
        if problem is not None:
            raise InputError(f"{problem} Nothing was written.")


def _bad_values(name: str, limits: Limits, survey: Survey) -> str | None:
    if survey.not_finite_rows:
        return (
            f"{survey.not_finite_rows} rows hold NaN or infinity, which {name} cannot hold."
            " Encode again."
        )
    if survey.negative_rows and not limits.is_signed:
        return (
            f"{survey.negative_rows} of {survey.rows} rows hold negative values, which {name} does"
            " not take. Leave `sign` out (or give `sign='split'`) to write them as columns"
            " of their own."
        )
    if survey.entries and survey.smallest < limits.min_value:
        return (
            f"the smallest value is {survey.smallest:.3g}, but {name} takes none below"
            f" {limits.min_value:.3g}."
        )
    return None


def _bad_sizes(name: str, limits: Limits, survey: Survey) -> str | None:
    if limits.max_columns is not None and survey.columns > limits.max_columns:
        return f"{survey.columns} columns, but {name} takes up to {limits.max_columns}."
    if limits.max_entries is not None and survey.longest_row > limits.max_entries:
        return (
            f"a row holds {survey.longest_row} entries, but {name} takes up to"
            f" {limits.max_entries} in a row. Encode with `max_active={limits.max_entries}`."
        )
    return None


def _bad_ids(name: str, limits: Limits, survey: Survey) -> str | None:
    if limits.has_text_ids and survey.not_text_ids:
        return (
            f"{len(survey.not_text_ids)} ids are no valid text (the first: row"
            f" {survey.not_text_ids[0]}), which {name} cannot hold. Rename those files."
        )
    if limits.has_unique_ids and survey.repeated_id is not None:
        return (
            f"the id {survey.repeated_id!r} is there more than once, and in {name} the last row of"
            " an id replaces the others."
        )
    if survey.rows and survey.shortest_id < limits.min_id_bytes:
        return f"an id is empty, which {name} does not take."
    if limits.max_id_bytes is not None and survey.longest_id > limits.max_id_bytes:
        return (
            f"an id has {survey.longest_id} bytes, but {name} takes up to {limits.max_id_bytes}."
            " Encode with shorter ids."
        )
    return None
