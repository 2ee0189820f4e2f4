"""`vsc convert`: codes in the formats of other tools."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, BinaryIO, Literal

import typer

from vsc_serve.cli.options import ForceOption
from vsc_serve.cli.translate import as_options
from vsc_serve.console import progress, say

if TYPE_CHECKING:
    from vsc_serve.convert import Planned

_STDOUT = Path("-")

# The same as `FORMATS` and `Sign`, which importing would load scipy for `vsc --help`; a test
# compares them.
_Format = Literal[
    "jsonl",
    "parquet",
    "npz",
    "h5ad",
    "bigann",
    "anserini",
    "elasticsearch",
    "opensearch",
    "pgvector",
    "qdrant",
]
_Sign = Literal["auto", "split", "keep", "error"]


def convert(
    codes: Annotated[
        list[Path], typer.Argument(help="Files that `vsc encode` wrote, or folders of shards.")
    ],
    to: Annotated[_Format, typer.Option(help="Format to write.")],
    *,
    out: Annotated[
        Path, typer.Option(help="File to write; - is stdout, for formats of lines.")
    ] = _STDOUT,
    sign: Annotated[
        _Sign, typer.Option(help="Negative values; auto splits where that is needed.")
    ] = "auto",
    field: Annotated[
        str, typer.Option(help="Field of elasticsearch, opensearch and qdrant.")
    ] = "code",
    scale: Annotated[float, typer.Option(help="Factor before rounding, for anserini.")] = 100.0,
    compress: Annotated[
        bool, typer.Option("--compress", help="Deflate the numbers of npz.")
    ] = False,
    force: ForceOption = False,
) -> None:
    """Write codes in the format of another tool."""
    from vsc_serve.convert import Options, check_target, plan, require_lines, write_file

    if out == _STDOUT:
        require_lines(to)
    else:
        check_target(to, out, codes, force=force)
    options = Options(sign=sign, field=field, scale=scale, compress=compress)
    planned = plan(codes, to=to, options=options)
    for note in planned.notes:
        say("note", as_options(note))
    with progress("convert", planned.facts.rows, "rows") as shown:
        if out == _STDOUT:
            _write_stdout(planned)
            return
        write_file(planned, out, report=shown)
    say(
        "wrote",
        f"{out}  {planned.facts.rows:,} rows, {planned.facts.entries:,} entries,"
        f" {planned.facts.empty_rows} empty rows, {out.stat().st_size / 1e3:,.0f} kB",
    )


def _write_stdout(planned: "Planned") -> None:
    from vsc_serve.convert import write_lines

    stdout: BinaryIO = sys.stdout.buffer
    write_lines(planned, stdout)
    stdout.flush()
