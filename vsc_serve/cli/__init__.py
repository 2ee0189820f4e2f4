"""The command line. Each command reads its arguments, calls one function and prints.

Results go to stdout, talk and progress to stderr. Heavy modules are imported inside the commands,
and `train`, `export` and `demo` join through the entry-point group `vsc.commands`, so `vsc --help`
loads none of it.
"""

import logging
import sys
from importlib.metadata import entry_points
from typing import Annotated

import typer

from vsc_serve.cli.convert import convert
from vsc_serve.cli.decode import decode
from vsc_serve.cli.encode import encode
from vsc_serve.cli.inspect import doctor, info
from vsc_serve.cli.options import print_text
from vsc_serve.cli.search import search
from vsc_serve.cli.serve import serve
from vsc_serve.errors import Interrupted, UsageError, VscError

app = typer.Typer(
    name="vsc",
    help="Sparse codes for images: train, export, encode, search, serve.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

for _command in (encode, decode, search, convert, info, serve, doctor):
    app.command()(_command)


@app.callback(invoke_without_command=True)
def _version(
    *, version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False
) -> None:
    if version:
        from vsc_serve import __version__

        print_text(f"vsc-serve {__version__}")
        raise typer.Exit


def main() -> None:
    """Run `vsc`. A VscError becomes one line on stderr and the exit code of its class."""
    logging.basicConfig(format="%(levelname)s %(message)s", stream=sys.stderr)
    for entry_point in sorted(entry_points(group="vsc.commands"), key=lambda entry: entry.name):
        app.add_typer(entry_point.load())
    try:
        code = app(standalone_mode=False)
    except VscError as error:
        _fail(error)
    except (KeyboardInterrupt, typer.Abort):
        _fail(Interrupted("interrupted. Nothing is half-written; run the same command again."))
    except Exception as error:
        if not hasattr(error, "format_message"):  # what typer raises for wrong arguments has it
            raise
        _fail(UsageError(f"{error.format_message()} See vsc --help."))
    sys.exit(code if isinstance(code, int) else 0)


def _fail(error: VscError) -> None:
    sys.stderr.write(f"vsc: {error}\n")
    sys.exit(error.exit_code)
