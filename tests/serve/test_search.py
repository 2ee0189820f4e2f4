"""`vsc search`: which queries are asked of which rows, by one image or by many."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vsc_serve.cli.search import search
from vsc_serve.codes import CODES_FILE, read_codes, write_codes
from vsc_serve.convert import Options, plan, write_file
from vsc_serve.encoder import Encoder
from vsc_serve.errors import InputError, UsageError, VscError
from vsc_serve.index.exact import search_many
from vsc_serve.index.queries import WIDE_FROM, query_options
from vsc_serve.options import EncodeOptions

KEPT = ("top", "model", "with_query", "unlike", "has", "has_not", "form", "as_json", "duplicates")
"""Options that are not given as text."""

Run = Callable[..., list[dict[str, Any]]]


def write(path: Path, bundle: Path, given: list[Path], **options: Any) -> Path:
    encoder = Encoder.open(bundle, device="cpu")
    chosen = EncodeOptions(**options)
    codes = encoder.encode_rows(encoder.read(given), chosen).codes
    write_codes(path, codes, [one.name for one in given], encoder.provenance(chosen))
    return path


def changed(path: Path, **meta: Any) -> Path:
    """Write the codes again with another provenance."""
    stored = read_codes(path)
    out = path.with_name("changed.npz")
    write_codes(out, stored.codes, stored.ids, stored.meta | meta)
    return out


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], tiny_bundle: Path) -> Run:
    """Search, and give the lines of JSON; what was said is left on stderr."""

    def run(codes: Path, **given: Any) -> list[dict[str, Any]]:
        options = {"top": 3, "metric": "cosine", "query": "auto", "explain": False}
        asked = {name: None if one is None else str(one) for name, one in given.items()}
        if "like" in given:
            asked["like"] = [str(given["like"])]
        chosen = {"model": tiny_bundle, "device": "cpu", "as_json": True} | options | asked
        search(codes, **chosen | {name: given[name] for name in given if name in KEPT})
        return [json.loads(line) for line in capsys.readouterr().out.splitlines()]

    return run


@pytest.fixture
def given(images: Path) -> list[Path]:
    return sorted(images.iterdir())


@pytest.fixture
def rows(tmp_path: Path, tiny_bundle: Path, given: list[Path]) -> Path:
    """Codes of forty images."""
    return write(tmp_path / "codes.npz", tiny_bundle, given)


@pytest.fixture
def queries(tmp_path: Path, tiny_bundle: Path, given: list[Path]) -> Path:
    """Wide queries of the first five images."""
    return write(tmp_path / "q.npz", tiny_bundle, given[:5], view="query")


def expected(rows: Path, queries: Path, top: int = 3) -> list[dict[str, Any]]:
    stored, asked = read_codes(rows), read_codes(queries)
    nearest = search_many(stored.codes, asked.codes, top=top)
    answers: list[dict[str, Any]] = []
    for place, name in enumerate(asked.ids):
        hits = [{"id": stored.ids[hit.row], "score": hit.score} for hit in nearest.hits(place)]
        is_empty = not asked.codes[[place]].nnz
        answers.append(
            {"query": name, "hits": [], "empty": True}
            if is_empty
            else {"query": name, "hits": hits}
        )
    return answers


# Which query


@pytest.mark.parametrize(
    ("rows", "rule", "view"),
    [
        ({"tau": 0.5}, "auto", "query"),
        ({"tau": WIDE_FROM}, "auto", "query"),
        ({"tau": 0.29}, "auto", "mean"),
        ({}, "auto", "mean"),
        ({"tau": 0.5, "view": "gamma"}, "auto", "gamma"),
        ({"tau": 0.5, "view": "spike"}, "auto", "spike"),
        ({"tau": 0.2, "max_active": 9}, "auto", "query"),
        ({"tau": 0.05, "max_active": 9}, "auto", "mean"),
        ({"tau": 0.5, "max_active": 9}, "wide", "query"),
        ({"tau": 0.2}, "wide", "query"),
        ({"tau": 0.5}, "symmetric", "mean"),
    ],
)
def test_queries_are_wide_where_it_is_measured_to_help_unless_told(
    fake_encoder: Encoder, rows: dict[str, Any], rule: Any, view: str
) -> None:
    options = query_options(rows, fake_encoder.manifest, rule)
    symmetric = EncodeOptions.of_codes(rows)
    assert options == (EncodeOptions.for_query(rows) if view == "query" else symmetric)
    assert options.view == view


def test_queries_are_not_wide_where_the_model_wants_them_above_the_rows(
    fake_encoder: Encoder,
) -> None:
    manifest = replace(fake_encoder.manifest, query_tau=0.4)
    assert query_options({"tau": 0.35}, manifest).view == "mean"
    assert query_options({"tau": 0.4}, manifest).view == "query"


def test_a_wide_query_is_not_asked_of_rows_it_does_not_go_with(fake_encoder: Encoder) -> None:
    manifest = fake_encoder.manifest
    with pytest.raises(UsageError, match='`query="wide"`: its values are slab means, but the rows'):
        query_options({"tau": 0.5, "view": "gamma"}, manifest, "wide")
    with pytest.raises(UsageError, match=r"changed since they were encoded \(sign: split\)"):
        query_options({"tau": 0.5, "sign": "split"}, manifest, "wide")
    with pytest.raises(UsageError, match="`query` must be one of auto, wide, symmetric, not broad"):
        query_options({}, manifest, "broad")  # type: ignore[arg-type]


@pytest.mark.parametrize("rule", ["auto", "wide", "symmetric"])
def test_an_image_is_asked_by_the_rule_that_the_output_names(
    run: Run, rows: Path, tiny_bundle: Path, given: list[Path], tmp_path: Path, rule: str
) -> None:
    (found,) = run(rows, like=given[7], query=rule)
    view = "mean" if rule == "symmetric" else "query"
    asked = write(tmp_path / "one.npz", tiny_bundle, given[7:8], view=view)
    (answer,) = expected(rows, asked)
    assert [(hit["id"], hit["score"]) for hit in found["hits"]] == [
        (hit["id"], hit["score"]) for hit in answer["hits"]
    ]
    assert found["query"] == ("symmetric" if rule == "symmetric" else "wide")
    assert found["query_active"] == read_codes(asked).codes.nnz


def test_of_a_stored_row_only_its_code_is_asked(run: Run, rows: Path) -> None:
    (found,) = run(rows, like="07.png", model=None)
    assert "07.png" not in [hit["id"] for hit in found["hits"]]
    (found,) = run(rows, like="07.png", model=None, with_query=True)
    assert found["query"] == "symmetric"
    assert found["hits"][0]["score"] == pytest.approx(1.0)
    with pytest.raises(
        UsageError, match=r"--query wide: of the row 07.png only the stored code is"
    ):
        run(rows, like="07.png", query="wide")


def test_rows_of_a_low_threshold_are_asked_symmetrically_and_the_output_says_so(
    run: Run, tmp_path: Path, tiny_bundle: Path, given: list[Path], capsys: Any
) -> None:
    low = write(tmp_path / "low.npz", tiny_bundle, given, tau=0.2)
    (found,) = run(low, like=given[0])
    assert found["query"] == "symmetric"
    assert found["hits"][0] == {"id": "00.png", "row": 0, "score": pytest.approx(1.0)}
    too_low = write(tmp_path / "low.npz", tiny_bundle, given, tau=0.05)
    with pytest.raises(UsageError, match=r"thresholds out of order: queries keep gamma above 0\.1"):
        run(too_low, like=given[0], query="wide")


# Many


def test_a_file_of_queries_gets_a_line_each(run: Run, rows: Path, queries: Path) -> None:
    assert run(rows, queries=queries, model=None) == expected(rows, queries)
    everything = run(rows, queries=rows, top=40, with_query=True)
    assert everything == expected(rows, rows, 40)
    for answer, line in zip(everything, run(rows, queries=rows, top=39), strict=True):
        others = [hit for hit in answer["hits"] if hit["id"] != answer["query"]]
        assert line == answer | {"hits": others}


def test_a_folder_is_encoded_as_queries_and_what_cannot_be_read_comes_last(
    run: Run, rows: Path, queries: Path, given: list[Path], tmp_path: Path, capsys: Any
) -> None:
    folder = tmp_path / "asked"
    folder.mkdir()
    (folder / "0-bad.png").write_bytes(b"no image")
    for path in given[:5]:
        (folder / path.name).write_bytes(path.read_bytes())
    *found, bad = run(rows, queries=folder)
    assert found == expected(rows, queries)
    assert (bad["query"], bad["hits"]) == ("0-bad.png", [])
    assert bad["error"].startswith("not an image")
    for path in given[:5]:
        (folder / path.name).unlink()
    with pytest.raises(InputError, match=r"none of 1 queries can be read; the first: 0-bad.png: n"):
        run(rows, queries=folder)


def test_vectors_are_encoded_as_queries_and_a_bad_one_costs_only_itself(
    run: Run, vector_bundle: Path, tmp_path: Path
) -> None:
    vectors = np.random.default_rng(1).normal(size=(30, 4)).astype(np.float32)
    encoder = Encoder.open(vector_bundle, device="cpu")
    stored = tmp_path / "rows.npz"
    write_codes(stored, encoder.encode(vectors), [f"v{n}" for n in range(30)], encoder.provenance())
    options = EncodeOptions.for_query(encoder.manifest)
    codes = encoder.encode_rows(vectors[:3], options).codes
    asked = tmp_path / "asked.npz"
    write_codes(asked, codes, ["0", "1", "3"], encoder.provenance(options))
    np.save(tmp_path / "q.npy", np.insert(vectors[:3], 2, np.nan, axis=0))
    *found, bad = run(stored, queries=tmp_path / "q.npy", model=vector_bundle)
    assert found == expected(stored, asked)
    reason = "holds values that are not finite (NaN or infinity)"
    assert bad == {"query": "2", "hits": [], "error": reason}
    with pytest.raises(UsageError, match=r"q\.npy: model tiny vectors encodes vectors, not images"):
        run(stored, like=tmp_path / "q.npy", model=vector_bundle)
    np.save(tmp_path / "q.npy", vectors[:, :3])
    with pytest.raises(InputError, match=r"takes float32 of shape \(rows, 4\), not float32 of sha"):
        run(stored, queries=tmp_path / "q.npy", model=vector_bundle)


def test_an_empty_query_has_no_hit_and_says_so(
    run: Run, rows: Path, queries: Path, tmp_path: Path
) -> None:
    stored = read_codes(queries)
    codes = stored.codes.toarray()
    codes[1] = 0
    out = tmp_path / "some.npz"
    write_codes(out, type(stored.codes)(codes), stored.ids, stored.meta)
    found = run(rows, queries=out)
    assert found[1] == {"query": "01.png", "hits": [], "empty": True}
    assert [len(answer["hits"]) for answer in found] == [3, 0, 3, 3, 3]


@pytest.mark.parametrize("rule", ["wide", "symmetric"])
def test_explanations_of_many_queries_sum_to_the_scores(
    rows: Path, images: Path, tiny_bundle: Path, capsys: Any, rule: Any
) -> None:
    search(
        rows, queries=str(images), top=4, query=rule, explain=True, model=tiny_bundle, as_json=True
    )
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 40
    for line in lines:
        for hit in json.loads(line)["hits"]:
            shared = sum(feature["score"] for feature in hit["shared"])
            assert shared == pytest.approx(hit["score"], abs=1e-9)


def test_without_json_a_table_names_query_and_hits(
    rows: Path, queries: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    search(rows, queries=str(queries), top=1, explain=True)
    shown = capsys.readouterr()
    first = expected(rows, queries, 1)[0]
    name, hit, feature, *_ = shown.out.splitlines()
    assert name == "00.png"
    assert hit == f"  {first['hits'][0]['score']:7.4f}  {first['hits'][0]['id']}"
    assert feature.strip().startswith(("+", "-"))
    assert shown.err == f"query    wide: the codes in {queries}\n"


# What cannot be


def test_exactly_one_of_like_and_queries_is_given(run: Run, rows: Path) -> None:
    with pytest.raises(UsageError, match="give one of --like IMAGE"):
        run(rows)
    with pytest.raises(
        UsageError, match="give one of --like, --queries, --vector and --duplicates"
    ):
        run(rows, like="00.png", queries="q.npz")


@pytest.mark.parametrize(
    ("meta", "message"),
    [
        ({"model_digest": "0" * 16}, r"changed.npz: model_digest is 0{16}, but \w{16} in .*codes"),
        ({"tau": 0.6}, "thresholds out of order: queries keep gamma above 0.6, the rows .* 0.5"),
        ({"stored_tau": 0.4}, r"queries for rows of tau 0.4, but .* 0.5. .* `stored_tau=0.5`"),
        ({"sign": "split"}, "changed.npz: sign is split, but None in .*codes.npz"),
        ({"view": "gamma"}, "changed.npz: view is gamma, but mean in .*codes.npz"),
        ({"view": "mean"}, "changed.npz: tau is 0.1, but 0.5 in .*codes.npz"),
        ({"view": "mean", "tau": 0.5, "max_active": 3}, "max_active is 3, but None in"),
    ],
)
def test_queries_that_do_not_go_with_the_rows_are_refused_in_one_line(
    run: Run, rows: Path, queries: Path, meta: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message) as refused:
        run(rows, queries=changed(queries, **meta))
    assert "\n" not in str(refused.value)


def test_wide_queries_are_refused_by_rows_of_other_values(
    run: Run, rows: Path, queries: Path
) -> None:
    with pytest.raises(UsageError, match=r"q.npz: queries for rows of slab means, but .* view gam"):
        run(changed(rows, view="gamma"), queries=queries)


def test_rows_that_are_queries_are_refused(run: Run, queries: Path) -> None:
    with pytest.raises(UsageError, match=r"q.npz: holds queries, not the rows to search"):
        run(queries, queries=queries)


def test_codes_as_queries_leave_no_rule_to_choose(run: Run, rows: Path, queries: Path) -> None:
    for path, rule in ((queries, "symmetric"), (rows, "wide")):
        with pytest.raises(UsageError, match=f"--query {rule}: the codes in .* Leave --query out"):
            run(rows, queries=path, query=rule)


def test_a_matrix_of_plain_scipy_is_taken_as_it_is_where_its_columns_fit(
    run: Run, rows: Path, queries: Path, tmp_path: Path
) -> None:
    import scipy.sparse

    matrix = read_codes(queries).codes
    scipy.sparse.save_npz(tmp_path / "plain.npz", matrix)
    found = run(rows, queries=tmp_path / "plain.npz")
    assert [one["hits"] for one in found] == [one["hits"] for one in expected(rows, queries)]
    assert [one["query"] for one in found] == ["0", "1", "2", "3", "4"]
    scipy.sparse.save_npz(tmp_path / "plain.npz", matrix[:, :5])
    with pytest.raises(UsageError, match=r"plain.npz: latents is 5, but 6 in .*codes.npz"):
        run(rows, queries=tmp_path / "plain.npz")


def test_values_that_are_not_finite_are_refused_with_file_row_and_id(
    run: Run, rows: Path, queries: Path
) -> None:
    broken = {}
    for name, path, row in (("rows", rows, 30), ("queries", queries, 2)):
        stored = read_codes(path)
        stored.codes.data[stored.codes.indptr[row + 1] - 1] = np.nan
        broken[name] = path.with_name(f"bad-{name}.npz")
        write_codes(broken[name], stored.codes, stored.ids, stored.meta)
    with pytest.raises(InputError, match=r"bad-rows.npz: row 30 \(30.png\) holds values that are"):
        run(broken["rows"], queries=queries)
    with pytest.raises(InputError, match=r"bad-queries.npz: row 2 \(02.png\) holds values that"):
        run(rows, queries=broken["queries"])


def test_a_file_without_queries_and_one_that_is_not_there_are_refused(
    run: Run, rows: Path, queries: Path, tmp_path: Path
) -> None:
    stored = read_codes(queries)
    write_codes(tmp_path / "none.npz", stored.codes[:0], [], stored.meta)
    with pytest.raises(UsageError, match="there is no query"):
        run(rows, queries=tmp_path / "none.npz")
    with pytest.raises(VscError, match=r"no\.npz"):
        run(rows, queries=tmp_path / "no.npz")


def test_queries_that_cannot_be_opened_are_an_error_in_one_line(
    run: Run, rows: Path, queries: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def denied(path: Path) -> bool:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("vsc_serve.codes.CODES_FILE", replace(CODES_FILE, recognises=denied))
    with pytest.raises(VscError, match=r"q\.npz"):
        run(rows, queries=queries)


def test_split_rows_are_asked_only_with_split_queries(
    run: Run, rows: Path, queries: Path, tmp_path: Path
) -> None:
    split = {}
    for name, path in (("rows", rows), ("queries", queries)):
        split[name] = tmp_path / f"split-{name}.npz"
        write_file(plan([path], to="npz", options=Options(sign="split")), split[name])
    with pytest.raises(UsageError, match="latents is 6, but 12 in"):
        run(split["rows"], queries=queries)
    found = run(split["rows"], queries=split["queries"])
    assert found == expected(split["rows"], split["queries"])
