"""Damaged and invented manifests, graphs and codes files give our own errors and nothing else.

`VSC_FUZZ_ROUNDS=134` makes 20,000 changes of each kind, the ordinary ones first.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Final

import numpy as np
import onnx
import pytest
import scipy.sparse
from google.protobuf.message import DecodeError, Message
from odd_values import change_value

from vsc_serve.bundle import ENCODER, LINEAR_MAP, MANIFEST, Bundle, open_bundle
from vsc_serve.codes import read_codes, write_codes
from vsc_serve.errors import BundleError, InputError, VscError
from vsc_serve.external_data import external_files
from vsc_serve.linear_map import LinearMap, read_linear_map, write_linear_map

ROUNDS: Final = int(os.environ.get("VSC_FUZZ_ROUNDS", "1"))
CHANGES: Final = 150 * ROUNDS
TOKENS: Final = [b"{", b"[", b'"', b",", b":", b"null", b"NaN", b"-", b"1e999", b"\\ud800", b"\xff"]


@pytest.fixture(params=range(4))
def seeds(request: pytest.FixtureRequest) -> range:
    """A quarter of the changes, so that several processes share them."""
    return range(request.param, CHANGES, 4)


def change_bytes(content: bytes, rng: np.random.Generator) -> bytes:
    """Flip, cut, repeat and insert, once to four times."""
    changed = bytearray(content)
    for _ in range(rng.integers(1, 5)):
        place = int(rng.integers(len(changed) + 1))
        how = rng.integers(5)
        if how == 0 and place < len(changed):
            changed[place] ^= int(rng.integers(1, 256))
        elif how == 1:
            del changed[place : place + int(rng.integers(1, 20))]
        elif how == 2:
            changed[place:place] = changed[place : place + int(rng.integers(1, 40))]
        elif how == 3:
            changed[place:place] = TOKENS[rng.integers(len(TOKENS))]
        elif rng.integers(10) == 0:
            del changed[place:]
    return bytes(changed)


def flip_bytes(content: bytes, rng: np.random.Generator) -> bytes:
    """Change one to three bytes, and no length: what is inside messages can still be read."""
    changed = bytearray(content)
    for place in rng.integers(len(content), size=rng.integers(1, 4)):
        changed[place] ^= int(rng.integers(1, 256))
    return bytes(changed)


def changed_json(content: bytes, rng: np.random.Generator) -> bytes:
    if rng.integers(2):
        return change_bytes(content, rng)
    return json.dumps(change_value(json.loads(content), rng, depth=4)).encode()


def outcomes(
    path: Path,
    read: Callable[[], object],
    change: Callable[[bytes, np.random.Generator], bytes],
    seeds: range,
) -> list[type[VscError] | None]:
    """Change a file again and again, and note which error each change gives, if any."""
    whole, found = path.read_bytes(), []
    for seed in seeds:
        path.write_bytes(change(whole, np.random.default_rng(seed)))
        try:
            read()
            found.append(None)
        except VscError as error:
            found.append(type(error))
    return found


@pytest.mark.timeout(60 * ROUNDS + 60)
def test_a_changed_manifest_of_a_bundle_is_read_or_refused(
    tmp_path: Path, seeds: range, any_bundle: Path
) -> None:
    bundle = tmp_path / "bundle"
    shutil.copytree(any_bundle, bundle)
    found = outcomes(bundle / MANIFEST, lambda: open_bundle(bundle), changed_json, seeds)
    assert set(found) <= {BundleError, None}
    assert found.count(BundleError) > len(found) / 3


def locations(message: Message) -> Iterator[str]:
    """Yield the files that a parsed graph takes weights from, however deep they are named."""
    for field, value in message.ListFields():
        if field.message_type is None:
            continue
        for inner in value if field.is_repeated else [value]:
            if message.DESCRIPTOR.name == "TensorProto" and field.name == "external_data":
                if inner.key == "location":
                    yield inner.value
            else:
                yield from locations(inner)


@pytest.mark.timeout(60 * ROUNDS + 60)
def test_no_change_of_a_graph_hides_a_file_that_onnx_sees(
    tmp_path: Path, seeds: range, any_bundle: Path
) -> None:
    graph = tmp_path / ENCODER
    whole, seen = (any_bundle / ENCODER).read_bytes(), 0
    for seed in seeds:
        changed = flip_bytes(whole, np.random.default_rng(seed))
        graph.write_bytes(changed)
        try:
            found = external_files(graph)
        except ValueError:
            continue
        with suppress(DecodeError):
            named = set(locations(onnx.ModelProto.FromString(changed)))
            assert named <= found
            seen += bool(named)
    assert seen > len(seeds) / 10


@pytest.fixture
def any_bundle() -> Path:
    return Path(__file__).parents[1] / "data" / "archive" / "bundle-v1-csr"


@pytest.mark.timeout(60 * ROUNDS + 60)
def test_a_changed_linear_map_is_read_or_refused(
    tmp_path: Path, seeds: range, any_bundle: Path
) -> None:
    """Its digest is taken to be right: whoever changes the file can change the manifest too."""
    path, manifest = tmp_path / LINEAR_MAP, open_bundle(any_bundle).manifest
    bundle = Bundle(tmp_path, replace(manifest, files=manifest.files | {LINEAR_MAP: "0" * 64}))
    shape = (manifest.latent_dim, manifest.data_dim)
    arrays = (np.ones(part, np.float32) for part in (shape, shape[1:], shape[1:]))
    write_linear_map(path, LinearMap(*arrays))

    def read() -> None:
        assert read_linear_map(bundle).weights.shape == shape

    found = outcomes(path, read, change_bytes, seeds)
    assert set(found) <= {BundleError, None}
    assert found.count(BundleError) > len(found) / 2


@pytest.fixture
def codes_file(tmp_path: Path) -> Path:
    """A small codes file with every member."""
    path = tmp_path / "codes.npz"
    rng = np.random.default_rng(0)
    codes = scipy.sparse.random_array((9, 7), density=0.3, dtype=np.float32, rng=rng).tocsr()
    codes.sort_indices()
    aligned = np.linspace(0.1, 0.9, codes.nnz, dtype=np.float32)
    ids = [f"größe/{row}.png" for row in range(9)]
    meta = {"model": "m", "model_digest": "0" * 16, "tau": 0.5, "view": "mean", "max_active": 3}
    digests = [f"{row:064}" for row in range(9)]
    write_codes(path, codes, ids, meta, gamma=aligned, sigma=aligned, digests=digests)
    return path


@pytest.mark.timeout(60 * ROUNDS + 60)
def test_a_changed_codes_file_is_read_or_refused(codes_file: Path, seeds: range) -> None:
    whole = read_codes(codes_file)

    def read() -> None:
        found = read_codes(codes_file)
        assert found.codes.shape[0] == len(found.ids)
        assert found.codes.shape == whole.codes.shape
        assert (found.codes != whole.codes).nnz == 0

    found = outcomes(codes_file, read, change_bytes, seeds)
    assert set(found) <= {InputError, None}
    assert found.count(InputError) > len(found) / 2


@pytest.mark.timeout(60 * ROUNDS + 60)
def test_a_changed_list_of_shards_is_read_or_refused(codes_file: Path, seeds: range) -> None:
    folder = codes_file.parent / "shards"
    folder.mkdir()
    shards = []
    for number in range(2):
        shutil.copy(codes_file, folder / f"part-{number:05}.npz")
        shards.append({"file": f"part-{number:05}.npz", "rows": 9, "sha256": None})
    (folder / MANIFEST).write_text(json.dumps({"format": 1, "shards": shards}), encoding="utf-8")
    found = outcomes(folder / MANIFEST, lambda: read_codes(folder), changed_json, seeds)
    assert set(found) <= {InputError, None}
    assert found.count(InputError) > len(found) / 3
