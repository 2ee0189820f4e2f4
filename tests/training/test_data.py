"""Reading training data: folders, arrays, what is refused, and the split by content."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vsc_serve.errors import InputError, UsageError
from vsc_serve.sources import FileSource
from vsc_training import memory
from vsc_training.data import choose_pixel_spec, load_examples


def save_image(path: Path, mode: str = "L", size: tuple[int, int] = (8, 8), seed: int = 0) -> None:
    rng = np.random.default_rng(seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)).convert(mode).save(
        path
    )


def test_a_folder_gives_pixels_ids_and_class_labels(grey_folder: Path) -> None:
    examples = load_examples(grey_folder)
    assert examples.rows.shape == (200, 8, 8, 1)
    assert examples.ids == sorted(examples.ids)
    assert examples.labels is not None
    assert examples.labels.tolist() == [identity.startswith("upright") for identity in examples.ids]


def test_a_flat_folder_has_no_labels(image_folder: Path) -> None:
    assert load_examples(image_folder).labels is None


def test_an_image_that_cannot_be_read_is_left_out_and_listed(image_folder: Path) -> None:
    (image_folder / "zz.png").write_bytes(b"no image")
    examples = load_examples(image_folder)
    assert len(examples.rows) == len(examples.ids) == 12
    assert [bad.id for bad in examples.bad] == ["zz.png"]


@pytest.mark.parametrize(
    ("mode", "size", "expected"),
    [
        ("L", (28, 28), "28x28 grey, crop"),
        ("RGB", (32, 32), "32x32 RGB, crop"),
        ("RGB", (50, 37), "48x32 RGB, crop"),
        ("RGB", (300, 200), "64x64 RGB, crop"),
    ],
)
def test_size_and_colour_are_chosen_from_the_images(
    tmp_path: Path, mode: str, size: tuple[int, int], expected: str
) -> None:
    save_image(tmp_path / "a.png", mode, size)
    source = FileSource("a.png", str(tmp_path / "a.png"))
    assert str(choose_pixel_spec([source], None)) == expected


def test_mixed_sizes_and_modes_become_one_square(tmp_path: Path) -> None:
    save_image(tmp_path / "a.png", "L", (30, 20))
    save_image(tmp_path / "b.png", "RGB", (28, 28), seed=1)
    assert load_examples(tmp_path).rows.shape == (2, 64, 64, 3)
    assert load_examples(tmp_path, size=16).rows.shape == (2, 16, 16, 3)


@pytest.mark.parametrize("place", [0, 200, 260])
def test_colour_after_hundreds_of_grey_images_is_not_made_grey(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, place: int
) -> None:
    for number in range(260):
        save_image(tmp_path / f"{2 * number + 1:04}.png", "L", (4, 4), seed=number)
    save_image(tmp_path / f"{2 * place:04}.png", "RGB", (4, 4), seed=999)
    rows = load_examples(tmp_path, size=8).rows
    assert rows.shape == (261, 8, 8, 3)
    assert len({rows[place, ..., channel].tobytes() for channel in range(3)}) == 3
    has_warned = "is in colour and the 200 images before it are grey" in caplog.text
    assert has_warned == (place == 200)


def test_a_set_of_grey_images_stays_grey_however_large(tmp_path: Path) -> None:
    for number in range(260):
        save_image(tmp_path / f"{number:04}.png", "L", (4, 4), seed=number)
    assert load_examples(tmp_path, size=8).rows.shape == (260, 8, 8, 1)


def test_pixels_that_do_not_fit_into_memory_are_refused_before_they_are_read(
    image_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "free_bytes", lambda device: 12 * 64 - 1)
    with pytest.raises(UsageError, match=r"12 images of 8x8 grey, crop take 0.0 GiB.*`size`"):
        load_examples(image_folder)
    monkeypatch.setattr(memory, "free_bytes", lambda device: 12 * 64)
    assert len(load_examples(image_folder).rows) == 12


def test_arrays_of_pixels_and_of_vectors_are_read(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    np.savez(
        tmp_path / "i.npz",
        images=rng.integers(0, 256, (9, 5, 6), dtype=np.uint8),
        labels=np.arange(9),
    )
    images = load_examples(tmp_path / "i.npz")
    assert images.rows.shape == (9, 5, 6, 1)
    assert images.labels is not None
    np.save(tmp_path / "v.npy", rng.normal(size=(9, 7)).astype(np.float32))
    vectors = load_examples(tmp_path / "v.npy")
    assert vectors.spec.shape == (7,)
    assert isinstance(vectors.rows, np.memmap)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((4, 5, 6), np.float32), "expected uint8 images"),
        (np.array([[0.0, np.nan], [1.0, 2.0]]), "1 rows hold NaN or infinity, the first is row 0"),
        (
            np.array([[0.0, 1.0], [1.0, -1e18], [1e18, 2.0]]),
            "2 rows hold values beyond 1e\\+15, the f",
        ),
        (np.array([[1e18, np.nan], [1.0, 2.0]]), "1 rows hold NaN or infinity, the first is row 0"),
        (np.full((5, 4, 4), 9, np.uint8), "all 5 examples are alike"),
        (np.array(["a", "b"]), "expected uint8 images"),
    ],
)
def test_an_array_that_cannot_be_used_says_why(
    tmp_path: Path, array: np.ndarray, message: str
) -> None:
    np.save(tmp_path / "x.npy", array)
    with pytest.raises(InputError, match=message):
        load_examples(tmp_path / "x.npy")


def test_labels_of_another_length_are_refused(tmp_path: Path) -> None:
    np.savez(
        tmp_path / "x.npz", images=np.eye(4, dtype=np.uint8)[None].repeat(3, 0), labels=np.arange(2)
    )
    with pytest.raises(InputError, match="3 rows but labels of shape"):
        load_examples(tmp_path / "x.npz")


def test_nothing_to_train_on_is_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no folder of images"):
        load_examples(tmp_path / "missing")
    with pytest.raises(UsageError, match="no image found"):
        load_examples(tmp_path)
    (tmp_path / "a.png").write_bytes(b"")
    with pytest.raises(UsageError, match="none of 1 image files can be read"):
        load_examples(tmp_path)


def test_a_class_folder_without_an_image_is_named(tmp_path: Path) -> None:
    for name in ("cat", "dog"):
        save_image(tmp_path / name / "a.png", seed=len(name) + ord(name[0]))
    (tmp_path / "emu").mkdir()
    (tmp_path / ".cache").mkdir()
    with pytest.raises(InputError, match="emu: a class folder without a readable image"):
        load_examples(tmp_path)


def test_copies_of_an_example_lie_on_one_side_of_the_split(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    rows = np.repeat(rng.integers(0, 256, (300, 4, 4), dtype=np.uint8), 2, axis=0)
    np.save(tmp_path / "x.npy", rows)
    examples = load_examples(tmp_path / "x.npy")
    train, validation = examples.split(0.3)
    assert sorted([*train, *validation]) == list(range(600))
    assert {row // 2 for row in train}.isdisjoint({row // 2 for row in validation})
    assert 0.2 < len(validation) / 600 < 0.4


def test_the_split_does_not_depend_on_order(tmp_path: Path) -> None:
    rows = np.random.default_rng(0).integers(0, 256, (100, 4, 4), dtype=np.uint8)
    np.save(tmp_path / "a.npy", rows)
    np.save(tmp_path / "b.npy", rows[::-1])
    _, first = load_examples(tmp_path / "a.npy").split(0.2)
    _, second = load_examples(tmp_path / "b.npy").split(0.2)
    assert sorted(first) == sorted(99 - second)
