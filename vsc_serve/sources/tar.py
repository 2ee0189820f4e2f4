"""Images in tar archives, as webdataset writes them: found by their place, read by their place.

The directory of a plain archive is walked from header to header without reading what lies between;
a worker goes straight to its member. A compressed archive can only be read from its beginning: each
process keeps one decompressor and moves forward with it, so that it passes the archive once, in
constant memory, as long as its sources come in order.
"""

import struct
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO, Final, cast

from vsc_serve.errors import InputError
from vsc_serve.sources.base import Source, UnreadableSource, check_size
from vsc_serve.sources.compression import DAMAGE, HEAD_BYTES, Unpacked, compression_of, unpacked
from vsc_serve.sources.files import PlaceFile
from vsc_serve.sources.members import is_wanted
from vsc_serve.sources.names import Choice, Naming
from vsc_serve.sources.open_files import drop, keep_open
from vsc_serve.sources.retry import RETRY, RetryPolicy

_ERRORS: Final = (tarfile.TarError, struct.error, LookupError, OverflowError, *DAMAGE)
"""Exceptions of tarfile on damaged headers."""
_BLOCK: Final = tarfile.BLOCKSIZE
_SCAN: Final = 2**20
"""Bytes that are looked through at a time for what follows the end of an archive."""
_LARGEST_HEADER: Final = 2**24
"""Bytes of a header, with its long names: tarfile would read any number into memory."""


@dataclass(frozen=True, slots=True)
class TarSource:
    """Image in a tar archive."""

    id: str
    """Name of the member; after the archive's, where there are several."""
    path: str
    """Path or URL of the archive."""
    offset: int
    """Where its bytes begin, in the archive as it is unpacked."""
    size: int
    """How many they are."""

    @property
    def where(self) -> str:
        """Where it lies, for people."""
        return f"byte {self.offset:,} of {self.path}"

    def read(self, retry: RetryPolicy = RETRY) -> bytes:
        """Return the member's bytes; see `Source.read`."""
        check_size(self.size)
        try:
            archive = keep_open(self.path, open_tar, retry)
            archive.seek(self.offset)
            content = archive.read(self.size)
        except InputError:
            drop(self.path, open_tar)
            raise
        except DAMAGE as error:
            drop(self.path, open_tar)
            raise InputError(f"damaged in its archive: {error}", kind="broken") from error
        if len(content) < self.size:
            raise InputError("cut off: its archive ends before it does", kind="broken")
        return content


def open_tar(place: str, retry: RetryPolicy) -> PlaceFile | Unpacked:
    """Open an archive that was found before, for reading anywhere in what it unpacks to."""
    return unpacked(PlaceFile(place, retry, was_there=True))


def search_tar(file: PlaceFile, naming: Naming, choice: Choice) -> Iterator[Source]:
    """Give the images of a tar archive in its own order, and of those that follow it in the file.

    Damage ends the search with a source that says so; what came before it stays.

    Args:
        file: The archive.
        naming: How members are called.
        choice: What is left out.
    """
    compression = compression_of(file.read_at(0, HEAD_BYTES))
    try:
        with unpacked(file) as archive:
            yield from _members(file.place, cast("BinaryIO", _Headers(archive)), naming, choice)
    except _ERRORS as error:
        kind = f" (inside {compression})" if compression else ""
        reason = f"broken archive, the rest is lost: {error}{kind}"
        yield UnreadableSource(naming.id_of_archive(file.place), reason, "broken")


class _Headers:
    """An archive as tarfile sees it while it reads headers: no more of it than they may take."""

    def __init__(self, archive: PlaceFile | Unpacked) -> None:
        self._read = archive.read
        self.seek, self.tell = archive.seek, archive.tell

    def read(self, size: int) -> bytes:
        """Read some bytes. Raises ReadError when those are more than a header may have."""
        if size > _LARGEST_HEADER:
            raise tarfile.ReadError(f"a header of {size:,} bytes")
        return self._read(size)


def _members(place: str, file: BinaryIO, naming: Naming, choice: Choice) -> Iterator[Source]:
    start: int | None = 0
    while start is not None:
        file.seek(start)
        with tarfile.open(fileobj=file, mode="r:") as archive:
            while (member := archive.next()) is not None:
                if member.size < 0:  # would lead back to a header that was read
                    raise tarfile.ReadError(f"a member of {member.size} bytes")
                archive.members = []  # type: ignore[attr-defined]  # it keeps all it has seen
                yield from _member(place, member, naming, choice)
            start = _find_next(file, archive.offset)


def _member(
    place: str, member: tarfile.TarInfo, naming: Naming, choice: Choice
) -> Iterator[Source]:
    """Give one member, unless it is no image or is passed over."""
    name = member.name.removeprefix("./")
    if member.isdir() or not is_wanted(name, naming, choice):
        return
    if member.isreg() and not member.issparse():
        yield TarSource(naming.id_of(name), place, member.offset_data, member.size)
    else:
        reason = "a link or a sparse file inside an archive"
        yield UnreadableSource(naming.id_of(name), reason, "unsupported")


def _find_next(file: BinaryIO, end: int) -> int | None:
    """Return where another archive begins after the end of one, as `cat a.tar b.tar` leaves it.

    Raises:
        ReadError: What tarfile took for the end is none: it stops at a broken header too.
    """
    file.seek(end)
    if file.read(_BLOCK).strip(b"\0"):
        raise tarfile.ReadError(f"no header where one belongs, at byte {end:,}")
    position = end + _BLOCK
    while block := file.read(_SCAN):
        if rest := block.lstrip(b"\0"):
            place = position + len(block) - len(rest)
            return place - (place - end) % _BLOCK
        position += len(block)
    return None
