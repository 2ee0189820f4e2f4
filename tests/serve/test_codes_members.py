"""Optional members of `codes.npz`, folders of shards, and joining files."""

import hashlib
import io
import json
import os
import struct
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import scipy.sparse
from hypothesis import given, settings
from hypothesis import strategies as st

from vsc_serve import codes as codes_module
from vsc_serve.codes import (
    CodeFile,
    CodeRows,
    codes_to_bytes,
    dense_to_csr,
    is_shard_folder,
    join_codes,
    list_shards,
    read_codes,
    stack_rows,
    write_codes,
)
from vsc_serve.errors import InputError

META = {"model": "fake", "model_digest": "ab12", "tau": 0.5, "view": "mean"}
ARCHIVE = Path(__file__).parents[1] / "data" / "archive"
PLAIN_SHA256 = "3fa8fe9c93a81563253c7bc87e97c498b904632475d2494ad88c0279cab810cf"
"""Of the members of a small file, as they were when format 1 was new."""
IDS = ["a.png", "größe/漢\n.png", "c", ""]


def some_codes(rows: int = 4, latent_dim: int = 5, seed: int = 0) -> codes_module.Codes:
    """Rows of which the second is empty and the last one has its last latent on."""
    rng = np.random.default_rng(seed)
    dense = rng.normal(size=(rows, latent_dim)).astype(np.float32)
    dense[rng.random(dense.shape) < 0.6] = 0
    dense[1:2] = 0
    dense[-1:, -1] = 7
    return dense_to_csr(dense)


def aligned(codes: codes_module.Codes, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).random(codes.nnz, np.float32)


def write_shards(
    folder: Path, sizes: list[int], *, with_all: bool = False, digest: bool = True
) -> CodeFile:
    """Write shards of these sizes and return what they hold together."""
    codes = some_codes(sum(sizes))
    ids = [f"{'ü' * (row % 7)}{row}" for row in range(sum(sizes))]
    gamma, sigma = (aligned(codes, 1), aligned(codes, 2)) if with_all else (None, None)
    digests = [f"d{'0' * (row % 3)}{row}" for row in range(sum(sizes))] if with_all else None
    folder.mkdir()
    entries, start = [], 0
    for number, size in enumerate(sizes):
        rows = slice(start, start + size)
        cut = slice(*codes.indptr[[start, start + size]])
        path = folder / f"part-{number}.npz"
        write_codes(
            path,
            codes[rows],
            ids[rows],
            META,
            gamma=None if gamma is None else gamma[cut],
            sigma=None if sigma is None else sigma[cut],
            digests=None if digests is None else digests[rows],
        )
        entry = {"file": path.name, "rows": size}
        found = hashlib.sha256(path.read_bytes()).hexdigest()
        entries.append(entry | ({"sha256": found} if digest else {}))
        start += size
    text = json.dumps({"format": 1, "shards": entries, "meta": META})
    (folder / "manifest.json").write_text(text, encoding="utf-8")
    return CodeFile(codes, ids, {"format": 1} | META, gamma, sigma, digests)


def assert_equal(found: CodeFile, expected: CodeFile) -> None:
    for name in ("data", "indices", "indptr"):
        np.testing.assert_array_equal(getattr(found.codes, name), getattr(expected.codes, name))
    assert found.codes.shape == expected.codes.shape
    assert found[1:3] == expected[1:3]
    np.testing.assert_array_equal(found.gamma, expected.gamma)
    np.testing.assert_array_equal(found.sigma, expected.sigma)
    assert found.digests == expected.digests


# Optional members


@pytest.mark.parametrize("compress", [False, True])
@pytest.mark.parametrize("names", [(), ("gamma",), ("gamma", "sigma", "digests")])
def test_optional_members_are_written_and_read_back(tmp_path, names, compress):
    codes = some_codes()
    values = {"gamma": aligned(codes, 1), "sigma": aligned(codes, 2), "digests": list("wxyz")}
    given = {name: values[name] for name in names}
    write_codes(tmp_path / "codes.npz", codes, IDS, META, **given, compress=compress)
    found = read_codes(tmp_path / "codes.npz")
    assert_equal(found, CodeFile(codes, IDS, {"format": 1} | META, **given))
    assert scipy.sparse.load_npz(tmp_path / "codes.npz").nnz == codes.nnz


def test_the_plain_file_has_the_bytes_it_always_had():
    codes = dense_to_csr(np.array([[0, 0.5, 0], [0, 0, 0], [0, -2, 1.25]], np.float32))
    content = codes_to_bytes(codes, ["a.png", "größe/漢.png", "c"], META)
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        stored = b"".join(archive.read(name) for name in archive.namelist())
        names = archive.namelist()
    order = ["indices", "indptr", "format", "shape", "data", "meta", "ids"]
    assert names == [f"{name}.npy" for name in order]
    assert hashlib.sha256(stored).hexdigest() == PLAIN_SHA256


def test_compressed_numbers_are_smaller_and_the_same_each_time(tmp_path):
    codes = dense_to_csr(np.eye(4000, 50, dtype=np.float32))
    ids = [str(row) for row in range(4000)]
    for name, compress in (("plain", False), ("small", True), ("again", True)):
        write_codes(tmp_path / name, codes, ids, META, gamma=codes.data, compress=compress)
    assert (tmp_path / "small").read_bytes() == (tmp_path / "again").read_bytes()
    assert 2 * (tmp_path / "small").stat().st_size < (tmp_path / "plain").stat().st_size
    with zipfile.ZipFile(tmp_path / "small") as archive:
        kinds = {entry.filename: entry.compress_type for entry in archive.infolist()}
        assert {entry.date_time for entry in archive.infolist()} == {(1980, 1, 1, 0, 0, 0)}
    numbers = {"data.npy", "indices.npy", "indptr.npy", "gamma.npy"}
    assert {name for name in numbers if kinds[name] == zipfile.ZIP_DEFLATED} == numbers
    with zipfile.ZipFile(tmp_path / "small") as archive:
        fast = zlib.compressobj(1, zlib.DEFLATED, -zlib.MAX_WBITS)
        content = archive.read("indices.npy")
        assert archive.getinfo("indices.npy").compress_size == len(
            fast.compress(content) + fast.flush()
        )


def test_members_that_do_not_go_with_the_codes_are_not_written(tmp_path):
    codes = some_codes()
    with pytest.raises(ValueError, match=f"2 values of gamma for {codes.nnz} entries"):
        write_codes(tmp_path / "c.npz", codes, IDS, META, gamma=np.ones(2, np.float32))
    with pytest.raises(ValueError, match="1 digests for 4 rows"):
        write_codes(tmp_path / "c.npz", codes, IDS, META, digests=["a"])
    with_zero = codes.copy()
    with_zero.data[0] = 0  # not kept, so that what is aligned would shift
    with pytest.raises(ValueError, match="values of sigma"):
        write_codes(tmp_path / "c.npz", with_zero, IDS, META, sigma=aligned(codes))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gamma": np.ones(2, np.float32)}, "damaged .gamma does not go with data"),
        ({"sigma": np.ones(4, np.float64)}, "damaged .sigma does not go with data"),
        ({"digests": np.array(["a"])}, "damaged .1 digests for 2 rows"),
        ({"indices": np.array([3, 0, 1, 2])}, "damaged .gamma does not go with data"),
    ],
)
def test_members_that_do_not_go_with_the_codes_are_not_read(tmp_path, change, message):
    arrays = {
        "data": np.array([1, 2, 3, 4], np.float32),
        "indices": np.array([0, 1, 2, 3]),
        "indptr": np.array([0, 4, 4]),
        "shape": np.array([2, 4]),
        "gamma": np.ones(4, np.float32),
    }
    np.savez(tmp_path / "whole.npz", **arrays)
    assert read_codes(tmp_path / "whole.npz").gamma.tolist() == [1, 1, 1, 1]
    np.savez(tmp_path / "codes.npz", **arrays | change)
    with pytest.raises(InputError, match=f"codes.npz: {message}"):
        read_codes(tmp_path / "codes.npz")


# Archive: files that are read for ever


def archived_facts() -> dict:
    return json.loads((ARCHIVE / "codes-v1-all-members.json").read_text(encoding="utf-8"))


def test_an_archived_file_with_every_member_is_read():
    found, facts = read_codes(ARCHIVE / "codes-v1-all-members.npz"), archived_facts()
    assert found.codes.toarray().tolist() == facts["codes"]
    assert found.gamma.tolist() == facts["gamma"]
    assert found.sigma.tolist() == facts["sigma"]
    assert (found.ids, found.meta, found.digests) == (
        facts["ids"],
        facts["meta"],
        facts["digests"],
    )


def test_an_archived_folder_of_shards_is_read():
    found, facts = read_codes(ARCHIVE / "codes-v1-shards"), archived_facts()
    assert found.codes.toarray().tolist() == facts["codes"]
    assert (found.ids, found.meta) == (facts["ids"], facts["meta"])


# Rows


def test_rows_are_stacked_with_all_that_belongs_to_them():
    codes = [some_codes(rows, seed=rows) for rows in (3, 1, 2)]
    parts = [CodeRows(codes=part, gamma=aligned(part)) for part in codes]
    stacked = stack_rows(parts, 5)
    expected = np.concatenate([part.toarray() for part in codes])
    np.testing.assert_array_equal(stacked.codes.toarray(), expected)
    np.testing.assert_array_equal(stacked.gamma, np.concatenate([part.gamma for part in parts]))
    assert stacked.sigma is None
    assert stack_rows([], 5).codes.shape == (0, 5)
    with pytest.raises(ValueError, match="1 of 2 parts have gamma: all or none must"):
        stack_rows([parts[0], CodeRows(codes=codes[1])], 5)


# Shards


@pytest.mark.parametrize("with_all", [False, True])
def test_a_folder_of_shards_is_read_as_one_file(tmp_path, with_all):
    expected = write_shards(tmp_path / "codes", [3, 0, 5, 1], with_all=with_all)
    assert is_shard_folder(tmp_path / "codes")
    assert_equal(read_codes(tmp_path / "codes"), expected)
    assert [shard.rows for shard in list_shards(tmp_path / "codes")] == [3, 0, 5, 1]


def test_shards_that_changed_or_do_not_belong_together_are_refused(tmp_path):
    folder = tmp_path / "codes"
    write_shards(folder, [3, 2])
    codes = some_codes(2, seed=9)
    write_codes(folder / "part-1.npz", codes, ["a", "b"], META)
    with pytest.raises(InputError, match=r"part-1.npz: changed since it was written \(sha256 "):
        read_codes(folder)
    listed = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    for entry in listed["shards"]:
        del entry["sha256"]
    (folder / "manifest.json").write_text(json.dumps(listed), encoding="utf-8")
    assert read_codes(folder).ids[-1] == "b"
    for meta, shape, message in (
        (META | {"tau": 0.7}, 5, "tau is 0.5 in the first and 0.7 in another"),
        (META | {"model_digest": "x"}, 5, "model_digest is ab12 in the first and x"),
        (META | {"max_active": 3}, 5, "max_active is None in the first and 3"),
        (META, 6, "latents is 5 in the first and 6"),
    ):
        write_codes(folder / "part-1.npz", some_codes(2, shape), ["a", "b"], meta)
        with pytest.raises(InputError, match=f"codes: shards of two kinds: {message}"):
            read_codes(folder)
    write_codes(folder / "part-1.npz", codes, ["a", "b"], META, gamma=codes.data)
    with pytest.raises(InputError, match="codes: 1 of 2 parts have gamma"):
        read_codes(folder)
    write_codes(folder / "part-1.npz", codes, ["a", "b"], META, digests=["a", "b"])
    with pytest.raises(InputError, match="codes: 1 of 2 parts have digests"):
        read_codes(folder)
    write_codes(folder / "part-1.npz", codes[:1], ["a"], META)
    with pytest.raises(InputError, match=r"part-1.npz: 1 rows, but manifest.json says 2\. Delete"):
        read_codes(folder)
    (folder / "part-1.npz").unlink()
    with pytest.raises(InputError, match=r"part-1.npz: no such file"):
        read_codes(folder)


@pytest.mark.timeout(30)
@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("pipe.npz", "not a regular file"),
        ("out.npz", "leads out of the folder"),
        ("zero.npz", "leads out of the folder"),
        ("a\0.npz", "not a relative name"),
        ("in/part-00000.npz", "no name of a file in this folder"),
        ("x" * 300, "File name too long"),
    ],
)
def test_a_list_names_only_plain_files_in_its_folder(tmp_path, name, reason):
    folder = tmp_path / "codes"
    write_shards(folder, [3])
    (folder / "part-0.npz").rename(tmp_path / "secret.npz")
    os.mkfifo(folder / "pipe.npz")
    (folder / "out.npz").symlink_to("../secret.npz")
    (folder / "zero.npz").symlink_to("/dev/zero")
    shards = {"format": 1, "shards": [{"file": name, "rows": 3}]}
    (folder / "manifest.json").write_text(json.dumps(shards), encoding="utf-8")
    with pytest.raises(InputError, match=reason):
        read_codes(folder)


def test_shards_of_a_hub_cache_are_read(tmp_path):
    snapshot = tmp_path / "datasets--a--b" / "snapshots" / "rev"
    blobs = tmp_path / "datasets--a--b" / "blobs"
    blobs.mkdir(parents=True)
    snapshot.parent.mkdir()
    whole = write_shards(snapshot, [3, 2])
    for path in list(snapshot.iterdir()):
        path.rename(blobs / path.name)
        path.symlink_to(f"../../blobs/{path.name}")
    assert read_codes(snapshot).ids == whole.ids


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "damaged"),
        ("[]", "damaged"),
        ('{"format": 1, "name": "model"}', r"lists no shards of codes .no 'shards'.\. Is it a mod"),
        ('{"format": 2, "shards": []}', "format 2, but this vsc-serve reads up to 1"),
        ('{"format": 1, "shards": []}', "lists no shard. Encode again"),
        ('{"format": 1, "shards": [{"file": "a.npz"}]}', "damaged .rows is missing"),
        ('{"format": 1, "shards": [{"file": "../a.npz", "rows": 1}]}', "no name of a file in this"),
        ('{"format": 1, "shards": [7]}', "damaged"),
    ],
)
def test_a_damaged_list_of_shards_says_so(tmp_path, text, message):
    (tmp_path / "manifest.json").write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match=f"manifest.json: .*{message}"):
        read_codes(tmp_path)


def test_a_bundle_is_no_folder_of_shards(tmp_path):
    assert not is_shard_folder(tmp_path)
    (tmp_path / "manifest.json").write_text('{"format": 1, "name": "model"}', encoding="utf-8")
    assert not is_shard_folder(tmp_path)


# Joining


@given(
    st.lists(st.integers(0, 40), min_size=1, max_size=5), st.booleans(), st.booleans(), st.data()
)
@settings(max_examples=15, deadline=None)
def test_joined_files_have_the_bytes_of_the_stacked_rows(
    tmp_path_factory, sizes, with_all, compress, data
):
    folder = tmp_path_factory.mktemp("join")
    whole = write_shards(folder / "codes", sizes, with_all=with_all)
    parts = [shard.path for shard in list_shards(folder / "codes")]
    meta = {"model": data.draw(st.text(max_size=5))}
    join_codes(parts, folder / "joined.npz", meta, compress=compress)
    extras = {"gamma": whole.gamma, "sigma": whole.sigma, "digests": whole.digests}
    write_codes(folder / "w.npz", whole.codes, whole.ids, meta, **extras, compress=compress)
    assert (folder / "joined.npz").read_bytes() == (folder / "w.npz").read_bytes()


@pytest.mark.parametrize("compress", [False, True])
def test_large_parts_join_to_the_bytes_of_the_stacked_rows(tmp_path, compress, monkeypatch):
    monkeypatch.setattr("vsc_serve.codes.npz._TEXT_BLOCK", 1000)
    whole = write_shards(tmp_path / "codes", [9999, 4001, 7])
    parts = [shard.path for shard in list_shards(tmp_path / "codes")]
    join_codes(parts, tmp_path / "joined.npz", META, compress=compress)
    write_codes(tmp_path / "whole.npz", whole.codes, whole.ids, META, compress=compress)
    assert (tmp_path / "joined.npz").read_bytes() == (tmp_path / "whole.npz").read_bytes()


def test_more_entries_than_32_bits_count_are_joined_with_64_bit_indices(tmp_path, monkeypatch):
    whole = write_shards(tmp_path / "codes", [3, 2, 4])
    monkeypatch.setattr("vsc_serve.codes.rows._INT32_MAX", whole.codes.nnz - 1)
    parts = [shard.path for shard in list_shards(tmp_path / "codes")]
    assert read_codes(parts[0]).codes.indices.dtype == np.int32
    join_codes(parts, tmp_path / "joined.npz", META)
    write_codes(tmp_path / "whole.npz", whole.codes, whole.ids, META)
    assert (tmp_path / "joined.npz").read_bytes() == (tmp_path / "whole.npz").read_bytes()
    found = read_codes(tmp_path / "joined.npz").codes
    assert found.indices.dtype == found.indptr.dtype == np.int64
    np.testing.assert_array_equal(found.toarray(), whole.codes.toarray())


def test_members_past_the_32_bit_sizes_of_zip_are_read_back(tmp_path, monkeypatch):
    monkeypatch.setattr("vsc_serve.codes.npz._ZIP64_BYTES", 1)
    codes = some_codes()
    write_codes(tmp_path / "codes.npz", codes, IDS, META, compress=True)
    assert read_codes(tmp_path / "codes.npz").ids == IDS
    content = (tmp_path / "codes.npz").read_bytes()
    with zipfile.ZipFile(tmp_path / "codes.npz") as archive:
        for entry in archive.infolist():
            name_length, extra_length = struct.unpack_from("<HH", content, entry.header_offset + 26)
            extra = content[entry.header_offset + 30 + name_length :][:extra_length]
            assert struct.unpack_from("<HHQ", extra) == (1, 16, entry.file_size)  # APPNOTE 4.5.3


def test_a_matrix_that_plain_scipy_wrote_is_joined_as_codes(tmp_path):
    messy = scipy.sparse.csr_array(
        (np.array([3.0, 0.0, 1.0, 2.0]), np.array([2, 1, 0, 2]), np.array([0, 3, 4])), shape=(2, 3)
    )
    scipy.sparse.save_npz(tmp_path / "plain.npz", messy)
    join_codes([tmp_path / "plain.npz"] * 2, tmp_path / "joined.npz", META)
    found = read_codes(tmp_path / "joined.npz")
    np.testing.assert_array_equal(found.codes.toarray(), np.tile(messy.toarray(), (2, 1)))
    assert found.ids == ["0", "1", "0", "1"]


def test_files_of_two_kinds_are_not_joined(tmp_path):
    codes = some_codes()
    write_codes(tmp_path / "a.npz", codes, IDS, META)
    for change, message in (
        ({"gamma": codes.data}, r"has optional members \['gamma'\], but .*a.npz has \[\]"),
        ({"digests": IDS}, r"has texts \['digests', 'ids'\]"),
    ):
        write_codes(tmp_path / "b.npz", codes, IDS, META, **change)
        with pytest.raises(InputError, match=f"b.npz: {message}"):
            join_codes([tmp_path / "a.npz", tmp_path / "b.npz"], tmp_path / "out.npz", META)
    write_codes(tmp_path / "b.npz", some_codes(latent_dim=6), IDS, META)
    with pytest.raises(InputError, match=r"b.npz: has latents 6, but .*a.npz has 5"):
        join_codes([tmp_path / "a.npz", tmp_path / "b.npz"], tmp_path / "out.npz", META)
    assert not (tmp_path / "out.npz").exists()


def test_a_join_that_cannot_be_written_leaves_the_old_file(tmp_path):
    write_codes(tmp_path / "a.npz", some_codes(), IDS, META)
    (tmp_path / "out.npz").write_bytes(b"old")
    with pytest.raises(InputError, match=r"gone.npz: no such file"):
        join_codes([tmp_path / "a.npz", tmp_path / "gone.npz"], tmp_path / "out.npz", META)
    assert (tmp_path / "out.npz").read_bytes() == b"old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.npz", "out.npz"]
