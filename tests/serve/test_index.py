"""The engine `exact`: what it finds, how it changes, and what is left when a change is cut off."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from vsc_serve.codes import CodeFile, Codes, dense_to_csr, read_codes, stack_codes
from vsc_serve.errors import InputError, UsageError
from vsc_serve.index import changes, postings, search_blocks
from vsc_serve.index.base import Change, Part, engine_names, find_engine, is_index, open_index
from vsc_serve.index.exact import search_many
from vsc_serve.index.inverted import ExactIndex
from vsc_serve.index.metrics import METRICS
from vsc_serve.locks import exclusive

META = {"format": 1, "model": "m", "model_digest": "abc", "tau": 0.5, "view": "mean"}


def random_codes(rows: int, latents: int, seed: int) -> Codes:
    rng = np.random.default_rng(seed)
    values = rng.normal(size=(rows, latents)) * (rng.uniform(size=(rows, latents)) < 0.2)
    return dense_to_csr(values.astype(np.float32))


def part(codes: Codes, ids: list[str] | None = None, **meta: Any) -> Part:
    names = [f"{row}.png" for row in range(codes.shape[0])] if ids is None else ids
    return Part(Path("codes.npz"), CodeFile(codes, names, META | meta))


def contents(index: ExactIndex) -> dict[str, list[float]]:
    """The dense code of each id."""
    rows = index.numbers()
    dense = index.rows[rows].toarray().tolist()
    return {index.id_of(row): code for row, code in zip(rows.tolist(), dense, strict=True)}


def same_hits(index: ExactIndex, codes: Codes, queries: Codes, **options: Any) -> None:
    """An index without removed rows answers as a search of the codes themselves, bit for bit."""
    found, expected = index.search(queries, **options), search_many(codes, queries, **options)
    np.testing.assert_array_equal(found.rows, expected.rows)
    np.testing.assert_array_equal(found.scores, expected.scores)


def small_integers(rows: int) -> st.SearchStrategy[np.ndarray]:
    """Codes whose sums are exact, with many equal scores, equal rows and empty rows."""
    values = st.sampled_from([0, 0, 0, 0, 1, 2, -1])
    return hnp.arrays(np.float32, st.tuples(st.integers(1, rows), st.just(5)), elements=values)


@given(small_integers(60), small_integers(9), st.sampled_from(METRICS), st.integers(1, 70))
@settings(max_examples=200, deadline=None)
def test_an_index_finds_what_a_search_of_all_rows_finds_bit_for_bit(
    tmp_path_factory: pytest.TempPathFactory,
    dense: np.ndarray,
    asked: np.ndarray,
    metric: Any,
    top: int,
) -> None:
    codes, queries = dense_to_csr(dense), dense_to_csr(asked)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(postings, "BLOCK_ROWS", 7)
        patch.setattr(search_blocks, "_SAMPLE", 3)
        index = ExactIndex.build([part(codes)], tmp_path_factory.mktemp("index") / "idx")
        same_hits(index, codes, queries, top=top, metric=metric)


@pytest.mark.parametrize("metric", METRICS)
def test_real_values_score_bit_for_bit_as_without_an_index_in_whatever_segments(
    metric: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(postings, "BLOCK_ROWS", 500)
    codes, queries = random_codes(3000, 60, 0), random_codes(40, 60, 1)
    parts = [
        part(codes[start : start + 700], [f"{row}" for row in range(start, min(3000, start + 700))])
        for start in range(0, 3000, 700)
    ]
    index = ExactIndex.build(parts, tmp_path / "idx")
    assert index.facts()["segments"] == 5
    same_hits(index, codes, queries, top=25, metric=metric)
    among = np.random.default_rng(2).uniform(size=3000) < 0.1
    found = index.search(queries, top=25, metric=metric, among=among)
    kept = np.flatnonzero(among)
    expected = search_many(codes[kept], queries, top=25, metric=metric)
    np.testing.assert_array_equal(found.rows, kept[expected.rows])
    np.testing.assert_array_equal(found.scores, expected.scores)


def test_rows_that_share_nothing_rank_above_negative_scores_and_in_row_order(
    tmp_path: Path,
) -> None:
    dense = np.array([[-1, 0], [0, 1], [2, 0], [0, 0]], np.float32)
    index = ExactIndex.build([part(dense_to_csr(dense))], tmp_path / "idx")
    (hits,) = [index.search(dense_to_csr(np.array([[1, 0]], np.float32)), top=4).hits(0)]
    assert [(hit.row, hit.score) for hit in hits] == [(2, 1.0), (1, 0.0), (3, 0.0), (0, -1.0)]


def test_jaccard_and_hamming_are_those_of_the_supports(tmp_path: Path) -> None:
    codes, queries = random_codes(50, 12, 0), random_codes(5, 12, 1)
    some, others = codes.toarray() != 0, queries.toarray() != 0
    both = (others[:, None] & some).sum(axis=2)
    either = (others[:, None] | some).sum(axis=2)
    expected = {"jaccard": both / np.maximum(either, 1), "hamming": 1 - (either - both) / 12}
    index = ExactIndex.build([part(codes)], tmp_path / "idx")
    for metric, scores in expected.items():
        found = index.search(queries, top=50, metric=metric)
        order = np.argsort(-scores, axis=1, kind="stable")
        np.testing.assert_allclose(found.scores, np.take_along_axis(scores, order, 1), atol=1e-12)


steps = st.lists(
    st.tuples(
        st.sampled_from(["add", "update", "remove"]),
        st.dictionaries(st.integers(0, 12), st.integers(1, 3), max_size=8),
    ),
    max_size=8,
)


@given(steps)
@settings(max_examples=60, deadline=None)
def test_any_changes_leave_what_a_dictionary_of_codes_would_hold(
    tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[str, dict[int, int]]]
) -> None:
    path = tmp_path_factory.mktemp("index") / "idx"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(postings, "BLOCK_ROWS", 4)
        patch.setattr(changes, "_SMALL", 6)
        patch.setattr(changes, "_MAX_SMALL", 2)
        expected = {"a": [1.0, 0.0, 0.0, 0.0]}
        index = ExactIndex.build([part(dense_to_csr(np.eye(1, 4, dtype=np.float32)), ["a"])], path)
        for verb, chosen in steps:
            named = {f"{one}": np.eye(4)[value].tolist() for one, value in chosen.items()}
            if verb == "remove":
                gone = [name for name in named if name in expected]
                assert index.remove(gone).removed == len(gone)
                expected = {name: code for name, code in expected.items() if name not in gone}
            else:
                dense = np.array([*named.values()], np.float32).reshape(-1, 4)
                change = index.add([part(dense_to_csr(dense), [*named])], update=verb == "update")
                same = sum(expected.get(name) == code for name, code in named.items())
                known = sum(name in expected for name in named)
                assert (change.added, change.unchanged) == (len(named) - known, same)
                assert change.replaced == known - same
                expected = (expected if verb == "add" else {}) | named
            assert contents(index) == contents(ExactIndex.open(path)) == expected
            assert index.count == len(expected)
            index.verify()
        for name in expected:
            row = index.row_of(name)
            assert row is not None
            assert index.id_of(row) == name
        assert index.row_of("none") is None


def test_removed_rows_are_never_found_and_their_ids_can_come_back(tmp_path: Path) -> None:
    codes = random_codes(40, 10, 0)
    index = ExactIndex.build([part(codes)], tmp_path / "idx")
    gone = [f"{row}.png" for row in range(0, 40, 3)]
    assert index.remove(gone) == Change(removed=14)
    kept = np.array([row for row in range(40) if row % 3])
    found = index.search(codes[[0, 1]], top=40)
    expected = search_many(codes[kept], codes[[0, 1]], top=40)
    np.testing.assert_array_equal(found.rows, kept[expected.rows])
    assert index.row_of("0.png") is None
    assert not set(index.having(0).tolist()) & set(range(0, 40, 3))
    assert index.add([part(codes[[0]], ["0.png"])]) == Change(added=1)
    assert index.row_of("0.png") == 40


def test_a_second_add_of_the_same_codes_writes_nothing(tmp_path: Path) -> None:
    codes = random_codes(30, 10, 0)
    index = ExactIndex.build([part(codes)], tmp_path / "idx")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "idx").rglob("*")}
    assert index.add([part(codes)], update=True) == Change(unchanged=30)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "idx").rglob("*")} == before


def test_ids_of_any_text_are_kept(tmp_path: Path) -> None:
    names = ["", "a b.png", "ä/日本.png", "\udcff.png", "line\nend", "x" * 5000, "\0", "b"]
    codes = random_codes(len(names), 8, 0)
    index = ExactIndex.build([part(codes, names)], tmp_path / "idx")
    assert [index.id_of(row) for row in range(len(names))] == names
    assert [index.row_of(name) for name in names] == list(range(len(names)))
    assert index.row_of("a") is None


def test_the_same_codes_give_the_same_bytes(tmp_path: Path) -> None:
    codes = random_codes(50, 20, 0)
    for name in ("one", "two"):
        ExactIndex.build([part(codes)], tmp_path / name)
    files = [path.relative_to(tmp_path / "one") for path in (tmp_path / "one").rglob("*.*")]
    assert len(files) == 10
    for file in files:
        if (tmp_path / "one" / file).is_file():
            content = (tmp_path / "one" / file).read_bytes()
            assert content == (tmp_path / "two" / file).read_bytes()


def test_codes_that_do_not_go_into_an_index_are_refused_and_nothing_is_changed(
    tmp_path: Path,
) -> None:
    codes = random_codes(6, 10, 0)
    index = ExactIndex.build([part(codes)], tmp_path / "idx")
    more = part(random_codes(3, 10, 1), ["x", "y", "z"])
    broken = codes.copy()
    broken.data[0] = np.nan
    cases: list[tuple[Part, type[Exception], str]] = [
        (part(codes, model_digest="other"), UsageError, "model_digest is other, but abc in"),
        (part(codes, tau=0.4), UsageError, "tau is 0.4, but 0.5 in .*build another index"),
        (part(codes, view="gamma"), UsageError, "view is gamma, but mean in"),
        (part(codes, view="query"), UsageError, "holds queries, not the rows to search"),
        (part(random_codes(6, 11, 0)), UsageError, "latents is 11, but 10 in"),
        (part(broken), InputError, "codes.npz: row 0 .*holds values that are not finite"),
        (part(codes, ["a"] * 6), InputError, r"the id 'a' \(row 1\) is there more than once"),
    ]
    for wrong, kind, message in cases:
        with pytest.raises(kind, match=message):
            index.add([more, wrong])
        with pytest.raises(kind):
            ExactIndex.build([part(codes, [*"123456"]), wrong], tmp_path / "new")
    with pytest.raises(UsageError, match=r"no row has the id 'q' and 1 more. Nothing was removed"):
        index.remove(["0.png", "q", "r"])
    assert len(contents(ExactIndex.open(tmp_path / "idx"))) == 6
    assert sorted(path.name for path in tmp_path.iterdir()) == ["idx"]
    assert [path.name for path in (tmp_path / "idx").glob("segment-*")] == ["segment-000001"]


def test_an_index_of_no_rows_answers_with_none(tmp_path: Path) -> None:
    codes = random_codes(3, 10, 0)
    index = ExactIndex.build([part(codes[:0])], tmp_path / "idx")
    assert index.search(codes, top=3).rows.shape == (3, 0)
    assert index.add([part(codes)]) == Change(added=3)
    assert index.add([part(codes[:0])], update=True) == Change(removed=3)
    assert index.count == 0
    assert index.search(codes).rows.shape == (3, 0)


@pytest.fixture
def built(tmp_path: Path) -> ExactIndex:
    index = ExactIndex.build([part(random_codes(200, 20, 0))], tmp_path / "idx")
    index.remove(["5.png"])
    return index


def test_every_file_that_is_cut_short_or_missing_is_named(
    built: ExactIndex, tmp_path: Path
) -> None:
    files = sorted((tmp_path / "idx").rglob("*.npy"))
    assert len(files) == 10
    for file in files:
        whole = file.read_bytes()
        file.write_bytes(whole[:-4])
        line = rf"{file.parent}: damaged \({file.name} has .* bytes, not .*\). Build the index aga"
        with pytest.raises(InputError, match=line):
            open_index(tmp_path / "idx")
        file.unlink()
        with pytest.raises(InputError, match=rf"{file.name}: damaged \(missing\)"):
            open_index(tmp_path / "idx")
        file.write_bytes(whole)
    assert open_index(tmp_path / "idx").count == 199


@pytest.mark.parametrize("seed", range(5))
def test_a_changed_byte_is_found_by_verify_and_never_ends_the_process(
    built: ExactIndex, tmp_path: Path, seed: int
) -> None:
    """Numbers that lead out of an array would make scipy read or write beyond it."""
    rng, queries = np.random.default_rng(seed), random_codes(5, 20, 1)
    for file in sorted((tmp_path / "idx").rglob("*.npy")):
        whole = file.read_bytes()
        damaged = bytearray(whole)
        for place in rng.integers(0, len(whole), 8).tolist():
            damaged[place] ^= 0xFF
        file.write_bytes(damaged)
        try:
            index = open_index(tmp_path / "idx")
            with pytest.raises(InputError, match=rf"{file.name}: damaged \(sha256 .* but index"):
                index.verify()
            index.search(queries, top=200)
            index.rows[index.numbers()]
            [index.id_of(row) for row in range(200)]
        except InputError as error:
            assert "damaged" in str(error)  # noqa: PT017  # some damage is harmless
        file.write_bytes(whole)


def test_a_list_that_names_other_files_or_a_newer_format_is_refused(
    built: ExactIndex, tmp_path: Path
) -> None:
    place = tmp_path / "idx" / "index.json"
    stored = json.loads(place.read_text())
    segment = stored["segments"][0]
    cases = [
        ({"format": 2}, "format 2, but this vsc-serve reads up to 1. Upgrade"),
        ({"engine": "other"}, "`engine` must be one of exact.*, not other"),
        ({"segments": [segment | {"name": "../x"}]}, "is no segment"),
        ({"segments": [segment | {"rows": -1}]}, "damaged"),
        ({"segments": 3}, "damaged"),
        ({"latents": 19}, "damaged"),
    ]
    for change, message in cases:
        place.write_text(json.dumps(stored | change))
        with pytest.raises((InputError, UsageError), match=message):
            open_index(tmp_path / "idx")
    place.write_text(json.dumps(stored)[:-9])
    with pytest.raises(InputError, match=r"index.json: damaged .*Build the index again"):
        open_index(tmp_path / "idx")
    with pytest.raises(InputError, match=r"no index here .*vsc index build codes.npz --out"):
        open_index(tmp_path)
    assert not is_index(tmp_path)


def test_two_writers_exclude_each_other(built: ExactIndex, tmp_path: Path) -> None:
    more = [part(random_codes(3, 20, 1), ["x", "y", "z"])]
    with exclusive(tmp_path / "idx"), pytest.raises(UsageError, match="another run is writing"):
        built.add(more)
    with exclusive(tmp_path / "idx"), pytest.raises(UsageError, match="another run is writing"):
        ExactIndex.build(more, tmp_path / "idx")
    assert built.add(more) == Change(added=3)


def test_a_full_disk_leaves_the_old_index_whole(
    built: ExactIndex, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = contents(built)
    more = [part(random_codes(3, 20, 1), ["x", "y", "5.png"])]
    for moment in range(30):
        calls = iter(range(1000))

        def full(file: int, calls: Any = calls, moment: int = moment) -> None:
            if next(calls) == moment:
                raise OSError(errno.ENOSPC, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", full)
            try:
                built.add(more)
                break
            except InputError as error:
                assert "cannot be written (No space left on device)" in str(error)  # noqa: PT017
        assert contents(ExactIndex.open(tmp_path / "idx")) == before
        assert len(list((tmp_path / "idx").iterdir())) == 2
    assert moment > 8
    assert built.count == 202


_CHANGER = """
import sys
sys.path[:0] = [sys.argv[2]]
from test_index import keep_changing
keep_changing(sys.argv[1])
"""


def keep_changing(path: str) -> None:
    index, number = ExactIndex.open(Path(path)), 0
    while True:
        number += 1
        codes = random_codes(30, 20, number)
        names = [f"{row}.png" for row in range(number % 7, number % 7 + 30)]
        index.add([part(codes, names)], update=bool(number % 3))
        print("changed", flush=True)


@pytest.mark.slow
def test_a_killed_change_leaves_an_index_that_opens_and_changes(
    built: ExactIndex, tmp_path: Path
) -> None:
    path = tmp_path / "idx"
    for moment in range(6):
        command = [sys.executable, "-c", _CHANGER, str(path), str(Path(__file__).parent)]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as changer:
            assert changer.stdout is not None
            changer.stdout.readline()
            time.sleep(0.013 * moment)
            changer.send_signal(signal.SIGKILL)
        index = ExactIndex.open(path)
        index.verify()
        assert len(contents(index)) == index.count > 0
        codes = random_codes(3, 20, 0)
        assert index.add([part(codes, ["x", "y", "z"])]).added in (0, 3)
        index.search(codes)


def test_a_reader_goes_on_while_the_index_changes(built: ExactIndex, tmp_path: Path) -> None:
    reader, codes = ExactIndex.open(tmp_path / "idx"), random_codes(200, 20, 0)
    expected = reader.search(codes[:5])
    names = [f"{row}.png" for row in range(200)]
    built.add([part(random_codes(200, 20, 3), names)])
    found = reader.search(codes[:5])
    np.testing.assert_array_equal(found.rows, expected.rows)
    assert reader.id_of(7) == "7.png"


def test_small_segments_are_merged_and_what_was_merged_is_removed(tmp_path: Path) -> None:
    codes = random_codes(40, 10, 0)
    index = ExactIndex.build([part(codes[:1], ["0"])], tmp_path / "idx")
    for row in range(1, 40):
        index.add([part(codes[[row]], [f"{row}"])])
        assert index.facts()["segments"] <= 16
        assert len(list((tmp_path / "idx").glob("segment-*"))) == index.facts()["segments"]
    same_hits(index, codes, codes[:9], top=40)
    assert [index.id_of(row) for row in range(40)] == [f"{row}" for row in range(40)]
    index.remove([f"{row}" for row in range(30)])
    assert index.facts()["removed"] < 30


def test_an_index_of_shards_is_that_of_their_rows(tmp_path: Path) -> None:
    archive = Path(__file__).parents[1] / "data" / "archive" / "codes-v1-shards"
    stored = read_codes(archive)
    from vsc_serve.cli.index import _parts

    index = ExactIndex.build(_parts([archive]), tmp_path / "idx")
    assert index.facts()["segments"] > 1
    same_hits(index, stored.codes, stored.codes, top=3)
    assert [index.id_of(row) for row in range(index.count)] == stored.ids
    assert index.meta == stored.meta


def test_engines_are_found_by_name() -> None:
    assert find_engine("exact") is ExactIndex
    assert "exact" in engine_names()
    with pytest.raises(UsageError, match=r"`engine` must be one of exact.*, not none"):
        find_engine("none")


def test_rows_of_several_segments_come_in_the_order_that_was_asked(tmp_path: Path) -> None:
    parts = [random_codes(5, 10, seed) for seed in range(3)]
    index = ExactIndex.build(
        [part(codes, [f"{n}-{row}" for row in range(5)]) for n, codes in enumerate(parts)],
        tmp_path / "idx",
    )
    order = np.array([14, 0, 7, 7, 3, 12])
    expected = stack_codes(parts, 10)[order]
    np.testing.assert_array_equal(index.rows[order].toarray(), expected.toarray())
    shutil.rmtree(tmp_path / "idx")
