"""`vsc index`: an index of codes in a folder, built once and searched often."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vsc_serve.cli.options import ForceOption, JsonOption, print_json, print_text
from vsc_serve.cli.search import search
from vsc_serve.console import say
from vsc_serve.errors import CheckFailed, InputError

if TYPE_CHECKING:
    from vsc_serve.index.base import Change, Part

app = typer.Typer(help="Index codes in a folder: build, add, remove, info, search.")

_CodesArgument = Annotated[
    list[Path], typer.Argument(help="Files that `vsc encode` wrote, or folders of shards.")
]
_IndexArgument = Annotated[Path, typer.Argument(help="Folder of the index.")]

app.command()(search)


@app.command()
def build(
    codes: _CodesArgument,
    out: Annotated[Path, typer.Option(help="Folder to write.")],
    *,
    engine: Annotated[str, typer.Option(help="Engine of the index.")] = "exact",
    force: ForceOption = False,
    as_json: JsonOption = False,
) -> None:
    """Build an index of codes."""
    from vsc_serve.index.base import find_engine
    from vsc_serve.outputs import check_output

    chosen = find_engine(engine)
    check_output(out, chosen.kind, force=force, inputs=codes)
    facts = chosen.build(_parts(codes), out).facts()
    _print(facts, as_json=as_json)


@app.command()
def add(
    index: _IndexArgument,
    codes: _CodesArgument,
    *,
    update: Annotated[
        bool, typer.Option("--update", help="Remove the rows that the codes no longer have.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Add codes to an index: new ids are added, changed ones replaced."""
    from vsc_serve.index.base import open_index

    _report(open_index(index).add(_parts(codes), update=update), as_json=as_json)


@app.command()
def remove(
    index: _IndexArgument,
    ids: Annotated[list[str], typer.Argument(help="Ids of rows; - reads them from stdin.")],
    *,
    as_json: JsonOption = False,
) -> None:
    """Remove rows from an index by their ids."""
    from vsc_serve.index.base import open_index

    _report(open_index(index).remove(_read_ids(ids)), as_json=as_json)


@app.command()
def info(
    index: Annotated[Path, typer.Argument(help="Folder of the index, or codes for an estimate.")],
    *,
    verify: Annotated[
        bool, typer.Option("--verify", help="Compare all files with their digests.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Say what an index is, and what a query costs."""
    from vsc_serve.index.base import is_index, open_index

    if not is_index(index):
        from vsc_serve.index.estimate import estimate

        _print(estimate(index), as_json=as_json)
        return
    opened = open_index(index)
    if verify:
        _verify(opened.verify)
    _print(opened.facts(), as_json=as_json)


def _verify(check: Any) -> None:
    """Raise CheckFailed for a file that was changed."""
    try:
        check()
    except InputError as error:
        raise CheckFailed(str(error)) from error
    say("verified", "all files have their digests")


def _parts(paths: list[Path]) -> "Iterator[Part]":
    """Read the files of codes one after the other."""
    from vsc_serve.codes import part_paths, read_parts
    from vsc_serve.index.base import Part

    for path in paths:
        for place, stored in zip(part_paths(path), read_parts(path), strict=True):
            yield Part(place, stored)


def _read_ids(given: list[str]) -> list[str]:
    if given != ["-"]:
        return given
    import sys

    letters = sys.stdin.buffer.read().decode("utf-8", "surrogateescape")
    return [line for line in letters.split("\n") if line]


def _report(change: "Change", *, as_json: bool) -> None:
    if as_json:
        print_json(vars(change))
        return
    counts = ", ".join(f"{count:,} {name}" for name, count in vars(change).items())
    say("changed", counts)


def _print(facts: dict[str, Any], *, as_json: bool) -> None:
    if as_json:
        print_json(facts, indent=2)
        return
    width = max(map(len, facts))
    for name, value in facts.items():
        shown = f"{value:,.1f}" if isinstance(value, float) and name != "tau" else value
        shown = f"{value:,}" if type(value) is int else shown
        print_text(f"{name:<{width}}  {shown}")
