"""What may be written where, and what is never replaced."""

import json
import os
import zipfile
from pathlib import Path

import pytest

from vsc_serve.errors import InputError, UsageError
from vsc_serve.outputs import PNG, FolderKind, check_output, marked, remove_folder, write_marker

KIND = marked("a folder of drawings", "drawings", "*.png")
ELSE = marked("a folder of words", "words", "*.txt")


@pytest.fixture
def ours(tmp_path: Path) -> Path:
    folder = tmp_path / "ours"
    (folder / "deep").mkdir(parents=True)
    write_marker(folder, "drawings")
    (folder / "deep" / "a.png").write_bytes(b"x")
    return folder


def test_what_is_not_there_may_be_written(tmp_path: Path) -> None:
    assert check_output(tmp_path / "new", KIND, force=False) == tmp_path / "new"
    assert check_output(tmp_path / "far" / "new.png", PNG, force=False).name == "new.png"
    assert not list(tmp_path.iterdir())


def test_what_is_there_needs_force(ours: Path, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n...")
    with pytest.raises(UsageError, match=r"ours: exists already.*`force=True`"):
        check_output(ours, KIND, force=False)
    with pytest.raises(UsageError, match=r"a\.png: exists already.*`force=True`"):
        check_output(tmp_path / "a.png", PNG, force=False)
    check_output(ours, KIND, force=True)
    check_output(tmp_path / "a.png", PNG, force=True)


def test_an_empty_folder_or_file_loses_nothing(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty.png").touch()
    check_output(tmp_path / "empty", KIND, force=False)
    check_output(tmp_path / "empty.png", PNG, force=True)


def test_another_folder_is_refused_also_with_force(ours: Path, tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    (photos / "a.jpg").write_bytes(b"precious")
    with pytest.raises(UsageError, match=r"photos: not a folder of drawings that vsc wrote"):
        check_output(photos, KIND, force=True)
    with pytest.raises(UsageError, match=r"ours: not a folder of words that vsc wrote"):
        check_output(ours, ELSE, force=True)
    with pytest.raises(UsageError, match=r"a\.jpg: a file, not a folder of drawings"):
        check_output(photos / "a.jpg", KIND, force=True)
    with pytest.raises(UsageError, match=r"ours: a folder, not a PNG image.*nothing was deleted"):
        check_output(ours, PNG, force=True)
    with pytest.raises(UsageError, match=r"a\.jpg: not a PNG image"):
        check_output(photos / "a.jpg", PNG, force=True)


def test_a_folder_of_ours_with_somebody_elses_file_is_refused(ours: Path) -> None:
    (ours / "deep" / "notes.txt").write_text("precious")
    (ours / "deep" / "more.txt").write_text("precious")
    with pytest.raises(UsageError, match=r"also holds 'deep/more\.txt' and 1 more"):
        check_output(ours, KIND, force=True)
    with pytest.raises(UsageError, match="not removed"):
        remove_folder(ours, KIND)
    assert (ours / "deep" / "notes.txt").read_text() == "precious"


def test_a_link_inside_a_folder_of_ours_is_somebody_elses_file(ours: Path, tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (ours / "linked").symlink_to(tmp_path / "photos")
    with pytest.raises(UsageError, match="also holds 'linked'"):
        check_output(ours, KIND, force=True)


def test_what_an_interrupted_write_and_a_lock_leave_does_not_count(ours: Path) -> None:
    (ours / ".a.png.0123456789ab.tmp").touch()
    (ours / ".model.0123456789ab.old").mkdir()
    (ours / ".model.0123456789ab.old" / "part").touch()
    (ours / ".codes.npz.lock").touch()
    check_output(ours, KIND, force=True)


@pytest.mark.parametrize("content", ["", "{", "[1]", "7", '{"kind": 3}', "[" * 100_000])
def test_a_damaged_marker_makes_no_folder_ours(ours: Path, content: str) -> None:
    (ours / ".vsc-serve.json").write_text(content)
    with pytest.raises(UsageError, match="not a folder of drawings"):
        check_output(ours, KIND, force=True)


def test_an_output_never_replaces_its_input(ours: Path, tmp_path: Path) -> None:
    image = ours / "deep" / "a.png"
    link = tmp_path / "link"
    link.symlink_to(ours)
    for given in (ours, image, ours / "deep", link, link / "deep" / "a.png"):
        with pytest.raises(UsageError, match=r"ours: holds the input .* never replaces its input"):
            check_output(ours, KIND, force=True, inputs=[given])
    with pytest.raises(UsageError, match="holds the input"):
        check_output(link, KIND, force=True, inputs=[image])
    with pytest.raises(UsageError, match="holds the input"):
        check_output(image, PNG, force=True, inputs=[image])
    check_output(tmp_path / "new", KIND, force=True, inputs=[ours, tmp_path])


def test_an_input_under_another_name_of_the_same_file_is_the_input(tmp_path: Path) -> None:
    image = tmp_path / "a.png"
    image.write_bytes(b"\x89PNG\r\n\x1a\n...")
    os.link(image, tmp_path / "b.png")
    with pytest.raises(UsageError, match="holds the input"):
        check_output(tmp_path / "b.png", PNG, force=True, inputs=[image])


@pytest.mark.parametrize("name", [".", "..", "/", "ours/.."])
def test_an_output_needs_a_name(ours: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ours.parent)
    with pytest.raises(UsageError, match=r"no name for an output|not a folder of drawings"):
        check_output(Path(name), KIND, force=True)
    assert (ours / "deep" / "a.png").exists()


def test_special_files_are_never_replaced(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UsageError, match=r"pipe: no plain file \(a pipe\), and never replaced"):
        check_output(tmp_path / "pipe", PNG, force=True)
    with pytest.raises(UsageError, match=r"null: no plain file \(a device\)"):
        check_output(Path("/dev/null"), PNG, force=True)


def test_a_place_where_nothing_can_be_written_is_said_at_the_start(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(InputError, match=r"cannot be written \(.*file is no folder\)"):
        check_output(tmp_path / "file" / "below" / "new", KIND, force=False)


def test_a_folder_without_permission_is_said_at_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vsc_serve.outputs.os.access", lambda path, mode: False)
    with pytest.raises(InputError, match="no permission to write in"):
        check_output(tmp_path / "new", KIND, force=False)


def test_removing_a_folder_that_is_not_there_is_no_error(ours: Path, tmp_path: Path) -> None:
    remove_folder(tmp_path / "none", KIND)
    remove_folder(ours, KIND)
    assert not ours.exists()


def test_a_kind_may_have_a_manifest_of_its_own(tmp_path: Path) -> None:
    def listed(stored: dict[str, object]) -> list[str] | None:
        return [str(name) for name in stored] or None

    kind = FolderKind(name="a bundle", markers=("manifest.json",), contents=listed)
    (tmp_path / "manifest.json").write_text(json.dumps({"a.bin": 1}))
    (tmp_path / "a.bin").touch()
    assert kind.why_not_ours(tmp_path) is None
    (tmp_path / "b.bin").touch()
    assert "b.bin" in str(kind.why_not_ours(tmp_path))


def test_rmtree_is_called_in_one_place_only() -> None:
    root = Path(__file__).parents[2]
    found = [
        path.relative_to(root).as_posix()
        for top in ("vsc_serve", "training", "export")
        for path in (root / top).rglob("*.py")
        for line in path.read_text(encoding="utf-8").splitlines()
        if "rmtree(" in line
    ]
    assert found == ["vsc_serve/outputs.py"]


def test_a_dataset_is_no_file_of_codes(tmp_path: Path) -> None:
    from vsc_serve.codes import CODES_FILE

    with zipfile.ZipFile(tmp_path / "images.npz", "w") as archive:
        archive.writestr("images.npy", b"x")
    with pytest.raises(UsageError, match="not a file of codes"):
        check_output(tmp_path / "images.npz", CODES_FILE, force=True)
