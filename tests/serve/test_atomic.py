"""Files and folders appear whole, or not at all."""

import errno
import os
import stat
import sys
from pathlib import Path

import pytest

from vsc_serve import atomic
from vsc_serve.atomic import atomic_file, atomic_folder, name_beside
from vsc_serve.errors import InputError, UsageError
from vsc_serve.outputs import FolderKind, write_marker

KIND = FolderKind(name="a folder of the test", contents=lambda stored: ("*",))


def disk_full(*_args, **_options):
    raise OSError(errno.ENOSPC, "No space left on device")


def write_file(path: Path, content: bytes, failure: BaseException | None = None) -> None:
    with atomic_file(path) as file:
        file.write(content)
        if failure:
            raise failure


def write_folder(path: Path, name: str, failure: BaseException | None = None) -> None:
    with atomic_folder(path, KIND) as folder:
        write_marker(folder, "test")
        (folder / name).write_bytes(b"content")
        assert not (path / name).exists()
        if failure:
            raise failure


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name != ".vsc-serve.json")


def test_a_file_appears_when_the_block_ends_and_not_before(tmp_path):
    path = tmp_path / "new" / "folder" / "codes.npz"
    with atomic_file(path) as file:
        file.write(b"whole")
        assert not path.exists()
    assert path.read_bytes() == b"whole"
    assert names(path.parent) == ["codes.npz"]


def test_a_file_that_was_there_is_replaced_only_by_a_whole_one(tmp_path):
    path = tmp_path / "codes.npz"
    path.write_bytes(b"old")
    with pytest.raises(RuntimeError):
        write_file(path, b"half", RuntimeError())
    assert path.read_bytes() == b"old"
    write_file(path, b"new")
    assert path.read_bytes() == b"new"
    assert names(tmp_path) == ["codes.npz"]


@pytest.mark.parametrize("failure", [RuntimeError(), KeyboardInterrupt(), OSError("odd")])
def test_a_failure_leaves_nothing_behind(tmp_path, failure):
    with pytest.raises((RuntimeError, KeyboardInterrupt, InputError)):
        write_file(tmp_path / "codes.npz", b"half", failure)
    with pytest.raises((RuntimeError, KeyboardInterrupt, InputError)):
        write_folder(tmp_path / "model", "half", failure)
    assert names(tmp_path) == []


def test_a_full_disk_is_named_and_leaves_nothing_behind(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", disk_full)
    with pytest.raises(InputError, match=r"codes.npz: cannot be written \(No space left on dev"):
        write_file(tmp_path / "codes.npz", b"x" * 1000)
    monkeypatch.setattr(Path, "write_bytes", disk_full)
    with pytest.raises(InputError, match=r"model: cannot be written \(No space left on device\)"):
        write_folder(tmp_path / "model", "encoder.onnx")
    assert names(tmp_path) == []


def test_an_os_error_without_a_number_keeps_its_text(tmp_path):
    with pytest.raises(InputError, match=r"cannot be written \(the reason\)"):
        write_file(tmp_path / "codes.npz", b"", OSError("the reason"))


def test_a_place_where_nothing_can_be_written_is_named(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    (tmp_path / "folder").mkdir()
    with pytest.raises(InputError, match=r"file/codes.npz: cannot be written \("):
        write_file(tmp_path / "file" / "codes.npz", b"")
    with pytest.raises(InputError, match=r"file/model: cannot be written \("):
        write_folder(tmp_path / "file" / "model", "new")
    with pytest.raises(InputError, match=r"folder: cannot be written \(Is a directory\)"):
        write_file(tmp_path / "folder", b"")
    assert names(tmp_path) == ["file", "folder"]


@pytest.mark.parametrize("name", ["codes.npz", "ü" * 120 + ".npz"])
def test_any_name_that_the_file_system_takes_can_be_written(tmp_path, name):
    write_file(tmp_path / name, b"x")
    assert names(tmp_path) == [name]


def test_new_files_and_folders_get_the_permissions_that_the_user_chose(tmp_path):
    before = os.umask(0o027)
    try:
        write_file(tmp_path / "codes.npz", b"")
        write_folder(tmp_path / "model", "new")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "codes.npz").stat().st_mode) == 0o640
    assert stat.S_IMODE((tmp_path / "model").stat().st_mode) == 0o750


def test_a_folder_replaces_one_of_its_kind_and_nothing_else(tmp_path):
    for name in ("first", "second"):
        write_folder(tmp_path / "model", name)
        assert names(tmp_path / "model") == [name]
    (tmp_path / "file").write_bytes(b"precious")
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.jpg").write_bytes(b"precious")
    for name in ("file", "photos"):
        with pytest.raises(UsageError, match=f"{name}: .*not a folder of the test.*not replaced"):
            write_folder(tmp_path / name, "new")
    assert (tmp_path / "file").read_bytes() == b"precious"
    assert names(tmp_path / "photos") == ["a.jpg"]
    assert names(tmp_path) == ["file", "model", "photos"]


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux exchanges two names")
def test_a_folder_is_replaced_in_one_step(tmp_path, monkeypatch):
    path = tmp_path / "model"
    write_folder(path, "old")
    seen = []
    rename = Path.rename

    def note(self, target):
        seen.append(path.exists())
        assert target != path
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", note)
    write_folder(path, "new")
    assert seen == [True]
    assert names(path) == ["new"]
    assert names(tmp_path) == ["model"]


def test_where_names_cannot_be_exchanged_a_folder_is_replaced_in_two_steps(tmp_path, monkeypatch):
    monkeypatch.setattr(atomic, "_exchange", lambda one, other: False)
    for name in ("old", "new"):
        write_folder(tmp_path / "model", name)
        assert names(tmp_path / "model") == [name]
    assert names(tmp_path) == ["model"]


def test_a_folder_that_cannot_be_renamed_into_place_leaves_the_old_one(tmp_path, monkeypatch):
    path = tmp_path / "model"
    write_folder(path, "old")
    monkeypatch.setattr(atomic, "_exchange", lambda one, other: False)
    rename = Path.rename

    def fail_for_the_new_one(self, target):
        if target == path and not self.name.endswith(".old"):
            disk_full()
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail_for_the_new_one)
    with pytest.raises(InputError, match="No space left"):
        write_folder(path, "new")
    assert names(tmp_path) == ["model"]
    assert names(path) == ["old"]


def test_a_link_is_followed_and_stays(tmp_path):
    (tmp_path / "target").mkdir()
    (tmp_path / "model").symlink_to("target")
    write_folder(tmp_path / "model", "new")
    (tmp_path / "codes.npz").symlink_to("elsewhere.npz")
    write_file(tmp_path / "codes.npz", b"new")
    assert (tmp_path / "model").is_symlink()
    assert names(tmp_path / "target") == ["new"]
    assert (tmp_path / "codes.npz").is_symlink()
    assert (tmp_path / "elsewhere.npz").read_bytes() == b"new"
    assert names(tmp_path) == ["codes.npz", "elsewhere.npz", "model", "target"]


def test_a_pipe_or_a_device_is_never_replaced(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path("/dev/null")):
        with pytest.raises(InputError, match=r"cannot be written \(a device or a pipe"):
            write_file(path, b"x")
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)
    assert stat.S_ISCHR(Path("/dev/null").stat().st_mode)


def test_a_path_without_a_name_cannot_be_written(tmp_path):
    with pytest.raises(UsageError, match="no name for an output"):
        write_folder(Path("/"), "new")


@pytest.mark.parametrize("letter", ["x", "\N{DUCK}"])
def test_a_name_made_from_another_is_no_longer_than_the_other_may_be(tmp_path, letter):
    longest = letter * (255 // len(letter.encode()))
    made = name_beside(tmp_path / longest, ".", ".0123456789ab.tmp")
    made.write_bytes(b"")
    assert made != name_beside(tmp_path / (longest[:-1] + "y"), ".", ".0123456789ab.tmp")
