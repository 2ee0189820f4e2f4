"""Refitted values: the same rows whichever way they are encoded, and what they say they are."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from vsc_serve.bundle import open_bundle
from vsc_serve.cli.encode import encode
from vsc_serve.codes import read_codes
from vsc_serve.encoder import Encoder
from vsc_serve.errors import BundleError, InputError, UsageError
from vsc_serve.executors import ExecutorOptions, open_executor
from vsc_serve.executors.gpu import GpuExecutor, open_encoders, read_spec
from vsc_serve.executors.processes import ProcessExecutor
from vsc_serve.linear_map import LinearMap
from vsc_serve.options import EncodeOptions
from vsc_serve.pipeline import batches, stream
from vsc_serve.sources import find_sources

REFIT = EncodeOptions(refit=True)


def refitted(bundle: Path, images: Path) -> np.ndarray:
    """Codes of a folder, refitted row by row in plain algebra."""
    encoder = Encoder.open(bundle, device="cpu")
    pixels = encoder.read(sorted(images.glob("*.png")))
    dense, found = encoder.encode(pixels).toarray(), encoder.linear_map
    goal = pixels.reshape(len(pixels), -1) / 255.0 - found.center - found.bias
    values = np.zeros(dense.shape)
    for row, is_on in enumerate(dense != 0):
        weights = found.weights[is_on].astype(float)
        values[row, is_on] = np.linalg.lstsq(weights.T, goal[row], rcond=None)[0]
    return values


def test_refitted_codes_are_those_of_least_squares(mapped_bundle: Path, images: Path) -> None:
    encoder = Encoder.open(mapped_bundle, device="cpu")
    pixels = encoder.read(sorted(images.glob("*.png")))
    rows = encoder.encode_rows(pixels, REFIT)
    np.testing.assert_allclose(rows.codes.toarray(), refitted(mapped_bundle, images), atol=1e-4)
    assert rows.codes.nnz > 60
    alone = [encoder.encode_rows(pixels[[row]], REFIT).codes.data for row in range(len(pixels))]
    assert np.concatenate(alone).tobytes() == rows.codes.data.tobytes()
    assert encoder.provenance(REFIT)["values"] == "refitted"
    assert "values" not in encoder.provenance()


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_every_executor_gives_the_same_refitted_rows(
    mapped_bundle: Path, images: Path, workers: int
) -> None:
    expected = refitted(mapped_bundle, images)
    streamed = list(stream(mapped_bundle, [images], REFIT, device="cpu", workers=workers))
    codes = np.concatenate([batch.rows.codes.toarray() for batch in streamed])
    np.testing.assert_allclose(codes, expected, atol=1e-4)
    encoder = Encoder.open(mapped_bundle, device="cpu")
    pixels = encoder.read(sorted(images.glob("*.png")))
    assert codes.tobytes() == encoder.encode_rows(pixels, REFIT).codes.toarray().tobytes()


@pytest.mark.slow
def test_models_on_devices_refit_as_well(mapped_bundle: Path, images: Path) -> None:
    """As on a GPU: readers feed the models, and rows that fill a batch up are no codes."""
    bundle = open_bundle(mapped_bundle)
    encoders, provenance = open_encoders(bundle, REFIT, "cpu", 1)
    assert provenance["values"] == "refitted"
    spec = read_spec(bundle.manifest, len(encoders[0]))
    with GpuExecutor(spec, ProcessExecutor(spec, 1), encoders, provenance) as pool:
        found = list(batches(pool, iter(find_sources([str(images)])), 7))
    codes = np.concatenate([batch.rows.codes.toarray() for batch in found])
    np.testing.assert_allclose(codes, refitted(mapped_bundle, images), atol=1e-4)


def run_encode(source: Path, out: Path, model: Path, **options: object) -> dict[str, object]:
    arguments = {"shard": "1/1", "device": "cpu", "workers": 0, "refit": True} | options
    encode([str(source)], out, model=model, **arguments)  # type: ignore[arg-type]
    return read_codes(out).meta


def test_the_command_writes_what_values_are_and_updates_only_alike(
    mapped_bundle: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "codes.npz"
    meta = run_encode(images, out, mapped_bundle, update=True)
    assert (meta["values"], meta["view"]) == ("refitted", "mean")
    np.testing.assert_allclose(
        read_codes(out).codes.toarray(), refitted(mapped_bundle, images), atol=1e-4
    )
    assert EncodeOptions.of_codes(meta) == EncodeOptions(tau=0.5, refit=True)
    capsys.readouterr()
    run_encode(images, out, mapped_bundle, update=True, refit=False)
    assert "encoding everything" in capsys.readouterr().err
    assert "values" not in read_codes(out).meta


def test_pixels_in_a_file_are_refitted_like_images(
    mapped_bundle: Path, images: Path, tmp_path: Path
) -> None:
    encoder = Encoder.open(mapped_bundle, device="cpu")
    np.save(tmp_path / "rows.npy", encoder.read(sorted(images.glob("*.png"))))
    run_encode(tmp_path / "rows.npy", tmp_path / "codes.npz", mapped_bundle)
    found = read_codes(tmp_path / "codes.npz").codes.toarray()
    np.testing.assert_allclose(found, refitted(mapped_bundle, images), atol=1e-4)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_bundle_without_a_map_refits_nothing_and_says_so(
    tiny_bundle: Path, images: Path, tmp_path: Path, workers: int
) -> None:
    np.save(tmp_path / "rows.npy", np.zeros((2, 4, 4, 1), np.uint8))
    for source in (images, tmp_path / "rows.npy"):
        with pytest.raises(BundleError, match=r"tiny: no linear_map\.npz, .* Export the run again"):
            run_encode(source, tmp_path / "codes.npz", tiny_bundle, workers=workers)
    assert not list(tmp_path.glob("codes*"))
    with pytest.raises(BundleError, match=r"no linear_map\.npz"):
        open_executor(open_bundle(tiny_bundle), REFIT, ExecutorOptions(device="cpu"))


def test_values_that_float32_cannot_hold_cost_their_row(
    mapped_bundle: Path, tmp_path: Path, vector_encoder: Encoder
) -> None:

    size = 1e-30 * np.random.default_rng(0).normal(size=(16, 64)).astype(np.float32)
    nothing = np.zeros(64, np.float32)
    vars(vector_encoder)["linear_map"] = LinearMap(size, nothing, nothing)
    rows = np.random.default_rng(1).normal(size=(300, 64)).astype(np.float32) * 1e-20
    rows[270] = 2e30
    with pytest.raises(InputError, match="row 270: model fake gives values that are not") as caught:
        vector_encoder.encode_rows(rows, REFIT)
    assert caught.value.row == 270


def test_refitted_values_take_the_place_of_means_alone() -> None:
    for view in ("gamma", "spike", "query"):
        with pytest.raises(UsageError, match=f"`refit` and `view={view}`: give one of them"):
            EncodeOptions(refit=True, view=view)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="values 'rounded', which this vsc-serve does not know"):
        EncodeOptions.of_codes({"values": "rounded"})


def test_shards_of_two_kinds_of_values_are_not_mixed(
    mapped_bundle: Path, images: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "shards"
    run_encode(images, folder, mapped_bundle, shard_rows=20)
    assert read_codes(folder).codes.shape[0] == 40
    run_encode(images, tmp_path / "plain", mapped_bundle, shard_rows=20, refit=False)
    shutil.copy(tmp_path / "plain" / "part-00001.npz", folder / "part-00001.npz")
    listed = json.loads((folder / "manifest.json").read_text())
    for shard in listed["shards"]:
        shard["sha256"] = None
    (folder / "manifest.json").write_text(json.dumps(listed))
    with pytest.raises(InputError, match="values is refitted in the first and None in another"):
        read_codes(folder)
