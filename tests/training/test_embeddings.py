"""Embeddings kept by content: what a second training reads, and what damage costs."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vsc_serve import atomic
from vsc_training.backbone import Backbone
from vsc_training.data import Examples, embed_examples, find_images
from vsc_training.embeddings import EmbeddingCache


class Counting:
    """A backbone that counts the images it embeds."""

    def __init__(self, path: Path) -> None:
        self._backbone = Backbone.open(path)
        self.spec = self._backbone.spec
        self.count = 0

    def embed(self, pixels: np.ndarray[Any, np.dtype[np.uint8]]) -> Any:
        self.count += len(pixels)
        return self._backbone.embed(pixels)


@pytest.fixture
def backbone(tmp_path: Path, conv_backbone: Callable[..., Path]) -> Counting:
    return Counting(conv_backbone(tmp_path / "b.onnx"))


def embedded(folder: Path, backbone: Any, run: Path | None = None) -> Examples:
    cache = None if run is None else EmbeddingCache.beside(run, backbone.spec)
    return embed_examples(folder, find_images(folder), backbone, lambda _done: None, cache)


@pytest.fixture
def folder(tmp_path: Path, grey_folder: Path) -> Path:
    """A copy of images in which one is broken."""
    copy = tmp_path / "images"
    shutil.copytree(grey_folder, copy)
    (copy / "level" / "broken.png").write_bytes(b"no image")
    return copy


def test_a_second_training_embeds_nothing_and_has_the_same_rows(
    folder: Path, backbone: Counting, tmp_path: Path
) -> None:
    plain = embedded(folder, backbone)
    first = embedded(folder, backbone, tmp_path / "run")
    count = backbone.count
    second = embedded(folder, backbone, tmp_path / "other-run")
    assert backbone.count == count
    for found in (first, second):
        np.testing.assert_array_equal(found.rows, plain.rows)
        np.testing.assert_array_equal(found.images, plain.images)
        assert (found.ids, found.bad) == (plain.ids, plain.bad)
    assert [one.id for one in plain.bad] == ["level/broken.png"]


def test_only_new_content_is_embedded(folder: Path, backbone: Counting, tmp_path: Path) -> None:
    embedded(folder, backbone, tmp_path / "run")
    first, second, *_ = sorted((folder / "upright").glob("*.png"))
    first.rename(folder / "level" / "moved.png")  # the same bytes under another name
    second.write_bytes(b"changed, and no image")
    shutil.copy(sorted((folder / "level").glob("0*.png"))[0], folder / "copy.png")
    before = backbone.count
    embedded(folder, backbone, tmp_path / "run")
    assert backbone.count == before


def test_another_backbone_or_rule_has_a_cache_of_its_own(
    folder: Path, backbone: Counting, tmp_path: Path, conv_backbone: Callable[..., Path]
) -> None:
    embedded(folder, backbone, tmp_path / "run")
    stated = {"height": 16, "width": 16, "mean": [0.5] * 3, "std": [0.5] * 3}
    other = Counting(conv_backbone(tmp_path / "other.onnx", stated=stated))
    found = embedded(folder, other, tmp_path / "run")
    assert other.count == len(found.rows)


@pytest.mark.parametrize("damage", ["cut", "shape", "nothing"])
def test_a_damaged_file_is_embedded_again(
    folder: Path,
    backbone: Counting,
    tmp_path: Path,
    damage: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    first = embedded(folder, backbone, tmp_path / "run")
    (path,) = (tmp_path / ".vsc-embeddings").rglob("*.npz")
    if damage == "shape":
        np.savez(path, digests=np.zeros((3, 20), np.uint8), rows=np.zeros((3, 2), np.float32))
    else:
        path.write_bytes(path.read_bytes()[:1000] if damage == "cut" else b"")
    again = embedded(folder, backbone, tmp_path / "run")
    np.testing.assert_array_equal(again.rows, first.rows)
    assert f"{path}: damaged" in caplog.text
    assert len(EmbeddingCache.beside(tmp_path / "run", backbone.spec)) == len(
        {row.tobytes() for row in first.rows}
    )


def test_a_full_disk_costs_a_warning_and_not_the_training(
    folder: Path,
    backbone: Counting,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def full(_file: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(atomic.os, "fsync", full)
    found = embedded(folder, backbone, tmp_path / "run")
    assert len(found.rows)
    assert "not kept for the next training" in caplog.text
    assert not list((tmp_path / ".vsc-embeddings").rglob("*.npz"))


def test_two_runs_that_write_the_same_leave_one_file(
    folder: Path, backbone: Counting, tmp_path: Path
) -> None:
    caches = [EmbeddingCache.beside(tmp_path / "run", backbone.spec) for _ in range(2)]
    for cache in caches:
        embed_examples(folder, find_images(folder), backbone, lambda _done: None, cache)  # type: ignore[arg-type]
    assert len(list((tmp_path / ".vsc-embeddings").rglob("*.npz"))) == 1
