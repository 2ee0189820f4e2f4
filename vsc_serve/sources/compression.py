"""Tell what a file is by its first bytes, whatever it is called, and unpack it while it is read."""

import bz2
import gzip
import io
import lzma
import zlib
from collections.abc import Callable
from typing import Any, Final, Literal, Self, TypeVar

from vsc_serve.errors import InputError
from vsc_serve.sources.files import PlaceFile

Value = TypeVar("Value")

Container = Literal["tar", "zip", "parquet"]
"""Files that hold many images."""

HEAD_BYTES: Final = 512
"""Bytes from which `container_of` tells what a file is."""
_BUFFER: Final = 2**18
_TAR_MARK: Final = slice(257, 262)

DAMAGE: Final = (OSError, EOFError, zlib.error, lzma.LZMAError, ValueError, RuntimeError)
"""Exceptions of the unpackers on damaged bytes."""


def _unzstd(file: Any) -> Any:
    """Open a zstd file. Raises InputError when the package that reads it is not installed."""
    try:
        from backports import zstd
    except ImportError:
        raise InputError(
            "zstd archive, which needs backports.zstd: pip install 'vsc-serve[zstd]', or unpack it"
            " with zstd -d",
            kind="package missing",
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


_UNPACKERS: Final[dict[bytes, tuple[str, Callable[[Any], Any]]]] = {
    b"\x1f\x8b": ("gzip", lambda file: gzip.GzipFile(fileobj=file)),
    b"BZh": ("bzip2", bz2.BZ2File),
    b"\xfd7zXZ\0": ("xz", lzma.LZMAFile),
    b"\x28\xb5\x2f\xfd": ("zstd", _unzstd),
}
_CONTAINERS: Final[dict[bytes, Container]] = {
    b"PK\3\4": "zip",
    b"PK\5\6": "zip",
    b"PAR1": "parquet",
}
_FOREIGN: Final = {
    b"7z\xbc\xaf\x27\x1c": "7z",
    b"Rar!\x1a\x07": "RAR",
    b"LZIP": "lzip",
    b"\x04\x22\x4d\x18": "LZ4",
    b"\x1f\x9d": "compress (.Z)",
}


def container_of(head: bytes, name: str) -> Container:
    """Tell what holds images: by the first bytes of a file, and by its name where they are silent.

    Raises:
        InputError: It is an archive of a kind that is not read.
    """
    if (foreign := _starting(head, _FOREIGN)) is not None:
        raise InputError(
            f"{foreign} archive, which is not read; pack it as tar or zip", kind="unsupported"
        )
    known = _starting(head, _CONTAINERS)
    if known is not None:
        return known
    if _starting(head, _UNPACKERS) is not None or head[_TAR_MARK] == b"ustar":
        return "tar"
    lower = name.lower()
    by_name: dict[str, Container] = {".zip": "zip", ".parquet": "parquet"}
    return next((kind for end, kind in by_name.items() if lower.endswith(end)), "tar")


def compression_of(head: bytes) -> str | None:
    """Name how a file is compressed, None where it is not."""
    found = _starting(head, _UNPACKERS)
    return None if found is None else found[0]


def _starting(head: bytes, marks: dict[bytes, Value]) -> Value | None:
    return next((value for mark, value in marks.items() if head.startswith(mark)), None)


class Unpacked:
    """A compressed file, unpacked while it is read; going back starts again from its beginning.

    Args:
        file: The compressed file, closed with this one.
        unpack: Opens it.
    """

    def __init__(self, file: PlaceFile, unpack: Callable[[Any], Any]) -> None:
        self._file = file
        self._unpacked = unpack(io.BufferedReader(file, _BUFFER))
        self.read = self._unpacked.read
        self.seek = self._unpacked.seek
        self.tell = self._unpacked.tell

    def close(self) -> None:
        """Close both."""
        self._unpacked.close()
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def unpacked(file: PlaceFile) -> "PlaceFile | Unpacked":
    """Return a file as it is, or unpacked where its first bytes say that it is compressed.

    Raises:
        InputError: The package that unpacks it is not installed.
    """
    found = _starting(file.read_at(0, HEAD_BYTES), _UNPACKERS)
    if found is None:
        return file
    try:
        return Unpacked(file, found[1])
    except BaseException:
        file.close()
        raise
