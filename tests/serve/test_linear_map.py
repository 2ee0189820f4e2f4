"""The linear map of a bundle: projections, lengths and refitted values against dense algebra."""

import io
import json
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vsc_serve import linear_map as module
from vsc_serve.bundle import LINEAR_MAP, MANIFEST, Bundle, open_bundle, sha256
from vsc_serve.codes import dense_to_csr
from vsc_serve.errors import BundleError, InputError
from vsc_serve.linear_map import LinearMap, read_linear_map, write_linear_map

LATENTS, DIMENSIONS = 12, 30


def random_map(seed: int = 0, *, latents: int = LATENTS, dimensions: int = DIMENSIONS) -> LinearMap:
    rng = np.random.default_rng(seed)
    shapes = ((latents, dimensions), (dimensions,), (dimensions,))
    return LinearMap(*(rng.normal(size=shape).astype(np.float32) for shape in shapes))


def random_codes(rows: int, seed: int = 1, *, latents: int = LATENTS) -> np.ndarray:
    """Dense codes of 0 to many active latents; the first row is empty."""
    rng = np.random.default_rng(seed)
    is_on = rng.random((rows, latents)) < rng.random((rows, 1))
    is_on[0] = False
    return np.where(is_on, rng.normal(size=(rows, latents)), 0).astype(np.float32)


def test_a_projection_scores_every_code_by_the_cosine_of_query_and_decoded_row() -> None:
    found, dense = random_map(), random_codes(9)
    rows = np.random.default_rng(2).normal(size=(4, DIMENSIONS)).astype(np.float32)
    u, c = found.project(rows)
    decoded = dense.astype(float) @ found.weights + found.bias
    moved = rows.astype(float) - found.center
    lengths = np.linalg.norm(moved, axis=1)[:, None] * np.linalg.norm(decoded, axis=1)
    scores = (u @ dense.T + c[:, None]) / found.norms(dense_to_csr(dense))
    np.testing.assert_allclose(scores, moved @ decoded.T / lengths, atol=1e-6)


def test_a_query_at_the_center_is_like_nothing() -> None:
    found = random_map()
    u, c = found.project(found.center[None])
    assert not u.any()
    assert not c.any()


def test_lengths_are_the_same_in_any_number_of_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    found, codes = random_map(), dense_to_csr(random_codes(50))
    whole = found.norms(codes)
    monkeypatch.setattr(module, "_BLOCK_VALUES", 7 * DIMENSIONS)
    np.testing.assert_array_equal(found.norms(codes), whole)
    np.testing.assert_allclose(whole[0], np.linalg.norm(found.bias), rtol=1e-6)
    assert found.norms(codes[:0]).shape == (0,)


@given(st.integers(0, 10_000))
@settings(max_examples=25, deadline=None)
def test_refitted_values_are_those_of_least_squares_on_the_support(seed: int) -> None:
    found, dense = random_map(seed), random_codes(20, seed)
    rows = np.random.default_rng(seed + 1).normal(size=(20, DIMENSIONS)).astype(np.float32)
    refitted = found.refit(dense_to_csr(dense), rows).toarray()
    np.testing.assert_array_equal(refitted != 0, dense != 0)
    goal = rows.astype(float) - found.center - found.bias
    for row, is_on in enumerate(dense != 0):
        weights = found.weights[is_on].astype(float)
        expected = np.linalg.lstsq(weights.T, goal[row], rcond=None)[0]
        np.testing.assert_allclose(refitted[row, is_on], expected, rtol=1e-4, atol=1e-5)
        left = goal[row] - refitted[row, is_on] @ weights
        np.testing.assert_allclose(weights @ left, 0, atol=1e-4)


def test_a_refitted_row_is_the_same_whatever_is_beside_it(monkeypatch: pytest.MonkeyPatch) -> None:
    found, codes = random_map(), dense_to_csr(random_codes(60))
    rows = np.random.default_rng(2).normal(size=(60, DIMENSIONS)).astype(np.float32)
    together = found.refit(codes, rows)
    alone = [found.refit(codes[[row]], rows[[row]]).data for row in range(60)]
    assert np.concatenate(alone).tobytes() == together.data.tobytes()
    monkeypatch.setattr(module, "_BLOCK_VALUES", 5 * DIMENSIONS)
    assert found.refit(codes, rows).data.tobytes() == together.data.tobytes()


def test_weights_that_depend_on_one_another_share_the_value() -> None:
    whole = random_map()
    twin = LinearMap(whole.weights[[0, 0, 1]], whole.bias, whole.center)
    code = dense_to_csr(np.ones((1, 3), np.float32))
    row = (3 * whole.weights[0] - 2 * whole.weights[1] + whole.bias + whole.center)[None]
    np.testing.assert_allclose(twin.refit(code, row).data, [1.5, 1.5, -2.0], rtol=1e-3)


def test_more_active_latents_than_dimensions_are_fitted() -> None:
    found = random_map(latents=9, dimensions=3)
    row = np.array([[5.0, -2.0, 1.0]], np.float32)
    refitted = found.refit(dense_to_csr(np.ones((1, 9), np.float32)), row)
    drawn = refitted.toarray() @ found.weights + found.bias + found.center
    np.testing.assert_allclose(drawn, row, atol=1e-3)
    assert np.abs(refitted.data).max() < 100


def test_a_value_that_comes_out_as_nothing_keeps_its_latent() -> None:
    whole = random_map()
    weights = whole.weights.copy()
    weights[3] = 0
    found = LinearMap(weights, whole.bias, whole.center)
    refitted = found.refit(
        dense_to_csr(np.ones((1, LATENTS), np.float32)), np.ones((1, DIMENSIONS))
    )
    assert refitted.nnz == LATENTS
    assert refitted.data[3] == np.finfo(np.float32).tiny
    alone = found.refit(
        dense_to_csr(np.eye(LATENTS, dtype=np.float32)[[3]]), np.ones((1, DIMENSIONS))
    )
    assert alone.data.tolist() == [np.finfo(np.float32).tiny]


def test_empty_codes_are_refitted_to_empty_codes() -> None:
    codes = dense_to_csr(np.zeros((3, LATENTS), np.float32))
    refitted = random_map().refit(codes, np.ones((3, DIMENSIONS), np.float32))
    assert refitted.shape == (3, LATENTS)
    assert refitted.nnz == 0


def test_codes_of_another_width_are_refused() -> None:
    codes = dense_to_csr(np.ones((1, 5), np.float32))
    for use in (random_map().norms, lambda codes: random_map().refit(codes, np.ones((1, 30)))):
        with pytest.raises(InputError, match="codes have 5 latents, the linear map has 12"):
            use(codes)


def add_map(bundle: Path, content: bytes) -> Bundle:
    """Put a file into a bundle as its linear map, with the digest that it has."""
    (bundle / LINEAR_MAP).write_bytes(content)
    stored = json.loads((bundle / MANIFEST).read_text(encoding="utf-8"))
    stored["files"][LINEAR_MAP] = sha256(bundle / LINEAR_MAP)
    (bundle / MANIFEST).write_text(json.dumps(stored), encoding="utf-8")
    return open_bundle(bundle)


def map_bytes(**changes: np.ndarray | None) -> bytes:
    """A map for `tiny_bundle`, 6 latents of 4x4 grey images, with some arrays changed."""
    arrays = vars(random_map(latents=6, dimensions=16)) | changes
    buffer = io.BytesIO()
    np.savez(buffer, **{name: array for name, array in arrays.items() if array is not None})
    return buffer.getvalue()


def test_a_map_survives_its_file(tiny_bundle: Path, tmp_path: Path) -> None:
    written = random_map(latents=6, dimensions=16)
    write_linear_map(tmp_path / "one", written)
    write_linear_map(tmp_path / "two", written)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    before = open_bundle(tiny_bundle).manifest.digest
    bundle = add_map(tiny_bundle, (tmp_path / "one").read_bytes())
    found = read_linear_map(bundle)
    for name, array in vars(written).items():
        np.testing.assert_array_equal(getattr(found, name), array)
    assert bundle.manifest.digest == before, "codes of the bundle stay the same"


def test_a_bundle_without_a_map_says_so(tiny_bundle: Path) -> None:
    (tiny_bundle / LINEAR_MAP).write_bytes(map_bytes())  # not in the manifest, so not looked at
    with pytest.raises(BundleError, match=r"no linear_map\.npz, which a second stage and refitted"):
        read_linear_map(open_bundle(tiny_bundle))


def inflated() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("weights.npy", bytes(2**24))
    return buffer.getvalue()


def with_header(shape: tuple[int, ...]) -> bytes:
    """An array that says it is larger than it is."""
    member = io.BytesIO()
    header = {"descr": "<f4", "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(member, header)
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("weights.npy", member.getvalue() + bytes(64))
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (lambda: b"no zip", "File is not a zip file"),
        (lambda: map_bytes(bias=None), "There is no item named 'bias.npy'"),
        (lambda: map_bytes(weights=np.zeros((6, 15), np.float32)), r"weights is float32 of shape"),
        (lambda: map_bytes(weights=np.zeros((5, 16), np.float32)), r"weights is float32 of shape"),
        (lambda: map_bytes(center=np.zeros(16)), r"center is float64 of shape \(16,\), but the"),
        (lambda: map_bytes(bias=np.full(16, np.nan, np.float32)), "values that are not finite"),
        (lambda: map_bytes(bias=np.full(16, np.inf, np.float32)), "values that are not finite"),
        (lambda: map_bytes(center=np.array([{}] * 16)), "allow_pickle=False"),
        (lambda: map_bytes(weights=np.zeros(4096, np.float32)), "weights is larger than"),
        (inflated, "weights is larger than the manifest says"),
        (lambda: with_header((2**40, 16)), "."),
        (lambda: map_bytes()[:-30], "File is not a zip file"),
    ],
)
def test_a_damaged_map_is_one_line(
    tiny_bundle: Path, content: Callable[[], bytes], reason: str
) -> None:
    bundle = add_map(tiny_bundle, content())
    with pytest.raises(BundleError, match=rf"linear_map\.npz: damaged \(.*{reason}") as caught:
        read_linear_map(bundle)
    assert "\n" not in str(caught.value)


def test_a_map_that_changed_since_the_export_is_refused(tiny_bundle: Path) -> None:
    add_map(tiny_bundle, map_bytes())
    content = bytearray((tiny_bundle / LINEAR_MAP).read_bytes())
    content[len(content) // 2] ^= 1
    (tiny_bundle / LINEAR_MAP).write_bytes(content)
    with pytest.raises(BundleError, match=r"linear_map\.npz: changed since it was exported"):
        open_bundle(tiny_bundle)


def test_a_map_that_would_take_too_much_memory_is_not_read(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = add_map(tiny_bundle, map_bytes())
    monkeypatch.setattr(module, "MAX_BYTES", 400)
    with pytest.raises(BundleError, match="512 bytes, and up to 400 are read"):
        read_linear_map(bundle)
