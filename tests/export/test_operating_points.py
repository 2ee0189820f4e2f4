"""Tau is chosen for an active count, and what each setting costs is measured."""

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vsc_export.operating_points import Rows, calibrate_tau, measure_trade_off, parse_goal
from vsc_export.options import ExportOptions
from vsc_export.write import export_bundle
from vsc_serve.codes import threshold_logit
from vsc_serve.encoder import Encoder
from vsc_serve.errors import InputError, UsageError
from vsc_serve.session import open_session
from vsc_training.checkpoint import load_checkpoint, load_samples

pytestmark = pytest.mark.usefixtures("cached_exports")


@pytest.mark.parametrize("active", [0.3, 2.0, 8.0, 39.0])
def test_a_calibrated_tau_gives_the_active_count_that_was_asked_for(active: float) -> None:
    logit = np.random.default_rng(0).normal(-3.0, 3.0, size=(500, 40)).astype(np.float32)
    tau = calibrate_tau(logit, active)
    assert 0 < tau < 1
    assert (logit > threshold_logit(tau)).sum(1).mean() == pytest.approx(active, rel=0.02)


def test_a_count_that_no_tau_gives_is_refused_with_what_can_be_reached() -> None:
    logit = np.full((100, 40), -12.0, np.float32)
    logit[:, :10] = np.random.default_rng(0).normal(size=(100, 10))
    assert calibrate_tau(logit, 9.9) > 0
    for active in (20.0, 40.0, 0.001):
        with pytest.raises(
            UsageError, match=r"no tau gives that on 100 rows .* from 0\.01 to 10 active"
        ):
            calibrate_tau(logit, active)


@pytest.mark.parametrize("text", ["8", "active", "active=", "active=many", "active=0", "tau=.5"])
def test_a_goal_that_is_not_an_active_count_is_refused(text: str) -> None:
    assert parse_goal("active=8") == 8.0
    with pytest.raises(UsageError, match="give active=NUMBER, such as active=8"):
        parse_goal(text)


def test_the_trade_off_is_measured_on_the_exported_graphs(
    tiny_run: Path, tiny_bundle: Path
) -> None:
    model, rows = load_checkpoint(tiny_run).build_model(), load_samples(tiny_run)
    labels = np.array(["a", "b"] * (len(rows) // 2))
    encoder, decoder = (
        open_session(tiny_bundle / name, device="cpu") for name in ("encoder.onnx", "decoder.onnx")
    )
    trade_off = measure_trade_off(model, encoder, decoder, Rows(rows, labels, "tests"), 0.4)
    assert [point.tau for point in trade_off] == [0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.7, 0.9]
    assert all(one.active > other.active for one, other in pairwise(trade_off))
    point = trade_off[4]
    codes = Encoder.open(tiny_bundle, device="cpu").encode(rows, tau=0.4).toarray()
    assert point.active == pytest.approx((codes != 0).sum(1).mean())
    assert point.search_cost == pytest.approx(np.square((codes != 0).mean(0)).sum())
    drawn = decoder.run(["mean"], {"code": codes})[0]
    assert point.squared_error == pytest.approx(
        np.square(drawn - rows / 255.0).sum((1, 2, 3)).mean(), rel=1e-4
    )
    assert point.knn is not None
    assert 0 <= point.knn <= 1
    bare = measure_trade_off(model, encoder, decoder, Rows(rows, None, "tests"), 0.5)
    assert bare[0].knn is None


@pytest.mark.slow
def test_an_export_for_an_active_count_is_calibrated_on_the_data_it_is_given(
    tiny_run: Path, tmp_path: Path, grey_folder: Path
) -> None:
    done = export_bundle(
        tiny_run, tmp_path / "out", ExportOptions(active=5.0, calibration=grey_folder, name="five")
    )
    assert done.manifest.active == pytest.approx(5.0, rel=0.02)
    codes = Encoder.open(tmp_path / "out", device="cpu").encode(load_samples(tiny_run))
    assert codes.nnz / codes.shape[0] == pytest.approx(5.0, rel=0.1)
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"**{done.manifest.tau:g}**" in card
    assert "200 rows of the calibration data" in card
    assert "| kNN |" in card, "class folders are labels"


def test_the_card_shows_the_trade_off(tiny_bundle: Path) -> None:
    card = (tiny_bundle / "README.md").read_text()
    assert "| tau | active | search cost | neighbour recall@10 | squared error |\n" in card
    for tau in ("| 0.05 |", "| **0.5** |", "| 0.9 |"):
        assert tau in card
    assert "200 rows of examples of the training data" in card


def test_calibration_data_of_another_shape_is_refused(tiny_run: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "rows.npy", np.arange(225, dtype=np.uint8).reshape(9, 5, 5))
    with pytest.raises(InputError, match=r"rows\.npy: found grey images of 5x5, but the model"):
        export_bundle(tiny_run, tmp_path / "out", ExportOptions(calibration=tmp_path / "rows.npy"))
    folder = tmp_path / "images"
    folder.mkdir()
    Image.new("L", (8, 8)).save(folder / "a.png")
    (folder / "a.png").write_bytes(b"no image")
    with pytest.raises(InputError, match="none of 1 image files can be read"):
        export_bundle(tiny_run, tmp_path / "out", ExportOptions(calibration=folder))
    assert not (tmp_path / "out").exists()
