"""Names of an earlier release work for one more, and say what they are called now."""

import json
from pathlib import Path

import numpy as np
import pytest

import vsc_serve
from vsc_serve.analysis.describe import describe
from vsc_serve.bundle import open_bundle
from vsc_training.checkpoint import SAMPLES, SUMMARY, _state_from_json, load_images
from vsc_training.config import load_recipe


def test_an_old_public_name_is_the_new_one_with_a_warning() -> None:
    with pytest.warns(DeprecationWarning, match="vsc_serve.Picture is now ImageLike"):
        found = vsc_serve.Picture  # type: ignore[attr-defined]
    assert found == vsc_serve.ImageLike


def test_an_old_property_of_the_manifest_is_the_new_one_with_a_warning(tiny_bundle: Path) -> None:
    manifest = open_bundle(tiny_bundle).manifest
    with pytest.warns(DeprecationWarning, match="draws_images"):
        assert manifest.draws_pictures == manifest.draws_images


def test_a_run_of_an_earlier_release_is_described(tiny_run: Path, tmp_path: Path) -> None:
    stored = json.loads((tiny_run / SUMMARY).read_text())
    metrics = stored.pop("metrics")
    (tmp_path / SUMMARY).write_text(json.dumps(stored | {"figures": metrics}))
    assert describe(tmp_path) == describe(tiny_run)
    assert _state_from_json(stored | {"figures": metrics}, tmp_path).metrics == metrics


def test_images_kept_by_an_earlier_release_are_read(tmp_path: Path) -> None:
    images = np.arange(12, dtype=np.uint8).reshape(1, 2, 2, 3)
    np.savez(tmp_path / SAMPLES, rows=np.zeros((1, 4), np.float32), pictures=images)
    np.testing.assert_array_equal(load_images(tmp_path), images)


def test_a_recipe_of_an_earlier_release_is_read_with_a_warning(
    caplog: pytest.LogCaptureFixture,
) -> None:
    recipe = load_recipe("sparse", ["interpolation=deviation"])
    assert recipe.interpolation == "standard_deviation"
    assert "standard_deviation" in caplog.text
