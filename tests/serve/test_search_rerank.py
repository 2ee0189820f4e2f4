"""`vsc search --rerank`: the best rows are scored again by what is asked itself."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vsc_serve.cli.search import search
from vsc_serve.codes import read_codes, write_codes
from vsc_serve.decoder import Decoder
from vsc_serve.encoder import Encoder
from vsc_serve.errors import BundleError, UsageError
from vsc_serve.options import EncodeOptions

Run = Callable[..., list[dict[str, Any]]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Search, and give the lines of JSON; what was said is left on stderr."""

    def run(codes: Path, model: Path, **given: Any) -> list[dict[str, Any]]:
        options = {"top": 4, "device": "cpu", "as_json": True, "rerank": "linear"}
        if "like" in given:
            given["like"] = [given["like"]]
        search(codes, model=model, **options | given)
        return [json.loads(line) for line in capsys.readouterr().out.splitlines()]

    return run


def write_rows(path: Path, bundle: Path, rows: np.ndarray, ids: list[str], **options: Any) -> Path:
    encoder, chosen = Encoder.open(bundle, device="cpu"), EncodeOptions(**options)
    write_codes(path, encoder.encode_rows(rows, chosen).codes, ids, encoder.provenance(chosen))
    return path


@pytest.fixture
def pixels(mapped_bundle: Path, images: Path) -> np.ndarray:
    return Encoder.open(mapped_bundle, device="cpu").read(sorted(images.iterdir()))


@pytest.fixture
def rows(tmp_path: Path, mapped_bundle: Path, images: Path, pixels: np.ndarray) -> Path:
    """Codes of forty images."""
    ids = [path.name for path in sorted(images.iterdir())]
    return write_rows(tmp_path / "codes.npz", mapped_bundle, pixels, ids)


def linear_scores(bundle: Path, rows: Path, queries: np.ndarray) -> np.ndarray:
    """Cosine of each query and each decoded row, in plain algebra."""
    found, stored = Encoder.open(bundle, device="cpu").linear_map, read_codes(rows)
    decoded = stored.codes.toarray().astype(float) @ found.weights + found.bias
    moved = queries - found.center
    lengths = np.linalg.norm(moved, axis=1)[:, None] * np.linalg.norm(decoded, axis=1)
    return moved @ decoded.T / lengths


def check(answers: list[dict[str, Any]], scores: np.ndarray, rows: Path, top: int) -> None:
    """Compare answers with the best of all rows."""
    ids = read_codes(rows).ids
    for answer, of_query in zip(answers, scores, strict=True):
        best = np.argsort(-of_query, kind="stable")[:top]
        assert [hit["id"] for hit in answer["hits"]] == [ids[row] for row in best]
        found = [hit["score"] for hit in answer["hits"]]
        np.testing.assert_allclose(found, of_query[best], atol=1e-6)


def test_an_image_is_compared_with_decoded_rows(
    run: Run, rows: Path, mapped_bundle: Path, images: Path, pixels: np.ndarray
) -> None:
    scores = linear_scores(mapped_bundle, rows, pixels.reshape(40, -1) / 255.0)
    for number in (3, 12):
        found = run(rows, mapped_bundle, like=str(images / f"{number:02}.png"))
        assert found[0]["rerank"] == "linear"
        check(found, scores[[number]], rows, 4)


def test_a_folder_of_images_is_and_a_broken_one_shifts_nothing(
    run: Run, rows: Path, mapped_bundle: Path, images: Path, pixels: np.ndarray
) -> None:
    (images / "05a.png").write_bytes(b"no image")
    found = run(rows, mapped_bundle, queries=str(images))
    assert found.pop()["query"] == "05a.png"
    active = [not answer.get("empty") for answer in found]
    scores = linear_scores(mapped_bundle, rows, pixels.reshape(40, -1) / 255.0)
    check([one for one in found if not one.get("empty")], scores[active], rows, 4)
    assert all(not one["hits"] for one in found if one.get("empty"))
    assert sum(active) > 30


def test_vectors_of_a_file_are_compared_with_decoded_rows(
    run: Run, mapped_vector_bundle: Path, tmp_path: Path
) -> None:
    rng = np.random.default_rng(0)
    stored, queries = (rng.normal(size=(n, 4)).astype(np.float32) for n in (300, 9))
    ids = [str(row) for row in range(300)]
    rows = write_rows(tmp_path / "codes.npz", mapped_vector_bundle, stored, ids)
    np.save(tmp_path / "q.npy", queries)
    found = run(rows, mapped_vector_bundle, queries=str(tmp_path / "q.npy"), candidates=300)
    check(found, linear_scores(mapped_vector_bundle, rows, queries), rows, 4)


def test_only_the_candidates_of_the_first_stage_are_chosen_from(
    run: Run, rows: Path, mapped_bundle: Path, images: Path, pixels: np.ndarray
) -> None:
    like = str(images / "12.png")
    first = run(rows, mapped_bundle, like=like, rerank="none", top=6)[0]["hits"]
    again = run(rows, mapped_bundle, like=like, candidates=6, top=6)[0]["hits"]
    assert {hit["id"] for hit in again} == {hit["id"] for hit in first}
    scores = linear_scores(mapped_bundle, rows, pixels[[12]].reshape(1, -1) / 255.0)[0]
    ids = read_codes(rows).ids
    expected = sorted((hit["id"] for hit in first), key=lambda name: -scores[ids.index(name)])
    assert [hit["id"] for hit in again] == expected


def test_refitted_rows_are_asked_like_others(
    run: Run, mapped_bundle: Path, images: Path, pixels: np.ndarray, tmp_path: Path
) -> None:
    ids = [path.name for path in sorted(images.iterdir())]
    rows = write_rows(tmp_path / "refitted.npz", mapped_bundle, pixels, ids, refit=True)
    found = run(rows, mapped_bundle, like=str(images / "12.png"))
    check(found, linear_scores(mapped_bundle, rows, pixels[[12]].reshape(1, -1) / 255.0), rows, 4)
    assert found[0]["hits"][0]["id"] == "12.png"


def test_explanations_sum_to_the_score_with_what_belongs_to_no_feature(
    run: Run, rows: Path, mapped_bundle: Path, images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (found,) = run(rows, mapped_bundle, like=str(images / "12.png"), explain=True)
    stored = read_codes(rows)
    for hit in found["hits"]:
        assert sum(one["score"] for one in hit["shared"]) + hit["bias"] == pytest.approx(
            hit["score"]
        )
        row = stored.codes[[stored.ids.index(hit["id"])]]
        assert {one["latent"] for one in hit["shared"]} == set(row.indices.tolist())
    search(rows, like=[str(images / "12.png")], model=mapped_bundle, rerank="linear", explain=True)
    printed = capsys.readouterr()
    assert "  bias of the linear map\n" in printed.out
    assert "the best 200 of each query by their codes, scored again" in printed.err


def test_an_image_is_compared_with_what_the_decoder_draws(
    run: Run, rows: Path, mapped_bundle: Path, images: Path, pixels: np.ndarray
) -> None:
    found = run(rows, mapped_bundle, like=str(images / "12.png"), rerank="decoded")
    drawn = Decoder.open(mapped_bundle, device="cpu").decode(read_codes(rows).codes)
    flat, query = drawn.reshape(40, -1).astype(float), pixels[12].reshape(-1) / 255.0
    scores = flat @ query / np.linalg.norm(flat, axis=1) / np.linalg.norm(query)
    check(found, scores[None], rows, 4)


def test_what_cannot_be_scored_again_is_one_line(
    run: Run,
    rows: Path,
    mapped_bundle: Path,
    images: Path,
    pixels: np.ndarray,
    tmp_path: Path,
) -> None:
    queries = write_rows(tmp_path / "q.npz", mapped_bundle, pixels[:2], ["a", "b"], view="query")
    gamma = write_rows(tmp_path / "g.npz", mapped_bundle, pixels[:2], ["a", "b"], view="gamma")
    like = {"like": str(images / "12.png")}
    for codes, given, message in (
        (rows, {"like": "12.png"}, "of the row 12.png only codes are there. Give its image file"),
        (rows, {"queries": str(queries)}, r"of .*q\.npz only codes are there. Give the images"),
        (gamma, like, "g.npz holds the view gamma, and only slab means"),
        (rows, like | {"candidates": 3}, "--candidates 3: .* --top asks for 4 of them"),
        (rows, like | {"candidates": 9, "rerank": "none"}, "--candidates is for a second stage"),
        (rows, like | {"explain": True, "rerank": "decoded"}, "--rerank decoded is no sum over"),
    ):
        with pytest.raises(UsageError, match=message) as caught:
            run(codes, mapped_bundle, **given)
        assert "\n" not in str(caught.value)


def test_a_bundle_without_a_map_and_rows_of_another_model_are_refused(
    run: Run, rows: Path, mapped_bundle: Path, images: Path, tmp_path: Path
) -> None:
    stored = read_codes(rows)
    other = tmp_path / "other.npz"
    write_codes(other, stored.codes, stored.ids, stored.meta | {"model_digest": "0" * 16})
    like = str(images / "12.png")
    with pytest.raises(UsageError, match="Codes of two models cannot be compared"):
        run(other, mapped_bundle, like=like)
    manifest = json.loads((mapped_bundle / "manifest.json").read_text())
    del manifest["files"]["linear_map.npz"]
    (mapped_bundle / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(BundleError, match=r"no linear_map\.npz, which a second stage and refitted"):
        run(rows, mapped_bundle, like=like)
    assert run(rows, mapped_bundle, like=like, rerank="decoded")


def test_an_image_whose_code_is_empty_finds_nothing(
    run: Run, mapped_bundle: Path, images: Path, pixels: np.ndarray, tmp_path: Path
) -> None:
    names = [path.name for path in sorted(images.iterdir())]
    rows = write_rows(tmp_path / "few.npz", mapped_bundle, pixels, names, tau=0.95)
    actives = np.diff(read_codes(rows).codes.indptr)
    assert 0 < (actives == 0).sum() < 40
    found = run(rows, mapped_bundle, queries=str(images), query="symmetric")
    assert [len(answer["hits"]) for answer in found] == np.where(actives, 4, 0).tolist()
    assert [bool(answer.get("empty")) for answer in found] == (actives == 0).tolist()
