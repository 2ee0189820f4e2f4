"""Sparse codes in memory and in `codes.npz`."""

import io
import json
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import scipy.sparse
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from vsc_serve.codes import (
    FORMAT,
    canonical,
    codes_to_bytes,
    dense_to_csr,
    read_codes,
    stack_codes,
    threshold,
    threshold_logit,
    write_codes,
)
from vsc_serve.errors import InputError, UsageError

META = {"model": "fake", "tau": 0.5}


def dense_codes(latent_dims: tuple[int, int] = (1, 9)) -> st.SearchStrategy[np.ndarray]:
    """Mostly zeros, as codes are; any shape, empty rows and empty matrices among them."""
    values = st.floats(-1e6, 1e6, width=32).filter(lambda value: value != 0)
    return hnp.arrays(
        np.float32,
        st.tuples(st.integers(0, 6), st.integers(*latent_dims)),
        elements=st.one_of(st.just(0.0), st.just(-0.0), values),
    )


@pytest.fixture
def codes():
    """Three rows: one with two latents on, an empty one, and one with only the last latent on."""
    dense = np.zeros((3, 5), np.float32)
    dense[0, [1, 3]] = [0.5, -2.0]
    dense[2, 4] = 1.25
    return dense_to_csr(dense)


@pytest.fixture
def code_path(tmp_path: Path, codes) -> Path:
    path = tmp_path / "codes.npz"
    write_codes(path, codes, ["a.png", "größe/漢.png", "c"], META)
    return path


def arrays_of(path: Path) -> dict[str, np.ndarray]:
    with np.load(path, allow_pickle=False) as stored:
        return {name: stored[name] for name in stored.files}


# Threshold


def logits() -> st.SearchStrategy[np.ndarray]:
    return hnp.arrays(np.float32, (3, 4), elements=st.floats(-30, 30, width=32))


@given(logits(), st.floats(0.01, 0.99))
def test_threshold_keeps_mu_exactly_where_the_spike_is_on(spike_logit, tau):
    mu = np.abs(spike_logit) + np.float32(1)
    found = threshold(spike_logit, mu, tau)
    on = spike_logit > np.float32(np.log(tau / (1 - tau)))
    near = np.abs(spike_logit - np.log(tau / (1 - tau))) < 1e-6  # where log rounds another way
    np.testing.assert_array_equal(found[on & ~near], mu[on & ~near])
    assert not found[~on & ~near].any()


@pytest.mark.parametrize("tau", [0.1, 0.5, 0.9])
def test_a_logit_that_equals_the_threshold_is_off(tau):
    limit = threshold_logit(tau)
    spike_logit = np.array([[limit, np.nextafter(limit, np.float32(np.inf))]], np.float32)
    assert threshold(spike_logit, np.ones((1, 2), np.float32), tau).tolist() == [[0.0, 1.0]]


def test_thresholding_leaves_neither_minus_zero_nor_nan_where_a_latent_is_off():
    found = threshold(np.full((1, 2), -1, np.float32), np.array([[-3, np.nan]], np.float32), 0.5)
    assert found.tobytes() == np.zeros((1, 2), np.float32).tobytes()


def test_the_threshold_is_computed_in_double_precision_and_rounded_once():
    assert threshold_logit(0.5) == 0.0
    for tau in (1e-6, 0.3, 0.7, 1 - 1e-6):
        assert threshold_logit(tau).dtype == np.float32
        assert threshold_logit(tau) == np.float32(np.log(tau / (1 - tau)))


@pytest.mark.parametrize("tau", [0.0, 1.0, -0.1, 7.0, float("nan")])
def test_a_tau_outside_zero_to_one_is_refused(tau):
    with pytest.raises(UsageError, match=f"tau must be above 0 and below 1, not {tau}"):
        threshold_logit(tau)


# CSR


@given(dense_codes())
def test_compaction_equals_scipys(dense):
    found, expected = dense_to_csr(dense), scipy.sparse.csr_array(dense)
    for name in ("data", "indices", "indptr"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name))
    assert found.shape == dense.shape
    assert found.dtype == np.float32
    assert found.indices.dtype == found.indptr.dtype == np.int32
    assert found.has_canonical_format
    assert found.data.all()


def test_compaction_takes_rows_that_do_not_lie_side_by_side():
    dense = np.arange(24, dtype=np.float32).reshape(4, 6)
    for view in (dense[::2], dense[:, ::3], np.asfortranarray(dense), dense.T):
        np.testing.assert_array_equal(dense_to_csr(view).toarray(), view)


@given(st.lists(dense_codes(latent_dims=(4, 4)), max_size=4))
def test_stacking_puts_rows_below_one_another(parts):
    stacked = stack_codes([dense_to_csr(part) for part in parts], 4)
    expected = np.concatenate([np.empty((0, 4), np.float32), *parts])
    np.testing.assert_array_equal(stacked.toarray(), expected)
    assert stacked.shape == expected.shape
    assert stacked.indices.dtype == np.int32


def test_more_entries_than_32_bits_count_get_64_bit_indices(monkeypatch, tmp_path):
    dense = np.eye(4, dtype=np.float32)
    monkeypatch.setattr("vsc_serve.codes.rows._INT32_MAX", 4)
    assert dense_to_csr(dense).indptr.dtype == np.int32
    monkeypatch.setattr("vsc_serve.codes.rows._INT32_MAX", 3)
    wide = dense_to_csr(dense)
    assert wide.indices.dtype == wide.indptr.dtype == np.int64
    stacked = stack_codes([wide, wide], 4)
    assert stacked.indptr.dtype == np.int64
    write_codes(tmp_path / "codes.npz", stacked, list("abcdefgh"), META)
    found = read_codes(tmp_path / "codes.npz").codes
    assert found.indices.dtype == np.int64
    np.testing.assert_array_equal(found.toarray(), np.tile(dense, (2, 1)))


def test_a_matrix_from_anywhere_becomes_codes():
    for dtype in (np.float32, np.float64):
        parts = (np.array([3, 0, 1, 2], dtype), np.array([2, 1, 0, 2]), np.array([0, 3, 4]))
        messy = scipy.sparse.csr_array(parts, shape=(2, 3))  # unsorted, with a stored zero
        tidy = canonical(messy)
        assert tidy.dtype == np.float32
        assert tidy.indices.tolist() == [0, 2, 2]
        assert tidy.data.tolist() == [1.0, 3.0, 2.0]
        assert messy.indices.tolist() == [2, 1, 0, 2]  # the caller's is untouched
    assert np.shares_memory(canonical(tidy).data, tidy.data)
    with pytest.raises(ValueError, match="complex128, not real numbers"):
        canonical(messy.astype(np.complex128))


# File


@given(
    dense_codes(),
    st.text(st.characters(exclude_characters="\0", exclude_categories=()), max_size=12),
    st.dictionaries(st.text(), st.integers() | st.text() | st.booleans()),
)
@settings(deadline=None)
def test_what_is_written_is_read_back(tmp_path_factory, dense, name, meta):
    path = tmp_path_factory.mktemp("round") / "codes.npz"
    ids = [f"{name}{row}" for row in range(len(dense))]
    meta = {key: value for key, value in meta.items() if key != "format"}
    write_codes(path, dense_to_csr(dense), ids, meta)
    found = read_codes(path)
    np.testing.assert_array_equal(found.codes.toarray(), dense)
    assert found.codes.shape == dense.shape
    assert found.ids == ids
    assert found.meta == {"format": FORMAT} | meta


def test_plain_scipy_and_numpy_open_the_file_where_vsc_serve_is_not_installed(code_path):
    script = (
        "import sys, numpy, scipy.sparse\n"
        "codes = scipy.sparse.load_npz(sys.argv[1])\n"
        "ids = numpy.load(sys.argv[1], allow_pickle=False)['ids']\n"
        "assert not [name for name in sys.modules if name.startswith('vsc')]\n"
        "print(codes.format, codes.dtype, codes.indices.dtype, *codes.shape, codes.sum(), len(ids))"
    )
    command = [sys.executable, "-I", "-c", script, str(code_path)]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=120)
    assert done.stdout.split() == ["csr", "float32", "int32", "3", "5", "-0.25", "3"]
    assert arrays_of(code_path)["ids"].tolist() == ["a.png", "größe/漢.png", "c"]


def test_the_file_says_what_the_format_promises(code_path):
    stored = arrays_of(code_path)
    assert stored.keys() == {"format", "shape", "data", "indices", "indptr", "ids", "meta"}
    assert json.loads(stored["meta"].item()) == {"format": 1, "model": "fake", "tau": 0.5}
    with zipfile.ZipFile(code_path) as archive:
        assert {entry.date_time for entry in archive.infolist()} == {(1980, 1, 1, 0, 0, 0)}
        compression = {entry.filename: entry.compress_type for entry in archive.infolist()}
    assert compression.pop("ids.npy") == zipfile.ZIP_DEFLATED
    assert set(compression.values()) == {zipfile.ZIP_STORED}


def test_the_same_codes_give_the_same_bytes(codes, code_path, monkeypatch):
    monkeypatch.setattr("time.time", lambda: 2e9)
    reordered = dict(reversed(META.items()))
    wide = codes.copy()
    wide.indices, wide.indptr = wide.indices.astype(np.int64), wide.indptr.astype(np.int64)
    for same in (codes, codes.astype(np.float64), wide):
        content = codes_to_bytes(same, ["a.png", "größe/漢.png", "c"], reordered)
        assert content == code_path.read_bytes()


def test_rows_and_ids_must_go_together(codes, code_path, tmp_path):
    with pytest.raises(ValueError, match="2 ids for 3 rows"):
        write_codes(tmp_path / "never.npz", codes, ["a", "b"], META)
    assert not (tmp_path / "never.npz").exists()
    np.savez(tmp_path / "two.npz", **arrays_of(code_path) | {"ids": np.array(["a", "b"])})
    with pytest.raises(InputError, match=r"two.npz: damaged \(2 ids for 3 rows\)\. Encode again"):
        read_codes(tmp_path / "two.npz")


def test_a_matrix_that_plain_scipy_wrote_gets_row_numbers_as_ids(tmp_path):
    matrix = scipy.sparse.csr_matrix(np.array([[0, 2], [3, 0]], np.int64))
    scipy.sparse.save_npz(tmp_path / "plain.npz", matrix)
    found = read_codes(tmp_path / "plain.npz")
    assert found.ids == ["0", "1"]
    assert found.meta == {}
    assert found.codes.dtype == np.float32
    np.testing.assert_array_equal(found.codes.toarray(), [[0, 2], [3, 0]])


def test_files_that_are_no_codes_say_so_and_what_to_do(tmp_path, codes):
    cases = {
        "text.npz": (b"hello", "not a readable npz file"),
        "empty.npz": (b"", "not a readable npz file"),
        "cut.npz": (codes_to_bytes(codes, list("abc"), META)[:400], "not a readable npz file"),
    }
    buffer = io.BytesIO()
    np.save(buffer, np.eye(2))
    cases["array.npy"] = (buffer.getvalue(), "not a readable npz file")
    buffer = io.BytesIO()
    np.savez(buffer, images=np.eye(2))
    cases["images.npz"] = (buffer.getvalue(), "not a CSR matrix .missing: data, indices, indptr,")
    buffer = io.BytesIO()
    scipy.sparse.save_npz(buffer, codes.tocsc())
    cases["csc.npz"] = (buffer.getvalue(), "not a CSR matrix .missing: format csr.")
    for name, (content, message) in cases.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError, match=f"{name}: {message}"):
            read_codes(tmp_path / name)
    with pytest.raises(InputError, match=r"gone.npz: no such file\. Make it with `vsc encode"):
        read_codes(tmp_path / "gone.npz")
    with pytest.raises(InputError, match=r"a folder without manifest.json, so no shards"):
        read_codes(tmp_path)


def test_ids_that_do_not_inflate_are_refused(code_path):
    content = bytearray(code_path.read_bytes())
    start = content.index(b"ids.npy") + len("ids.npy") + 20  # behind the 64-bit sizes
    content[start : start + 8] = b"\xff" * 8
    code_path.write_bytes(content)
    with pytest.raises(InputError, match=r"not a readable npz file \(Error -3 while decompressing"):
        read_codes(code_path)


def test_a_newer_format_is_refused_with_both_numbers(tmp_path, codes):
    write_codes(tmp_path / "new.npz", codes, list("abc"), {"format": FORMAT + 1})
    with pytest.raises(InputError, match=r"codes format 2, but this vsc-serve reads up to 1\. Up"):
        read_codes(tmp_path / "new.npz")


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("indices", np.array([1, 9, 4], np.int32), r"damaged \(.*< ?5"),
        ("indptr", np.array([0, 2, 1, 3], np.int32), "damaged .*non-decreasing"),
        ("indptr", np.array([0, 2], np.int32), "damaged"),
        ("data", np.array(["x", "y", "z"]), "damaged .*not real numbers"),
        ("data", np.ones(2, np.float32), "damaged"),
        ("shape", np.array([3, 5, 7]), "damaged"),
        ("shape", np.array("wide"), "damaged"),
        ("format", np.array(["csr", "csr"]), "not a CSR matrix"),
        ("meta", np.array("{"), "damaged meta"),
        ("meta", np.array("[]"), "damaged meta"),
        ("meta", np.array('{"format": "new"}'), "damaged meta"),
    ],
)
def test_parts_that_do_not_fit_together_are_refused(code_path, tmp_path, name, value, message):
    np.savez(tmp_path / "bad.npz", **arrays_of(code_path) | {name: value})
    with pytest.raises(InputError, match=f"bad.npz: {message}"):
        read_codes(tmp_path / "bad.npz")


@given(st.data())
@settings(
    max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_a_damaged_file_is_read_or_refused_and_nothing_else(code_path, data):
    content = bytearray(code_path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
    damaged = code_path.with_name("damaged.npz")
    damaged.write_bytes(content)
    try:
        found = read_codes(damaged)
    except InputError:
        return
    assert len(found.ids) == found.codes.shape[0]


def test_paths_may_be_text(tmp_path):
    codes = dense_to_csr(np.array([[0.0, 1.5]], np.float32))
    write_codes(str(tmp_path / "codes.npz"), codes, ["a"], {})
    assert read_codes(str(tmp_path / "codes.npz")).codes.toarray().tolist() == [[0.0, 1.5]]
