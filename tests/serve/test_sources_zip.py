"""Zip archives whose directory is not what the end of the archive says of it."""

import io
import os
import struct
import zipfile
import zlib
from pathlib import Path

import pytest

from vsc_serve.errors import InputError
from vsc_serve.sources import Source, UnreadableSource, find_sources

END = b"PK\5\6"


def zip_of(members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in members.items():
            archive.writestr(zipfile.ZipInfo(name), content)
    return buffer.getvalue()


def numbered(count: int) -> dict[str, bytes]:
    return {f"{number:06}.png": b"%d" % number for number in range(count)}


def search(path: Path, content: bytes) -> list[Source]:
    path.write_bytes(content)
    return list(find_sources([str(path)]))


def read_all(path: Path, content: bytes) -> dict[str, bytes]:
    return {source.id: source.read() for source in search(path, content)}


def reason(source: Source) -> str:
    assert isinstance(source, UnreadableSource)
    return source.reason


def without_wide_records(content: bytes) -> bytes:
    """The archive as macOS writes it: counts and offsets cut to 16 and 32 bits."""
    locator = content.rfind(b"PK\6\7")
    record = content.rfind(b"PK\6\6", 0, locator)
    *_, count, size, offset = struct.unpack("<4sQ2H2L4Q", content[record : record + 56])
    end = (END, 0, 0, count % 2**16, count % 2**16, size, offset % 2**32, 0)
    return content[:record] + struct.pack("<4s4H2LH", *end)


def with_end(content: bytes, **fields: int) -> bytes:
    """The archive with other numbers in the record at its end."""
    place = content.rfind(END)
    names = ("mark", "disk", "first_disk", "here", "count", "size", "offset", "comment")
    found = dict(zip(names, struct.unpack_from("<4s4H2LH", content, place), strict=True))
    return content[:place] + struct.pack("<4s4H2LH", *(found | fields).values())


@pytest.mark.slow
def test_more_members_than_16_bits_count_are_all_read(tmp_path):
    members = numbered(65_536 + 7)
    content = without_wide_records(zip_of(members))
    assert b"PK\6\6" not in content
    assert int.from_bytes(content[-12:-10], "little") == 7
    found = search(tmp_path / "mac.zip", content)
    assert [source.id for source in found] == list(members)
    assert found[-1].read() == b"65542"


def test_a_count_that_is_too_small_loses_nothing(tmp_path):
    members = numbered(9)
    for count in (0, 1, 8):
        changed = with_end(zip_of(members), count=count, here=count)
        assert read_all(tmp_path / "a.zip", changed) == members


def test_a_count_that_is_too_large_is_no_quiet_end(tmp_path):
    changed = with_end(zip_of(numbered(9)), count=12, here=12)
    *found, rest = search(tmp_path / "a.zip", changed)
    assert [source.read() for source in found] == list(numbered(9).values())
    assert reason(rest) == "broken archive: its directory has 9 members, but counts 12"


def test_a_directory_that_is_longer_than_its_end_says_is_read_whole(tmp_path):
    members = numbered(9)
    content = zip_of(members)
    entry = 46 + len("000000.png")
    size = 9 * entry
    for wrong in (size - entry, size - 3 * entry, 0):
        assert read_all(tmp_path / "a.zip", with_end(content, size=wrong)) == members


def test_a_directory_that_ends_too_early_is_no_quiet_end(tmp_path):
    """Both numbers are wrong alike: what is left is the count."""
    content = zip_of(numbered(9))
    place = content.rfind(END)
    size, offset = struct.unpack_from("<2L", content, place + 12)
    entry = size // 9
    changed = with_end(content, size=size - 2 * entry, offset=offset + 2 * entry)
    *found, rest = search(tmp_path / "a.zip", changed)
    assert len(found) == 7
    assert "its directory has 7 members, but counts 9" in reason(rest)


def test_an_entry_that_is_none_is_no_quiet_end(tmp_path):
    content = bytearray(zip_of(numbered(9)))
    third = [place for place in range(len(content)) if content[place : place + 4] == b"PK\1\2"][3]
    content[third] = 0
    *found, rest = search(tmp_path / "a.zip", bytes(content))
    assert len(found) == 3
    assert "no entry where one belongs" in reason(rest)


def test_two_archives_in_one_file_are_not_read_as_one(tmp_path):
    """`cat a.zip b.zip`: every tool reads the second alone."""
    both = zip_of({"a.png": b"a"}) + zip_of({"b.png": b"b"})
    found, rest = search(tmp_path / "both.zip", both)
    assert found.read() == b"b"
    assert reason(rest) == "broken archive: another archive lies before it in the file; split them"


def test_a_part_of_a_split_archive_says_so(tmp_path):
    (found,) = search(tmp_path / "a.zip", with_end(zip_of(numbered(2)), disk=3))
    assert reason(found) == "broken archive: a part of a split archive; join its parts"


def test_a_comment_that_holds_the_mark_of_an_end_is_a_comment(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("a.png", b"a")
        archive.comment = b"see PK\5\6 and" + bytes(30)
    (source,) = find_sources([str(tmp_path / "a.zip")])
    assert source.read() == b"a"


@pytest.mark.skipif(os.name != "posix", reason="needs files with holes")
def test_members_beyond_4_gib_are_found_without_wide_records(tmp_path):
    """Offsets begin again at 0 every 4 GiB in archives as macOS writes them."""
    wrap = 2**32
    members = [(b"a.png", b"a", 0), (b"b.png", b"b", 1_000), (b"c.png", b"c", wrap + 7)]
    members.append((b"d.png", b"d", wrap + 900))
    path = tmp_path / "mac.zip"
    entries = b""
    with path.open("wb") as file:
        for name, content, offset in members:
            facts = (0, 0, 0, 0, 0, zlib.crc32(content), 1, 1, len(name), 0)
            file.seek(offset)
            file.write(struct.pack("<4s5H3L2H", b"PK\3\4", *facts) + name + content)
            facts = (0, *facts, 0, 0, 0, 0, offset % wrap)
            entries += struct.pack("<4s6H3L5H2L", b"PK\1\2", *facts) + name
        start = file.tell()
        file.write(entries)
        end = (END, 0, 0, 4, 4, len(entries), start % wrap, 0)
        file.write(struct.pack("<4s4H2LH", *end))
    found = {source.id: source.read() for source in find_sources([str(path)])}
    assert found == {"a.png": b"a", "b.png": b"b", "c.png": b"c", "d.png": b"d"}


# Names


def named(raw: bytes, *, extra: bytes = b"", flags: int = 0) -> bytes:
    """An archive with one member whose name is exactly these bytes."""
    facts = (0, flags, 0, 0, 0, zlib.crc32(b"x"), 1, 1, len(raw))
    local = struct.pack("<4s5H3L2H", b"PK\3\4", *facts, 0) + raw + b"x"
    entry = struct.pack("<4s6H3L5H2L", b"PK\1\2", 0, *facts, len(extra), 0, 0, 0, 0, 0) + raw
    end = struct.pack("<4s4H2LH", END, 0, 0, 1, 1, len(entry + extra), len(local), 0)
    return local + entry + extra + end


@pytest.mark.parametrize("name", ["café.png", "größe 漢字.png", "plain.png"])
def test_a_name_in_utf_8_needs_no_flag(name, tmp_path):
    assert read_all(tmp_path / "a.zip", named(name.encode())) == {name: b"x"}
    assert read_all(tmp_path / "a.zip", named(name.encode(), flags=0x800)) == {name: b"x"}


def test_a_name_that_is_no_utf_8_is_in_code_page_437(tmp_path):
    raw = "größe.png".encode("cp437")
    assert read_all(tmp_path / "a.zip", named(raw)) == {"größe.png": b"x"}


def test_a_name_in_an_extra_field_goes_before_that_of_the_entry(tmp_path):
    raw = "漢字.png".encode("shift-jis")
    better = "漢字.png".encode()
    field = b"\1" + struct.pack("<L", zlib.crc32(raw)) + better
    extra = struct.pack("<HH", 0x7075, len(field)) + field
    assert read_all(tmp_path / "a.zip", named(raw, extra=extra)) == {"漢字.png": b"x"}
    stale = b"\1" + struct.pack("<L", 1) + better
    extra = struct.pack("<HH", 0x7075, len(stale)) + stale
    assert "漢字.png" not in read_all(tmp_path / "a.zip", named(raw, extra=extra))


def test_an_offset_beyond_all_files_is_a_reason(tmp_path):
    content = bytearray(named(b"a.png"))
    place = content.index(b"PK\1\2")
    wide = struct.pack("<HHQ", 1, 8, 2**64 - 1)
    entry = bytearray(content[place : place + 46])
    entry[42:46] = b"\xff" * 4
    entry[30:32] = struct.pack("<H", len(wide))
    changed = bytes(content[:place] + entry + b"a.png" + wide)
    end = struct.pack("<4s4H2LH", END, 0, 0, 1, 1, len(changed) - place, place, 0)
    (source,) = search(tmp_path / "a.zip", changed + end)
    with pytest.raises(InputError, match="no header where one belongs"):
        source.read()
