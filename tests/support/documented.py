"""Run what the documentation shows, in a folder with what its examples name.

Commands of `vsc` run in this process, so that torch is loaded once. Training is cut short and may
collapse: what is tested is that a command as it is printed does what the page says of it.
"""

import contextlib
import io
import json
import logging
import os
import re
import shlex
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

import pytest
import typer.main
from markdown_blocks import Block

import vsc_export.cli
import vsc_training.cli
from vsc_serve import cli
from vsc_serve.errors import VscError

RUN_LANGUAGES: Final = frozenset({"sh", "console", "python"})
DATA_LANGUAGES: Final = frozenset({"json", "text", "sql", "toml"})

PLACEHOLDERS: Final = {"DATA": "images/", "RUN": "run/", "MODEL": "model/", "FOLDER": "images/"}
"""Words that stand for something of the reader's."""

_SHORT: Final = ["steps=40", "hidden=32", "latent_dim=16", "pseudo_inputs=4", "batch_size=32"]
_SHORT_TRAINING: Final = [f"--set={field}" for field in (*_SHORT, "on_collapse=warn")]
_ADDED: Final = {
    "train": [*_SHORT_TRAINING, "--threads=1"],
    "eval": ["--threads=1", "--iwae-samples=2"],
    "export": ["--allow-collapsed"],
}
"""Options that make a command quick, or content with a model that was hardly trained."""

_OUTPUTS: Final = ("--out", "--triton", "--sheet")
_COMPLETE: Final = re.compile(r"(?<!\\)\n")
_PROSE_ERRORS: Final = ("MissingParameter", "BadOptionUsage")
"""What prose may leave out: arguments, and the value of an option."""


def command_group() -> Any:
    """Return `vsc` with the commands of training and export, as `cli.main` joins them."""
    group = typer.main.get_command(cli.app)
    for app in (vsc_training.cli.app, vsc_export.cli.app):
        for registered in app.registered_commands:
            command = typer.main.get_command_from_info(
                registered, pretty_exceptions_short=True, rich_markup_mode=None
            )
            group.commands[str(command.name)] = command  # type: ignore[attr-defined]
    return group


def check_prose(command: str) -> None:
    """Parse a command that prose mentions: the command and its options must be there."""
    _, *arguments = shlex.split(command)
    name = arguments[0]
    if name in ("--help", "--version"):
        return
    commands = command_group().commands
    assert name in commands, f"`{command}`: no command {name}"
    try:
        commands[name].make_context(name, arguments[1:])
    except Exception as error:
        if type(error).__name__ not in _PROSE_ERRORS:
            raise AssertionError(f"`{command}`: {error}") from error


def check_data(block: Block) -> None:
    """Check a block that is no program: JSON is JSON, and no command hides in it."""
    if block.language == "json":
        json_values(block.text)
    assert not re.search(r"^(\$ |vsc |pip |python )", block.text, re.M), f"{block}: a command"


def json_values(text: str) -> list[Any]:
    """Read one JSON value, or one a line."""
    try:
        return [json.loads(text)]
    except ValueError:
        return [json.loads(line) for line in text.splitlines()]


def same_shape(found: Any, shown: Any) -> bool:
    """Compare two JSON values: the same names in all objects, types alike, lists by their first."""
    if isinstance(shown, dict):
        names = isinstance(found, dict) and found.keys() == shown.keys()
        return names and all(same_shape(found[name], shown[name]) for name in shown)
    if isinstance(shown, list):
        return isinstance(found, list) and all(map(same_shape, found[:1], shown[:1]))
    return isinstance(found, (int, float)) == isinstance(shown, (int, float))


class Page:
    """What a page has done so far.

    Args:
        folder: Where it works.
        names: What its Python blocks find defined.
    """

    def __init__(self, folder: Path, names: dict[str, Any]) -> None:
        self.folder = folder
        self.names = names
        self.printed = ""
        """What the last block of commands printed to stdout."""
        self._ports: dict[str, str] = {}
        self._services: list[subprocess.Popen[str]] = []

    def close(self) -> None:
        """Stop the services that were started."""
        for service in self._services:
            service.terminate()
            service.communicate(timeout=30)

    def run(self, block: Block) -> None:
        """Run a block, or check what it shows against what the block before it printed."""
        if block.language == "python":
            exec(compile(block.text, str(block), "exec"), self.names)
        elif block.language == "sh":
            printed = [self.run_line(line) for line in commands_of(block.text)]
            self.printed = "\n".join(text.strip() for text in printed)
        elif block.language == "console":
            self._run_session(block)
        else:
            check_data(block)
            if block.language == "json" and self.printed.startswith("{"):
                self._compare(block)

    def run_line(self, line: str) -> str:
        """Run one command; return what it printed to stdout. Raises AssertionError."""
        words = shlex.split(line, comments=True)
        for port, own in self._ports.items():
            line = line.replace(f"127.0.0.1:{port}", own)
        if words[:2] == ["vsc", "serve"]:
            self._serve(words)
            return ""
        if words[0] == "vsc" and not {"|", ">", "&&", ";"} & set(words):
            return self._run_vsc(words[1:])[0]
        if words[0] == "curl" and shutil.which("curl") is None:
            pytest.skip("curl is not installed")
        if words[:2] == ["python", "-m"]:
            self._clear_outputs(words)
        done = subprocess.run(
            ["bash", "-ec", line],
            cwd=self.folder,
            env=os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"},
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
        )
        assert done.returncode == 0, f"{line}: exit {done.returncode}\n{done.stderr}"
        return done.stdout

    def _run_vsc(self, words: list[str]) -> tuple[str, str]:
        words = [PLACEHOLDERS.get(word, word) for word in words]
        if not {"--force", "--update", "--resume"} & set(words):
            self._clear_outputs(words)
        out, err = Written(), Written()
        level = logging.getLogger().level
        try:
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                arguments = [*words, *_ADDED.get(words[0], [])]
                code = command_group().main(arguments, standalone_mode=False)
        except Exception as error:
            if not isinstance(error, VscError) and not hasattr(error, "format_message"):
                raise
            raise AssertionError(f"vsc {shlex.join(words)}: {error}") from error
        finally:
            logging.getLogger().setLevel(level)
        assert not code, f"vsc {shlex.join(words)}: exit {code}"
        return out.text(), err.text()

    def _clear_outputs(self, words: list[str]) -> None:
        """Remove what the command is about to write, which earlier pages or blocks have made."""
        for option, value in pairwise(words):
            path = self.folder / value
            if option in _OUTPUTS and path.is_dir():
                shutil.rmtree(path)
            elif option in _OUTPUTS:
                path.unlink(missing_ok=True)

    def _run_session(self, block: Block) -> None:
        """Run the lines after `$ `, and compare the labels of the lines that follow each."""
        for part in re.split(r"^\$ ", block.text, flags=re.M)[1:]:
            line, _, shown = part.partition("\n")
            printed, said = self._run_vsc(shlex.split(line)[1:])
            assert labels(said + printed) == labels(shown), f"{block}: {line}\n{said}{printed}"

    def _serve(self, words: list[str]) -> None:
        """Start a service on a free port, in place of the port that the page shows."""
        shown = words[words.index("--port") + 1] if "--port" in words else "8000"
        service = subprocess.Popen(
            [sys.executable, "-m", "vsc_serve", *words[1:], "--port", "0"],
            cwd=self.folder,
            stderr=subprocess.PIPE,
            text=True,
        )
        self._services.append(service)
        watchdog = threading.Timer(60, service.kill)
        watchdog.start()
        assert service.stderr is not None
        line = service.stderr.readline()
        watchdog.cancel()
        found = re.search(r"listening on http://(127\.0\.0\.1:\d+)$", line)
        assert found, line
        self._ports[shown] = found[1]

    def _compare(self, block: Block) -> None:
        pairs = zip(json_values(self.printed), json_values(block.text), strict=True)
        for found, shown in pairs:
            assert same_shape(found, shown), f"{block} shows other fields than {self.printed}"


class Written(io.TextIOWrapper):
    """A stream that keeps what is written to it."""

    def __init__(self) -> None:
        super().__init__(io.BytesIO(), encoding="utf-8", write_through=True)

    def text(self) -> str:
        """Return all of it."""
        content = self.buffer
        assert isinstance(content, io.BytesIO)
        return content.getvalue().decode()


def commands_of(text: str) -> Iterator[str]:
    """Yield the commands of a block, each in one line."""
    for line in _COMPLETE.split(text):
        joined = re.sub(r"\\\n\s*", "", line).strip()
        if joined and not joined.startswith("#"):
            yield joined


def labels(text: str) -> set[str]:
    """Return the first word of each line, with numbers of one kind."""
    words = (line.split()[0] for line in text.splitlines() if line.strip())
    return {re.sub(r"[+-]?\d+(\.\d+)?", "#", word) for word in words}
