"""Images in zip archives, each read by its place."""

import bz2
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from vsc_serve.errors import InputError, SourceUnavailable
from vsc_serve.sources.base import Source, UnreadableSource, check_size
from vsc_serve.sources.files import PlaceFile
from vsc_serve.sources.members import is_wanted
from vsc_serve.sources.names import Choice, Naming
from vsc_serve.sources.open_files import drop, keep_open
from vsc_serve.sources.retry import RETRY, RetryPolicy
from vsc_serve.sources.zip_directory import Member, read_directory

_LOCAL: Final = struct.Struct("<4s5H3L2H")
STORED, DEFLATED, BZIP2 = 0, 8, 12
"""Methods of compression, as zip numbers them."""


@dataclass(frozen=True, slots=True)
class ZipSource:
    """Image in a zip archive."""

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

    @property
    def where(self) -> str:
        """Where it lies, for people."""
        return f"byte {self.offset:,} of {self.path}"

    def read(self, retry: RetryPolicy = RETRY) -> bytes:
        """Return the member's bytes; see `Source.read`."""
        check_size(max(self.size, self.compressed))
        archive = keep_open(self.path, open_zip, retry)
        try:
            start = data_offset(archive, self.offset)
            packed = archive.read_at(start, self.compressed)
        except SourceUnavailable:
            drop(self.path, open_zip)
            raise
        content = _unpack(packed, self.method, self.size)
        if len(content) != self.size or zlib.crc32(content) != self.checksum:
            raise InputError("damaged in its archive: the checksum differs", kind="broken")
        return content


def open_zip(place: str, retry: RetryPolicy) -> PlaceFile:
    """Open an archive that was found before."""
    return PlaceFile(place, retry, was_there=True)


def data_offset(file: PlaceFile, offset: int) -> int:
    """Return where the bytes of the member begin whose local header is at `offset`."""
    header = file.read_at(offset, _LOCAL.size)
    if len(header) < _LOCAL.size or header[:4] != b"PK\3\4":
        raise InputError("damaged in its archive: no header where one belongs", kind="broken")
    *_, name_length, extra_length = _LOCAL.unpack(header)
    return int(offset + _LOCAL.size + name_length + extra_length)


def _unpack(packed: bytes, method: int, size: int) -> bytes:
    """Decompress no more than the directory promises: a bomb stops there."""
    if method == STORED:
        return packed
    try:
        if method == DEFLATED:
            return zlib.decompressobj(-zlib.MAX_WBITS).decompress(packed, size + 1)
        if method == BZIP2:
            return bz2.BZ2Decompressor().decompress(packed, size + 1)
    except (zlib.error, OSError, EOFError, ValueError) as error:
        raise InputError(f"damaged in its archive: {error}", kind="broken") from error
    raise InputError(
        f"zip compression method {method} is not read; use stored or deflated", kind="unsupported"
    )


def search_zip(file: PlaceFile, naming: Naming, choice: Choice) -> Iterator[Source]:
    """Give the images of a zip archive in the order of its directory.

    Damage ends the search with a source that says so; what came before it stays.

    Args:
        file: The archive.
        naming: How members are called.
        choice: What is left out.
    """
    try:
        for member in read_directory(file):
            if not member.name.endswith("/") and is_wanted(member.name, naming, choice):
                yield _source(file.place, member, naming)
    except SourceUnavailable:
        raise
    except InputError as error:
        name = naming.id_of_archive(file.place)
        yield UnreadableSource(name, f"broken archive: {error}", error.kind)


def _source(place: str, member: Member, naming: Naming) -> Source:
    name, is_encrypted, *where = member
    if is_encrypted:
        return UnreadableSource(naming.id_of(name), "encrypted in its archive", "unsupported")
    return ZipSource(naming.id_of(name), place, *where)
