"""`vsc convert` as a person runs it."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from vsc_serve.cli import app
from vsc_serve.codes import dense_to_csr, read_codes, write_codes
from vsc_serve.convert import FORMATS

META = {"model": "fake", "model_digest": "ab12", "tau": 0.5, "view": "mean"}


@pytest.fixture
def codes_path(tmp_path: Path) -> Path:
    dense = np.zeros((3, 4), np.float32)
    dense[0, [1, 3]] = [0.5, -2.0]
    dense[2, 3] = 1.0
    write_codes(tmp_path / "codes.npz", dense_to_csr(dense), ["a", "größe", "c"], META)
    return tmp_path / "codes.npz"


def vsc(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "vsc_serve", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_lines_go_to_stdout_and_talk_to_stderr(codes_path):
    for out in ([], ["--out", "-"]):
        done = vsc("convert", codes_path, "--to", "elasticsearch", *out)
        assert done.returncode == 0, done.stderr
        lines = [json.loads(line) for line in done.stdout.splitlines()]
        assert lines[0] == {"index": {"_id": "a"}}
        assert lines[1] == {"id": "a", "code": {"f1p": 0.5, "f3n": 2.0}}
        assert "note     4 latents become 8 columns" in done.stderr
        assert "elasticsearch takes no negative values" in done.stderr


def test_a_file_is_written_once_and_replaced_only_when_asked(codes_path):
    out = codes_path.with_name("codes.jsonl")
    arguments = ["convert", codes_path, "--to", "jsonl", "--out", out]
    done = vsc(*arguments)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    assert f"wrote    {out}  3 rows, 3 entries, 1 empty rows" in done.stderr
    again = vsc(*arguments)
    assert again.returncode == 2
    assert "exists already" in again.stderr
    assert vsc(*arguments, "--force").returncode == 0


def test_what_a_target_does_not_take_is_exit_3_and_no_file(codes_path):
    out = codes_path.with_name("out")
    done = vsc("convert", codes_path, "--to", "anserini", "--out", out, "--sign", "keep")
    assert done.returncode == 3
    assert done.stderr.startswith("vsc: 1 of 3 rows hold negative values, which anserini does not")
    assert not out.exists()


def test_a_format_of_numbers_needs_a_file(codes_path):
    done = vsc("convert", codes_path, "--to", "npz")
    assert done.returncode == 2
    assert done.stdout == ""
    assert "npz cannot go to a pipe: give --out" in done.stderr


def test_several_files_become_one(codes_path):
    out = codes_path.with_name("both.npz")
    done = vsc("convert", codes_path, codes_path, "--to", "npz", "--out", out, "--compress")
    assert done.returncode == 0, done.stderr
    assert "note     the id 'a' is there more than once" in done.stderr
    assert read_codes(out).ids == ["a", "größe", "c"] * 2


def test_a_reader_that_goes_away_early_is_no_error(codes_path):
    dense = np.ones((20_000, 30), np.float32)
    write_codes(codes_path, dense_to_csr(dense), [str(row) for row in range(20_000)], META)
    process = subprocess.Popen(
        [sys.executable, "-m", "vsc_serve", "convert", str(codes_path), "--to", "jsonl"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None
    assert json.loads(process.stdout.readline())["id"] == "0"
    process.stdout.close()
    assert process.stderr is not None
    assert process.stderr.read() == b""
    process.stderr.close()
    assert process.wait(60) == 0


def test_the_help_names_every_format():
    shown = CliRunner().invoke(app, ["convert", "--help"]).output
    choices = re.search(r"--to <([^>]*)>", shown) or re.search(r"--to +\[([^\]]*)\]", shown)
    assert set(re.sub(r"\s", "", choices[1]).split("|")) == set(FORMATS)
