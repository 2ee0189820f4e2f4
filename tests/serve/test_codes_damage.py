"""A codes file that is damaged, or made by a stranger, is refused in one line or read as it is."""

import json
import os
import zipfile
from pathlib import Path

import numpy as np
import pytest

from vsc_serve.codes import codes_to_bytes, dense_to_csr, join_codes, read_codes, write_codes
from vsc_serve.errors import InputError

META = {"model": "fake", "model_digest": "ab12", "tau": 0.5, "view": "mean"}
CODES = dense_to_csr(np.array([[0, 1.5, 0], [-2, 0, 3]], np.float32))
IDS = ["größe/a.png", "b.png"]


def arrays(**changes: object) -> dict[str, object]:
    """The members of a small codes file, some of them others."""
    members: dict[str, object] = {
        "format": b"csr",
        "shape": np.array([2, 3]),
        "data": np.array([1.5, -2, 3], np.float32),
        "indices": np.array([1, 0, 2], np.int32),
        "indptr": np.array([0, 1, 3], np.int32),
        "ids": np.array(IDS),
        "meta": json.dumps({"format": 1} | META),
    }
    return {name: value for name, value in (members | changes).items() if value is not None}


@pytest.mark.parametrize("compress", [False, True])
def test_any_changed_byte_is_found_or_changes_nothing(tmp_path: Path, compress: bool) -> None:
    path = tmp_path / "codes.npz"
    write_codes(path, CODES, IDS, META, digests=["d", "e"], compress=compress)
    whole, right = path.read_bytes(), read_codes(path)
    refused = 0
    for place in range(len(whole)):
        changed = bytearray(whole)
        changed[place] ^= (0x55, 0xFF, 1)[place % 3]
        path.write_bytes(changed)
        try:
            found = read_codes(path)
        except InputError as error:
            assert "\n" not in str(error).replace(str(path), "")  # noqa: PT017
            refused += 1
            continue
        assert (found.codes != right.codes).nnz == 0
        assert found.meta in (right.meta, {})
        assert found.ids in (right.ids, ["0", "1"])  # a member under another name is not there
    assert refused > 0.7 * len(whole)


def test_a_member_that_is_longer_than_its_array_is_damage(tmp_path: Path) -> None:
    """One digit of a shape in a header hides rows, and no checksum was compared."""
    write_codes(tmp_path / "whole.npz", CODES, IDS, META)
    with (
        zipfile.ZipFile(tmp_path / "whole.npz") as whole,
        zipfile.ZipFile(tmp_path / "codes.npz", "w") as archive,
    ):
        for name in whole.namelist():
            content = whole.read(name)
            if name == "ids.npy":
                content = content.replace(b"(2,)", b"(1,)")
            archive.writestr(name, content)
    with pytest.raises(InputError, match=r"not a readable npz file \(ids is longer than its arr"):
        read_codes(tmp_path / "codes.npz")


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_a_member_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    (tmp_path / "codes.npz").write_bytes(codes_to_bytes(CODES, IDS, META))
    with zipfile.ZipFile(tmp_path / "codes.npz", "a") as archive:
        archive.writestr("ids.npy", archive.read("ids.npy"))
    with pytest.raises(InputError, match="a member is there twice"):
        read_codes(tmp_path / "codes.npz")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"shape": np.array([2, 2**40])}, "up to 16,777,216 columns are read"),
        ({"shape": np.array([-2, 3])}, r"shape \(-2, 3\)"),
        ({"shape": np.array([2.0, 3.0])}, "shape must be a list of integers"),
        ({"shape": np.array([[2, 3]])}, "shape must be a list of integers"),
        ({"shape": np.array([2, 3, 4])}, "damaged"),
        ({"indices": np.array([1.0, 0.0, 2.0])}, "indices must be a list of integers"),
        ({"indices": np.array([1, 0, 3])}, "indices must be < 3"),
        ({"indptr": np.array([0, 3, 1])}, "damaged"),
        ({"indptr": np.array(["0", "1", "3"])}, "indptr must be a list of integers"),
        ({"data": np.array(["a", "b", "c"])}, "not real numbers"),
        ({"data": np.array([1j, 2, 3])}, "not real numbers"),
        ({"ids": np.array([[1, 2]])}, r"ids are int64 of shape \(1, 2\)"),
        ({"ids": np.array([0.5, 1.5])}, "ids are float64"),
        ({"ids": np.frombuffer(b"\xff\xff\xff\x7f" * 2, "<U1")}, "no letter"),
        ({"meta": np.frombuffer(b"\xff\xff\xff\x7f", "<U1")[0:1]}, "damaged meta"),
        ({"meta": "{}"}, "damaged meta"),
        ({"meta": "[" * 100_000}, "nested too deep"),
        ({"meta": '{"format": 1, "tau": NaN}'}, "NaN is no number"),
        ({"meta": '{"format": 1, "tau": "0.5"}'}, "tau must be a number"),
        ({"meta": '{"format": 1, "max_active": [3]}'}, "max_active must be an integer"),
        ({"meta": '{"format": 1, "model": 7}'}, "model must be text"),
        ({"meta": '{"format": true}'}, "format must be an integer"),
        ({"meta": np.array([1, 2])}, "damaged meta"),
    ],
)
def test_what_is_no_codes_file_says_why(tmp_path: Path, changes: dict, reason: str) -> None:
    np.savez(tmp_path / "codes.npz", **arrays(**changes))
    with pytest.raises(InputError, match=rf"codes.npz: .*{reason}.*Encode again"):
        read_codes(tmp_path / "codes.npz")


def test_ids_may_be_bytes_or_numbers(tmp_path: Path) -> None:
    path = tmp_path / "codes.npz"
    for ids, expected in (
        (np.array([name.encode() for name in IDS]), IDS),
        (np.array([b"\xff", b"b"]), ["\udcff", "b"]),
        (np.array([7, 12]), ["7", "12"]),
    ):
        np.savez(path, **arrays(ids=ids))
        assert read_codes(path).ids == expected
        join_codes([path, path], tmp_path / "joined.npz", META)
        assert read_codes(tmp_path / "joined.npz").ids == expected * 2


def test_values_too_large_for_float32_are_infinite_without_a_warning(tmp_path: Path) -> None:
    np.savez(tmp_path / "codes.npz", **arrays(data=np.array([1e300, -2, 3])))
    assert read_codes(tmp_path / "codes.npz").codes.data[0] == np.inf


@pytest.mark.timeout(30)
def test_a_pipe_or_device_is_never_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.npz")
    for path in (tmp_path / "pipe.npz", Path("/dev/zero")):
        with pytest.raises(InputError, match=r"not a readable npz file \(not a regular file"):
            read_codes(path)


def test_a_name_that_is_too_long_is_an_error_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="File name too long"):
        read_codes(tmp_path / ("n" * 300))
