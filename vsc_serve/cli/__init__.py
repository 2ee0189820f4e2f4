"""The command line. Each command reads its arguments, calls one function and prints.

Results go to stdout, talk and progress to stderr. Heavy modules are imported inside the commands,
and `train`, `export` and `demo` join through the entry-point group `vsc.commands`, so `vsc --help`
loads none of it.
"""

import errno
import logging
import sys
from contextlib import suppress
from importlib.metadata import entry_points
from typing import Annotated, NoReturn

import typer

from vsc_serve import streams
from vsc_serve.cli.convert import convert
from vsc_serve.cli.decode import decode
from vsc_serve.cli.encode import encode
from vsc_serve.cli.index import app as index_app
from vsc_serve.cli.inspect import doctor, info
from vsc_serve.cli.options import print_text
from vsc_serve.cli.search import search
from vsc_serve.cli.serve import serve
from vsc_serve.cli.translate import OptionFormatter, as_options
from vsc_serve.console import printable, quiet_pillow
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
app.add_typer(index_app, name="index")


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
    streams.prepare()
    _log_to_stderr()
    quiet_pillow()
    try:
        for entry_point in sorted(entry_points(group="vsc.commands"), key=lambda entry: entry.name):
            app.add_typer(entry_point.load())
        code = app(standalone_mode=False)
        sys.stdout.flush()  # a full disk shows here, not when Python ends
    except streams.ReaderGone:
        code = 0
    except VscError as error:
        _fail(error)
    except (KeyboardInterrupt, typer.Abort):
        _fail(Interrupted("interrupted. Nothing is half-written; run the same command again."))
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG:
            raise
        _fail(UsageError(f"{error.filename}: too long for the name of a file"))
    except Exception as error:
        if not hasattr(error, "format_message"):  # what typer raises for wrong arguments has it
            raise
        _fail(UsageError(f"{error.format_message()} See vsc --help."))
    sys.exit(code if isinstance(code, int) else 0)


def _log_to_stderr() -> None:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(OptionFormatter("%(levelname)s %(message)s"))
    logging.basicConfig(handlers=[handler])


def _fail(error: VscError) -> NoReturn:
    with suppress(streams.ReaderGone, VscError):
        sys.stdout.flush()
    sys.stderr.write(f"vsc: {printable(as_options(str(error)))}\n")
    sys.exit(error.exit_code)
