"""From data to a second stage with refitted values, on the command line: vectors and images."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vsc_serve.codes import read_codes
from vsc_serve.encoder import Encoder
from vsc_training.checkpoint import RECIPE

pytestmark = pytest.mark.slow


def vsc(*arguments: object) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "vsc_serve", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


def done(*arguments: object) -> "subprocess.CompletedProcess[str]":
    result = vsc(*arguments)
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
def vectors(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with vectors of 24 numbers that a few of 40 directions make up."""
    folder = tmp_path_factory.mktemp("vectors")
    rng = np.random.default_rng(0)
    is_on = rng.random((1300, 40)) < 0.08
    rows = (is_on * rng.normal(2, 0.5, is_on.shape)) @ rng.normal(size=(40, 24))
    rows = (rows + rng.normal(scale=0.2, size=rows.shape)).astype(np.float32)
    np.save(folder / "train.npy", rows[:1200])
    np.save(folder / "asked.npy", rows[1200:])
    return folder


@pytest.fixture(scope="module")
def model(vectors: Path) -> Path:
    """A model of the vectors, exported for a budget."""
    run, out = vectors / "run", vectors / "model"
    fields = ["steps=400", "latent_dim=48", "hidden=64", "pseudo_inputs=4", "batch_size=64"]
    fields += ["on_collapse=warn", "learning_rate=0.005", "beta=0.1"]
    options = [f"--set={field}" for field in fields]
    done("train", vectors / "train.npy", "--out", run, "--active", 6, "--threads", 1, *options)
    assert 'decoder = "linear"' in (run / RECIPE).read_text()
    exported = done(
        *("export", run, "--out", out, "--budget", "bytes=40"),
        *("--calibration", vectors / "train.npy", "--allow-collapsed"),
    )
    assert "budget   tau " in exported.stderr
    return out


def neighbours_found(lines: str, vectors: Path) -> float:
    """Share of the ten nearest rows, by cosine, that are among the hits of each query."""
    stored, asked = (np.load(vectors / f"{name}.npy") for name in ("train", "asked"))
    stored /= np.linalg.norm(stored, axis=1, keepdims=True)
    nearest = np.argsort(-asked @ stored.T, axis=1)[:, :10]
    answers = [json.loads(line) for line in lines.splitlines()]
    assert [answer["query"] for answer in answers] == [str(row) for row in range(len(asked))]
    return float(
        np.mean(
            [
                len({int(hit["id"]) for hit in answer["hits"]} & set(of_query.tolist())) / 10
                for answer, of_query in zip(answers, nearest, strict=True)
            ]
        )
    )


def test_each_step_finds_more_of_the_nearest_vectors(
    vectors: Path, model: Path, tmp_path: Path
) -> None:
    def search(rows: Path, *options: object) -> float:
        asked = vectors / "asked.npy"
        lines = done("search", rows, "--queries", asked, "--model", model, "--json", *options)
        return neighbours_found(lines.stdout, vectors)

    for name, options in (("plain", []), ("refitted", ["--refit"])):
        out = tmp_path / f"{name}.npz"
        done("encode", vectors / "train.npy", "--out", out, "--model", model, *options)
    plain, refitted = read_codes(tmp_path / "plain.npz"), read_codes(tmp_path / "refitted.npz")
    np.testing.assert_array_equal(plain.codes.indices, refitted.codes.indices)
    assert 8 * plain.codes.nnz / plain.codes.shape[0] <= 40
    first = search(tmp_path / "plain.npz")
    second = search(tmp_path / "plain.npz", "--rerank", "linear")
    third = search(tmp_path / "refitted.npz", "--rerank", "linear")
    assert first + 0.03 < second
    assert second < third
    info = done("info", tmp_path / "refitted.npz").stdout
    assert "refitted" in info


def test_images_are_scored_again_by_map_and_decoder(
    grey_folder: Path, tiny_bundle: Path, tmp_path: Path
) -> None:
    rows = tmp_path / "codes.npz"
    done("encode", grey_folder, "--out", rows, "--model", tiny_bundle, "--refit")
    assert read_codes(rows).meta["values"] == "refitted"
    like = grey_folder / "upright" / "000.png"
    scores: dict[str, list[dict[str, Any]]] = {}
    for rerank in ("linear", "decoded"):
        found = done(
            *("search", rows, "--like", like, "--model", tiny_bundle),
            *("--rerank", rerank, "--candidates", 50, "--top", 5, "--json"),
        )
        answer = json.loads(found.stdout)
        assert answer["rerank"] == rerank
        scores[rerank] = answer["hits"]
        assert all(hit["id"].startswith("upright/") for hit in answer["hits"])
    encoder, stored = Encoder.open(tiny_bundle, device="cpu"), read_codes(rows)
    x, best = encoder.targets(encoder.read([like]))[0].astype(float), scores["linear"][0]
    code = stored.codes[[stored.ids.index(best["id"])]]
    drawn = (code @ encoder.linear_map.weights + encoder.linear_map.bias)[0]
    cosine = x @ drawn / np.linalg.norm(x) / np.linalg.norm(drawn)
    assert best["score"] == pytest.approx(cosine, abs=1e-5)


def test_what_has_no_second_stage_ends_in_one_line(
    grey_folder: Path, tiny_bundle: Path, tmp_path: Path
) -> None:
    old = Path(__file__).parents[1] / "data" / "archive" / "bundle-v1"
    rows = tmp_path / "codes.npz"
    out = ["--out", rows, "--model", old]
    line = refused(4, "encode", grey_folder, *out, "--refit")
    assert "bundle-v1: no linear_map.npz, which a second stage and refitted values need." in line
    done("encode", grey_folder, *out)
    like = ["search", rows, "--like", grey_folder / "upright" / "000.png", "--rerank", "linear"]
    assert "no linear_map.npz" in refused(4, *like, "--model", old)
    assert "Codes of two models cannot be compared" in refused(2, *like, "--model", tiny_bundle)
    assert "--candidates 3: " in refused(2, *like, "--model", old, "--candidates", 3)
    line = refused(2, "search", rows, "--like", "upright/000.png", "--rerank", "linear")
    assert "of the row upright/000.png only codes are there" in line
    line = refused(2, "encode", grey_folder, *out, "--force", "--refit", "--view", "gamma")
    assert line.startswith("vsc: --refit and --view gamma: give one of them.")
