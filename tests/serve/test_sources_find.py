"""Patterns, lists on standard input, exclusion, ids and their uniqueness."""

import io
import os
import random
import re
import sys
import tracemalloc
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from vsc_serve.errors import InputError, UsageError
from vsc_serve.sources import FileSource, Source, find_sources, unique
from vsc_serve.sources.unique import unique_ids


def fill(folder: Path, *names: str) -> Path:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
    return folder


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def ids(*inputs: str, **options: object) -> list[str]:
    return [source.id for source in find_sources(inputs, **options)]


def give_list(monkeypatch: pytest.MonkeyPatch, content: bytes) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))


# Patterns


def test_a_pattern_gives_the_files_it_matches_in_order(here):
    fill(here, "p/b.jpg", "p/a.jpg", "p/c.png", "p/in/d.jpg", "p/a10.jpg", "q/e.jpg")
    assert ids("p/*.jpg") == ["p/a.jpg", "p/a10.jpg", "p/b.jpg"]
    assert ids("p/?.???") == ["p/a.jpg", "p/b.jpg", "p/c.png"]
    assert ids("[pq]/[!ab].jpg") == ["q/e.jpg"]
    assert ids("*/in/d.jpg") == ["p/in/d.jpg"]
    assert ids(f"{here}/p/b*.jpg") == [f"{here}/p/b.jpg"]


def test_two_stars_stand_for_any_number_of_folders(here):
    fill(here, "p/a.jpg", "p/x/b.jpg", "p/x/y/c.jpg", "p/x/y/d.png", "p/.h/e.jpg", "p/@eaDir/f.jpg")
    assert ids("p/**/*.jpg") == ["p/a.jpg", "p/x/b.jpg", "p/x/y/c.jpg"]
    assert ids("**/y/*") == ["p/x/y/c.jpg", "p/x/y/d.png"]
    assert ids("p/**") == ["p/a.jpg", "p/x/b.jpg", "p/x/y/c.jpg", "p/x/y/d.png"]
    assert ids("p/**/x/**/c.jpg") == ["p/x/y/c.jpg"]
    (here / "p" / "x" / "up").symlink_to(here)
    assert ids("p/**/*.jpg") == ["p/a.jpg", "p/x/b.jpg", "p/x/y/c.jpg"]


def test_a_folder_that_a_pattern_matches_is_searched_once_and_whole(here):
    fill(here, "2024-01/a.jpg", "2024-02/in/b.jpg", "2023/c.jpg", "2024-x.jpg", "2024.txt")
    assert ids("2024*") == ["2024-01/a.jpg", "2024-02/in/b.jpg", "2024-x.jpg"]


def test_hidden_names_are_matched_when_the_pattern_says_so(here):
    fill(here, ".a.jpg", "b.jpg", ".h/c.jpg")
    assert ids("*") == ["b.jpg"]
    assert ids(".*.jpg") == [".a.jpg"]
    assert ids(".h/*.jpg") == [".h/c.jpg"]


def test_a_pattern_that_names_an_extension_takes_any_and_one_that_does_not_takes_images(here):
    fill(here, "a.dat", "b.jpg")
    assert ids("*") == ["b.jpg"]
    assert ids("*.dat") == ["a.dat"]


def test_a_name_that_exists_is_never_a_pattern(here):
    fill(here, "a[1].jpg", "a1.jpg", "x*/b.jpg")
    assert ids("a[1].jpg") == ["a[1].jpg"]
    assert ids("x*") == ["b.jpg"]


def test_a_pattern_that_matches_nothing_is_refused_before_anything_is_read(here):
    fill(here, "a.jpg", "p/readme.md")
    for pattern in ("*.png", "none/*.jpg", "p/*"):
        with pytest.raises(UsageError, match=f"^{re.escape(pattern)}: (no image|there is no f)"):
            find_sources(["a.jpg", pattern])


# A list


def test_a_list_gives_its_files_in_its_order_one_a_line(here, monkeypatch):
    fill(here, "b.jpg", "a b.jpg", "x")
    give_list(monkeypatch, b"b.jpg\na b.jpg\r\n\nx")
    assert ids("-") == ["b.jpg", "a b.jpg", "x"]


def test_a_list_between_zero_bytes_may_have_newlines_in_names(here, monkeypatch):
    name = "two\nlines.jpg"
    fill(here, name, "b.jpg")
    give_list(monkeypatch, f"{name}\0b.jpg\0".encode())
    assert ids("-") == [name, "b.jpg"]


def test_a_name_on_a_list_that_is_not_there_is_a_row_without_an_image(here, monkeypatch):
    fill(here, "b.jpg")
    give_list(monkeypatch, b"gone.jpg\nb.jpg\n" + b"caf\xe9.jpg\n")
    gone, there, undecodable = find_sources(["-"])
    with pytest.raises(InputError, match=r"^no such file"):
        gone.read()
    assert there.read() == b""
    assert os.fsencode(undecodable.id) == b"caf\xe9.jpg"


def test_a_list_stands_beside_other_inputs_and_is_read_as_it_is_wanted(here, monkeypatch):
    fill(here, "in/a.jpg")
    give_list(monkeypatch, b"".join(b"%06d.jpg\n" % number for number in range(40_000)))
    sources = find_sources(["in", "-"])
    assert next(sources).id == "in/a.jpg"
    assert next(sources).id == "000000.jpg"
    assert sys.stdin.buffer.tell() < 100_000
    assert sum(1 for _ in sources) == 39_999


def test_an_empty_list_and_a_terminal_are_refused(here, monkeypatch):
    give_list(monkeypatch, b"\n")
    with pytest.raises(UsageError, match=r"^-: no image found"):
        find_sources(["-"])
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(sys, "stdin", type("Terminal", (), {"isatty": lambda self: True})())
    with pytest.raises(UsageError, match=r"^-: a list of paths is read from a pipe"):
        find_sources(["-"])


# Leaving out


def test_an_excluded_folder_is_left_out_with_all_that_is_in_it_and_not_listed(here, monkeypatch):
    fill(here, "p/a.jpg", "p/thumbs/b.jpg", "p/x/thumbs/c.jpg", "p/x/d_small.jpg", "p/x/e.jpg")
    listed = []
    scandir = os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: listed.append(path) or scandir(path))
    assert ids("p", exclude=["thumbs", "*_small.*"]) == ["a.jpg", "x/e.jpg"]
    assert not [path for path in listed if "thumbs" in path]


def test_an_exclusion_with_a_slash_is_of_the_path_and_one_without_of_any_name_in_it(here):
    fill(here, "a/t/1.jpg", "b/t/2.jpg", "t.jpg")
    assert ids(".", exclude=["t"]) == ["t.jpg"]
    assert ids(".", exclude=["a/t"]) == ["b/t/2.jpg", "t.jpg"]
    assert ids(".", exclude=["a/"]) == ["b/t/2.jpg", "t.jpg"]
    assert ids(".", exclude=["*/1.jpg"]) == ["b/t/2.jpg", "t.jpg"]
    assert ids("a", "b", exclude=["b/*"]) == ["a/t/1.jpg"]
    assert ids("**/*.jpg", exclude=["b"]) == ["a/t/1.jpg", "t.jpg"]
    assert ids(".", exclude=[""]) == ["a/t/1.jpg", "b/t/2.jpg", "t.jpg"]


def test_an_exclusion_means_the_same_whatever_the_ids(here):
    fill(here, "a/1.jpg", "b/2.jpg")
    for kind in ("relative", "absolute", "name"):
        (source,) = find_sources(["."], exclude=["a/*"], ids=kind)
        assert source.id.endswith("2.jpg")


# Ids


def test_ids_are_the_path_inside_the_whole_path_or_the_name(here):
    fill(here, "p/in/a.jpg", "b.jpg")
    assert ids("p", ids="relative") == ["in/a.jpg"]
    assert ids("p", ids="absolute") == [f"{here}/p/in/a.jpg"]
    assert ids("p", ids="name") == ["a.jpg"]
    assert ids("p", "b.jpg", ids="absolute") == [f"{here}/p/in/a.jpg", f"{here}/b.jpg"]
    assert ids("p", "b.jpg", ids="name") == ["a.jpg", "b.jpg"]
    assert ids("*", ids="name") == ["b.jpg", "a.jpg"]
    (here / "link").symlink_to("p")
    assert ids("link", ids="absolute") == [f"{here}/link/in/a.jpg"]


def test_two_images_with_one_name_are_refused_and_both_are_named(here):
    fill(here, "x/1.jpg", "y/1.jpg")
    with pytest.raises(UsageError, match=r"the id '1\.jpg'.*x/1\.jpg.*y/1\.jpg.*`ids=.relative.`"):
        ids(".", ids="name")
    with pytest.raises(UsageError, match=r"the id 'x/1\.jpg'"):
        ids("x", "./", "x/1.jpg")


def test_a_path_that_is_twice_on_a_list_is_refused(here, monkeypatch):
    give_list(monkeypatch, b"a.jpg\nb.jpg\na.jpg\n")
    with pytest.raises(UsageError, match=r"^two images would have the id 'a\.jpg'\. Give each"):
        ids("-")


def numbered(count: int, *, last: int) -> Iterator[Source]:
    numbers = list(range(count))
    random.Random(0).shuffle(numbers)
    for number in [*numbers, last]:
        yield FileSource(str(number), f"{number}.png")


def test_equal_ids_far_apart_are_found_too(monkeypatch):
    monkeypatch.setattr(unique, "_BLOCK", 500)
    count = 2_300
    assert sum(1 for _ in unique_ids(numbered(count, last=count), None)) == count + 1
    for last in (0, 777, count - 1):
        again = partial(numbered, count, last=last)
        with pytest.raises(UsageError, match=rf"'{last}': {last}\.png and {last}\.png\."):
            list(unique_ids(again(), again))


def test_the_memory_for_ids_is_a_few_bytes_an_image(monkeypatch):
    monkeypatch.setattr(unique, "_BLOCK", 1_000)
    many = (FileSource(f"folder/{number:09}.png", "x") for number in range(20_000))
    tracemalloc.start()
    for _ in unique_ids(iter(many), None):
        pass
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1e6  # 1,000 ids, and 8 bytes for each; all the ids would be 3 MB


def test_a_path_with_file_before_it_is_a_path(here):
    fill(here, "p/a.jpg")
    assert ids(f"file://{here}/p") == ["a.jpg"]
    assert next(find_sources([f"file://{here}/p/a.jpg"])).read() == b""


def test_a_folder_whose_name_has_signs_of_a_pattern_is_no_pattern(here):
    """`photos [2024]` would match `photos 2`, and did."""
    fill(here, "photos [2024]/a.jpg", "photos [2024]/in/b.jpg", "photos 2/c.jpg", "photos 0/d.jpg")
    assert ids("photos [2024]/*.jpg") == ["photos [2024]/a.jpg"]
    assert ids("photos [2024]/**/*.jpg") == ["photos [2024]/a.jpg", "photos [2024]/in/b.jpg"]
    assert ids("photos [2024]/in/*") == ["photos [2024]/in/b.jpg"]
    assert ids(f"{here}/photos [2024]/i?/*") == [f"{here}/photos [2024]/in/b.jpg"]
    assert ids("photos [20]/*.jpg") == ["photos 0/d.jpg", "photos 2/c.jpg"]
    with pytest.raises(UsageError, match=r"^photos \[2024\]/gone\.jpg: no such file or folder"):
        find_sources(["photos [2024]/gone.jpg"])
    with pytest.raises(UsageError, match=r"^photos \[2024\]/gone/\*: there is no folder photos"):
        find_sources(["photos [2024]/gone/*"])
    fill(here, "x*/a?/1.jpg", "x1/ab/2.jpg")
    assert ids("x*/a?/*") == ["x*/a?/1.jpg"]


def test_a_list_may_begin_with_the_mark_of_its_encoding(here, monkeypatch):
    """As Windows writes it: PowerShell's `>` gives UTF-16."""
    name = "größe 漢字.jpg"
    fill(here, "a b.jpg", name)
    text = f"a b.jpg\r\n{name}\r\n"
    for encoding in ("utf-8-sig", "utf-16"):
        give_list(monkeypatch, text.encode(encoding))
        assert ids("-") == ["a b.jpg", name]
    give_list(monkeypatch, b"\xfe\xff" + text.encode("utf-16-be"))
    assert ids("-") == ["a b.jpg", name]
    give_list(monkeypatch, b"\xff\xfe" + text.replace("\r\n", "\0").encode("utf-16-le"))
    assert ids("-") == ["a b.jpg", name]


def test_a_long_list_in_utf_16_is_read_as_it_is_wanted(here, monkeypatch):
    names = [f"{number:06} é.jpg" for number in range(40_000)]
    give_list(monkeypatch, "\n".join(names).encode("utf-16"))
    sources = find_sources(["-"])
    assert next(sources).id == names[0]
    assert sys.stdin.buffer.tell() < 200_000
    assert [source.id for source in sources] == names[1:]


def test_a_list_that_begins_as_utf_16_and_is_none_says_so(here, monkeypatch):
    for content in (b"\xff\xfea", b"\xff\xfe" + "\ud800".encode("utf-16-le", "surrogatepass")):
        give_list(monkeypatch, content)
        with pytest.raises(
            InputError, match=r"^-: the list begins as UTF-16 text and is none"
        ) as it:
            list(find_sources(["-"]))
        assert it.value.kind == "broken"


def test_paths_and_a_single_input_are_inputs_too(here):
    fill(here, "p/a.jpg", "b.jpg")
    assert ids(Path("p"), Path("b.jpg")) == ["p/a.jpg", "b.jpg"]
    assert [source.id for source in find_sources(Path("p"))] == ["a.jpg"]
    assert [source.id for source in find_sources("b.jpg")] == ["b.jpg"]


def test_a_name_that_no_file_can_have_is_not_there(here):
    for name in ("n" * 300, "a\0b", f"{'n' * 300}/*.jpg"):
        with pytest.raises(UsageError, match=r"no such file or folder|there is no folder"):
            find_sources([name])


def test_sources_travel_small_and_know_where_they_lie(here):
    fill(here, "p/a.jpg")
    (source,) = find_sources(["p"])
    assert isinstance(source, FileSource)
    assert source.where == "p/a.jpg"
    assert source == FileSource("a.jpg", "p/a.jpg")
