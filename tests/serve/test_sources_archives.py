"""Images in tar and zip archives."""

import bz2
import errno
import io
import os
import struct
import sys
import tarfile
import threading
import tracemalloc
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Mapping
from contextlib import suppress
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import numpy as np
import pytest
from backports import zstd

from vsc_serve.errors import InputError, SourceUnavailable, UsageError
from vsc_serve.sources import RETRY, RetryPolicy, Source, find_sources, open_files, unique
from vsc_serve.sources.tar import TarSource, open_tar
from vsc_serve.sources.zip import ZipSource

MEMBERS = {
    "b/0001.jpg": b"one" * 400,
    "a/0002.png": b"two",
    "0003.webp": bytes(np.random.default_rng(0).integers(0, 256, 5_000, dtype=np.uint8)),
    "größe 漢字.gif": b"four",
    "n" * 150 + ".png": b"a name too long for a plain header",
}
OTHERS = {"b/0001.json": b"{}", "__MACOSX/b/._0001.jpg": b"x", ".hidden.png": b"x"}
TAR_KINDS = {
    ".tar": "w",
    ".tar.gz": "w:gz",
    ".tgz": "w:gz",
    ".tar.bz2": "w:bz2",
    ".tar.xz": "w:xz",
    ".tar.zst": "w:zst",
}


def write_tar(path: Path, members: Mapping[str, bytes] = MEMBERS | OTHERS, mode: str = "w") -> Path:
    if mode == "w:zst":
        plain = write_tar(path.with_name("plain.tar"), members)
        path.write_bytes(zstd.compress(plain.read_bytes()))
        plain.unlink()
        return path
    with tarfile.open(path, mode) as archive:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def write_zip(
    path: Path, members: Mapping[str, bytes] = MEMBERS | OTHERS, method: int = zipfile.ZIP_DEFLATED
) -> Path:
    with zipfile.ZipFile(path, "w", method) as archive:
        archive.mkdir("b")
        for name, content in members.items():
            archive.writestr(name, content)
    return path


def travelled(source: Source) -> Source:
    """The source after a way to another process."""
    return ForkingPickler.loads(ForkingPickler.dumps(source))


def contents(*inputs: Path | str, **options: object) -> dict[str, bytes]:
    """Ids in order, each source having been to another process and back."""
    sources = find_sources([str(given) for given in inputs], **options)
    return {source.id: travelled(source).read() for source in sources}


def reason(source: Source) -> str:
    with pytest.raises(InputError) as caught:
        source.read()
    return str(caught.value)


# tar


@pytest.mark.parametrize("ending", TAR_KINDS)
def test_a_tar_gives_its_images_in_its_order(ending, tmp_path):
    path = write_tar(tmp_path / f"shard{ending}", mode=TAR_KINDS[ending])
    assert contents(path) == MEMBERS
    assert list(contents(path)) == list(MEMBERS)


@pytest.mark.parametrize("ending", TAR_KINDS)
def test_members_can_be_read_in_any_order_and_from_threads(ending, tmp_path):
    path = write_tar(tmp_path / f"shard{ending}", mode=TAR_KINDS[ending])
    sources = list(find_sources([str(path)]))
    for source in sources[::-1] + sources:
        assert source.read() == MEMBERS[source.id]
    wrong: list[str] = []

    def read_often(start: int) -> None:
        for number in range(40):
            source = sources[(start + 3 * number) % len(sources)]
            if source.read() != MEMBERS[source.id]:
                wrong.append(source.id)

    threads = [threading.Thread(target=read_often, args=(start,)) for start in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")  # another test's threads
def test_a_process_that_was_forked_opens_the_archive_anew(tmp_path):
    """One file position in two processes: each would read from where the other has left off."""
    source = next(find_sources([str(write_tar(tmp_path / "a.tar"))]))
    assert isinstance(source, TarSource)
    here = open_files.keep_open(source.path, open_tar, RETRY)
    here.seek(7)
    receive, send = os.pipe()
    child = os.fork()
    if child == 0:
        there = open_files.keep_open(source.path, open_tar, RETRY)
        there.seek(0)
        os.write(send, b"same" if there is here else b"anew")
        os._exit(0)
    os.waitpid(child, 0)
    assert os.read(receive, 9) == b"anew"
    assert here.tell() == 7


def test_few_archives_stay_open_however_many_are_read(tmp_path):
    for number in range(12):
        write_tar(tmp_path / f"{number:02}.tar")
    assert len(contents(tmp_path)) == 12 * len(MEMBERS)
    assert len(open_files._open.handles) <= 4


def test_finding_members_takes_no_memory_for_each(tmp_path, monkeypatch):
    monkeypatch.setattr(unique, "_BLOCK", 500)
    path = write_tar(tmp_path / "a.tar", {f"{number:05}.png": b"" for number in range(3_000)})
    sources = find_sources([str(path)])
    next(sources)
    tracemalloc.start()
    assert sum(1 for _ in sources) == 2_999
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 500_000  # tarfile by itself keeps 3 MB


def test_a_webdataset_of_shards_is_a_folder_pattern_or_several_archives(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("set").mkdir()
    for number in range(2):
        write_tar(Path(f"set/{number}.tar"), {"a.jpg": b"%d" % number, "a.txt": b""})
    assert contents("set") == {"0.tar/a.jpg": b"0", "1.tar/a.jpg": b"1"}
    expected = {"set/0.tar/a.jpg": b"0", "set/1.tar/a.jpg": b"1"}
    assert contents("set/*.tar") == contents("set/0.tar", "set/1.tar") == expected
    absolute = [f"{tmp_path}/{name}" for name in expected]
    assert list(contents("set", ids="absolute")) == absolute
    with pytest.raises(UsageError, match=r"two images would have the id 'a\.jpg'"):
        contents("set", ids="name")


def test_archives_beside_images_are_not_opened_but_counted(tmp_path):
    write_zip(tmp_path / "originals.zip")
    (tmp_path / "a.png").write_bytes(b"a")
    passed: dict[str, str] = {}
    assert contents(tmp_path, on_skip=passed.__setitem__) == {"a.png": b"a"}
    assert passed == {"originals.zip": "with extension .zip"}


@pytest.mark.parametrize("write", [write_tar, write_zip])
def test_exclusion_works_inside_archives(write, tmp_path):
    path = write(tmp_path / ("a.tar" if write is write_tar else "a.zip"))
    names = list(contents(path, exclude=["b", "n*"]))
    assert names == ["a/0002.png", "0003.webp", "größe 漢字.gif"]


@pytest.mark.parametrize("ending", [".tar", ".tar.gz"])
def test_what_comes_before_damage_is_kept_and_the_damage_is_listed(ending, tmp_path):
    path = write_tar(tmp_path / f"a{ending}", mode=TAR_KINDS[ending])
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 3])
    sources = list(find_sources([str(path)]))
    assert sources[0].id == "b/0001.jpg"
    assert sources[-1].id == str(path)
    assert "broken archive, the rest is lost" in reason(sources[-1])


def test_a_broken_header_inside_a_tar_is_no_silent_end(tmp_path):
    path = write_tar(tmp_path / "a.tar", {"a.png": b"a" * 512, "b.png": b"b", "c.png": b"c"})
    content = bytearray(path.read_bytes())
    content[1024:1100] = b"\xff" * 76  # tarfile by itself stops here as if all were well
    path.write_bytes(content)
    first, rest = find_sources([str(path)])
    assert first.read() == b"a" * 512
    assert reason(
        rest
    ) == "broken archive, the rest is lost: no header where one belongs, at byte" + (" 1,024")


def test_a_tar_without_its_closing_blocks_is_whole(tmp_path):
    path = write_tar(tmp_path / "a.tar", {"a.png": b"a" * 512})
    path.write_bytes(path.read_bytes()[:1024])
    assert contents(path) == {"a.png": b"a" * 512}


def test_a_member_cut_off_or_gone_is_a_reason(tmp_path):
    path = write_tar(tmp_path / "a.tar", {"a.png": b"a" * 5_000})
    (source,) = find_sources([str(path)])
    path.write_bytes(path.read_bytes()[:3_000])
    assert reason(source) == "cut off: its archive ends before it does"
    assert reason(TarSource("x", str(path), 0, 2**40)).startswith("too large: 1,099,511,627,776")


def test_links_in_a_tar_are_listed_and_not_followed(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for name, kind in (("l.png", tarfile.SYMTYPE), ("h.png", tarfile.LNKTYPE)):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "/etc/passwd"
            archive.addfile(member)
    sources = list(find_sources([str(tmp_path / "a.tar")]))
    assert [reason(source) for source in sources] == 2 * [
        "a link or a sparse file inside an archive"
    ]


@pytest.mark.parametrize("name", ["a.tar", "a.tar.gz", "a.tgz", "a.tar.xz", "a.zip", "a.tar.zst"])
def test_what_is_no_archive_is_listed_by_its_path(name, tmp_path):
    (tmp_path / name).write_bytes(b"no archive at all" * 100)
    (source,) = find_sources([str(tmp_path / name)])
    assert source.id == str(tmp_path / name)
    assert "archive" in reason(source)


def test_a_zstd_archive_without_its_package_says_what_to_install(tmp_path, monkeypatch):
    path = write_tar(tmp_path / "a.tar.zst", mode="w:zst")
    monkeypatch.setitem(sys.modules, "backports", None)
    (source,) = find_sources([str(path)])
    assert "pip install 'vsc-serve[zstd]'" in reason(source)


# zip


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2])
def test_a_zip_gives_its_images_in_its_order(method, tmp_path):
    path = write_zip(tmp_path / "a.ZIP", method=method)
    assert contents(path) == MEMBERS
    assert list(contents(path)) == list(MEMBERS)


def test_a_zip_larger_than_its_32_bit_fields_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(zipfile, "ZIP64_LIMIT", 100)
    monkeypatch.setattr(zipfile, "ZIP_FILECOUNT_LIMIT", 2)
    path = write_zip(tmp_path / "a.zip")
    assert b"PK\6\6" in path.read_bytes()
    assert contents(path) == MEMBERS


def test_a_zip_with_bytes_before_it_and_a_comment_after_it_is_read(tmp_path):
    path = write_zip(tmp_path / "a.zip")
    with zipfile.ZipFile(path, "a") as archive:
        archive.comment = b"made by hand " * 500
    path.write_bytes(b"#!/bin/sh\nexit\n" + path.read_bytes())
    assert contents(path) == MEMBERS


def test_a_zip_from_an_old_windows_has_folders_too(tmp_path):
    path = write_zip(tmp_path / "a.zip", {"in/a.png": b"a"}, zipfile.ZIP_STORED)
    path.write_bytes(path.read_bytes().replace(b"in/a.png", b"in\\a.png"))
    assert contents(path) == {"in/a.png": b"a"}


def test_damage_in_a_zip_costs_the_member_it_is_in(tmp_path):
    path = write_zip(tmp_path / "a.zip", {"a.png": b"a" * 99, "b.png": b"b" * 99}, 0)
    path.write_bytes(path.read_bytes().replace(b"a" * 99, b"x" * 99))
    damaged, good = find_sources([str(path)])
    assert reason(damaged) == "damaged in its archive: the checksum differs"
    assert good.read() == b"b" * 99


def test_a_zip_bomb_unpacks_to_no_more_than_its_directory_says(tmp_path):
    packed = zlib.compressobj(9, zlib.DEFLATED, -15)
    bomb = packed.compress(bytes(50_000_000)) + packed.flush()
    (tmp_path / "a.zip").write_bytes(bytes(30) + bomb)
    header = struct.pack("<4s5H3L2H", b"PK\3\4", 0, 0, 8, 0, 0, 0, 0, 0, 0, 0)
    (tmp_path / "a.zip").write_bytes(header + bomb)
    source = ZipSource("x", str(tmp_path / "a.zip"), 0, len(bomb), 1_000, 8, 0)
    tracemalloc.start()
    assert reason(source) == "damaged in its archive: the checksum differs"
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1_000_000


def test_a_zip_member_that_cannot_be_unpacked_says_why(tmp_path):
    path = write_zip(tmp_path / "a.zip", {"a.png": b"a" * 99}, zipfile.ZIP_LZMA)
    (source,) = find_sources([str(path)])
    assert reason(source) == "zip compression method 14 is not read; use stored or deflated"
    path = write_zip(tmp_path / "b.zip", {"a.png": b"a" * 99}, zipfile.ZIP_BZIP2)
    path.write_bytes(path.read_bytes().replace(bz2.compress(b"a" * 99)[:9], b"BZh9nonse"))
    (source,) = find_sources([str(path)])
    assert reason(source).startswith("damaged in its archive: ")
    path = write_zip(tmp_path / "c.zip", {"a.png": b"a" * 99})
    content = bytearray(path.read_bytes())
    place = content.index(b"PK\1\2", content.index(b"PK\1\2") + 4)  # after the folder's entry
    content[place + 8] |= 1
    path.write_bytes(content)
    (source,) = find_sources([str(path)])
    assert reason(source) == "encrypted in its archive"


def test_a_zip_that_is_cut_off_anywhere_gives_sources_or_reasons_and_nothing_else(tmp_path):
    whole = write_zip(tmp_path / "a.zip", {"a.png": b"a" * 99, "b.png": b"b" * 9}).read_bytes()
    for length in range(len(whole)):
        (tmp_path / "cut.zip").write_bytes(whole[:length])
        (source,) = find_sources([str(tmp_path / "cut.zip")])
        assert reason(source).startswith("broken archive: ")


@pytest.mark.parametrize("ending", [".zip", ".tar", ".tar.gz", ".tar.zst"])
def test_damaged_archives_give_sources_or_reasons_and_nothing_else(ending, tmp_path):
    write = write_zip if ending == ".zip" else write_tar
    options = {} if ending == ".zip" else {"mode": TAR_KINDS[ending]}
    whole = write(tmp_path / f"whole{ending}", **options).read_bytes()
    path = tmp_path / f"damaged{ending}"
    rng = np.random.default_rng(0)
    for _ in range(150):
        content = bytearray(whole)
        for _ in range(rng.integers(1, 6)):
            content[rng.integers(len(content))] = rng.integers(256)
        path.write_bytes(content)
        open_files._open.handles = OrderedDict()
        for source in find_sources([str(path)], ids="absolute"):
            with suppress(InputError):
                source.read()


@pytest.mark.parametrize("ending", [".zip", ".tar"])
def test_an_exhausted_machine_is_no_fault_of_the_image(ending, tmp_path, monkeypatch):
    path = (write_zip if ending == ".zip" else write_tar)(tmp_path / f"a{ending}")
    source = next(find_sources([str(path)]))

    def fail(*_: object) -> int:
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(os, "open", fail)
    match = r"a\.(tar|zip): cannot be reached now: the machine failed: Too many open files\. Free"
    with pytest.raises(SourceUnavailable, match=match):
        source.read(RetryPolicy(patience_s=0))


# What is not as it is called, and what follows


@pytest.mark.parametrize("mode", ["w", "w:gz", "w:bz2", "w:xz", "w:zst"])
@pytest.mark.parametrize("name", ["a.tar", "a.tar.gz", "a.tgz", "a.zip", "a.parquet"])
def test_an_archive_is_read_by_its_content_whatever_it_is_called(mode, name, tmp_path):
    path = write_tar(tmp_path / "right.tar.xz", mode=mode).rename(tmp_path / name)
    assert contents(path) == MEMBERS


@pytest.mark.parametrize("name", ["a.tar", "a.tar.gz", "a.parquet"])
def test_a_zip_is_read_by_its_content_whatever_it_is_called(name, tmp_path):
    path = write_zip(tmp_path / "right.zip").rename(tmp_path / name)
    assert contents(path) == MEMBERS


def test_a_table_that_is_called_an_archive_is_read(tmp_path):
    pa = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pa.table({"image": [b"a"]}), tmp_path / "a.zip")
    assert contents(tmp_path / "a.zip") == {"0": b"a"}


@pytest.mark.parametrize(
    ("head", "kind"),
    [(b"7z\xbc\xaf\x27\x1c", "7z"), (b"Rar!\x1a\x07\1\0", "RAR"), (b"LZIP\1", "lzip")],
)
def test_an_archive_of_another_kind_says_what_it_is(head, kind, tmp_path):
    (tmp_path / "a.tar").write_bytes(head + bytes(2_000))
    (source,) = find_sources([str(tmp_path / "a.tar")])
    assert reason(source) == f"{kind} archive, which is not read; pack it as tar or zip"


def test_a_compressed_file_without_an_archive_in_it_says_so(tmp_path):
    import gzip

    (tmp_path / "a.tar").write_bytes(gzip.compress(b"a single image" * 99))
    (source,) = find_sources([str(tmp_path / "a.tar")])
    assert reason(source).startswith("broken archive, the rest is lost: ")
    assert reason(source).endswith("(inside gzip)")


@pytest.mark.parametrize("extension", [".tar", ".tar.gz"])
@pytest.mark.parametrize("padding", [0, 1, 19, 5_000])
def test_archives_that_follow_each_other_in_one_file_are_all_read(extension, padding, tmp_path):
    """`cat a.tar b.tar > both.tar`: tar by itself stops after the first, in silence."""
    parts = []
    for name in "abc":
        part = write_tar(tmp_path / f"{name}.tar", {f"{name}.png": name.encode() * 700})
        parts.append(part.read_bytes() + bytes(padding * 512))
        part.unlink()
    if extension == ".tar.gz":
        import gzip

        parts = [gzip.compress(part) for part in parts]
    path = tmp_path / f"both{extension}"
    path.write_bytes(b"".join(parts))
    assert contents(path) == {f"{name}.png": name.encode() * 700 for name in "abc"}


def test_what_follows_an_archive_and_is_none_is_no_silent_end(tmp_path):
    path = write_tar(tmp_path / "a.tar", {"a.png": b"a"})
    path.write_bytes(path.read_bytes() + b"something else" * 99)
    found, rest = find_sources([str(path)])
    assert found.read() == b"a"
    assert "no header where one belongs, at byte 10,240" in reason(rest)


def test_a_member_with_less_than_no_bytes_does_not_lead_back(tmp_path):
    path = write_tar(tmp_path / "a.tar", {"a.png": b"a", "b.png": b"b"})
    content = bytearray(path.read_bytes())
    header = content[1024:1536]
    header[124:136] = b"\xff" * 8 + (-1024 & 2**32 - 1).to_bytes(4, "big")
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    content[1024:1536] = header
    path.write_bytes(content)
    sources = list(find_sources([str(path)]))
    assert len(sources) == 2
    assert "broken archive" in reason(sources[1])


def test_a_header_that_claims_gigabytes_takes_no_memory(tmp_path):
    path = tmp_path / "a.tar"
    member = tarfile.TarInfo("././@LongLink")
    member.type, member.size = tarfile.GNUTYPE_LONGNAME, 2**33
    path.write_bytes(member.tobuf(tarfile.GNU_FORMAT) + bytes(4096))
    tracemalloc.start()
    (source,) = find_sources([str(path)])
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert "broken archive, the rest is lost: a header of 8,589,934,592 bytes" in reason(source)
    assert peak < 10_000_000


def test_a_locked_folder_does_not_hide_the_archives_beside_it(tmp_path, monkeypatch):
    write_tar(tmp_path / "a.tar", {"a.png": b"a"})
    (tmp_path / "locked").mkdir()
    scandir = os.scandir

    def refuse(path):
        if Path(path).name == "locked":
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    locked, found = find_sources([str(tmp_path)])
    assert (locked.id, found.id) == ("locked", "a.tar/a.png")


def test_members_of_one_name_are_refused_in_a_folder_of_archives_too(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for content in (b"1", b"2"):
            member = tarfile.TarInfo("a.png")
            member.size = 1
            archive.addfile(member, io.BytesIO(content))
    with pytest.raises(UsageError, match=r"'a\.tar/a\.png': byte 512 of .* and byte 1,536 of "):
        list(find_sources([str(tmp_path)]))


def test_the_archives_that_are_read_are_not_counted_as_passed_over(tmp_path):
    write_tar(tmp_path / "a.tar", {"a.png": b"a", "a.json": b"{}"})
    (tmp_path / "notes.txt").write_bytes(b"")
    passed: dict[str, str] = {}
    list(find_sources([str(tmp_path)], on_skip=passed.__setitem__))
    assert passed == {"notes.txt": "with extension .txt", "a.tar/a.json": "with extension .json"}
