"""Read anywhere in a file or object, however often the way to it breaks down."""

import io
import os
from functools import partial
from typing import Any, Final, Protocol, Self

from vsc_serve.errors import InputError, SourceUnavailable
from vsc_serve.sources.base import fault_below, open_regular
from vsc_serve.sources.faults import Fault, fault_of_store
from vsc_serve.sources.retry import RETRY, RetryPolicy, reach
from vsc_serve.sources.roots import Root
from vsc_serve.sources.stores import file_system, is_url

_MARKS: Final = ("ETag", "etag", "LastModified", "Last-Modified", "last_modified", "mtime")
"""Keys under which file systems say which version of an object there is."""


class _Handle(Protocol):
    """Something open that can be read at any position."""

    size: int | None
    """Bytes; None where the store does not say."""
    version: object
    """Equal for the same content."""

    def read_at(self, position: int, size: int) -> bytes:
        """Return bytes from a position: fewer than asked for only at the end."""

    def close(self) -> None:
        """Close it."""


class _LocalHandle:
    def __init__(self, path: str) -> None:
        self._file, status = open_regular(path)
        self.size: int | None = status.st_size
        self.version: object = (status.st_size, status.st_mtime_ns)

    def read_at(self, position: int, size: int) -> bytes:
        os.lseek(self._file, position, os.SEEK_SET)
        content = os.read(self._file, size)
        while len(content) < size and (more := os.read(self._file, size - len(content))):
            content += more
        return content

    def close(self) -> None:
        os.close(self._file)


class _StoreHandle:
    def __init__(self, url: str) -> None:
        system, path = file_system(url)
        self._file: Any = system.open(path, "rb")
        details = getattr(self._file, "details", None) or {}
        size = details.get("size", getattr(self._file, "size", None))
        self.size: int | None = size if isinstance(size, int) else None
        self.version: object = (self.size, *(str(details.get(mark)) for mark in _MARKS))

    def read_at(self, position: int, size: int) -> bytes:
        self._file.seek(position)
        blocks = []
        while size > 0 and (block := self._file.read(size)):
            blocks.append(block)
            size -= len(block)
        return b"".join(blocks)

    def close(self) -> None:
        self._file.close()


class PlaceFile(io.RawIOBase):
    """A file or object behind a URL, open for reading anywhere in it.

    A read that fails because the place cannot be reached is done again on a file opened anew.

    Args:
        place: Path or URL.
        retry: How often and how long to try.
        root: Folder or mount that holds it.
        was_there: Whether it was found before: if it is missing now, it cannot be reached.

    Raises:
        InputError: It cannot be opened or read; the message is the reason.
        SourceUnavailable: It cannot be reached.
    """

    def __init__(
        self,
        place: str,
        retry: RetryPolicy = RETRY,
        *,
        root: Root | None = None,
        was_there: bool = False,
    ) -> None:
        super().__init__()
        self._handle: _Handle | None = None
        self.place = place
        self._retry = retry
        self._root = root
        self._was_there = was_there
        self._position = 0
        self._version: object = None
        self._size = reach(place, self._open, retry, self._judge).size
        self._was_there = True

    @property
    def size(self) -> int:
        """Bytes of the file. Raises InputError where a server does not say."""
        if self._size is None:
            raise InputError(
                "the server does not say how long it is, so that it cannot be read in place;"
                " download it first",
                kind="unsupported",
            )
        return self._size

    @property
    def version(self) -> object:
        """Size and time, or what a store says in their place: another where the content is."""
        return self._version

    def release(self) -> None:
        """Let go of the file until the next read, for which it is opened again."""
        handle, self._handle = getattr(self, "_handle", None), None
        if handle is not None:
            handle.close()

    def read(self, size: int | None = -1) -> bytes:
        """Read so many bytes, by default all: fewer only at the end."""
        if size is None or size < 0:
            size = max(self.size - self._position, 0)
        content = self.read_at(self._position, size)
        self._position += len(content)
        return content

    def read_at(self, position: int, size: int) -> bytes:
        """Read so many bytes from a position: fewer only at the end."""
        return reach(self.place, partial(self._read, position, size), self._retry, self._judge)

    def readinto(self, buffer: Any) -> int:
        """Fill a buffer; return how many bytes that were."""
        view = memoryview(buffer).cast("B")
        content = self.read(len(view))
        view[: len(content)] = content
        return len(content)

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Go to a position. Raises ValueError where there can be none."""
        if whence == io.SEEK_END:
            offset += self.size
        position = offset + (self._position if whence == io.SEEK_CUR else 0)
        if not 0 <= position < 2**63:
            raise ValueError(f"no position in a file: {position}")
        self._position = position
        return position

    def tell(self) -> int:
        """Return the position."""
        return self._position

    def readable(self) -> bool:
        """Return True."""
        return True

    def seekable(self) -> bool:
        """Return True."""
        return True

    def close(self) -> None:
        """Close it."""
        self.release()
        super().close()

    def __enter__(self) -> Self:
        return self

    def _read(self, position: int, size: int) -> bytes:
        if self._size is not None:  # a wrong length in a header must not take memory
            size = min(size, max(self._size - position, 0))
        try:
            return self._open().read_at(position, size) if size > 0 else b""
        except Exception:
            self.release()
            raise

    def _open(self) -> _Handle:
        """Return what is open, opened anew where it is not."""
        if self._handle is None:
            self._handle = (_StoreHandle if is_url(self.place) else _LocalHandle)(self.place)
            version = self._handle.version
            if self._version not in (None, version):
                raise SourceUnavailable(
                    f"{self.place}: was replaced while it was read. Let nobody write it meanwhile."
                )
            self._version = version
        return self._handle

    def _judge(self, error: Exception) -> Fault:
        is_remote = is_url(self.place)
        fault = fault_of_store(error) if is_remote else fault_below(self._root, self.place, error)
        if fault.kind == "missing" and self._was_there:
            return Fault("unavailable", "it was there before and is missing now")
        return fault
