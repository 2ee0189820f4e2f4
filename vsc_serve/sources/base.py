"""Source of one image: an id, and where its bytes lie.

A source is small: it is made in one process and read in another, and a run of a million images
keeps none of them. So it says where the bytes are, and `read` fetches them.
"""

import errno
import os
import stat
from dataclasses import dataclass, field
from functools import partial
from typing import Final, Protocol, runtime_checkable

from vsc_serve.errors import InputError, Kind
from vsc_serve.sources.faults import Fault, fault_of_file
from vsc_serve.sources.retry import RETRY, RetryPolicy, reach
from vsc_serve.sources.roots import Root

MAX_BYTES: Final = 512 * 2**20
"""Largest encoded image that is read, in bytes: the largest one allowed, 16 bits a channel."""

# Without O_NONBLOCK, opening a pipe waits for a writer that may never come.
_OPEN_FLAGS: Final = (
    os.O_RDONLY
    | getattr(os, "O_NONBLOCK", 0)
    | getattr(os, "O_BINARY", 0)
    | getattr(os, "O_CLOEXEC", 0)
)


@runtime_checkable
class Source(Protocol):
    """One image: hashable, picklable, and read when it is wanted."""

    @property
    def id(self) -> str:
        """Name of its row."""

    def read(self, retry: RetryPolicy = RETRY) -> bytes:
        """Return the encoded image.

        Args:
            retry: How often and how long to try while it cannot be reached.

        Raises:
            InputError: It cannot be read; the message is the reason, without the path.
            SourceUnavailable: It cannot be reached; or the machine failed (no memory, too many
                open files). The message says where.
        """


@dataclass(frozen=True, slots=True)
class FileSource:
    """Image in a file."""

    id: str
    """Path relative to the folder it was found in, with `/`; or the path as it was given."""
    path: str
    """Where it lies."""
    root: Root | None = field(default=None, compare=False, repr=False)
    """Folder or mount that holds it, as it was when the search began."""

    @property
    def where(self) -> str:
        """Where it lies, for people."""
        return self.path

    def read(self, retry: RetryPolicy = RETRY) -> bytes:
        """Return the file's bytes; see `Source.read`."""
        return read_file(self.path, retry=retry, root=self.root)


@dataclass(frozen=True, slots=True)
class UnreadableSource:
    """Something that should have given images and cannot: a locked folder, a cut-off archive.

    It takes its place among the sources so that it is listed like any unreadable file.
    """

    id: str
    """What cannot be read."""
    reason: str
    """Why."""
    kind: Kind = "unreadable"

    @property
    def where(self) -> str:
        """Where it lies, for people."""
        return self.id

    def read(self, retry: RetryPolicy = RETRY) -> bytes:
        """Raise InputError with the reason."""
        raise InputError(self.reason, kind=self.kind)


def read_file(
    path: str,
    max_bytes: int = MAX_BYTES,
    *,
    retry: RetryPolicy = RETRY,
    root: Root | None = None,
) -> bytes:
    """Read a whole file, if it is a file and not too large.

    Args:
        path: Where it lies.
        max_bytes: Refuse a larger one, before reading it.
        retry: How often and how long to try while it cannot be reached.
        root: Folder or mount that holds it: where that has gone away, a file that is missing
            cannot be reached.

    Raises:
        InputError: It is not there, no regular file, too large or not readable.
        SourceUnavailable: It cannot be reached, or the machine failed.
    """
    return read_with_status(path, max_bytes, retry=retry, root=root)[0]


def read_with_status(
    path: str,
    max_bytes: int = MAX_BYTES,
    *,
    retry: RetryPolicy = RETRY,
    root: Root | None = None,
) -> tuple[bytes, os.stat_result]:
    """Read a whole file as `read_file` does, and return its status too."""
    return reach(path, partial(_read, path, max_bytes), retry, partial(fault_below, root, path))


def _read(path: str, max_bytes: int) -> tuple[bytes, os.stat_result]:
    file, status = open_regular(path)
    try:
        check_size(status.st_size, max_bytes)
        return _read_exactly(file, status.st_size), status
    finally:
        os.close(file)


def open_regular(path: str) -> tuple[int, os.stat_result]:
    """Open a file, never waiting for one that is no file; return its descriptor and status.

    Raises:
        InputError: It is no regular file.
        OSError: It cannot be opened.
    """
    file = os.open(path, _OPEN_FLAGS)
    try:
        status = os.fstat(file)
        if not stat.S_ISREG(status.st_mode):
            raise _no_file()
    except BaseException:
        os.close(file)
        raise
    return file, status


def check_size(size: int, max_bytes: int = MAX_BYTES) -> None:
    """Raise InputError when an image has more bytes than are read into memory."""
    if size > max_bytes:
        raise InputError(
            f"too large: {size:,} bytes are over the limit of {max_bytes:,} bytes", kind="too large"
        )


def _read_exactly(file: int, size: int) -> bytes:
    """Read `size` bytes, or what there is when the file has become shorter."""
    content = os.read(file, size)
    while len(content) < size and (more := os.read(file, size - len(content))):
        content += more
    return content


def fault_below(root: Root | None, path: str, error: Exception) -> Fault:
    """Judge an error of a file or folder on this machine that lies below a root."""
    if not isinstance(error, OSError | ValueError | MemoryError):
        raise error
    fault = fault_of_file(error)
    if fault.kind == "missing" and root is not None and root.is_lost():
        return gone(root)
    if isinstance(error, OSError) and error.errno == errno.ENXIO and _is_socket(path):
        return Fault("not a file", str(_no_file()))
    return fault


def gone(root: Root) -> Fault:
    """Return the fault of everything below a root that is lost."""
    reason = (
        f"{root.path}, which was there when the run began, is gone or was replaced (unmounted?)"
    )
    return Fault("unavailable", reason, "Mount it again.")


def _is_socket(path: str) -> bool:
    """Tell whether a path leads to what cannot be opened, as ENXIO says of a lost device too."""
    try:
        mode = os.stat(path).st_mode  # noqa: PTH116
    except OSError:
        return False
    return stat.S_ISSOCK(mode) or stat.S_ISFIFO(mode) or stat.S_ISCHR(mode) or stat.S_ISBLK(mode)


def _no_file() -> InputError:
    return InputError("not a regular file", kind="not a file")
