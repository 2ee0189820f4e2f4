"""A bundle is opened whole and unchanged, or refused."""

import dataclasses
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from vsc_serve.bundle import (
    DECODER,
    ENCODER,
    ENCODER_CSR,
    ENCODER_TOPK,
    FORMAT,
    MANIFEST,
    Manifest,
    open_bundle,
)
from vsc_serve.decoder import Decoder
from vsc_serve.encoder import Encoder
from vsc_serve.errors import BundleError
from vsc_serve.session import open_graph, open_session

ARCHIVE = Path(__file__).parents[1] / "data" / "archive"


def edit_manifest(bundle: Path, **changes: object) -> None:
    stored = json.loads((bundle / MANIFEST).read_text(encoding="utf-8"))
    (bundle / MANIFEST).write_text(json.dumps(stored | changes), encoding="utf-8")


def vector_manifest(**changes: object) -> Manifest:
    fields = {
        "name": "vectors",
        "modality": "vector",
        "latent_dim": 6,
        "tau": 0.5,
        "alpha": 0.1,
        "active": 2.0,
        "opset": 20,
        "files": {ENCODER: "0" * 64},
        "probes": [],
        "input_dim": 4,
    }
    return Manifest(**fields | changes)


def test_a_whole_bundle_opens(tiny_bundle):
    bundle = open_bundle(tiny_bundle)
    assert bundle.path == tiny_bundle
    assert bundle.manifest.name == "tiny"
    assert bundle.manifest.pixel_spec.shape == (4, 4, 1)
    assert bundle.manifest.format == FORMAT


def test_a_manifest_survives_json(tiny_bundle):
    for manifest in (open_bundle(tiny_bundle).manifest, vector_manifest()):
        text = manifest.to_json()
        again = Manifest.from_json(text, Path("x"))
        assert again == manifest
        assert again.to_json() == text


@pytest.mark.parametrize("name", [ENCODER, DECODER, "probe.png"])
def test_one_changed_byte_in_any_file_is_found(tiny_bundle, name):
    content = bytearray((tiny_bundle / name).read_bytes())
    content[len(content) // 2] ^= 1
    (tiny_bundle / name).write_bytes(content)
    with pytest.raises(BundleError, match=rf"{name}: changed since .*expected .* Copy the bundle"):
        open_bundle(tiny_bundle)


@pytest.mark.parametrize("name", [ENCODER, DECODER, "probe.png"])
def test_a_missing_file_is_named(tiny_bundle, name):
    (tiny_bundle / name).unlink()
    with pytest.raises(BundleError, match=rf"{name}: listed in the manifest but unreadable \(No "):
        open_bundle(tiny_bundle)


@pytest.mark.parametrize("found", [FORMAT + 1, 0, "one"])
def test_another_format_is_refused_with_both_numbers(tiny_bundle, found):
    edit_manifest(tiny_bundle, format=found)
    with pytest.raises(
        BundleError, match=f"format {json.dumps(found)}, but this vsc-serve reads format 1. Up"
    ):
        open_bundle(tiny_bundle)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "{}", "\x00"])
def test_a_file_that_is_no_manifest_says_so(tiny_bundle, text):
    (tiny_bundle / MANIFEST).write_text(text, encoding="utf-8")
    with pytest.raises(BundleError, match=rf"{MANIFEST}: not a bundle manifest .* Export again"):
        open_bundle(tiny_bundle)


def test_a_manifest_that_is_not_text_is_unreadable(tiny_bundle):
    (tiny_bundle / MANIFEST).write_bytes(b"\xff\xfe\x00")
    with pytest.raises(BundleError, match=rf"{MANIFEST}: unreadable"):
        open_bundle(tiny_bundle)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tau": 1.5}, "tau must be above 0 and below 1"),
        ({"tau": "half"}, "damaged manifest"),
        ({"latent_dim": 0}, "latent_dim must be positive"),
        ({"pixel_spec": None}, "an image model has a pixel_spec"),
        ({"modality": "vector"}, "an image model has a pixel_spec"),
        ({"modality": "sound"}, 'modality must be image or vector, not "sound"'),
        ({"input_dim": 4}, "a vector model has an input_dim"),
        ({"pixel_spec": {"height": 4}}, "damaged manifest"),
        ({"files": []}, "damaged manifest"),
        ({"files": {}}, "no digest for encoder.onnx, probe.png"),
        ({"probes": [{"file": "probe.png"}]}, "damaged manifest"),
        ({"probes": 3}, "damaged manifest"),
        ({"precision": "fp8"}, 'precision must be float32 or fp16 or int8, not "fp8"'),
    ],
)
def test_a_manifest_that_contradicts_itself_is_damaged(tiny_bundle, changes, message):
    edit_manifest(tiny_bundle, **changes)
    with pytest.raises(
        BundleError, match=rf"{MANIFEST}: damaged manifest .*Export again"
    ) as caught:
        open_bundle(tiny_bundle)
    assert message in str(caught.value)


@pytest.mark.timeout(30)
@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("/dev/zero", "not a relative name of a file"),
        ("../../../etc/hostname", "not a relative name of a file"),
        ("probes/../../x", "not a relative name of a file"),
        ("a\0b", "not a relative name of a file"),
        ("out", "leads out of the folder"),
        ("pipe", "not a regular file"),
        ("zero", "leads out of the folder"),
        ("probes", "not a regular file"),
    ],
)
def test_a_manifest_names_only_plain_files_inside_the_bundle(tiny_bundle, name, reason):
    (tiny_bundle.parent / "secret").write_bytes(b"s")
    (tiny_bundle / "out").symlink_to("../secret")
    (tiny_bundle / "zero").symlink_to("/dev/zero")
    (tiny_bundle / "probes").mkdir()
    os.mkfifo(tiny_bundle / "pipe")
    stored = json.loads((tiny_bundle / MANIFEST).read_text(encoding="utf-8"))
    edit_manifest(tiny_bundle, files=stored["files"] | {name: "0" * 64})
    with pytest.raises(BundleError, match=rf"listed in the manifest but unreadable \({reason}"):
        open_bundle(tiny_bundle)


@pytest.mark.timeout(30)
def test_a_manifest_that_is_a_pipe_or_a_link_out_is_not_read(tiny_bundle):
    text = (tiny_bundle / MANIFEST).read_text(encoding="utf-8")
    (tiny_bundle / MANIFEST).unlink()
    os.mkfifo(tiny_bundle / MANIFEST)
    with pytest.raises(BundleError, match=r"manifest.json: unreadable \(not a regular file"):
        open_bundle(tiny_bundle)
    (tiny_bundle.parent / "manifest.json").write_text(text, encoding="utf-8")
    (tiny_bundle / MANIFEST).unlink()
    (tiny_bundle / MANIFEST).symlink_to("../manifest.json")
    with pytest.raises(BundleError, match=r"manifest.json: unreadable \(leads out of the folder"):
        open_bundle(tiny_bundle)


def test_sizes_are_limited_before_anything_is_read(tiny_bundle):
    with (tiny_bundle / "huge.bin").open("wb") as file:
        file.truncate(2**40)  # a hole: it takes no room and a quarter of an hour to hash
    stored = json.loads((tiny_bundle / MANIFEST).read_text(encoding="utf-8"))
    edit_manifest(tiny_bundle, files=stored["files"] | {"huge.bin": "0" * 64})
    with pytest.raises(BundleError, match="more than 68,719,476,736"):
        open_bundle(tiny_bundle)
    (tiny_bundle / MANIFEST).write_text(" " * (2**23 + 1), encoding="utf-8")
    with pytest.raises(BundleError, match=r"unreadable \(larger than 8,388,608 bytes"):
        open_bundle(tiny_bundle)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 100_000, "nested too deep"),
        ('{"format": 1, "format": 1}', "'format' is there twice"),
        ('{"format": NaN}', "NaN is no number"),
        ('{"format": true}', "format true, but this vsc-serve reads format 1"),
        ('{"format": 1.0}', "format 1.0, but this vsc-serve reads format 1"),
    ],
)
def test_json_that_readers_take_differently_is_no_manifest(tiny_bundle, text, message):
    (tiny_bundle / MANIFEST).write_text(text, encoding="utf-8")
    with pytest.raises(BundleError, match=message) as caught:
        open_bundle(tiny_bundle)
    assert "\n" not in str(caught.value)


SPEC = {"height": 4, "width": 4, "channels": 1, "fit": "crop"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"latent_dim": 10**30}, "latent_dim must be positive and at most 1048576"),
        ({"latent_dim": -1}, "latent_dim must be positive and at most 1048576"),
        ({"latent_dim": True}, "latent_dim must be an integer, not true"),
        ({"latent_dim": 6.0}, "latent_dim must be an integer, not 6.0"),
        ({"pixel_spec": SPEC | {"height": 10**9}}, "an input has 1 to 16777216 values"),
        ({"pixel_spec": SPEC | {"height": 0}}, "image size must be positive"),
        ({"pixel_spec": SPEC | {"height": "4"}}, "pixel_spec.height must be an integer"),
        ({"pixel_spec": SPEC | {"channels": 2}}, "channels must be 1"),
        ({"pixel_spec": SPEC | {"fit": "pad"}}, "pixel_spec.fit must be crop or stretch"),
        ({"pixel_spec": SPEC | {"resample": "nearest"}}, "resample must be bilinear or bicubic"),
        ({"pixel_spec": SPEC | {"background": "black"}}, "background must be white"),
        ({"pixel_spec": SPEC | {"crop_pct": 1.5}}, "crop_pct must be above 0 and at most 1"),
        ({"pixel_spec": SPEC | {"gamma": 2}}, "pixel_spec.'gamma' is no known field"),
        ({"pixel_spec": "4x4"}, "pixel_spec must be an object"),
        ({"name": None}, "name must be text"),
        ({"tau": True}, "tau must be a number"),
        ({"opset": "20"}, "opset must be an integer"),
        (
            {"files": {ENCODER: "A" * 64, "probe.png": "0" * 64}},
            "the digest of 'encoder.onnx' is no sha256",
        ),
        ({"versions": {"numpy": 2}}, "versions['numpy'] must be text"),
        ({"graphs": {ENCODER: {"inputs": {"image": "x"}}}}, "a type and a shape for each name"),
        (
            {"graphs": {ENCODER: {"outputs": {"code": "float32 " + "(" * 300}}}},
            "a type and a shape for each name",
        ),
        ({"backbone": {"dim": "9"}}, "backbone.dim must be an integer"),
    ],
)
def test_an_absurd_field_is_named(tiny_bundle, changes, message):
    edit_manifest(tiny_bundle, **changes)
    with pytest.raises(BundleError, match=r"damaged manifest \(") as caught:
        open_bundle(tiny_bundle)
    assert message in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    "changes", [{"indices": [2, 1]}, {"indices": [1, 1]}, {"indices": [5, 6]}, {"values": [1.0]}]
)
def test_the_code_of_a_probe_is_a_row(tiny_bundle, changes):
    stored = json.loads((tiny_bundle / MANIFEST).read_text(encoding="utf-8"))
    probe = stored["probes"][0] | {"indices": [1, 2], "values": [1.0, 2.0]} | changes
    edit_manifest(tiny_bundle, probes=[probe])
    with pytest.raises(BundleError, match=r"values of the probe 'probe.png' make no code"):
        open_bundle(tiny_bundle)


def test_a_graph_of_another_shape_than_the_manifest_says_is_refused(tiny_bundle):
    open_graph(open_bundle(tiny_bundle), ENCODER, device="cpu")
    for changes in ({"latent_dim": 7}, {"pixel_spec": SPEC | {"channels": 3}}):
        edit_manifest(tiny_bundle, **{"latent_dim": 6, "pixel_spec": SPEC} | changes)
        with pytest.raises(BundleError, match=r"has shape .* but the manifest says"):
            open_graph(open_bundle(tiny_bundle), ENCODER, device="cpu")


@pytest.mark.parametrize(
    "outputs",
    [None, {}, {"values": "float32 (batch, k)"}, {'a"b': "int32 (batch, 1)"}, {"a": "bool (n)"}],
)
def test_the_outputs_that_a_server_is_told_must_be_plain(tiny_bundle, outputs):
    stored = json.loads((tiny_bundle / MANIFEST).read_text(encoding="utf-8"))
    files = stored["files"] | {ENCODER_TOPK: stored["files"][ENCODER]}
    shutil.copy(tiny_bundle / ENCODER, tiny_bundle / ENCODER_TOPK)
    plain = {"indices": "int32 (batch, 4)", "count": "int32 (batch, 1)"}
    edit_manifest(tiny_bundle, files=files, graphs={ENCODER_TOPK: {"outputs": plain}})
    open_bundle(tiny_bundle)
    edit_manifest(
        tiny_bundle, graphs={} if outputs is None else {ENCODER_TOPK: {"outputs": outputs}}
    )
    with pytest.raises(BundleError, match=r"the shapes of the outputs of encoder_topk.onnx"):
        open_bundle(tiny_bundle)


def test_a_graph_without_a_digest_is_not_opened(tiny_bundle):
    stored = json.loads((tiny_bundle / MANIFEST).read_text(encoding="utf-8"))
    del stored["files"][DECODER]
    edit_manifest(tiny_bundle, files=stored["files"])
    with pytest.raises(BundleError, match=r"decoder.onnx: not a part of this bundle"):
        Decoder.open(tiny_bundle, device="cpu")


def test_a_missing_field_is_named(tiny_bundle):
    stored = json.loads((tiny_bundle / MANIFEST).read_text(encoding="utf-8"))
    del stored["alpha"]
    (tiny_bundle / MANIFEST).write_text(json.dumps(stored), encoding="utf-8")
    with pytest.raises(BundleError, match=r"damaged manifest \(alpha is missing\)"):
        open_bundle(tiny_bundle)


def test_where_no_bundle_is_the_command_that_makes_one_is_given(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    for name in ("gone", "file", "."):
        with pytest.raises(
            BundleError, match=r"no model bundle there .* Make one with `vsc export"
        ):
            open_bundle(tmp_path / name)


def test_the_digest_names_the_weights_and_nothing_else(tiny_bundle):
    manifest = open_bundle(tiny_bundle).manifest
    renamed = dataclasses.replace(
        manifest, name="other", files=manifest.files | {"README.md": "1" * 64}
    )
    assert renamed.digest == manifest.digest
    for name in (ENCODER, DECODER, "weights.bin"):
        changed = dataclasses.replace(manifest, files=manifest.files | {name: "1" * 64})
        assert changed.digest != manifest.digest


def test_a_bundle_can_be_read_from_anywhere(tiny_bundle, monkeypatch):
    monkeypatch.chdir(tiny_bundle.parent)
    assert open_bundle(Path("tiny")).manifest == open_bundle(tiny_bundle).manifest
    Path("link").symlink_to(tiny_bundle)
    assert open_bundle(Path("link")).manifest == open_bundle(tiny_bundle).manifest


def test_a_manifest_without_what_was_added_later_is_read_with_its_meaning():
    manifest = open_bundle(ARCHIVE / "bundle-v1").manifest
    assert manifest.precision == "float32"
    assert manifest.graphs == {}
    assert not manifest.has_csr


def test_a_bundle_with_a_compacting_graph_is_read_for_ever():
    folder = ARCHIVE / "bundle-v1-csr"
    manifest = open_bundle(folder).manifest
    assert manifest.has_csr
    assert manifest.precision == "float32"
    assert manifest.graphs["encoder.onnx"]["inputs"] == {
        "image": "uint8 (batch, 8, 8, 1)",
        "tau_logit": "float32 ()",
    }
    codes = Encoder.open(folder, device="cpu").encode(sorted((ARCHIVE / "images").glob("*.png")))
    expected = json.loads((ARCHIVE / "bundle-v1-csr-codes.json").read_text(encoding="utf-8"))
    assert codes.indices.tolist() == [j for row in expected["indices"] for j in row]
    np.testing.assert_allclose(
        codes.data, [v for row in expected["values"] for v in row], atol=1e-4
    )


def test_the_compacting_graph_of_the_archive_gives_the_codes_of_the_encoder():
    folder = ARCHIVE / "bundle-v1-csr"
    pixels = np.random.default_rng(0).integers(0, 256, (20, 8, 8, 1), dtype=np.uint8)
    expected = Encoder.open(folder, device="cpu").encode(pixels)
    session = open_session(folder / ENCODER_CSR, device="cpu")
    values, indices, row_counts = session.run(
        ["values", "indices", "row_counts"], {"image": pixels}
    )
    np.testing.assert_array_equal(values, expected.data)
    np.testing.assert_array_equal(indices, expected.indices)
    np.testing.assert_array_equal(row_counts, np.diff(expected.indptr))


def test_values_of_a_variant_may_lie_farther_from_those_at_export():
    tolerances = [
        vector_manifest(precision=name).value_tolerance for name in ("float32", "fp16", "int8")
    ]
    assert tolerances == sorted(tolerances)
    assert tolerances[0] == 1e-4
