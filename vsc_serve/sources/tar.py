"""Pictures in tar archives, as webdataset writes them: found by their place, read by their place.

The directory of a plain archive is walked from header to header without reading what lies between;
a worker goes straight to its member. A compressed archive can only be read from its beginning: each
process keeps one decompressor and moves forward with it, so that it passes the archive once, in
constant memory, as long as its sources come in order.
"""

import bz2
import gzip
import lzma
import tarfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO, Final, cast

from vsc_serve.errors import InputError
from vsc_serve.sources.base import Source, UnreadableSource, check_size, is_machine_failure
from vsc_serve.sources.folder import why_not_wanted
from vsc_serve.sources.names import Choice, Naming, why_junk
from vsc_serve.sources.places import Unpacked, drop, keep_open, open_binary


def _unzstd(file: BinaryIO) -> Any:
    """Open a zstd file. Raises InputError when the package that reads it is not installed."""
    try:
        from backports import zstd
    except ImportError:
        raise InputError(
            "zstd archive, which needs backports.zstd: pip install 'vsc-serve[zstd]', or unpack it"
            " with zstd -d"
        ) from None
    return _ZstdFile(zstd.ZstdFile(file), zstd.ZstdError)


class _ZstdFile:
    """A zstd file whose damage is an OSError, as that of the other kinds is."""

    def __init__(self, file: Any, error: type[Exception]) -> None:
        self._file, self._error = file, error
        self.tell, self.close = file.tell, file.close

    def read(self, size: int = -1) -> bytes:
        """Read some bytes."""
        return bytes(self._do(self._file.read, size))

    def seek(self, place: int, whence: int = 0) -> int:
        """Go to a place in what is unpacked."""
        return int(self._do(self._file.seek, place, whence))

    def _do(self, method: Callable[..., Any], *arguments: int) -> Any:
        try:
            return method(*arguments)
        except self._error as error:
            raise OSError(str(error)) from error


_UNPACKERS: Final[dict[str, Callable[[BinaryIO], Any]]] = {
    ".gz": lambda file: gzip.GzipFile(fileobj=file),
    ".tgz": lambda file: gzip.GzipFile(fileobj=file),
    ".bz2": bz2.BZ2File,
    ".xz": lzma.LZMAFile,
    ".zst": _unzstd,
}
_ERRORS: Final = (tarfile.TarError, OSError, EOFError, zlib.error, lzma.LZMAError, ValueError)
_BLOCK: Final = tarfile.BLOCKSIZE


@dataclass(frozen=True, slots=True)
class TarSource:
    """A picture in a tar archive."""

    id: str
    """Name of the member; after the archive's, where there are several."""
    path: str
    """Path or URL of the archive."""
    offset: int
    """Where its bytes begin, in the archive as it is unpacked."""
    size: int
    """How many they are."""

    def read(self) -> bytes:
        """Return the member's bytes. Raises InputError with the reason."""
        check_size(self.size)
        try:
            archive = keep_open(self.path, open_tar)
            archive.seek(self.offset)
            content = archive.read(self.size)
        except _ERRORS as error:
            drop(self.path, open_tar)
            if is_machine_failure(error):
                raise
            raise InputError(f"unreadable in its archive: {error}") from error
        if len(content) < self.size:
            raise InputError("cut off: its archive ends before it does")
        return content


def open_tar(place: str) -> BinaryIO:
    """Open an archive for reading anywhere in what it unpacks to. Raises InputError."""
    file = open_binary(place)
    unpackers = (unpack for end, unpack in _UNPACKERS.items() if place.lower().endswith(end))
    unpack = next(unpackers, None)
    return file if unpack is None else cast("BinaryIO", Unpacked(file, unpack))


def search_tar(place: str, naming: Naming, choice: Choice) -> Iterator[Source]:
    """Give the pictures of a tar archive in its own order.

    Damage ends the search with a source that says so; what came before it stays.

    Args:
        place: Path or URL of the archive.
        naming: How members are called.
        choice: What is left out.
    """
    try:
        with open_tar(place) as file, tarfile.open(fileobj=file, mode="r:") as archive:
            while (member := archive.next()) is not None:
                archive.members = []  # type: ignore[attr-defined]  # it keeps all it has seen
                yield from _member(place, member, naming, choice)
            _require_end(file, archive.offset)
    except InputError as error:
        yield UnreadableSource(naming.id_of_archive(place), str(error))
    except _ERRORS as error:
        yield UnreadableSource(
            naming.id_of_archive(place), f"broken archive, the rest is lost: {error}"
        )


def _member(
    place: str, member: tarfile.TarInfo, naming: Naming, choice: Choice
) -> Iterator[Source]:
    """Give one member, unless it is no picture or is passed over."""
    name = member.name.removeprefix("./")
    if member.isdir():
        return
    why = why_junk(name) or why_not_wanted(name.rpartition("/")[2])
    if why is None and choice.excludes_any(naming.prefix + name):
        why = "excluded"
    if why is not None:
        choice.skip(naming.prefix + name, why)
    elif member.isreg() and not member.issparse():
        yield TarSource(naming.id_of(name), place, member.offset_data, member.size)
    else:
        yield UnreadableSource(naming.id_of(name), "a link or a sparse file inside an archive")


def _require_end(file: BinaryIO, offset: int) -> None:
    """Check that the archive ended where tarfile stopped: it stops at a broken header too."""
    file.seek(offset)
    block = file.read(_BLOCK)
    if block.strip(b"\0"):
        raise tarfile.ReadError(f"no header where one belongs, at byte {offset:,}")
