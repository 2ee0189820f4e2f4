"""`vsc encode --as query` and `vsc search --queries`, from the command line to exit codes."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vsc_serve.codes import read_codes
from vsc_serve.encoder import Encoder
from vsc_serve.options import EncodeOptions

pytestmark = pytest.mark.slow


def vsc(*arguments: object, **options: Any) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "vsc_serve", *map(str, arguments)]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=120, check=False, **options
    )


def done(*arguments: object, **options: Any) -> "subprocess.CompletedProcess[str]":
    result = vsc(*arguments, **options)
    assert result.returncode == 0, result.stderr
    return result


def refused(code: int, *arguments: object) -> str:
    """The one line of an error."""
    result = vsc(*arguments)
    assert result.returncode == code, result.stderr
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("vsc: ")]
    assert "Traceback" not in result.stderr
    return line


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory, grey_folder: Path) -> Path:
    """Twenty of the images, and a file that is none."""
    folder = tmp_path_factory.mktemp("asked")
    for path in sorted(grey_folder.rglob("*.png"))[::10]:
        os.link(path, folder / path.name)
    (folder / "bad.png").write_bytes(b"no image")
    return folder


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory, grey_folder: Path, tiny_bundle: Path) -> Path:
    out = tmp_path_factory.mktemp("rows") / "codes.npz"
    done("encode", grey_folder, "--out", out, "--model", tiny_bundle)
    return out


@pytest.mark.parametrize("workers", [0, 2])
def test_queries_are_written_as_the_encoder_gives_them(
    asked: Path, tiny_bundle: Path, tmp_path: Path, workers: int
) -> None:
    out = tmp_path / "q.npz"
    command = ["encode", asked, "--as", "query", "--model", tiny_bundle, "--workers", workers]
    talk = done(*command, "--out", out).stderr
    assert re.search(r"^model .* tau 0\.1 \(queries for rows of tau 0\.5\), weights", talk, re.M)
    assert re.search(rf"^next +vsc search CODES --queries {out}$", talk, re.M)
    stored = read_codes(out)
    encoder = Encoder.open(tiny_bundle, device="cpu")
    options = EncodeOptions.for_query(encoder.manifest)
    pixels = encoder.read([asked / name for name in stored.ids])
    expected = encoder.encode_rows(pixels, options).codes
    assert expected.nnz > encoder.encode(pixels).nnz
    np.testing.assert_array_equal(stored.codes.toarray(), expected.toarray())
    facts = {"view": "query", "tau": 0.1, "stored_tau": 0.5}
    assert stored.meta.items() >= facts.items()
    assert json.loads((tmp_path / "q.errors.jsonl").read_text())["id"] == "bad.png"
    done(*command, "--out", tmp_path / "shards", "--shard-rows", 6)
    in_shards = read_codes(tmp_path / "shards")
    np.testing.assert_array_equal(in_shards.codes.toarray(), expected.toarray())
    assert in_shards.meta == stored.meta


def test_queries_go_to_parquet(asked: Path, tiny_bundle: Path, tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    for name in ("q.parquet", "q.npz"):
        done("encode", asked, "--as", "query", "--out", tmp_path / name, "--model", tiny_bundle)
    table = parquet.read_table(tmp_path / "q.parquet")
    stored = read_codes(tmp_path / "q.npz")
    assert table["id"].to_pylist() == stored.ids
    assert json.loads(table.schema.metadata[b"vsc"]) == stored.meta
    assert np.concatenate(table["values"].to_pylist()).tolist() == stored.codes.data.tolist()


def test_update_takes_queries_over_only_for_the_same_thresholds(
    asked: Path, tiny_bundle: Path, tmp_path: Path
) -> None:
    out = tmp_path / "q.npz"
    command = ["encode", asked, "--out", out, "--model", tiny_bundle, "--update", "--as", "query"]
    done(*command)
    assert ", 0 of them new" in done(*command).stderr
    for option, why in ((["--tau", 0.2], "tau: 0.1"), (["--stored-tau", 0.4], "stored_tau: 0.5")):
        talk = done(*command, *option).stderr
        assert re.search(f"^update +encoding everything: .* has another {why}", talk, re.M), talk
        done(*command)
    as_rows = done(*command[:-2])
    assert re.search("^update +encoding everything: .* has another tau: 0.1", as_rows.stderr, re.M)


def test_what_queries_cannot_be_is_one_line(asked: Path, tiny_bundle: Path, tmp_path: Path) -> None:
    command = ["encode", asked, "--out", tmp_path / "q.npz", "--model", tiny_bundle]
    line = refused(2, *command, "--as", "query", "--view", "gamma")
    assert line == "vsc: --as query sets the values of queries: leave --view out"
    line = refused(2, *command, "--as", "query", "--tau", 0.6)
    assert re.match(
        r"vsc: thresholds out of order: queries keep gamma above 0\.6, .* --tau of", line
    )
    assert "--view query too" in refused(2, *command, "--stored-tau", 0.4)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_is_searched_with_the_same_queries_as_its_file(
    rows: Path, asked: Path, tiny_bundle: Path, tmp_path: Path
) -> None:
    out = tmp_path / "q.npz"
    done("encode", asked, "--as", "query", "--out", out, "--model", tiny_bundle)
    command = ["search", rows, "--json", "--top", 5, "--queries"]
    from_file = done(*command, out).stdout.splitlines()
    from_folder = done(*command, asked, "--model", tiny_bundle)
    *found, bad = from_folder.stdout.splitlines()
    assert len(found) == 20
    assert found == from_file
    assert json.loads(bad).items() >= {"query": "bad.png", "hits": []}.items()
    assert "skipped  1 of 21 queries cannot be read" in from_folder.stderr
    names = "\n".join(str(path) for path in sorted(asked.iterdir()))
    listed = done(*command, "-", "--model", tiny_bundle, input=names).stdout.splitlines()
    assert [json.loads(line)["hits"] for line in listed] == [
        json.loads(line)["hits"] for line in [*found, bad]
    ]


def test_what_cannot_be_searched_with_is_one_line_and_an_exit_code(
    rows: Path, asked: Path, tiny_bundle: Path, tmp_path: Path
) -> None:
    lone = tmp_path / "lone"
    lone.mkdir()
    (lone / "bad.png").write_bytes(b"no image")
    search = ["search", rows, "--model", tiny_bundle]
    assert "none of 1 queries can be read" in refused(3, *search, "--queries", lone)
    assert "give one of --like IMAGE" in refused(2, *search)
    np.save(tmp_path / "q.npy", np.zeros((2, 5), np.float32))
    line = refused(3, *search, "--queries", tmp_path / "q.npy")
    assert "takes uint8 of shape (rows, 8, 8, 1), not float32 of shape" in line
    (tmp_path / "cut.npz").write_bytes(rows.read_bytes()[:900])
    assert "cut.npz" in refused(3, *search, "--queries", tmp_path / "cut.npz")
    low = tmp_path / "low.npz"
    done("encode", asked, "--out", low, "--model", tiny_bundle, "--tau", 0.05)
    done("encode", asked, "--out", tmp_path / "q.npz", "--as", "query", "--model", tiny_bundle)
    for query in (asked, tmp_path / "q.npz"):
        wide = ["search", low, "--queries", query, "--query", "wide", "--model", tiny_bundle]
        assert "thresholds out of order: queries keep gamma above 0.1" in refused(2, *wide)
