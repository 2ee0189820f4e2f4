"""Directory of a zip archive, walked entry by entry from its beginning to its end.

`zipfile` holds the whole directory in memory, in every process that opens it: some hundred
megabytes for a million members. And it believes what the end of the archive says of the directory,
which is wrong in archives as macOS writes them: their counts and offsets are cut to 16 and 32 bits.
"""

import io
import struct
import zlib
from collections.abc import Iterator
from typing import BinaryIO, Final, NamedTuple

from vsc_serve.errors import InputError, SourceUnavailable
from vsc_serve.sources.files import PlaceFile

_END: Final = struct.Struct("<4s4H2LH")
_END_64: Final = struct.Struct("<4sQ2H2L4Q")
_LOCATOR_64: Final = struct.Struct("<4sLQL")
_ENTRY: Final = struct.Struct("<4s6H3L5H2L")
_LONGEST_COMMENT: Final = 65_535
_TOO_LARGE: Final = 0xFFFFFFFF
"""Value of a 32-bit field when the number is in the 64-bit extra field."""
_WRAP: Final = 2**32
_ENCRYPTED: Final = 0x1
_UTF_8: Final = 0x800
_WIDE_FIELD, _NAME_FIELD = 0x0001, 0x7075
_BUFFER: Final = 2**16


class Member(NamedTuple):
    """Entry of the directory."""

    name: str
    is_encrypted: bool
    offset: int
    """Where its local header begins."""
    compressed: int
    """Its bytes in the archive."""
    size: int
    """Its bytes when unpacked."""
    method: int
    """How it is compressed, as zip numbers it."""
    checksum: int
    """CRC-32 of the unpacked bytes."""


class _Directory(NamedTuple):
    start: int
    end: int
    announced: int
    """Members, as the end of the archive says."""
    shift: int
    """Bytes before the archive, in a file that begins with something else."""
    is_wrapped: bool
    """Whether offsets are cut to 32 bits in an archive that is longer."""


def read_directory(file: PlaceFile) -> Iterator[Member]:
    """Give the members of an archive in the order of its directory.

    Raises:
        InputError: It is no archive, or its directory is not whole; what came before is right.
    """
    directory = _find_directory(file)
    file.seek(directory.start)
    reader = io.BufferedReader(file, _BUFFER)
    try:
        count = 0
        for member in _entries(reader, directory):
            count += 1
            yield member
        if count < directory.announced:  # more may be: a count of 16 bits begins again at 0
            raise _broken(
                f"its directory has {count:,} members, but counts {directory.announced:,}"
            )
        if not directory.is_wrapped:
            _refuse_earlier_archive(file, directory.shift)
    finally:
        reader.detach()


def _entries(reader: BinaryIO, directory: _Directory) -> Iterator[Member]:
    """Walk the entries up to the end of the directory, whatever the archive's count says."""
    left = directory.end - directory.start
    earlier, shift = 0, 0 if directory.is_wrapped else directory.shift
    while left > 0:
        member, length = _read_entry(reader, left)
        left -= length
        if member is None:
            return
        if directory.is_wrapped and member.offset < earlier:
            shift += _WRAP
        earlier = member.offset
        yield member._replace(offset=member.offset + shift)


def _read_entry(reader: BinaryIO, left: int) -> tuple[Member | None, int]:
    """Read one entry and its length; no entry for the signature that may end a directory."""
    head = _exactly(reader, min(_ENTRY.size, left))
    if head.startswith((b"PK\5\5", b"PK\6\6")):
        return None, left
    if not head.startswith(b"PK\1\2") or len(head) < _ENTRY.size:
        raise _broken("no entry where one belongs in its directory")
    _, _, _, flags, method, _, _, checksum, compressed, size, *lengths, _, _, _, offset = (
        _ENTRY.unpack(head)
    )
    length = _ENTRY.size + sum(lengths)
    if length > left:
        raise _broken("its directory is cut off")
    name, extra, _ = (_exactly(reader, part) for part in lengths)
    fields = dict(_extra_fields(extra))
    size, compressed, offset = _widen(fields.get(_WIDE_FIELD, b""), [size, compressed, offset])
    text = _decode_name(name, fields.get(_NAME_FIELD, b""), is_utf_8=bool(flags & _UTF_8))
    is_encrypted = bool(flags & _ENCRYPTED)
    return Member(text, is_encrypted, offset, compressed, size, method, checksum), length


def _exactly(reader: BinaryIO, size: int) -> bytes:
    content = reader.read(size)
    if len(content) < size:
        raise _broken("its directory is cut off")
    return content


def _extra_fields(extra: bytes) -> Iterator[tuple[int, bytes]]:
    """Give the kind and the content of each extra field."""
    position = 0
    while position + 4 <= len(extra):
        kind, length = struct.unpack_from("<HH", extra, position)
        yield kind, extra[position + 4 : position + 4 + length]
        position += 4 + length


def _widen(field: bytes, numbers: list[int]) -> list[int]:
    """Replace the numbers that did not fit by those in the 64-bit extra field, in their order."""
    wide = iter(struct.unpack(f"<{len(field) // 8}Q", field[: len(field) // 8 * 8]))
    return [next(wide, number) if number == _TOO_LARGE else number for number in numbers]


def _decode_name(name: bytes, field: bytes, *, is_utf_8: bool) -> str:
    """Return a name as text.

    It is UTF-8 where a flag or an extra field says so, and also where it could be nothing else:
    macOS and many libraries write UTF-8 without saying so. Else it is code page 437.
    """
    if len(field) > 5 and int.from_bytes(field[1:5], "little") == zlib.crc32(name):
        name, is_utf_8 = field[5:], True
    try:
        text = name.decode()
    except UnicodeDecodeError:
        text = name.decode("utf-8" if is_utf_8 else "cp437", "surrogateescape")
    return text.replace("\\", "/")


def _find_directory(file: PlaceFile) -> _Directory:
    """Find the directory from the end of the file."""
    length = file.size
    start = max(0, length - _LONGEST_COMMENT - _END.size)
    tail = file.read_at(start, length - start)
    place = _find_end(tail)
    if place < 0:
        raise _broken("no zip archive, or its end is cut off")
    _, disk, first_disk, _, count, size, offset, _ = _END.unpack_from(tail, place)
    wide = _find_wide_directory(file, start + place)
    if wide is None and (disk or first_disk) and disk != 0xFFFF:
        raise InputError("a part of a split archive; join its parts", kind="unsupported")
    count, size, offset, end = wide or (count, size, offset, start + place)
    return _place_directory(file, offset, size, end, count, is_wide=wide is not None)


def _place_directory(
    file: PlaceFile, offset: int, size: int, end: int, count: int, *, is_wide: bool
) -> _Directory:
    """Choose where the directory begins: where it says, or so many bytes before its end."""
    if end - size < 0 or end - size < offset:
        raise _broken("its directory does not lie where the archive says")
    is_earlier = offset < end - size and _leads_to_end(file, offset, end)
    start = offset if is_earlier else end - size
    shift = start - offset
    is_wrapped = not is_wide and shift > 0 and shift % _WRAP == 0
    return _Directory(start, end, count, shift, is_wrapped)


def _leads_to_end(file: PlaceFile, start: int, end: int) -> bool:
    """Tell whether entries lie one after the other from here to the end of a directory.

    Else bytes before the archive are why it does not begin where it says.
    """
    if file.read_at(start, 4) != b"PK\1\2":
        return False
    file.seek(start)
    reader = io.BufferedReader(file, _BUFFER)
    try:
        left = end - start
        while left > 0:
            left -= _read_entry(reader, left)[1]
    except SourceUnavailable:
        raise
    except InputError:
        return False
    finally:
        reader.detach()
    return True


def _find_end(tail: bytes) -> int:
    """Return where the record at the end of an archive begins, -1 without one.

    The last one whose comment ends with the file; else the last one.
    """
    last = place = tail.rfind(b"PK\5\6", 0, max(len(tail) - _END.size + 4, 0))
    while place >= 0:
        *_, comment = _END.unpack_from(tail, place)
        if place + _END.size + comment == len(tail):
            return place
        place = tail.rfind(b"PK\5\6", 0, place)
    return last


def _find_wide_directory(file: PlaceFile, end: int) -> tuple[int, int, int, int] | None:
    """Return count, size, offset and end of a 64-bit archive's directory, None if it is none."""
    locator = file.read_at(max(0, end - _LOCATOR_64.size), _LOCATOR_64.size)
    if len(locator) < _LOCATOR_64.size or not locator.startswith(b"PK\6\7"):
        return None
    wide_end = end - _LOCATOR_64.size - _END_64.size
    record = file.read_at(max(0, wide_end), _END_64.size)
    if len(record) < _END_64.size or not record.startswith(b"PK\6\6"):
        raise _broken("its 64-bit directory is damaged")
    *_, count, size, offset = _END_64.unpack(record)
    return count, size, offset, wide_end


def _refuse_earlier_archive(file: PlaceFile, shift: int) -> None:
    """Raise InputError where another archive ends before this one begins: nobody would read it."""
    start = max(0, shift - _LONGEST_COMMENT - _END.size)
    before = file.read_at(start, shift - start)
    place = before.rfind(b"PK\5\6", 0, max(len(before) - _END.size + 4, 0))
    if place >= 0:
        *_, comment = _END.unpack_from(before, place)
        if place + _END.size + comment == len(before):
            raise _broken("another archive lies before it in the file; split them")


def _broken(text: str) -> InputError:
    return InputError(text, kind="broken")
