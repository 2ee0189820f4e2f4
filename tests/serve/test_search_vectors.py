"""`vsc search --vector`: dense vectors of the space that codes decode to, as queries."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vsc_serve.bundle import LINEAR_MAP, MANIFEST
from vsc_serve.cli.search import search
from vsc_serve.codes import dense_to_csr, read_codes, write_codes
from vsc_serve.encoder import Encoder
from vsc_serve.errors import BundleError, InputError, UsageError
from vsc_serve.index import dense
from vsc_serve.index.base import Part
from vsc_serve.index.dense import search_vectors
from vsc_serve.index.inverted import ExactIndex
from vsc_serve.linear_map import LinearMap
from vsc_serve.options import EncodeOptions

Ask = Callable[..., list[dict[str, Any]]]


@pytest.fixture
def rows(tmp_path: Path, mapped_bundle: Path, images: Path) -> Path:
    encoder = Encoder.open(mapped_bundle, device="cpu")
    paths = sorted(images.iterdir())
    path, codes = tmp_path / "codes.npz", encoder.encode(encoder.read(paths))
    write_codes(path, codes, [one.name for one in paths], encoder.provenance())
    return path


@pytest.fixture
def ask(rows: Path, mapped_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Ask:
    """Ask vectors, and give the lines of JSON."""

    def ask(vectors: Any, **given: Any) -> list[dict[str, Any]]:
        path = tmp_path / "q.npy"
        np.save(path, vectors)
        options = {"top": 4, "as_json": True, "model": mapped_bundle} | given
        search(rows, vector=path, **options)
        return [json.loads(line) for line in capsys.readouterr().out.splitlines()]

    return ask


def cosines(linear_map: LinearMap, codes: np.ndarray, vectors: np.ndarray) -> np.ndarray:
    """Return the score of all pairs, in plain algebra."""
    decoded = codes.astype(float) @ linear_map.weights + linear_map.bias
    moved = vectors - linear_map.center
    lengths = np.linalg.norm(moved, axis=1)[:, None] * np.linalg.norm(decoded, axis=1)
    return moved @ decoded.T / lengths


@pytest.mark.parametrize("block", [3, 2**21])
def test_every_row_is_scored_by_the_cosine_of_what_it_decodes_to(
    monkeypatch: pytest.MonkeyPatch, block: int
) -> None:
    monkeypatch.setattr(dense, "_SCORES", block * 32)
    rng = np.random.default_rng(0)
    linear_map = LinearMap(*(rng.normal(size=s).astype(np.float32) for s in ((9, 7), (7,), (7,))))
    codes = np.where(rng.random((50, 9)) < 0.3, rng.normal(size=(50, 9)), 0).astype(np.float32)
    vectors = rng.normal(size=(70, 7))
    found = search_vectors(dense_to_csr(codes), linear_map, vectors, top=6)
    expected = cosines(linear_map, codes, vectors)
    best = np.argsort(-expected, axis=1, kind="stable")[:, :6]
    np.testing.assert_array_equal(found.rows, best)
    np.testing.assert_allclose(found.scores, np.take_along_axis(expected, best, 1), atol=1e-9)


def test_equal_scores_are_in_row_order_and_few_rows_are_all_found() -> None:
    linear_map = LinearMap(np.eye(3, dtype=np.float32), *np.zeros((2, 3), np.float32))
    codes = dense_to_csr(np.array([[1, 0, 0], [0, 0, 0], [2, 0, 0]], np.float32))
    found = search_vectors(codes, linear_map, np.array([[1.0, 0, 0]]), top=9)
    assert found.rows.tolist() == [[0, 2, 1]]
    assert found.scores.tolist() == [[1, 1, 0]]


def test_vectors_of_a_file_are_answered_in_order_and_bad_ones_shift_nothing(
    ask: Ask, rows: Path, mapped_bundle: Path
) -> None:
    linear_map = Encoder.open(mapped_bundle, device="cpu").linear_map
    vectors = np.random.default_rng(1).random((4, 16))
    vectors[1], vectors[2, 3] = 0, np.nan
    answers = ask(vectors)
    assert [answer["query"] for answer in answers] == ["0", "3", "1", "2"]
    stored = read_codes(rows)
    scores = cosines(linear_map, stored.codes.toarray(), vectors[[0, 3]])
    for answer, of_query in zip(answers[:2], scores, strict=True):
        best = np.argsort(-of_query, kind="stable")[:4]
        assert [hit["id"] for hit in answer["hits"]] == [stored.ids[row] for row in best]
    assert answers[2]["error"] == "is 0 everywhere, and nothing is like it"
    assert answers[3]["error"] == "holds values that are not finite (NaN or infinity)"


def test_an_index_answers_as_its_codes_do_without_the_rows_that_were_removed(
    ask: Ask, rows: Path, mapped_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stored, vectors = read_codes(rows), np.random.default_rng(1).random((2, 16))
    everything = ask(vectors, top=len(stored.ids))
    first = everything[0]["hits"][0]["id"]
    index = ExactIndex.build([Part(rows, stored)], tmp_path / "index")
    index.remove([first])
    path = tmp_path / "q.npy"
    search(tmp_path / "index", vector=path, top=3, as_json=True, model=mapped_bundle)
    for line, answer in zip(capsys.readouterr().out.splitlines(), everything, strict=True):
        left = [hit["id"] for hit in answer["hits"] if hit["id"] != first]
        assert [hit["id"] for hit in json.loads(line)["hits"]] == left[:3]


def test_one_vector_needs_no_second_axis_and_explanations_sum_to_the_score(ask: Ask) -> None:
    (answer,) = ask(np.arange(16, dtype=np.float32), explain=True)
    for hit in answer["hits"]:
        total = sum(shared["score"] for shared in hit["shared"]) + hit["bias"]
        assert total == pytest.approx(hit["score"], abs=1e-6)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"query": "wide"}, "--query wide: is for queries that are codes"),
        ({"metric": "dot"}, "--metric dot: is for queries that are codes"),
        ({"rerank": "linear"}, "--rerank linear: is for queries that are codes"),
        ({"candidates": 9}, "--candidates is for a second stage"),
        ({"like": "0.png"}, "give one of --like, --queries, --vector"),
    ],
)
def test_options_of_other_queries_are_refused(ask: Ask, given: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        ask(np.ones(16), **given)


@pytest.mark.parametrize(
    ("vectors", "words"),
    [
        (np.ones((2, 15)), r"q.npy: float64 of shape \(2, 15\), .* vectors of 16 numbers"),
        (np.ones((2, 2, 16)), "q.npy: float64 of shape"),
        (np.array(["text"] * 16), "q.npy: <U4 of shape"),
        (np.zeros((1, 16)), "none of 1 queries can be read; the first: 0: is 0 everywhere"),
        (np.full((1, 16), np.inf), "0: holds values that are not finite"),
    ],
)
def test_vectors_that_cannot_be_asked_are_one_line(ask: Ask, vectors: Any, words: str) -> None:
    with pytest.raises(InputError, match=words) as raised:
        ask(vectors)
    assert "\n" not in str(raised.value)


def test_a_file_that_is_no_array_is_one_line(rows: Path, mapped_bundle: Path) -> None:
    for path in (rows, rows.with_name("missing.npy")):
        with pytest.raises(InputError, match=r"no \.npy file of vectors") as raised:
            search(rows, vector=path, model=mapped_bundle)
        assert "\n" not in str(raised.value)


def test_a_bundle_without_a_map_and_rows_without_slab_means_are_refused(
    mapped_bundle: Path, ask: Ask, rows: Path
) -> None:
    whole = (mapped_bundle / MANIFEST).read_text()
    stored_manifest = json.loads(whole)
    del stored_manifest["files"][LINEAR_MAP]
    (mapped_bundle / MANIFEST).write_text(json.dumps(stored_manifest))
    with pytest.raises(BundleError, match=r"no linear_map\.npz"):
        ask(np.ones(16))
    (mapped_bundle / MANIFEST).write_text(whole)
    stored = read_codes(rows)
    meta = stored.meta | {"view": EncodeOptions(view="gamma").view}
    write_codes(rows, stored.codes, stored.ids, meta)
    with pytest.raises(UsageError, match="holds other values than slab means"):
        ask(np.ones(16))
