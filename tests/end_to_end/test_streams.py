"""What a terminal, a pipe, a full disk or a closed stream do to a command that prints."""

import json
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from vsc_serve.codes import read_codes
from vsc_serve.console import LineFormatter, printable, progress, say

ARCHIVE = Path(__file__).parents[1] / "data" / "archive"
ODD = "0 größe\n\x1b[31m漢.png"
ODD_IN_SHELL = r"$'0 größe\n\x1b[31m漢.png'"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images, one of an odd name, their codes, and a model."""
    folder = tmp_path_factory.mktemp("streams")
    shutil.copytree(ARCHIVE / "images", folder / "images")
    (folder / "images" / "000.png").rename(folder / "images" / ODD)
    shutil.copytree(ARCHIVE / "bundle-v1-csr", folder / "model")
    done = run(folder, "encode images --out codes.npz")
    assert done.returncode == 0, done.stderr
    return folder


def run(
    folder: Path, command: str, streams: str = "", **environment: str
) -> "subprocess.CompletedProcess[str]":
    """Run a command of `vsc` in a shell, which can close and redirect."""
    return subprocess.run(
        ["bash", "-c", f'exec "$0" -m vsc_serve {command} {streams}', sys.executable],
        cwd=folder,
        env=os.environ | environment,
        capture_output=True,
        encoding=environment.get("PYTHONIOENCODING", "utf-8"),
        check=False,
        timeout=120,
    )


COMMANDS = {
    "info": "info codes.npz",
    "search": f"search codes.npz --like {ODD_IN_SHELL}",
    "queries": "search codes.npz --queries images --query symmetric --json",
    "convert": "convert codes.npz --to jsonl",
    "doctor": "doctor",
    "help": "--help",
    "encode": "encode images --out again.npz --force --json",
}


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS)
def test_a_full_disk_or_a_closed_stdout_is_an_error_in_one_line(folder: Path, command: str) -> None:
    for streams, reason in ((">/dev/full", "No space left"), (">&-", "Bad file descriptor")):
        done = run(folder, command, streams)
        assert done.returncode == 3
        assert done.stderr.splitlines()[-1].startswith(f"vsc: stdout cannot be written ({reason}")
        assert "Traceback" not in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS)
def test_a_closed_or_full_stderr_changes_nothing(folder: Path, command: str) -> None:
    whole = run(folder, command).stdout.partition('"seconds"')[0]
    for streams in ("2>&-", "2>/dev/full", "2>&- 0<&-"):
        done = run(folder, command, streams)
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout.partition('"seconds"')[0] == whole


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS)
def test_a_reader_that_goes_away_is_no_failure(folder: Path, command: str) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    try:
        done = subprocess.run(
            ["bash", "-c", f'exec "$0" -m vsc_serve {command}', sys.executable],
            cwd=folder,
            stdout=writer,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
            timeout=120,
        )
    finally:
        os.close(writer)
    assert done.returncode == 0
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr


@pytest.mark.slow
def test_a_closed_stderr_does_not_end_up_in_a_file_that_is_written(folder: Path) -> None:
    """Without a stream 2, the next file that is opened would get its number."""
    assert (
        run(folder, "encode images --out closed.npz --workers 0", "0<&- 1>&- 2>&-").returncode == 0
    )
    assert (folder / "closed.npz").read_bytes() == (folder / "codes.npz").read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_no_encoding_costs_a_result(folder: Path, encoding: str) -> None:
    done = run(folder, COMMANDS["search"] + " --top 6 --with-query", PYTHONIOENCODING=encoding)
    assert done.returncode == 0
    assert len(done.stdout.splitlines()) == 6
    shown = printable(ODD).encode(encoding, "backslashreplace")
    assert done.stdout.splitlines()[0].encode(encoding).endswith(shown)


@pytest.mark.slow
def test_a_locale_without_letters_costs_no_result(folder: Path) -> None:
    environment = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    done = run(folder, "info codes.npz", **environment)
    assert done.returncode == 0
    assert "first id" in done.stdout
    done = run(folder, "encode images --out c.npz --force", **environment)
    assert (done.returncode, done.stderr.count("\n")) == (0, 7)
    assert read_codes(folder / "c.npz").codes.nnz == read_codes(folder / "codes.npz").codes.nnz


@pytest.mark.slow
def test_an_id_cannot_act_on_the_terminal(folder: Path) -> None:
    for command in ("search codes.npz --like images/001.png", "info codes.npz"):
        done = run(folder, command)
        assert "\\n\\x1b[31m" in done.stdout
        assert "\x1b" not in done.stdout
    failed = run(folder, "info $'gone\\n\\x1b[2J'")
    assert failed.returncode == 2
    assert failed.stderr.startswith(r"vsc: gone\n\x1b[2J: no regular file or folder is there")
    failed = run(folder, "decode codes.npz --out drawn --model b$'\\n'ad")
    assert failed.stderr.count("\n") == 1
    exact = run(folder, "search codes.npz --like images/001.png --json")
    assert ODD in [hit["id"] for hit in json.loads(exact.stdout)["hits"]]
    assert json.loads(run(folder, "info codes.npz --json").stdout)["images"] == 6


@pytest.mark.slow
def test_a_name_that_is_too_long_is_one_line(folder: Path) -> None:
    name = "n" * 300
    for command, code in (
        (f"info {name}", 2),
        (f"search {name} --like x", 3),
        (f"search codes.npz --like {name}", 2),
        (f"convert {name} --to jsonl", 3),
        (f"convert codes.npz --to npz --out {name}", None),
        (f"decode codes.npz --sheet {name}", None),
        (f"decode codes.npz --sheet s.png --images {name}", 3),
        (f"encode images --out {name}", None),
        (f"decode codes.npz --out drawn --model {name}", 4),
    ):
        done = run(folder, command)
        assert done.returncode in ((2, 3) if code is None else (code,)), command
        assert "Traceback" not in done.stderr
        last = done.stderr.splitlines()[-1]
        assert last.startswith("vsc: ")
        assert "too long" in last or "no such file" in last or "no regular file" in last


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("größe/漢 🙂.png", "größe/漢 🙂.png"),
        ("a\nb\r\t\0", r"a\nb\r\t\x00"),
        ("\x1b]0;title\x07", r"\x1b]0;title\x07"),
        ("\x9b31m", r"\x9b31m"),
        ("\u202egnp.exe", r"\u202egnp.exe"),
        ("line\u2028line", r"line\u2028line"),
        ("\udcff", r"\udcff"),
        ("می\u200cخواهم", "می\u200cخواهم"),
        ("👩\u200d🚀", "👩\u200d🚀"),
        ("全角\u3000空白", "全角\u3000空白"),
    ],
)
def test_what_a_terminal_acts_upon_is_escaped_and_letters_are_not(text: str, shown: str) -> None:
    assert printable(text) == shown


def test_talk_progress_and_the_log_are_printable(capsys: pytest.CaptureFixture[str]) -> None:
    say("wrote", "a\nb")
    record = logging.LogRecord("x", logging.WARNING, "", 0, "%s: bad", ("a\x1b[2J\n",), None)
    line = LineFormatter("%(levelname)s %(message)s").format(record)
    assert capsys.readouterr().err == "wrote    a\\nb\n"
    assert line == "WARNING a\\x1b[2J\\n: bad"


def test_a_bar_takes_no_note_for_markup(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with progress("encode", 2, "images") as shown:
        shown.update(1, "[/nothing opened] a\nb")
