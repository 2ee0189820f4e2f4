"""What a picture to be read is: an id, and where its bytes lie.

A source is small: it is made in one process and read in another, and a run of a million images
keeps none of them. So it says where the bytes are, and `read` fetches them.
"""

import errno
import os
import stat
from dataclasses import dataclass
from typing import Final, Protocol, runtime_checkable

from vsc_serve.errors import InputError

MAX_BYTES: Final = 512 * 2**20
"""Largest encoded picture that is read, in bytes: the largest one allowed, 16 bits a channel."""

# Without O_NONBLOCK, opening a pipe waits for a writer that may never come.
_OPEN_FLAGS: Final = (
    os.O_RDONLY
    | getattr(os, "O_NONBLOCK", 0)
    | getattr(os, "O_BINARY", 0)
    | getattr(os, "O_CLOEXEC", 0)
)
_EXHAUSTED: Final = (errno.ENOMEM, errno.EMFILE, errno.ENFILE)


@runtime_checkable
class Source(Protocol):
    """One picture: hashable, picklable, and read when it is wanted."""

    @property
    def id(self) -> str:
        """What its row is called."""

    def read(self) -> bytes:
        """Return the encoded picture.

        Raises:
            InputError: It cannot be read; the message is the reason, without the path.
            OSError: The machine failed, not the picture (no memory, too many open files).
        """


@dataclass(frozen=True, slots=True)
class FileSource:
    """A picture that is a file."""

    id: str
    """Path relative to the folder it was found in, with `/`; or the path as it was given."""
    path: str
    """Where it lies."""

    def read(self) -> bytes:
        """Return the file's bytes. Raises InputError with the reason, or OSError."""
        return read_file(self.path)


@dataclass(frozen=True, slots=True)
class UnreadableSource:
    """Something that should have given pictures and cannot: a locked folder, a cut-off archive.

    It takes its place among the sources so that it is listed like any unreadable file.
    """

    id: str
    """What cannot be read."""
    reason: str
    """Why."""

    def read(self) -> bytes:
        """Raise InputError with the reason."""
        raise InputError(self.reason)


def read_file(path: str, max_bytes: int = MAX_BYTES) -> bytes:
    """Read a whole file, if it is a file and not too large.

    Args:
        path: Where it lies.
        max_bytes: Refuse a larger one, before reading it.

    Raises:
        InputError: It is not there, no regular file, too large or not readable.
        OSError: The machine failed, not the file.
    """
    return read_with_status(path, max_bytes)[0]


def read_with_status(path: str, max_bytes: int = MAX_BYTES) -> tuple[bytes, os.stat_result]:
    """Read a whole file as `read_file` does, and return its status too."""
    file, status = _open_regular(path)
    try:
        check_size(status.st_size, max_bytes)
        return _read_exactly(file, status.st_size), status
    except OSError as error:
        raise _unreadable(error) from error
    finally:
        os.close(file)


def open_regular(path: str) -> int:
    """Open a file, never waiting for one that is no file, and return its descriptor.

    Raises:
        InputError: It is not there, no regular file, or not readable.
        OSError: The machine failed, not the file.
    """
    return _open_regular(path)[0]


def _open_regular(path: str) -> tuple[int, os.stat_result]:
    try:
        file = os.open(path, _OPEN_FLAGS)
    except (OSError, ValueError) as error:
        raise _unreadable(error) from error
    status = os.fstat(file)
    if stat.S_ISREG(status.st_mode):
        return file, status
    os.close(file)
    raise InputError("not a regular file")


def check_size(size: int, max_bytes: int = MAX_BYTES) -> None:
    """Raise InputError when a picture has more bytes than are read into memory."""
    if size > max_bytes:
        raise InputError(f"too large: {size:,} bytes are over the limit of {max_bytes:,} bytes")


def _read_exactly(file: int, size: int) -> bytes:
    """Read `size` bytes, or what there is when the file has become shorter."""
    content = os.read(file, size)
    while len(content) < size and (more := os.read(file, size - len(content))):
        content += more
    return content


def is_machine_failure(error: BaseException) -> bool:
    """Tell an exhausted machine, which is no picture's fault, from a file that cannot be read."""
    return isinstance(error, OSError) and error.errno in _EXHAUSTED


def _unreadable(error: OSError | ValueError) -> Exception:
    """Turn what the operating system said of one file into a reason; a failing machine stays."""
    if isinstance(error, FileNotFoundError):
        return InputError("no such file (a link that leads nowhere?)")
    if not isinstance(error, OSError):  # a zero byte inside the name
        return InputError(f"unreadable: {error}")
    if is_machine_failure(error):
        return error
    if error.errno == errno.ENXIO:  # a socket, or a pipe
        return InputError("not a regular file")
    return InputError(f"unreadable: {error.strerror}")
