"""Messages of the library, which name parameters, in the words of the command line.

The library writes a parameter in backquotes: `out`, `force=True`, `view="gamma"`. On the command
line these are --out, --force and --view gamma. A field of the recipe, `recipe.alpha=0.02`, is --set
alpha=0.02.
"""

import logging
import re
from functools import cache
from typing import Final

import typer

from vsc_serve.console import LineFormatter

_PARAMETER: Final = re.compile(r"`([a-z_]+)(?:=([^`\s]+))?`")
_RECIPE_FIELD: Final = re.compile(r"`recipe\.([a-z_]+)(?:=([^`\s]+))?`")
_OTHER_NAMES: Final = {
    "is_strict": "strict",
    "is_update": "update",
    "share": "shard",
    "is_compiled": "compile",
    "overrides": "set",
}
"""Parameters whose option has another name."""


def as_options(text: str) -> str:
    """Return a message with its parameters as options; whatever else is in backquotes stays."""
    return _PARAMETER.sub(_option, _RECIPE_FIELD.sub(_override, text))


def _override(found: re.Match[str]) -> str:
    return f"--set {found[1]}={found[2] or ''}"


@cache
def _options() -> frozenset[str]:
    """Return the options of all commands."""
    from vsc_serve.cli import app  # which imports this module

    commands = [*typer.main.get_group(app).commands.values()]
    for one in commands:  # grows: the commands of a group follow it
        commands += getattr(one, "commands", {}).values()
    return frozenset(name for one in commands for option in one.params for name in option.opts)


def _option(found: re.Match[str]) -> str:
    name, value = found[1], found[2]
    option = f"--{_OTHER_NAMES.get(name, name).replace('_', '-')}"
    if option not in _options():
        return found[0]
    is_flag = value is None or value == "True"
    return option if is_flag else f"{option} {value.strip(chr(34) + chr(39))}"


class OptionFormatter(LineFormatter):
    """A formatter of log messages that writes parameters as options."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        """Return the line of a record."""
        record.message = as_options(record.message)
        return super().formatMessage(record)
