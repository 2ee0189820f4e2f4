"""`evaluate_run` as a whole: what it reports, on what, and what it refuses."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from vsc_serve.codes import threshold
from vsc_serve.errors import InputError, UsageError
from vsc_training.checkpoint import load_checkpoint
from vsc_training.config import load_recipe
from vsc_training.data import load_examples
from vsc_training.evaluation import dataset
from vsc_training.evaluation.dataset import load_factors
from vsc_training.evaluation.evaluate import evaluate_run
from vsc_training.evaluation.metrics import Evaluation
from vsc_training.evaluation.retrieval import knn_accuracy
from vsc_training.fit import fit

CPU = torch.device("cpu")
TAUS = (0.1, 0.5, 0.8)


def evaluate(run: Path, data: Path, **arguments: Any) -> Evaluation:
    return evaluate_run(run, data, device=CPU, **({"taus": TAUS, "iwae_samples": 5} | arguments))


@pytest.fixture(scope="module")
def whole(tiny_run: Path, grey_folder: Path) -> Evaluation:
    return evaluate(tiny_run, grey_folder)


@pytest.fixture(scope="module")
def bars(grey_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The images of `grey_folder` as files: without labels, and with numbers for labels."""
    folder = tmp_path_factory.mktemp("arrays")
    examples = load_examples(grey_folder)
    assert examples.labels is not None
    np.savez(folder / "plain.npz", images=examples.rows[..., 0])
    np.savez(folder / "numbers.npz", images=examples.rows[..., 0], labels=examples.labels)
    return {name: folder / f"{name}.npz" for name in ("plain", "numbers")}


@pytest.fixture(scope="module")
def vector_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A run on vectors of three clusters far from zero, and their file."""
    folder = tmp_path_factory.mktemp("vectors")
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 300)
    vectors = 500 + 20 * np.eye(3, 6)[labels] + rng.normal(size=(300, 6))
    np.savez(folder / "vectors.npz", vectors=vectors.astype(np.float32), labels=labels)
    fields = ["latent_dim=12", "hidden=32", "pseudo_inputs=4", "batch_size=32", "alpha=0.25"]
    fields += ["steps=300", "learning_rate=0.005", "precision=float32", "on_collapse=warn"]
    recipe, examples = load_recipe("sparse", fields), load_examples(folder / "vectors.npz")
    fit(recipe, examples, folder / "run", device=CPU, name="clusters")
    return folder / "run", folder / "vectors.npz"


def test_the_metrics_belong_together(whole: Evaluation) -> None:
    assert whole.health.images == whole.codes.images == whole.bound.images == 200
    assert whole.bound.elbo_mixture <= whole.bound.iwae
    assert whole.health.elbo <= whole.bound.elbo_mixture + 3.0  # another draw of the noise
    assert whole.codes.bytes_per_image == pytest.approx(8 * whole.health.active)
    assert whole.codes.active_quantiles[0] <= whole.health.active <= whole.codes.active_quantiles[4]
    assert 0 < whole.codes.support_entropy_bits <= whole.health.latents
    assert 1 < whole.codes.distinct_supports <= 200
    assert 0 < whole.codes.jaccard_passes <= 1
    neighbours = whole.neighbours
    assert neighbours is not None
    assert neighbours.references + neighbours.queries == 200
    assert neighbours.knn > 0.9
    assert whole.overlaps is not None
    assert whole.overlaps.same > whole.overlaps.other


def test_the_curve_goes_through_the_metrics_at_one_half(whole: Evaluation) -> None:
    assert [point.tau for point in whole.curve] == list(TAUS)
    middle = whole.curve[1]
    assert whole.neighbours is not None
    assert middle.active == pytest.approx(whole.health.active)
    assert middle.search_cost == pytest.approx(whole.codes.search_cost)
    assert middle.squared_error == pytest.approx(whole.health.squared_error, rel=1e-5)
    assert middle.nll == pytest.approx(whole.codes.nll, rel=1e-5)
    assert (middle.knn, middle.precision) == (whole.neighbours.knn, whole.neighbours.precision)
    assert whole.curve[0].active > middle.active > whole.curve[2].active


@torch.no_grad()
def test_the_metrics_are_those_of_the_model_on_all_rows_at_once(
    whole: Evaluation, tiny_run: Path, grey_folder: Path
) -> None:
    model = load_checkpoint(tiny_run).build_model()
    examples = load_examples(grey_folder)
    rows = torch.from_numpy(examples.rows).float() / 255
    q = model.encode(rows)
    for point in whole.curve:
        codes = threshold(q.spike_logit.numpy(), q.mu.numpy(), point.tau)
        assert point.active == pytest.approx((codes != 0).sum(1).mean())
        assert point.search_cost == pytest.approx(np.square((codes != 0).mean(0)).sum())
        again = model.decode(torch.from_numpy(codes))
        error = (again - rows).square().flatten(1).sum(1).mean()
        assert point.squared_error == pytest.approx(error.item(), rel=1e-5)
        likelihood = torch.nn.functional.binary_cross_entropy(again, rows, reduction="none")
        assert point.nll == pytest.approx(likelihood.flatten(1).sum(1).mean().item(), rel=1e-4)
        reference, queries = examples.split(0.5)
        assert examples.labels is not None
        labels = examples.labels[reference], examples.labels[queries]
        accuracy = knn_accuracy(codes[reference], labels[0], codes[queries], labels[1])
        assert point.knn == pytest.approx(accuracy)


def test_the_same_seed_gives_the_same_metrics_and_another_seed_other_noise(
    whole: Evaluation, tiny_run: Path, grey_folder: Path
) -> None:
    assert evaluate(tiny_run, grey_folder) == whole
    other = evaluate(tiny_run, grey_folder, seed=1)
    assert other.bound.iwae != whole.bound.iwae
    assert other.codes.active_quantiles == whole.codes.active_quantiles


def test_the_json_is_whole_and_strict(whole: Evaluation) -> None:
    stored = json.loads(json.dumps(whole.to_json(), allow_nan=False))
    assert stored["format"] == 1
    assert stored["health"]["images"] == 200
    assert whole.neighbours is not None
    assert stored["neighbours"]["knn"] == pytest.approx(whole.neighbours.knn, abs=1e-6)
    assert stored["factors"] is None
    assert [point["tau"] for point in stored["curve"]] == list(TAUS)


def test_every_line_of_the_table_names_its_denominator(whole: Evaluation) -> None:
    lines = whole.table().splitlines()
    assert lines[0].startswith("bars, step 300, on ")
    figures = [line for line in lines if line.startswith("  ")]
    sections, curve = figures[:-4], figures[-4:]
    assert len(sections) > 20
    assert all("200 images" in line or "pairs" in line or "queries" in line for line in sections)
    assert len(curve) == 1 + len(TAUS)
    assert "over tau (200 images; neighbours: " in whole.table()
    assert lines[-1] == "no factor metrics: no factors.npz was given"


def test_without_labels_the_rows_are_absent_and_the_table_says_why(
    tiny_run: Path, bars: dict[str, Path]
) -> None:
    found = evaluate(tiny_run, bars["plain"])
    assert found.neighbours is None
    assert found.overlaps is None
    table = found.table()
    assert "kNN" not in table
    assert "probe" not in table
    assert f"no class metrics: {bars['plain']} has no labels (class folders" in table


def test_one_class_is_no_ground_for_neighbours(tiny_run: Path, bars: dict[str, Path]) -> None:
    with np.load(bars["numbers"]) as stored:
        images = stored["images"]
    path = bars["numbers"].with_name("one.npz")
    np.savez(path, images=images, labels=np.zeros(len(images), np.int64))
    found = evaluate(tiny_run, path)
    assert found.absent["class"] == "the references are of one class"
    assert found.overlaps is not None
    assert found.to_json()["overlaps"]["other"] is None


def test_queries_are_never_among_their_references(
    tiny_run: Path, grey_folder: Path, tmp_path: Path
) -> None:
    alike = evaluate(tiny_run, grey_folder, reference=grey_folder)
    assert "200 queries and 0 references that are no copies" in alike.absent["class"]
    few = tmp_path / "few"
    for path in sorted(grey_folder.glob("*/*.png"))[::4]:
        (few / path.parent.name).mkdir(parents=True, exist_ok=True)
        shutil.copy(path, few / path.parent.name)
    found = evaluate(tiny_run, few, reference=grey_folder)
    assert found.neighbours is not None
    assert (found.neighbours.queries, found.neighbours.references) == (50, 150)
    assert found.neighbours.copies == 50
    assert "50 queries, 150 references (50 copies of queries left out)" in found.table()


def test_class_folders_and_numbers_in_a_file_are_the_same_classes(
    tiny_run: Path, bars: dict[str, Path], grey_folder: Path, tmp_path: Path
) -> None:
    for number, name in enumerate(["level", "upright"]):
        shutil.copytree(grey_folder / name, tmp_path / str(number))
        for path in sorted((tmp_path / str(number)).iterdir())[50:]:
            path.unlink()
    found = evaluate(tiny_run, tmp_path, reference=bars["numbers"])
    assert found.neighbours is not None
    assert found.neighbours.knn > 0.9


def test_large_data_are_sampled_by_the_seed(
    tiny_run: Path, grey_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dataset, "QUERY_COUNT", 30)
    monkeypatch.setattr(dataset, "REFERENCE_COUNT", 40)
    found = evaluate(tiny_run, grey_folder)
    assert found.neighbours is not None
    assert (found.neighbours.queries, found.neighbours.references) == (30, 40)
    assert found == evaluate(tiny_run, grey_folder)


def test_images_of_a_folder_are_resized_and_bad_ones_counted(
    tiny_run: Path, tmp_path: Path
) -> None:
    rng = np.random.default_rng(0)
    for number in range(4):
        pixels = rng.integers(0, 256, (20 + number, 31, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{number}.png")
    (tmp_path / "bad.png").write_bytes(b"no image")
    found = evaluate(tiny_run, tmp_path)
    assert (found.health.images, found.skipped) == (4, 1)
    assert "4 images, 1 files unreadable" in found.table()


def factors_of(grey_folder: Path, path: Path) -> Path:
    """Where each bar lies, and whether it is upright, by the images themselves."""
    examples = load_examples(grey_folder)
    pixels = examples.rows[..., 0].astype(np.float64)
    is_upright = np.array(["upright" in name for name in examples.ids])
    profile = np.where(is_upright[:, None], pixels.mean(1), pixels.mean(2))
    place = (profile**4 @ np.arange(8)) / (profile**4).sum(1)
    order = np.random.default_rng(0).permutation(200)
    np.savez(
        path,
        ids=np.array(examples.ids)[order],
        values=np.stack([place, place, np.full(200, 2.0)], axis=1)[order],
        spikes=np.stack([is_upright, ~is_upright, ~is_upright], axis=1)[order],
        names=np.array(["upright.place", "level.place", "level.constant"]),
        attributes=np.array(["upright", "level", "level"]),
    )
    return path


def test_factors_are_joined_by_id_and_constant_ones_left_out(
    tiny_run: Path, grey_folder: Path, tmp_path: Path
) -> None:
    found = evaluate(
        tiny_run, grey_folder, factors=factors_of(grey_folder, tmp_path / "factors.npz")
    )
    factors = found.factors
    assert factors is not None
    assert factors.factors == ["upright.place", "level.place"]
    assert factors.attributes == ["upright", "level"]
    assert factors.informativeness > 0.3
    assert factors.attribute_score > 0.3
    assert [entry["factor"] for entry in factors.strongest] == factors.factors
    assert "factor" not in found.absent
    assert "200 images, 2 factors" in found.table()


def test_a_factor_counts_only_where_its_spike_is_on(tmp_path: Path) -> None:
    np.savez(
        tmp_path / "factors.npz",
        ids=np.array(["c", "b", "a", "other"]),
        values=np.array([[1.0, 5], [2, 6], [3, 7], [9, 9]], np.float32),
        spikes=np.array([[True, True], [True, False], [False, True], [True, True]]),
    )
    found = load_factors(tmp_path / "factors.npz", ["a", "b", "c"])
    np.testing.assert_array_equal(found.values, [[math.nan, 7], [2, math.nan], [1, 5]])
    np.testing.assert_array_equal(found.presence, [[0, 1], [1, 0], [1, 1]])
    assert found.names == found.attributes == ["factor 0", "factor 1"]


def test_factors_of_other_images_are_refused(
    tiny_run: Path, grey_folder: Path, bars: dict[str, Path], tmp_path: Path
) -> None:
    path = factors_of(grey_folder, tmp_path / "factors.npz")
    message = r"no factors for 200 of 200 images, the first '0' \(its ids are like '.*png'\)"
    with pytest.raises(InputError, match=message):
        evaluate(tiny_run, bars["plain"], factors=path)
    np.savez(tmp_path / "odd.npz", ids=np.array(["a"]), values=np.zeros((2, 2)))
    with pytest.raises(InputError, match=r"expected ids \(images\), values and spikes"):
        evaluate(tiny_run, grey_folder, factors=tmp_path / "odd.npz")
    (tmp_path / "text.npz").write_text("none")
    with pytest.raises(InputError, match="not readable as numpy data"):
        evaluate(tiny_run, grey_folder, factors=tmp_path / "text.npz")
    with pytest.raises(UsageError, match="no such file"):
        evaluate(tiny_run, grey_folder, factors=tmp_path / "none.npz")
    constant = {"ids": load_examples(grey_folder).ids, "values": np.zeros((200, 2))}
    np.savez(tmp_path / "same.npz", **constant)
    with pytest.raises(InputError, match="every factor is the same in all 200 images"):
        evaluate(tiny_run, grey_folder, factors=tmp_path / "same.npz")


def test_data_of_another_shape_are_refused(
    tiny_run: Path, vector_run: tuple[Path, Path], grey_folder: Path, tmp_path: Path
) -> None:
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "wide.npz", images=rng.integers(0, 256, (9, 6, 10, 3), dtype=np.uint8))
    message = (
        "found RGB images of 10x6, but the model was fitted to grey images of 8x8."
        " Give data of that shape, or a folder of images, which are resized."
    )
    with pytest.raises(InputError, match=message):
        evaluate(tiny_run, tmp_path / "wide.npz")
    with pytest.raises(InputError, match="found vectors of 6, but the model was fitted to grey"):
        evaluate(tiny_run, vector_run[1])
    with pytest.raises(InputError, match=r"a folder, but the model was fitted to vectors of 6\."):
        evaluate(vector_run[0], grey_folder)


def test_a_reference_of_other_classes_or_none_is_refused(
    tiny_run: Path, grey_folder: Path, bars: dict[str, Path]
) -> None:
    with pytest.raises(InputError, match=r"its classes \(0, 1, ...\) and those of .* \(level, upr"):
        evaluate(tiny_run, grey_folder, reference=bars["numbers"])
    with pytest.raises(InputError, match=r"no labels, but .* has some"):
        evaluate(tiny_run, grey_folder, reference=bars["plain"])


def test_no_checkpoint_and_arguments_out_of_range_are_refused(
    tiny_run: Path, grey_folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=r"no checkpoint.safetensors there. Train first: vsc"):
        evaluate(tmp_path, grey_folder)
    with pytest.raises(UsageError, match=r"no folder of images and no .npz or"):
        evaluate(tiny_run, tmp_path / "nothing")
    with pytest.raises(UsageError, match=r"tau must be above 0 and below 1, not 1\.0"):
        evaluate(tiny_run, grey_folder, taus=[0.5, 1.0])
    with pytest.raises(UsageError, match="iwae_samples must be at least 1, not 0"):
        evaluate(tiny_run, grey_folder, iwae_samples=0)


@torch.no_grad()
def test_vectors_are_measured_in_their_own_units(vector_run: tuple[Path, Path]) -> None:
    run, data = vector_run
    found = evaluate(run, data)
    assert found.noun == "vectors"
    assert "nats per vector" in found.table()
    assert found.neighbours is not None
    assert found.neighbours.knn > 0.9
    model = load_checkpoint(run).build_model()
    rows = torch.from_numpy(load_examples(data).rows)
    q = model.encode(rows)
    again = model.decode(torch.where(q.spike_logit > 0, q.mu, 0.0))
    error = (again - rows).square().sum(1).mean().item()
    assert found.health.squared_error == pytest.approx(error, rel=1e-5)
    assert found.curve[1].squared_error == pytest.approx(error, rel=1e-5)
    assert math.isfinite(found.bound.iwae)
