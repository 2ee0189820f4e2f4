"""Messages of the library, which name parameters, in the words of the command line.

The library writes a parameter in backquotes: `out`, `force=True`, `view="gamma"`. On the command
line these are --out, --force and --view gamma.
"""

import logging
import re
from typing import Final

from vsc_serve.console import LineFormatter

_PARAMETER: Final = re.compile(r"`([a-z_]+)(?:=([^`\s]+))?`")
_OTHER_NAMES: Final = {"is_strict": "strict", "is_update": "update", "share": "shard"}
"""Parameters whose option has another name."""


def as_options(text: str) -> str:
    """Return a message with its parameters as options; commands in backquotes stay."""
    return _PARAMETER.sub(_option, text)


def _option(found: re.Match[str]) -> str:
    name, value = found[1], found[2]
    option = f"--{_OTHER_NAMES.get(name, name).replace('_', '-')}"
    is_flag = value is None or value == "True"
    return option if is_flag else f"{option} {value.strip(chr(34) + chr(39))}"


class OptionFormatter(LineFormatter):
    """A formatter of log messages that writes parameters as options."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        """Return the line of a record."""
        record.message = as_options(record.message)
        return super().formatMessage(record)
