"""Numpy files: rows across files, ids, labels, and what is no array of rows."""

import errno
import os
import zipfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vsc_serve.errors import InputError, SourceUnavailable, UsageError
from vsc_serve.sources import ArraySet, RetryPolicy, holds_arrays, npy, open_arrays
from vsc_serve.sources.arrays import read_rows

ONCE = RetryPolicy(patience_s=0)


def numbers(*shape: int, dtype: Any = np.float32, start: int = 0) -> Any:
    count = int(np.prod(shape))
    return ((np.arange(count) + start) % 251).reshape(shape).astype(dtype)


def save(path: Path, array: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    np.save(path, array)
    return path


def names(arrays: ArraySet) -> list[str]:
    return [source.id for source in arrays.sources()]


def fill(path: Path, content: bytes = b"x") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


# Rows


@pytest.mark.parametrize("dtype", ["<f2", "<f4", "<f8", ">f4", ">f8", ">f2"])
@pytest.mark.parametrize("kind", ["npy", "npz", "deflated", "fortran", "fortran npz"])
def test_rows_come_in_their_own_type_whatever_the_file(dtype, kind, tmp_path):
    expected = numbers(10, 6, dtype=dtype)
    stored = np.asfortranarray(expected) if "fortran" in kind else expected
    path = tmp_path / ("a.npz" if "npz" in kind or kind == "deflated" else "a.npy")
    if path.suffix == ".npy":
        np.save(path, stored)
    else:
        (np.savez_compressed if kind == "deflated" else np.savez)(path, vectors=stored)
    arrays = open_arrays(path)
    assert (arrays.row_count, arrays.row_shape) == (10, (6,))
    assert arrays.dtype == np.dtype(dtype).newbyteorder("=")
    for start, count in ((0, 4), (4, 6), (9, 1), (2, 3), (0, 10), (8, 99), (10, 5)):
        found = arrays.read(start, count)
        assert found.dtype == arrays.dtype
        assert found.flags.c_contiguous
        np.testing.assert_array_equal(found, expected[start : start + count])


@pytest.mark.parametrize("shape", [(5, 8, 8), (5, 8, 8, 1), (5, 8, 8, 3)])
def test_images_have_an_axis_of_channels(shape, tmp_path):
    images = numbers(*shape, dtype=np.uint8)
    arrays = open_arrays(save(tmp_path / "a.npy", images))
    assert arrays.is_images
    assert arrays.row_shape == (8, 8, shape[3] if len(shape) == 4 else 1)
    np.testing.assert_array_equal(arrays.read(1, 3), images.reshape(5, 8, 8, -1)[1:4])


def test_rows_are_read_across_the_ends_of_files(here):
    parts = [numbers(count, 3, start=count) for count in (4, 1, 0, 6)]
    for place, part in enumerate(parts):
        save(here / "emb" / f"{place}.npy", part)
    whole = np.concatenate(parts)
    arrays = open_arrays(["emb"])
    assert arrays.row_count == 11
    for start in range(11):
        for count in (1, 2, 5, 11):
            np.testing.assert_array_equal(
                arrays.read(start, count), whole[start : start + count], strict=True
            )
    assert names(arrays) == [
        *(f"0.npy/{row}" for row in range(4)),
        "1.npy/0",
        *(f"3.npy/{row}" for row in range(6)),
    ]
    assert [source.row for source in arrays.sources()] == list(range(11))
    assert list(arrays.sources())[5].where == "row 0 of emb/3.npy"


def test_memory_holds_the_rows_that_are_read_and_no_more(tmp_path):
    import tracemalloc

    save(tmp_path / "a.npy", np.zeros((200_000, 16), np.float16))
    np.savez_compressed(tmp_path / "a.npz", vectors=np.zeros((200_000, 16), np.float16))
    for name in ("a.npy", "a.npz"):
        tracemalloc.start()
        arrays = open_arrays(tmp_path / name)
        for start in range(0, arrays.row_count, 1_000):
            arrays.read(start, 1_000)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < 5_000_000, name  # the rows are 6.4 MB, and as float32 twice that


def test_few_files_are_open_however_many_there_are(here):
    for place in range(40):
        save(here / "emb" / f"{place:02}.npy", numbers(2, 3))
    arrays = open_arrays("emb")
    arrays.read(0, 80)
    arrays.read(3, 1)
    assert sum(str(here) in name for name in open_files()) <= 2


def open_files() -> Iterator[str]:
    for link in Path("/proc/self/fd").iterdir():
        with suppress(FileNotFoundError):
            yield str(link.readlink())


def test_files_that_are_not_alike_are_named_both(here):
    save(here / "a.npy", numbers(2, 3))
    save(here / "b.npy", numbers(2, 4))
    save(here / "c.npy", numbers(2, 3, dtype=np.float16))
    with pytest.raises(
        InputError,
        match=r"^b\.npy holds rows of float32 \(4,\), and a\.npy of float32 \(3,\): encode them",
    ):
        open_arrays(["a.npy", "b.npy"])
    with pytest.raises(InputError, match=r"^c\.npy .* float16 .* a\.npy of float32"):
        open_arrays(["a.npy", "c.npy"])


# Which files


def test_numpy_files_patterns_and_folders_of_them_hold_arrays(here):
    save(here / "emb" / "in" / "0.npy", numbers(2, 3))
    save(here / "emb" / "1.npy", numbers(2, 3)).rename(here / "emb" / "1.NPY")
    fill(here / "emb" / "notes.txt")
    fill(here / "photos" / "a.jpg")
    save(here / "photos" / "mean.npy", numbers(2, 3))
    for given in ("emb", "emb/1.NPY", "emb/**/*", "emb/**/*.npy", "emb/in/?.npy", "gone.npy"):
        assert holds_arrays(given), given
        assert holds_arrays([Path(given)]), given
    for given in ("photos", "photos/*", "photos/a.jpg", "emb/notes.txt", "-", "gone", "gone/*"):
        assert not holds_arrays([given]), given
    assert holds_arrays("photos", exclude=["*.jpg"])
    assert names(open_arrays("emb/**/*")) == [
        *("emb/1.NPY/0", "emb/1.NPY/1", "emb/in/0.npy/0", "emb/in/0.npy/1")
    ]


def test_a_folder_of_archives_of_images_holds_no_arrays(here):
    save(here / "set" / "mean.npy", numbers(2, 3))
    with zipfile.ZipFile(here / "set" / "a.zip", "w") as archive:
        archive.writestr("notes.txt", b"")
    assert holds_arrays("set")
    with zipfile.ZipFile(here / "set" / "a.zip", "a") as archive:
        archive.writestr("a.png", b"a")
    assert not holds_arrays("set")


def test_a_folder_of_vectors_beside_tables_about_them_holds_arrays(here):
    """What clip-retrieval leaves: img_emb/*.npy, and metadata/*.parquet without images."""
    pa = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    save(here / "out" / "img_emb" / "img_emb_0.npy", numbers(2, 3, dtype=np.float16))
    (here / "out" / "metadata").mkdir()
    parquet.write_table(pa.table({"url": ["a", "b"]}), here / "out" / "metadata" / "0.parquet")
    assert holds_arrays("out")
    assert open_arrays("out").read(0, 9).dtype == np.float16


def test_arrays_and_images_are_not_encoded_together(here):
    save(here / "a.npy", numbers(2, 3))
    fill(here / "b.jpg")
    with pytest.raises(UsageError, match=r"^a\.npy holds arrays and b\.jpg does not: encode them"):
        holds_arrays(["a.npy", "b.jpg"])


def test_other_numpy_files_in_a_folder_are_passed_over_and_a_named_one_is_refused(here):
    save(here / "emb" / "0.npy", numbers(2, 3))
    save(here / "emb" / "labels.npy", np.arange(2))
    np.savez(here / "emb" / "codes.npz", indices=np.arange(2), data=np.ones(2, np.float32))
    passed: dict[str, str] = {}
    assert open_arrays("emb", on_skip=passed.__setitem__).row_count == 2
    assert passed == dict.fromkeys(["codes.npz", "labels.npy"], "without rows of images or vectors")
    with pytest.raises(InputError, match=r"codes\.npz: expected uint8 .*; found indices int64 \(2"):
        open_arrays("emb/codes.npz")


def test_nothing_to_encode_is_said(here):
    save(here / "empty.npy", numbers(0, 3))
    save(here / "emb" / "labels.npy", np.arange(2))
    with pytest.raises(
        UsageError, match=r"^empty\.npy: no rows found\. Looked for \.npy and \.npz"
    ):
        open_arrays("empty.npy")
    with pytest.raises(UsageError, match=r"Passed over: 1 without rows of images or vectors\.$"):
        open_arrays("emb")
    with pytest.raises(UsageError, match=r"^gone\.npy: no such file or folder"):
        open_arrays("gone.npy")


def test_an_npz_is_known_by_its_content(here):
    np.savez(here / "a.npz", vectors=numbers(2, 3))
    (here / "a.npz").rename(here / "a.npy")
    np.testing.assert_array_equal(open_arrays("a.npy").read(0, 2), numbers(2, 3))


# Ids


def with_ids(path: Path, ids: Any, **more: Any) -> ArraySet:
    np.savez_compressed(path, vectors=numbers(len(ids), 3), ids=ids, **more)
    return open_arrays(path)


def test_a_single_file_has_numbers_for_ids(here):
    save(here / "a.npy", numbers(3, 2))
    assert names(open_arrays("a.npy")) == ["0", "1", "2"]
    assert names(open_arrays(["./a.npy"])) == ["0", "1", "2"]
    assert names(open_arrays("a.npy", ids="absolute")) == [
        f"{here}/a.npy/{row}" for row in range(3)
    ]
    assert names(open_arrays("a.npy", ids="name")) == ["0", "1", "2"]
    save(here / "b.npy", numbers(1, 2))
    assert names(open_arrays(["b.npy", "a.npy"]))[:2] == ["b.npy/0", "a.npy/0"]
    with pytest.raises(UsageError, match=r"the id '0': row 0 of a\.npy and row 0 of b\.npy"):
        names(open_arrays(["a.npy", "b.npy"], ids="name"))


@pytest.mark.parametrize(
    ("ids", "expected"),
    [
        (np.array(["pic0", "größe", "漢字"]), ["pic0", "größe", "漢字"]),
        (np.array([b"pic0", "größe".encode(), b"\xff\xfe"]), ["pic0", "größe", "0xfffe"]),
        (np.array([7, 2**62, -1]), ["7", str(2**62), "-1"]),
        (np.array([7, 2**63, 0], np.uint64), ["7", str(2**63), "0"]),
        (np.array([7.0, 8.0, 0.5]), ["7", "8", "0.5"]),
        (np.array(["a", "b", "c"]).astype(">U1"), ["a", "b", "c"]),
    ],
)
def test_ids_of_the_file_are_text_as_it_is(ids, expected, tmp_path):
    assert names(with_ids(tmp_path / "a.npz", ids)) == expected


def test_an_id_that_is_empty_or_nan_gives_way_to_the_file_and_the_number(tmp_path):
    assert names(with_ids(tmp_path / "a.npz", np.array(["x", "", "y", ""]))) == [
        *("x", "a.npz/1", "y", "a.npz/3")
    ]
    assert names(with_ids(tmp_path / "a.npz", np.array([1.0, np.nan]))) == ["1", "a.npz/1"]


def test_ids_that_are_there_twice_are_refused_with_both_rows(here):
    arrays = with_ids(here / "a.npz", np.array(["a", "b", "a"]))
    with pytest.raises(UsageError, match=r"the id 'a': row 0 of .*a\.npz and row 2 of .*a\.npz"):
        names(arrays)
    with_ids(here / "b.npz", np.array(["c", "b"]))
    with_ids(here / "a.npz", np.array(["a", "b"]))
    with pytest.raises(UsageError, match=r"the id 'b': row 1 of a\.npz and row 1 of b\.npz"):
        names(open_arrays(["a.npz", "b.npz"]))


def test_ids_and_labels_that_do_not_go_with_the_rows_are_refused(tmp_path):
    path = tmp_path / "a.npz"
    for what, wrong in (("ids", np.arange(4)), ("labels", np.zeros((3, 1)))):
        np.savez(path, vectors=numbers(3, 2), **{what: wrong})
        with pytest.raises(InputError, match=rf"3 rows but {what} of shape"):
            open_arrays(path)
        np.savez(path, vectors=numbers(3, 2), **{what: np.zeros(3, complex)})
        with pytest.raises(InputError, match=rf"{what} of type complex128; store text or whole"):
            open_arrays(path)
        np.savez(path, vectors=numbers(3, 2), **{what: np.array([1, None, "x"], object)})
        with pytest.raises(InputError, match=rf"{what} of type object; store text or whole"):
            open_arrays(path)


def test_an_array_of_objects_that_nobody_needs_is_no_fault(tmp_path):
    path = tmp_path / "a.npz"
    np.savez(path, vectors=numbers(3, 2), notes=np.array([{"a": 1}], object))
    assert open_arrays(path).row_count == 3


# Labels


def test_labels_are_classes_and_text_is_numbered_in_sorted_order(here):
    labels = np.array(["dog", "cat", "dog"])
    arrays = with_ids(here / "a.npz", np.arange(3), labels=labels)
    assert arrays.labels is not None
    assert arrays.labels.tolist() == [1, 0, 1]
    assert arrays.labels.dtype == np.int64
    assert arrays.label_names == ("cat", "dog")
    rows = read_rows(here / "a.npz")
    assert rows.labels is not None
    assert rows.labels.tolist() == [1, 0, 1]
    with_ids(here / "b.npz", np.arange(3, 5), labels=np.array([b"ant", b"dog"]))
    both = open_arrays(["a.npz", "b.npz"])
    assert both.labels is not None
    assert both.labels.tolist() == [2, 1, 2, 0, 2]
    assert both.label_names == ("ant", "cat", "dog")


@pytest.mark.parametrize("dtype", [np.uint8, np.int32, np.float64, np.bool_, ">i4"])
def test_labels_that_are_numbers_stay(dtype, tmp_path):
    arrays = with_ids(tmp_path / "a.npz", np.arange(3), labels=np.array([1, 0, 1]).astype(dtype))
    assert arrays.labels is not None
    assert arrays.labels.tolist() == [1, 0, 1]
    assert arrays.label_names is None


def test_a_label_that_is_no_class_is_named_by_its_row(tmp_path):
    for wrong in (0.5, np.nan, np.inf):
        with pytest.raises(InputError, match=r"a\.npz: the label of row 1 is .*, no whole") as it:
            with_ids(tmp_path / "a.npz", np.arange(3), labels=np.array([1, wrong, 2]))
        assert it.value.row == 1


def test_labels_that_one_file_has_and_another_has_not_are_none(here):
    with_ids(here / "a.npz", np.arange(2), labels=np.arange(2))
    with_ids(here / "b.npz", np.arange(2, 4))
    assert open_arrays(["a.npz", "b.npz"]).labels is None
    with_ids(here / "b.npz", np.arange(2, 4), labels=np.array(["x", "y"]))
    with pytest.raises(InputError, match=r"^a\.npz: labels are text in some files"):
        open_arrays(["a.npz", "b.npz"])


# Damage, and places that go away


def test_a_file_that_is_longer_or_shorter_than_its_header_says_is_refused(tmp_path):
    path = save(tmp_path / "a.npy", numbers(10, 3))
    whole = path.read_bytes()
    path.write_bytes(whole[:-5])
    with pytest.raises(InputError, match=r"a\.npy: cut off: 243 bytes where its header makes 248$"):
        open_arrays(path)
    path.write_bytes(whole + whole)  # np.save twice into one file
    with pytest.raises(InputError, match=r"a\.npy: longer than its header says: 496 bytes") as it:
        open_arrays(path)
    assert it.value.kind == "broken"


def test_damage_in_an_npz_is_found_before_the_first_row(tmp_path):
    path = tmp_path / "a.npz"
    np.savez(path, vectors=numbers(1_000, 3))
    whole = bytearray(path.read_bytes())
    whole[6_000] ^= 1
    path.write_bytes(whole)
    with pytest.raises(InputError, match=r"vectors\.npy is damaged: its checksum differs"):
        open_arrays(path)


def test_two_arrays_of_one_name_are_refused(tmp_path):
    path = tmp_path / "a.npz"
    np.savez(path, vectors=numbers(2, 3))
    with zipfile.ZipFile(path) as archive:
        content = archive.read("vectors.npy")
    with zipfile.ZipFile(path, "a") as archive, pytest.warns(UserWarning, match="Duplicate"):
        archive.writestr("vectors.npy", content)
    with pytest.raises(InputError, match="two arrays are called vectors"):
        open_arrays(path)


def test_a_file_that_cannot_be_reached_is_tried_again(tmp_path, monkeypatch):
    path = save(tmp_path / "a.npy", numbers(10, 3))
    waits: list[float] = []
    arrays = open_arrays(path, retry=RetryPolicy(wait=waits.append))
    real, left = os.read, [3]

    def fail(*arguments: Any) -> bytes:
        left[0] -= 1
        if left[0] >= 0:
            raise OSError(errno.ESTALE, "Stale file handle")
        return real(*arguments)

    monkeypatch.setattr(os, "read", fail)
    np.testing.assert_array_equal(arrays.read(2, 5), numbers(10, 3)[2:7])
    assert len(waits) == 3
    left[0] = 99
    arrays = open_arrays_after(path, left)
    with pytest.raises(SourceUnavailable, match=r"a\.npy: cannot be reached now: Stale"):
        arrays.read(0, 1)


def open_arrays_after(path: Path, left: list[int]) -> ArraySet:
    left[0] = 0
    arrays = open_arrays(path, retry=ONCE)
    left[0] = 99
    return arrays


def test_a_file_that_changes_while_it_is_encoded_stops_the_run(here):
    save(here / "a.npy", numbers(10, 3))
    save(here / "b.npy", numbers(10, 3))
    arrays = open_arrays(["a.npy", "b.npy"], retry=ONCE)
    arrays.read(0, 10)
    save(here / "b.npy", numbers(11, 3))
    with pytest.raises(SourceUnavailable, match=r"b\.npy: was replaced while it was read"):
        arrays.read(10, 10)


def test_the_signature_changes_with_any_file(here):
    save(here / "a.npy", numbers(3, 3))
    save(here / "b.npy", numbers(3, 3))
    before = open_arrays(["a.npy", "b.npy"]).signature()
    assert open_arrays(["a.npy", "b.npy"]).signature() == before
    assert open_arrays(["b.npy", "a.npy"]).signature() != before
    assert open_arrays(["a.npy"]).signature() != before
    status = Path("b.npy").stat()
    os.utime("b.npy", ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    assert open_arrays(["a.npy", "b.npy"]).signature() != before


def test_arrays_behind_a_url_are_read_in_place():
    fsspec = pytest.importorskip("fsspec")
    from io import BytesIO

    system = fsspec.filesystem("memory")
    for name, start in (("0.npy", 0), ("1.npy", 9)):
        buffer = BytesIO()
        np.save(buffer, numbers(3, 3, start=start))
        system.pipe(f"/emb/{name}", buffer.getvalue())
    assert holds_arrays("memory://emb")
    arrays = open_arrays("memory://emb")
    np.testing.assert_array_equal(arrays.read(2, 2), numbers(18).reshape(6, 3)[2:4])
    assert names(arrays)[3] == "1.npy/0"
    system.rm("/emb", recursive=True)


# All rows at once


def test_all_rows_of_a_file_are_mapped_where_the_byte_order_is_that_of_the_machine(tmp_path):
    for dtype in ("<f2", "<f4", "<f8", ">f4"):
        path = save(tmp_path / "a.npy", numbers(10, 3, dtype=dtype))
        rows, ids, labels = read_rows(path)
        assert rows.dtype == np.dtype(dtype).newbyteorder("=")
        assert isinstance(rows.base, np.memmap) == (dtype != ">f4")
        np.testing.assert_array_equal(rows, numbers(10, 3))
        assert (ids[-1], labels) == ("9", None)
    rows, _, _ = read_rows(save(tmp_path / "b.npy", numbers(4, 8, 8, dtype=np.uint8)))
    assert rows.shape == (4, 8, 8, 1)


def test_a_header_is_read_by_its_version(tmp_path):
    with (tmp_path / "a.npy").open("wb") as file:
        np.lib.format.write_array(file, numbers(3, 2), version=(2, 0))
    assert open_arrays(tmp_path / "a.npy").row_count == 3
    with (tmp_path / "a.npy").open("wb") as file:
        np.lib.format.write_array(file, np.zeros(3, [("é", "f4")]), version=(3, 0))
    with pytest.raises(InputError, match=r"a\.npy: not readable as numpy data"):
        open_arrays(tmp_path / "a.npy")
    assert npy._LARGEST_HEADER > 10_000
