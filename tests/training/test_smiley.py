"""The Smiley data: geometry, statistics, files, and how near it is to the public set."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from vsc_serve.errors import InputError, UsageError
from vsc_training.smiley import (
    FACTORS,
    Smiley,
    draw_faces,
    factor_names,
    generate,
    main,
    write_folder,
)

STATISTICS = Path(__file__).parents[1] / "data" / "smiley_statistics.json"
"""Counts taken from the public set: the set itself is not shipped."""

FIRST_COLUMN = {"bow_tie": 0, "hat": 4, "eyes": 10, "mouth": 13}

# Drawn by hand from the geometry of docs/smiley.md, all factors 0, every attribute present.
NEUTRAL_FACE = """
................................
................................
...........###########..........
...........###########..........
........################........
........################........
........################........
...........##########...........
.........##############.........
........################........
........################........
.......##################.......
.......###....####....###.......
......####....####....####......
......####....####....####......
......####################......
......####################......
......####################......
......####################......
.......##################.......
.......######.....#######.......
........###.........####........
........#####.....######........
.........##############.........
...........##########...........
.............######.............
................................
..........####.....####.........
..........#############.........
..........#############.........
..........####.....####.........
................................
"""


class PublicSet:
    """The 14,000 test images of the paper's authors, with their factors in half precision."""

    def __init__(self, path: Path) -> None:
        with np.load(path) as stored:
            packed = np.unpackbits(stored["images_packed"], axis=1)
            self.is_on = packed.reshape(-1, 32, 32).astype(bool)
            self.spikes = stored["spikes"].astype(bool)
            self.half_values = stored["values"]
        self.values = self.half_values.astype(np.float64)

    def rounding(self, row: int) -> NDArray[np.float64]:
        """How far a factor may lie from the one that was drawn, as half precision was stored."""
        return np.spacing(np.abs(self.half_values[row])).astype(np.float64) / 2


@pytest.fixture(scope="module")
def public_set(data_folder: Path) -> PublicSet:
    return PublicSet(data_folder / "smiley.npz")


@pytest.fixture(scope="module")
def many_faces() -> Smiley:
    return generate(20_000, seed=1)


def draw_one(present: list[str], **factors: float) -> NDArray[np.bool_]:
    names = factor_names()
    spikes = np.array([[name.split(".")[0] in present for name in names]])
    values = np.array([[factors.get(name.replace(".", "_"), 0.0) for name in names]])
    return draw_faces(spikes, values)[0] > 0


def from_text(text: str) -> NDArray[np.bool_]:
    return np.array([[pixel == "#" for pixel in line] for line in text.split()])


def count_statistics(is_on: NDArray[np.bool_], spikes: NDArray[np.bool_]) -> dict[str, Any]:
    """Of all images, and of those with each attribute: their number, and each pixel's count."""
    groups = {"all": np.ones(len(spikes), bool)}
    groups |= {name: spikes[:, column] for name, column in FIRST_COLUMN.items()}
    return {
        name: {"images": int(rows.sum()), "on": is_on[rows].sum(axis=0).tolist()}
        for name, rows in groups.items()
    }


def test_a_seed_gives_the_same_faces_again_and_another_seed_gives_others():
    first, again, other = generate(50, seed=3), generate(50, seed=3), generate(50, seed=4)
    for one, two in zip(first, again, strict=True):
        np.testing.assert_array_equal(one, two)
    assert (first.images != other.images).any()


def test_a_smaller_count_gives_the_first_faces_of_a_larger_one():
    few, many = generate(7, seed=0), generate(600, seed=0)
    for one, two in zip(few, many, strict=True):
        np.testing.assert_array_equal(one, two[:7])


def test_faces_are_black_and_white_and_have_eighteen_factors():
    smiley = generate(40, seed=0)
    assert smiley.images.shape == (40, 32, 32)
    assert smiley.images.dtype == np.uint8
    assert set(np.unique(smiley.images)) == {0, 255}
    assert smiley.spikes.shape == smiley.values.shape == (40, 18)
    assert smiley.values.dtype == np.float32
    assert len(set(factor_names())) == 18


def test_the_factors_of_one_attribute_are_on_together():
    spikes = generate(500, seed=0).spikes
    ends = np.cumsum([len(names) for names in FACTORS.values()])
    for group in np.split(spikes, ends[:-1], axis=1):
        assert (group == group[:, :1]).all()


def test_the_neutral_face_is_the_one_drawn_by_hand():
    np.testing.assert_array_equal(draw_one(list(FACTORS)), from_text(NEUTRAL_FACE))


def test_a_face_without_attributes_is_a_disc_of_radius_ten():
    face = draw_one([])
    assert face.sum() == 316
    np.testing.assert_array_equal(face, face.T)
    np.testing.assert_array_equal(face, face[::-1])


@pytest.mark.parametrize("attribute", list(FACTORS))
def test_factors_of_an_absent_attribute_change_nothing(attribute):
    others = [name for name in FACTORS if name != attribute]
    moved = {f"{attribute}_{name}": 0.7 for name in FACTORS[attribute]}
    np.testing.assert_array_equal(draw_one(others), draw_one(others, **moved))


@pytest.mark.parametrize("name", factor_names())
def test_every_factor_changes_the_image_of_its_attribute(name):
    attribute = name.split(".")[0]
    low, high = (draw_one([attribute], **{name.replace(".", "_"): by}) for by in (-1.2, 1.2))
    assert (low != high).any()


@pytest.mark.parametrize("size", [-9.0, 9.0])
def test_factors_far_out_draw_something_and_do_not_fail(size):
    factors = {name.replace(".", "_"): size for name in factor_names()}
    assert draw_one(list(FACTORS), **factors).any()


def test_eyes_of_no_size_are_no_eyes():
    np.testing.assert_array_equal(draw_one(["eyes"], eyes_radius=-3.0), draw_one([]))


@pytest.mark.parametrize(("count", "seed", "named"), [(0, 0, "count"), (5, -1, "seed")])
def test_a_count_or_seed_out_of_range_is_refused(count, seed, named):
    with pytest.raises(UsageError, match=named):
        generate(count, seed)


def test_factors_are_normal_with_standard_deviation_one_half(many_faces):
    values, count = many_faces.values, len(many_faces.values)
    assert np.abs(values.mean(axis=0)).max() < 4 * 0.5 / np.sqrt(count)
    assert np.abs(values.std(axis=0) - 0.5).max() < 4 * 0.5 / np.sqrt(2 * count)
    assert np.abs(many_faces.spikes.mean(axis=0) - 0.5).max() < 4 * 0.5 / np.sqrt(count)


def test_the_mean_of_all_pixels_is_that_of_the_public_set(many_faces):
    public = json.loads(STATISTICS.read_text())["all"]
    share_on = np.sum(public["on"]) / (public["images"] * 32 * 32)
    assert abs(many_faces.images.mean() / 255 - share_on) < 0.002


@pytest.mark.parametrize("group", ["all", *FIRST_COLUMN])
def test_mean_images_are_those_of_the_public_set(many_faces, group):
    public = json.loads(STATISTICS.read_text())[group]
    ours = count_statistics(many_faces.images > 0, many_faces.spikes)[group]
    shares = [np.array(one["on"]) / one["images"] for one in (ours, public)]
    pooled = np.mean(shares, axis=0)
    spread = np.sqrt(pooled * (1 - pooled) * (1 / ours["images"] + 1 / public["images"]))
    differences = np.abs(shares[0] - shares[1])
    assert (differences <= 5 * spread + 0.002).all()
    assert differences.mean() < 0.003


def test_the_stored_statistics_are_those_of_the_public_set(public_set):
    stored = json.loads(STATISTICS.read_text())
    assert stored == count_statistics(public_set.is_on, public_set.spikes)


def test_drawn_from_the_public_factors_98_of_100_images_are_identical(public_set):
    ours = draw_faces(public_set.spikes, public_set.values) > 0
    differing = (ours != public_set.is_on).sum(axis=(1, 2))
    assert (differing == 0).mean() > 0.984
    assert differing.mean() < 0.08


def test_without_a_bow_tie_images_differ_only_by_the_stored_precision(public_set):
    ours = draw_faces(public_set.spikes, public_set.values) > 0
    differs = (ours != public_set.is_on).any(axis=(1, 2)) & ~public_set.spikes[:, 0]
    rows = np.flatnonzero(differs)
    assert len(rows) <= 12
    rng = np.random.default_rng(0)
    for row in rows:
        nudges = rng.uniform(-1, 1, (2000, 18)) * public_set.rounding(row)
        spikes = np.repeat(public_set.spikes[row : row + 1], 2000, axis=0)
        nudged = draw_faces(spikes, public_set.values[row] + nudges) > 0
        assert (nudged == public_set.is_on[row]).all(axis=(1, 2)).any()


def test_a_folder_holds_every_face_and_its_factors(tmp_path):
    smiley = generate(12, seed=0)
    write_folder(smiley, tmp_path / "smiley")
    with np.load(tmp_path / "smiley" / "factors.npz", allow_pickle=False) as stored:
        np.testing.assert_array_equal(stored["spikes"], smiley.spikes)
        np.testing.assert_array_equal(stored["values"], smiley.values)
        assert stored["names"].tolist() == factor_names()
        assert stored["attributes"].tolist()[::6] == ["bow_tie", "hat", "eyes"]
        ids = stored["ids"].tolist()
    assert ids == sorted(path.name for path in (tmp_path / "smiley" / "images").iterdir())
    for name, pixels in zip(ids, smiley.images, strict=True):
        with Image.open(tmp_path / "smiley" / "images" / name) as image:
            assert image.mode == "L"
            np.testing.assert_array_equal(np.asarray(image), pixels)


def test_the_same_faces_give_the_same_bytes(tmp_path):
    for name in ("one", "two"):
        write_folder(generate(3, seed=0), tmp_path / name)
    for path in sorted((tmp_path / "one").rglob("*.*")):
        twin = tmp_path / "two" / path.relative_to(tmp_path / "one")
        assert path.read_bytes() == twin.read_bytes()


def test_a_folder_that_cannot_be_finished_is_not_there(tmp_path, monkeypatch):
    def fail(*_args: object, **_kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez_compressed", fail)
    with pytest.raises(InputError, match="No space left on device"):
        write_folder(generate(3, seed=0), tmp_path / "smiley")
    assert list(tmp_path.iterdir()) == []


def test_the_command_makes_a_folder_and_refuses_one_that_is_there(tmp_path, capsys):
    arguments = ["--out", str(tmp_path / "smiley"), "--count", "5", "--seed", "2"]
    assert main(arguments) == 0
    assert len(list((tmp_path / "smiley" / "images").glob("*.png"))) == 5
    capsys.readouterr()
    assert main(arguments) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert len(said.err.splitlines()) == 1
    assert "exists already" in said.err
    assert main([*arguments, "--force"]) == 0


def test_the_command_refuses_to_make_no_images(tmp_path, capsys):
    assert main(["--out", str(tmp_path / "smiley"), "--count", "0"]) == 2
    assert "count must be at least 1" in capsys.readouterr().err


def test_the_command_runs_as_a_module_and_loads_no_torch(tmp_path):
    code = (
        "import sys, runpy; sys.argv = ['smiley', '--out', sys.argv[1], '--count', '2']\n"
        "try: runpy.run_module('vsc_training.smiley', run_name='__main__')\n"
        "except SystemExit as end: print(end.code, 'torch' in sys.modules)"
    )
    out = tmp_path / "smiley"
    command = [sys.executable, "-c", code, str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.split() == ["0", "False"]
    assert "2 images" in done.stderr
