"""Searching folders: which files, in which order, under which names, whatever the links."""

import os
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vsc_serve.errors import InputError, UsageError
from vsc_serve.sources import FileSource, Source, UnreadableSource, find_sources


def travelled(source: Source) -> Source:
    """The source after a way to another process."""
    return ForkingPickler.loads(ForkingPickler.dumps(source))


def fill(folder: Path, *names: str) -> Path:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode("utf-8", "surrogateescape"))
    return folder


def ids(*inputs: Path | str, **options: object) -> list[str]:
    return [source.id for source in find_sources([str(given) for given in inputs], **options)]


def skipped(*inputs: Path) -> dict[str, str]:
    found: dict[str, str] = {}
    list(find_sources([str(given) for given in inputs], on_skip=found.__setitem__))
    return found


def test_a_folder_is_searched_to_any_depth_in_the_order_of_its_paths(tmp_path):
    fill(tmp_path, "b.png", "a/z.JPG", "a/b/c.jpeg", "a.png", "B.webp", "c/1.tif", "c/10.png")
    assert ids(tmp_path) == [
        *("B.webp", "a.png", "a/b/c.jpeg", "a/z.JPG", "b.png", "c/1.tif", "c/10.png")
    ]


NAMES = st.text(st.sampled_from("ab.-/0é"), min_size=1, max_size=6)


@settings(max_examples=60, deadline=None)
@given(paths=st.sets(NAMES, min_size=1, max_size=12))
def test_the_order_is_that_of_the_whole_paths_whatever_the_names(paths, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tree")
    wanted = set()
    for path in paths:
        parts = [part for part in path.split("/") if not part.startswith(".")]
        relative = "/".join([*(f"{part}_" for part in parts if part), "x.png"])
        fill(folder, relative)
        wanted.add(relative)
        fill(folder, beside := relative.removesuffix("/x.png") + ".png")
        wanted.add(beside)
    assert ids(folder) == sorted(wanted)


def test_folders_are_listed_when_the_search_comes_to_them_and_not_before(tmp_path, monkeypatch):
    fill(tmp_path, *(f"{number}/a.png" for number in range(9)))
    listed = []
    scandir = os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: listed.append(path) or scandir(path))
    sources = find_sources([str(tmp_path)])
    next(sources)
    next(sources)
    assert len(listed) == 3  # the folder itself, 0 and 1


def test_a_source_is_small_travels_and_can_be_a_key(tmp_path):
    (source,) = find_sources([str(fill(tmp_path, "a.png"))])
    assert travelled(source) == source
    assert {source: 1}[FileSource("a.png", str(tmp_path / "a.png"))] == 1
    assert len(ForkingPickler.dumps(source)) < 350 + 2 * len(str(tmp_path))
    sources = list(find_sources([str(fill(tmp_path, *(f"{number}.png" for number in range(99))))]))
    assert len(ForkingPickler.dumps(sources)) < 100 * (100 + len(str(tmp_path)))  # one root
    assert isinstance(source, Source)
    assert not hasattr(source, "__dict__")


def test_files_that_are_no_images_and_hidden_and_junk_places_are_skipped(tmp_path):
    fill(tmp_path, "a.png", ".hidden.png", "._a.png", ".git/b.png", "__MACOSX/a.png")
    fill(tmp_path, "x/@eaDir/a.jpg", "node_modules/logo.png", "notes.txt", "Thumbs.db", "png")
    assert ids(tmp_path) == ["a.png"]
    assert skipped(tmp_path) == {
        "._a.png": "hidden",
        ".git/": "hidden or junk folder",
        ".hidden.png": "hidden",
        "Thumbs.db": "with extension .db",
        "__MACOSX/": "hidden or junk folder",
        "node_modules/": "hidden or junk folder",
        "notes.txt": "with extension .txt",
        "png": "without extension",
        "x/@eaDir/": "hidden or junk folder",
    }


def test_complaint_junk_folders_indexed_with_the_images(tmp_path):
    """A phone backup on a network drive: previews and resource forks look like images."""
    fill(tmp_path, "DCIM/a.jpg", "DCIM/@eaDir/a.jpg/preview.jpg", "__MACOSX/DCIM/._a.jpg")
    fill(tmp_path, ".thumbnails/a.jpg", "$RECYCLE.BIN/$R1.jpg", "lost+found/b.jpg")
    assert ids(tmp_path) == ["DCIM/a.jpg"]


# Links


def test_a_link_that_leads_back_up_is_not_followed_for_ever(tmp_path):
    fill(tmp_path, "a.png", "deep/b.png")
    (tmp_path / "deep" / "again").symlink_to(tmp_path)
    (tmp_path / "deep" / "self").symlink_to("self")
    assert ids(tmp_path) == ["a.png", "deep/b.png"]


def test_a_linked_folder_is_searched_under_the_links_name_in_its_place(tmp_path):
    elsewhere = fill(tmp_path / "elsewhere", "a.png", "b/c.png")
    folder = fill(tmp_path / "folder", "a.png", "z.png")
    (folder / "more").symlink_to(elsewhere)
    assert ids(folder) == ["a.png", "more/a.png", "more/b/c.png", "z.png"]
    (tmp_path / "linked").symlink_to(folder)
    assert ids(tmp_path / "linked") == ids(folder)


def test_a_folder_keeps_its_own_name_when_a_link_leads_to_it_too(tmp_path):
    fill(tmp_path, "real/a.png", "z/b.png")
    (tmp_path / "a_link_that_sorts_first").symlink_to(tmp_path / "real")
    (tmp_path / "real" / "z_link").symlink_to(tmp_path / "z")
    assert ids(tmp_path) == ["real/a.png", "z/b.png"]


def test_two_links_to_one_place_are_followed_once(tmp_path):
    elsewhere = fill(tmp_path / "elsewhere", "a.png", "in/b.png")
    folder = fill(tmp_path / "folder", "z.png")
    (folder / "1").symlink_to(elsewhere)
    (folder / "2").symlink_to(elsewhere)
    (folder / "3").symlink_to(elsewhere / "in")
    assert ids(folder) == ["1/a.png", "1/in/b.png", "z.png"]


def test_a_link_into_a_place_and_one_around_it_read_every_folder_once(tmp_path):
    fill(tmp_path / "elsewhere", "a.png", "in/b.png", "in/c/d.png")
    folder = fill(tmp_path / "folder", "z.png")
    (folder / "1").symlink_to(tmp_path / "elsewhere" / "in")
    (folder / "2").symlink_to(tmp_path / "elsewhere")
    (folder / "3").symlink_to(tmp_path)
    assert ids(folder) == ["1/b.png", "1/c/d.png", "2/a.png", "z.png"]


def test_a_link_to_a_hidden_or_excluded_place_is_followed(tmp_path):
    """`current -> .versions/3`: what is not reached under its own name is not lost."""
    fill(tmp_path, ".versions/3/a.png", "old/b.png")
    (tmp_path / "current").symlink_to(tmp_path / ".versions" / "3")
    (tmp_path / "kept").symlink_to(tmp_path / "old")
    assert ids(tmp_path) == ["current/a.png", "old/b.png"]
    assert ids(tmp_path, exclude=["old"]) == ["current/a.png", "kept/b.png"]


def test_a_linked_file_is_a_file(tmp_path):
    fill(tmp_path, "store/1.png", "images/a.png")
    (tmp_path / "images" / "b.png").symlink_to(tmp_path / "store" / "1.png")
    assert ids(tmp_path / "images") == ["a.png", "b.png"]
    (tmp_path / "images" / "c.png").symlink_to("gone.png")
    *_, dangling = find_sources([str(tmp_path / "images")])
    with pytest.raises(InputError, match=r"^no such file \(a link that leads nowhere\?\)$"):
        dangling.read()


# Names


def test_a_folder_that_is_named_like_an_image_is_a_folder(tmp_path):
    fill(tmp_path, "trip.jpg/a.png")
    assert ids(tmp_path) == ["trip.jpg/a.png"]


def test_a_file_named_on_its_own_keeps_its_path_and_needs_no_extension(tmp_path, monkeypatch):
    monkeypatch.chdir(fill(tmp_path, "some/image"))
    (source,) = find_sources(["some/image"])
    assert source.id == "some/image"
    assert source.read() == b"some/image"


def test_the_folder_one_stands_in_can_be_given(tmp_path, monkeypatch):
    monkeypatch.chdir(fill(tmp_path, "a.png", "in/b.png"))
    assert ids(".") == ids("./") == ["a.png", "in/b.png"]
    assert [source.read() for source in find_sources(["."])] == [b"a.png", b"in/b.png"]


def test_with_several_inputs_an_id_begins_with_the_input_and_their_order_stays(
    tmp_path, monkeypatch
):
    monkeypatch.chdir(fill(tmp_path, "b/1.png", "a/1.png", "0.png"))
    assert ids("b", "0.png", "a/") == ["b/1.png", "0.png", "a/1.png"]


def test_names_in_any_encoding_are_found(tmp_path):
    fill(tmp_path, "größe 漢字.png", "two\nlines.png")
    undecodable = os.fsdecode(b"caf\xe9.png")  # Latin-1, not UTF-8
    try:
        fill(tmp_path, undecodable)
    except OSError:
        pytest.skip("this file system has UTF-8 names only")
    sources = list(find_sources([str(tmp_path)]))
    assert [source.id for source in sources] == [undecodable, "größe 漢字.png", "two\nlines.png"]
    assert [os.fsdecode(source.read()) for source in sources] == [source.id for source in sources]


# Nothing there


def test_complaint_zero_images_say_what_was_looked_for_and_exit_with_2(tmp_path):
    with pytest.raises(UsageError, match=r"no image found\. Looked for files ending in \.apng .*"):
        find_sources([str(tmp_path)])
    fill(tmp_path, "notes.txt", "more.txt", "table.csv", ".cache/a.png")
    with pytest.raises(UsageError, match=f"^{tmp_path}: no image found") as caught:
        find_sources([str(tmp_path)])
    assert caught.value.exit_code == 2
    assert str(caught.value).endswith(
        " Passed over: 2 with extension .txt, 1 hidden or junk folder, 1 with extension .csv."
    )


def test_an_input_that_is_not_there_is_named_before_anything_is_read(tmp_path):
    fill(tmp_path, "a.png")
    with pytest.raises(UsageError, match=r"missing: no such file or folder\. Check the path\."):
        find_sources([str(tmp_path), str(tmp_path / "missing")])
    with pytest.raises(UsageError, match="no input"):
        find_sources([])


def test_a_folder_that_cannot_be_searched_is_listed_and_ends_nothing(tmp_path, monkeypatch):
    fill(tmp_path, "a.png", "locked/b.png", "z.png")
    scandir = os.scandir

    def refuse(path):
        if Path(path).name == "locked":
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)  # root, as in a container, may read everything
    first, locked, last = find_sources([str(tmp_path)])
    assert [first.id, locked.id, last.id] == ["a.png", "locked", "z.png"]
    assert isinstance(locked, UnreadableSource)
    with pytest.raises(InputError, match=r"^folder cannot be searched \(Permission denied\)$"):
        locked.read()
    (alone,) = find_sources([str(tmp_path / "locked")])
    assert alone.id == str(tmp_path / "locked")


# What is no file


@pytest.mark.timeout(10)
def test_pipes_sockets_and_devices_are_refused_and_never_waited_for(tmp_path):
    import socket

    os.mkfifo(tmp_path / "pipe.png")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "socket.png"))
        (tmp_path / "zero.png").symlink_to("/dev/zero")
        sources = [*find_sources([str(tmp_path)]), *find_sources(["/dev/zero"])]
    assert len(sources) == 4
    for source in sources:
        with pytest.raises(InputError, match=r"^not a regular file$"):
            source.read()


def test_a_file_too_large_for_memory_is_refused_before_it_is_read(tmp_path):
    with (tmp_path / "huge.tif").open("wb") as file:
        file.truncate(2**40)  # a sparse file takes no room
    (source,) = find_sources([str(tmp_path)])
    with pytest.raises(InputError, match=r"^too large: 1,099,511,627,776 bytes are over the limit"):
        source.read()


def test_a_name_with_a_zero_byte_and_one_that_is_too_long_are_reasons():
    for name, reason in (("a\0b.png", "embedded null byte"), ("a" * 300, "File name too long")):
        with pytest.raises(InputError, match=f"^unreadable: {reason}$"):
            FileSource(name, name).read()
