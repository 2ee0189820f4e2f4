"""Codes that are far outside what a model was fitted to."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from vsc_serve import Encoder, read_codes
from vsc_serve.bundle import MANIFEST, STATISTICS, open_bundle, sha256
from vsc_serve.cli import app
from vsc_serve.codes import Codes, CodeStatistics, dense_to_csr
from vsc_serve.domain import (
    MIN_IMAGES,
    OwnCodes,
    are_comparable,
    compare,
    domain_facts,
    read_reference,
    reference_of,
)
from vsc_serve.errors import BundleError
from vsc_serve.models import builtin_model
from vsc_serve.options import EncodeOptions

LATENTS = 60


def codes_of(rates: np.ndarray, images: int, seed: int) -> Codes:
    on = np.random.default_rng(seed).random((images, len(rates))) < rates
    return dense_to_csr(on.astype(np.float32))


RATES = np.random.default_rng(7).uniform(0.02, 0.3, LATENTS)
OTHER = RATES[np.argsort(RATES, kind="stable")[::-1].argsort()]
REFERENCE = reference_of(
    [
        OwnCodes("held out", codes_of(RATES, 60, 1), 1e-6, 3.0),
        OwnCodes("training", codes_of(RATES, 450, 2), 1e-6, 2.0),
    ],
    0.5,
)


def outside(codes: Codes) -> list[str]:
    found = compare(REFERENCE, CodeStatistics.of(codes))
    assert found is not None
    return found.out_of_domain


@pytest.mark.parametrize("images", [MIN_IMAGES, 50, 500])
def test_data_like_a_model_s_own_is_never_said_to_be_outside(images: int) -> None:
    assert not any(outside(codes_of(RATES, images, seed)) for seed in range(100, 300))


@pytest.mark.parametrize("images", [50, 500])
def test_what_is_outside_is_named(images: int) -> None:
    many = np.full(LATENTS, 0.6)
    concentrated = np.zeros(LATENTS)
    concentrated[:12] = RATES.sum() / 12
    half_empty = codes_of(RATES, images, 5).toarray() * (np.arange(images) % 2)[:, None]
    assert "active" in outside(codes_of(many, images, 3))
    assert outside(codes_of(concentrated, images, 4)) == ["features"]
    assert "empty" in outside(dense_to_csr(half_empty))
    assert set(outside(codes_of(np.zeros(LATENTS), images, 3))) == {"active", "empty", "features"}


def test_a_few_images_are_not_judged() -> None:
    few = CodeStatistics.of(codes_of(np.zeros(LATENTS), MIN_IMAGES - 1, 0))
    assert compare(REFERENCE, few) is None
    assert domain_facts(None) == {}


def test_between_training_and_held_out_data_no_active_count_is_outside() -> None:
    groups = [
        OwnCodes("held out", codes_of(RATES, 100, 1), 0, 0),
        OwnCodes("training", codes_of(RATES * 3, 100, 2), 0, 0),
    ]
    found = compare(reference_of(groups, 0.5), CodeStatistics.of(codes_of(RATES * 2, 1000, 3)))
    assert found is not None
    assert "active" not in found.out_of_domain


def test_only_codes_at_the_threshold_of_the_reference_are_compared() -> None:
    manifest = open_bundle(builtin_model()).manifest
    assert are_comparable(EncodeOptions(uncertainty=True), manifest)
    for options in (
        EncodeOptions(tau=0.3),
        EncodeOptions(max_active=5),
        EncodeOptions(view="query"),
        EncodeOptions(refit=True),
    ):
        assert not are_comparable(options, manifest)


def with_statistics(bundle: Path, text: str) -> None:
    (bundle / STATISTICS).write_text(text)
    stored = json.loads((bundle / MANIFEST).read_text())
    stored["files"][STATISTICS] = sha256(bundle / STATISTICS)
    (bundle / MANIFEST).write_text(json.dumps(stored))


def test_a_bundle_without_statistics_and_one_of_a_newer_version_work(tiny_bundle: Path) -> None:
    assert read_reference(open_bundle(tiny_bundle)) is None
    with_statistics(tiny_bundle, '{"format": 2}')
    assert read_reference(open_bundle(tiny_bundle)) is None
    assert Encoder.open(tiny_bundle, device="cpu").reference is None


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("[]", "no attribute"),
        ('{"format": 1}', "firing_rates is missing"),
        (REFERENCE.to_json(), "60 firing rates"),
        (REFERENCE.to_json().replace('"tau": 0.5', '"tau": -1'), "not negative"),
    ],
)
def test_damaged_statistics_are_refused(tiny_bundle: Path, text: str, why: str) -> None:
    with_statistics(tiny_bundle, text)
    with pytest.raises(BundleError, match=f"{STATISTICS}: damaged .*{why}"):
        read_reference(open_bundle(tiny_bundle))


@pytest.fixture
def noise(tmp_path: Path) -> Path:
    folder = tmp_path / "noise"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for number in range(40):
        pixels = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:02}.png")
    return folder


def encode(folder: Path, out: Path, *options: str) -> tuple[str, dict[str, object]]:
    given = ["encode", str(folder), "--out", str(out), "--json", "--workers", "0", *options]
    result = CliRunner().invoke(app, [*given, "--model", str(builtin_model())])
    assert result.exit_code == 0, result.output
    return result.stderr, json.loads(result.stdout)


def test_encode_says_that_noise_is_outside_in_summary_json_and_metadata(
    noise: Path, tmp_path: Path
) -> None:
    said, metrics = encode(noise, tmp_path / "codes.npz")
    assert "far outside the model's own data (" in said
    assert "vsc fit " in said
    assert "--out model/" in said
    domain = metrics["domain"]
    assert isinstance(domain, dict)
    assert "empty" in domain["out_of_domain"]
    assert read_codes(tmp_path / "codes.npz").meta["out_of_domain"] == domain["out_of_domain"]


def test_a_folder_of_shards_says_it_too_and_joins_into_the_same_bytes(
    noise: Path, tmp_path: Path
) -> None:
    encode(noise, tmp_path / "codes.npz")
    encode(noise, tmp_path / "shards", "--shard-rows", "15")
    joined = str(tmp_path / "joined.npz")
    given = ["convert", str(tmp_path / "shards"), "--to", "npz", "--out", joined]
    assert CliRunner().invoke(app, given).exit_code == 0
    assert (tmp_path / "joined.npz").read_bytes() == (tmp_path / "codes.npz").read_bytes()


def test_what_is_not_outside_or_not_comparable_is_not_mentioned(
    noise: Path, tmp_path: Path
) -> None:
    said, metrics = encode(noise, tmp_path / "other.npz", "--tau", "0.3")
    assert "domain" not in said
    assert metrics["domain"] is None
    assert "out_of_domain" not in read_codes(tmp_path / "other.npz").meta


def test_info_says_what_a_model_s_own_data_looks_like() -> None:
    result = CliRunner().invoke(app, ["info", str(builtin_model())])
    assert "10000 held out: 12.9 active" in result.stdout
