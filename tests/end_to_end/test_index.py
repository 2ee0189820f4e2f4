"""`vsc index` and the combined queries of `vsc search`, from the command line to exit codes."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer.testing

from vsc_serve.cli import app
from vsc_serve.cli.translate import as_options
from vsc_serve.codes import dense_to_csr, read_codes, write_codes
from vsc_serve.errors import VscError

META = {"format": 1, "model": "m", "model_digest": "abc", "tau": 0.5, "view": "mean"}


def vsc(*arguments: object) -> typer.testing.Result:
    return typer.testing.CliRunner().invoke(app, list(map(str, arguments)))


def lines(*arguments: object) -> list[Any]:
    result = vsc(*arguments)
    assert result.exit_code == 0, result.output
    return [json.loads(line) for line in result.stdout.splitlines()]


def refused(code: int, *arguments: object) -> str:
    result = vsc(*arguments)
    error = result.exception
    assert isinstance(error, VscError), result.output
    assert error.exit_code == code
    return as_options(str(error))


def random_dense(seed: int, rows: int = 60) -> np.ndarray:
    rng = np.random.default_rng(seed)
    values = rng.normal(size=(rows, 12)) * (rng.uniform(size=(rows, 12)) < 0.4)
    return values.astype(np.float32)


@pytest.fixture
def codes(tmp_path: Path) -> Path:
    out = tmp_path / "codes.npz"
    ids = [f"{row:02}.png" for row in range(60)]
    write_codes(out, dense_to_csr(random_dense(0)), ids, META)
    return out


@pytest.fixture
def index(tmp_path: Path, codes: Path) -> Path:
    out = tmp_path / "idx"
    assert vsc("index", "build", codes, "--out", out).exit_code == 0
    return out


@pytest.mark.parametrize(
    "question",
    [
        ["--like", "07.png", "--explain"],
        ["--like", "07.png", "--like", "08.png", "--unlike", "09.png", "--metric", "dot"],
        ["--has", "3", "--not", "5"],
        ["--like", "07.png", "--has", "3", "--metric", "jaccard"],
        ["--queries", "codes.npz", "--explain"],
        ["--queries", "codes.npz", "--with-query", "--metric", "hamming"],
        ["--duplicates", "0.8"],
    ],
)
def test_an_index_answers_as_its_codes_do(
    codes: Path, index: Path, question: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(codes.parent)
    of_codes = lines("search", codes, *question, "--json")
    assert lines("index", "search", index, *question, "--json") == of_codes
    assert lines("search", index, *question, "--json") == of_codes
    assert of_codes


def test_codes_are_added_replaced_and_removed_and_the_answers_follow(
    codes: Path, index: Path, tmp_path: Path
) -> None:
    stored, more = read_codes(codes), tmp_path / "more.npz"
    dense = random_dense(1, 10)
    ids = [*stored.ids[:5], *(f"new-{row}" for row in range(5))]
    write_codes(more, dense_to_csr(dense), ids, META)
    add = ["index", "add", index, more, "--json"]
    assert lines(*add) == [{"added": 5, "replaced": 5, "unchanged": 0, "removed": 0}]
    assert lines(*add) == [{"added": 0, "replaced": 0, "unchanged": 10, "removed": 0}]
    assert lines(*add, "--update")[0]["removed"] == 55
    fresh = tmp_path / "fresh"
    assert vsc("index", "build", more, "--out", fresh).exit_code == 0
    question = ["--queries", more, "--json"]
    assert lines("search", index, *question) == lines("search", fresh, *question)
    assert lines("index", "remove", index, "new-0", "new-1", "--json")[0]["removed"] == 2
    assert json.loads(vsc("index", "info", index, "--verify", "--json").stdout)["rows"] == 8


def test_info_estimates_what_an_index_of_codes_costs_before_it_is_built(
    codes: Path, index: Path
) -> None:
    built = json.loads(vsc("index", "info", index, "--json").stdout)
    estimated = json.loads(vsc("index", "info", codes, "--json").stdout)
    firing = (random_dense(0) != 0).sum(axis=0).astype(float)
    assert estimated["postings_per_query"] == pytest.approx((firing**2).sum() / 60)
    for name in ("rows", "latents", "active", "postings_per_query"):
        assert built[name] == estimated[name]
    assert estimated["bytes"] < built["bytes"] < estimated["bytes"] + 3000  # headers of the files
    assert "postings_per_query" in vsc("index", "info", index).stdout


def test_a_wish_ranks_by_the_mean_of_unit_codes_less_that_of_others(codes: Path) -> None:
    unit = random_dense(0).astype(float)
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    query = (unit[7] + unit[8]) / 2 - unit[9]
    scores = unit @ query / np.linalg.norm(query)
    order = [row for row in np.argsort(-scores, kind="stable") if row not in (7, 8, 9)]
    wish = ["--like", "07.png", "--like", "08.png", "--unlike", "09.png"]
    (found,) = lines("search", codes, *wish, "--top", 60, "--json")
    assert [hit["row"] for hit in found["hits"]] == order
    assert (found["like"], found["unlike"]) == (["07.png", "08.png"], ["09.png"])
    (kept,) = lines("search", codes, *wish, "--top", 60, "--json", "--with-query")
    assert len(kept["hits"]) == 60


def test_features_limit_the_rows_and_rank_them(codes: Path) -> None:
    dense = random_dense(0)
    fits = np.flatnonzero((dense[:, 3] != 0) & (dense[:, 4] != 0) & (dense[:, 5] == 0))
    has = ["--has", 3, "--has", 4, "--not", 5]
    (found,) = lines("search", codes, *has, "--top", 60, "--json", "--metric", "dot")
    signs = np.where(dense[fits][:, [3, 4]].sum(axis=0) < 0, -1, 1)
    scores = dense[fits][:, [3, 4]] @ signs
    expected = fits[np.argsort(-scores, kind="stable")].tolist()
    assert [hit["row"] for hit in found["hits"]] == expected
    assert (found["has"], found["not"]) == ([3, 4], [5])
    (like,) = lines("search", codes, "--like", "07.png", *has, "--top", 60, "--json")
    assert sorted(hit["row"] for hit in like["hits"]) == sorted({*fits.tolist()} - {7})


def test_a_trec_run_and_bare_paths_hold_the_hits_of_json(codes: Path) -> None:
    question = ["search", codes, "--queries", codes, "--top", 3]
    answers = lines(*question, "--json")
    run = vsc(*question, "--format", "trec").stdout.splitlines()
    expected = [
        f"{answer['query']} Q0 {hit['id']} {rank} {hit['score']!r} vsc"
        for answer in answers
        for rank, hit in enumerate(answer["hits"], 1)
    ]
    assert run == expected
    paths = vsc("search", codes, "--like", "07.png", "-f", "paths", "--top", 3).stdout.splitlines()
    assert paths == [hit["id"] for hit in answers[7]["hits"]]


def test_ids_that_a_format_cannot_hold_are_one_line(tmp_path: Path) -> None:
    out = tmp_path / "codes.npz"
    write_codes(out, dense_to_csr(np.ones((2, 3), np.float32)), ["a b", "c\nd"], META)
    like = ["search", out, "--like", "a b", "--with-query"]
    assert "the id 'a b' holds white space" in refused(3, *like, "--format", "trec")
    assert "the id 'c\\nd' holds an end of line" in refused(3, *like, "--format", "paths")


def test_duplicates_are_printed_as_groups(tmp_path: Path) -> None:
    dense = random_dense(0, 6)
    out = tmp_path / "codes.npz"
    rows = np.concatenate([dense, dense[[2]] * 3, dense[[3, 2]]])
    write_codes(out, dense_to_csr(rows), [*"abcdefghi"], META)
    groups = [["c", "g", "i"], ["d", "h"]]
    question = ["search", out, "--duplicates", 0.9999]
    assert [line["ids"] for line in lines(*question, "--json")] == groups
    assert vsc(*question, "-f", "paths").stdout == "c\ng\ni\n\nd\nh\n"


def test_what_cannot_be_asked_is_one_line_and_an_exit_code(
    codes: Path, index: Path, tmp_path: Path
) -> None:
    search, like = ["search", index], ["--like", "07.png"]
    cases: list[tuple[list[object], str]] = [
        ([*like, "--queries", codes], "give one of --like, --queries, --vector and --duplicates"),
        ([*like, "--duplicates", 0.9], "give one of --like, --queries, --vector and --duplicates"),
        (["--unlike", "07.png"], "--unlike and --not leave rows out: give --like, --has"),
        (["--not", 3], "--unlike and --not leave rows out: give --like, --has"),
        (["--has", 12], "no feature 12: the codes have latents 0 to 11"),
        (["--has", 3, "--not", 3], "feature 3 is in --has and in --not"),
        (["--has", 3, "--rerank", "linear"], "of features only codes are there"),
        ([*like, *like, "--rerank", "linear"], "of the row 07.png only codes are there"),
        ([*like, "--explain", "-f", "trec"], "--explain: --format trec has no place for it"),
        ([*like, "--explain", "--metric", "hamming"], "--explain: a score of --metric hamming"),
        (["--like", "none"], "--like none: no such file, and no row has that id"),
        ([*like, "--unlike", "none"], "--unlike none: no such file, and no row has that id"),
        (["--duplicates", 1.5], "--duplicates is a cosine above 0.5 and at most 1, not 1.5"),
    ]
    for options, message in cases:
        assert message in refused(2, *search, *options), options
    other = tmp_path / "other.npz"
    write_codes(other, dense_to_csr(random_dense(1)), [*map(str, range(60))], META | {"tau": 0.3})
    assert "tau is 0.3, but 0.5" in refused(2, *search, "--queries", other)
    assert "tau is 0.3, but 0.5" in refused(2, "index", "add", index, other)
    build = ["index", "build", codes, "--out"]
    assert f"{index}: exists already. Choose another --out" in refused(2, *build, index)
    assert "--engine must be one of exact" in refused(2, *build, index, "--engine", "none")
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "mine.txt").write_text("mine")
    assert "not an index that vsc wrote" in refused(2, *build, foreign, "--force")
    assert [path.name for path in foreign.iterdir()] == ["mine.txt"]
    assert vsc(*build, index, "--force").exit_code == 0
    assert "no row has the id 'q'" in refused(2, "index", "remove", index, "q")
    file = next(index.rglob("norms.npy"))
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert "norms.npy: damaged (sha256" in refused(1, "index", "info", index, "--verify")
