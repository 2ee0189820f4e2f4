"""Codes in the formats of other tools. docs/convert.md says what each one takes, and what is done.

    planned = plan([Path("codes.npz")], to="parquet")
    write_file(planned, Path("codes.parquet"))

Everything a target may refuse is found by `plan`, which goes through all rows; writing follows.
"""

from vsc_serve.console import Progress
from vsc_serve.convert.plan import (
    FORMATS,
    Options,
    Planned,
    Sign,
    check_target,
    ids_path,
    plan,
    require_lines,
    write_file,
    write_lines,
)
from vsc_serve.convert.rows import Block, Rows, Survey

__all__ = [
    "FORMATS",
    "Block",
    "Options",
    "Planned",
    "Progress",
    "Rows",
    "Sign",
    "Survey",
    "check_target",
    "ids_path",
    "plan",
    "require_lines",
    "write_file",
    "write_lines",
]
