"""Pictures in zip archives, each read by its place.

`zipfile` holds the whole directory of an archive in memory, in every process that opens it: some
hundred megabytes for a million members. Here the directory is walked entry by entry, and a source
knows where its member lies.
"""

import bz2
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from io import BufferedReader, RawIOBase
from typing import BinaryIO, Final, NamedTuple, cast

from vsc_serve.errors import InputError
from vsc_serve.sources.base import Source, UnreadableSource, check_size, is_machine_failure
from vsc_serve.sources.folder import why_not_wanted
from vsc_serve.sources.names import Choice, Naming, why_junk
from vsc_serve.sources.places import drop, keep_open, open_binary

_END: Final = struct.Struct("<4s4H2LH")
_END_64: Final = struct.Struct("<4sQ2H2L4Q")
_LOCATOR_64: Final = struct.Struct("<4sLQL")
_ENTRY: Final = struct.Struct("<4s6H3L5H2L")
_LOCAL: Final = struct.Struct("<4s5H3L2H")
_LONGEST_COMMENT: Final = 65_535
_TOO_LARGE: Final = 0xFFFFFFFF
"""What a 32-bit field says when the number is in the 64-bit extra field."""
_ENCRYPTED: Final = 0x1
_UTF_8: Final = 0x800
_STORED, _DEFLATED, _BZIP2 = 0, 8, 12


@dataclass(frozen=True, slots=True)
class ZipSource:
    """A picture in a zip archive."""

    id: str
    """Name of the member; after the archive's, where there are several."""
    path: str
    """Path or URL of the archive."""
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

    def read(self) -> bytes:
        """Return the member's bytes. Raises InputError with the reason."""
        check_size(max(self.size, self.compressed))
        try:
            packed = _read_packed(keep_open(self.path, open_binary), self.offset, self.compressed)
        except OSError as error:
            drop(self.path, open_binary)
            if is_machine_failure(error):
                raise
            raise InputError(f"unreadable in its archive: {error}") from error
        content = _unpack(packed, self.method, self.size)
        if len(content) != self.size or zlib.crc32(content) != self.checksum:
            raise InputError("damaged in its archive: the checksum differs")
        return content


def _read_packed(file: BinaryIO, offset: int, size: int) -> bytes:
    """Read the compressed bytes of the member whose local header is at `offset`."""
    file.seek(offset)
    header = file.read(_LOCAL.size)
    if len(header) < _LOCAL.size or header[:4] != b"PK\3\4":
        raise InputError("damaged in its archive: no header where one belongs")
    *_, name_length, extra_length = _LOCAL.unpack(header)
    file.seek(offset + _LOCAL.size + name_length + extra_length)
    return file.read(size)


def _unpack(packed: bytes, method: int, size: int) -> bytes:
    """Decompress no more than the directory promises: a bomb stops there."""
    if method == _STORED:
        return packed
    try:
        if method == _DEFLATED:
            return zlib.decompressobj(-zlib.MAX_WBITS).decompress(packed, size + 1)
        if method == _BZIP2:
            return bz2.BZ2Decompressor().decompress(packed, size + 1)
    except (zlib.error, OSError) as error:
        raise InputError(f"damaged in its archive: {error}") from error
    raise InputError(f"zip compression method {method} is not read; use stored or deflated")


def search_zip(place: str, naming: Naming, choice: Choice) -> Iterator[Source]:
    """Give the pictures of a zip archive in the order of its directory.

    Damage ends the search with a source that says so; what came before it stays.

    Args:
        place: Path or URL of the archive.
        naming: How members are called.
        choice: What is left out.
    """
    try:
        with open_binary(place) as file:
            yield from _members(place, file, naming, choice)
    except (InputError, OSError, struct.error) as error:
        yield UnreadableSource(naming.id_of_archive(place), f"broken archive: {error}")


def _members(place: str, file: BinaryIO, naming: Naming, choice: Choice) -> Iterator[Source]:
    for member in _directory(file):
        if member.name.endswith("/"):
            continue
        why = why_junk(member.name) or why_not_wanted(member.name.rpartition("/")[2])
        if why is None and choice.excludes_any(naming.prefix + member.name):
            why = "excluded"
        if why is not None:
            choice.skip(naming.prefix + member.name, why)
        elif member.flags & _ENCRYPTED:
            yield UnreadableSource(naming.id_of(member.name), "encrypted in its archive")
        else:
            yield ZipSource(naming.id_of(member.name), place, *member.where)


class _Member(NamedTuple):
    name: str
    flags: int
    where: tuple[int, int, int, int, int]
    """Offset, compressed size, size, method, checksum."""


class _Directory(NamedTuple):
    start: int
    entries: int
    shift: int
    """Bytes before the archive, in a file that begins with something else."""


def _directory(file: BinaryIO) -> Iterator[_Member]:
    """Walk the central directory."""
    found = _find_directory(file)
    file.seek(found.start)
    reader = BufferedReader(cast("RawIOBase", file), 65_536)
    try:
        for _ in range(found.entries):
            yield _read_entry(reader, found.shift)
    finally:
        reader.detach()


def _read_entry(reader: BinaryIO, shift: int) -> _Member:
    fields = _ENTRY.unpack(_exactly(reader, _ENTRY.size))
    signature, _, _, flags, method, _, _, checksum, compressed, size, *lengths = fields
    if signature != b"PK\1\2":
        raise InputError("no entry where one belongs in its directory")
    raw_name, extra = _exactly(reader, lengths[0]), _exactly(reader, lengths[1])
    _exactly(reader, lengths[2])
    offset = fields[-1]
    size, compressed, offset = _widen(extra, [size, compressed, offset])
    name = raw_name.decode("utf-8" if flags & _UTF_8 else "cp437", "replace").replace("\\", "/")
    return _Member(name, flags, (offset + shift, compressed, size, method, checksum))


def _exactly(reader: BinaryIO, size: int) -> bytes:
    content = reader.read(size)
    if len(content) < size:
        raise InputError("its directory is cut off")
    return content


def _widen(extra: bytes, numbers: list[int]) -> list[int]:
    """Replace the numbers that did not fit by those in the 64-bit extra field, in their order."""
    position = 0
    while position + 4 <= len(extra):
        kind, length = struct.unpack_from("<HH", extra, position)
        if kind == 1:
            wide = iter(struct.unpack_from(f"<{length // 8}Q", extra, position + 4))
            return [next(wide, number) if number == _TOO_LARGE else number for number in numbers]
        position += 4 + length
    return numbers


def _find_directory(file: BinaryIO) -> _Directory:
    """Find the directory from the end of the file."""
    length = file.seek(0, 2)
    start = max(0, length - _LONGEST_COMMENT - _END.size)
    file.seek(start)
    tail = file.read(length - start)
    place = tail.rfind(b"PK\5\6")
    if place < 0 or len(tail) < place + _END.size:
        raise InputError("no zip archive, or its end is cut off")
    *_, count, size, offset, _ = _END.unpack_from(tail, place)
    end = start + place
    count, size, offset, end = _find_wide_directory(file, end) or (count, size, offset, end)
    if end - size < 0 or end - size < offset:
        raise InputError("its directory does not lie where the archive says")
    return _Directory(end - size, count, end - size - offset)


def _find_wide_directory(file: BinaryIO, end: int) -> tuple[int, int, int, int] | None:
    """Return count, size, offset and end of a 64-bit archive's directory, None if it is none."""
    file.seek(max(0, end - _LOCATOR_64.size))
    locator = file.read(_LOCATOR_64.size)
    if len(locator) < _LOCATOR_64.size or not locator.startswith(b"PK\6\7"):
        return None
    wide_end = end - _LOCATOR_64.size - _END_64.size
    file.seek(max(0, wide_end))
    record = file.read(_END_64.size)
    if len(record) < _END_64.size or not record.startswith(b"PK\6\6"):
        raise InputError("its 64-bit directory is damaged")
    *_, count, size, offset = _END_64.unpack(record)
    return count, size, offset, wide_end
