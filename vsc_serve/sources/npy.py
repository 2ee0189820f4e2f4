"""Arrays in numpy files: their headers first, their rows when they are wanted."""

import io
import math
import zlib
from typing import Any, Final, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from vsc_serve.errors import InputError
from vsc_serve.sources.files import PlaceFile
from vsc_serve.sources.zip import DEFLATED, STORED, data_offset
from vsc_serve.sources.zip_directory import Member, read_directory

_SUFFIX: Final = ".npy"
_BLOCK: Final = 2**20
_LARGEST_HEADER: Final = 2**16
"""Bytes of a header at most: that of an array without named fields is 128 long."""


class Stream(Protocol):
    """Bytes of one `.npy` file, or of one in an `.npz`."""

    length: int
    """How many they are."""

    def read_at(self, position: int, size: int) -> bytes:
        """Return bytes from a position: fewer only at the end."""

    def check(self) -> None:
        """Raise InputError where they are damaged."""


class Header(NamedTuple):
    """Header of a numpy file."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    is_fortran: bool
    """Whether columns lie one after the other, and not rows."""
    offset: int
    """Where the numbers begin."""


class StoredArray:
    """Array in a numpy file; its rows are read when they are wanted.

    Args:
        stream: The bytes.

    Raises:
        InputError: They are no numpy array.
    """

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self._header = _read_header(stream)
        self._whole: NDArray[Any] | None = None
        self.shape = self._header.shape
        self.dtype = self._header.dtype.newbyteorder("=")

    @property
    def is_plain(self) -> bool:
        """Whether it is a whole `.npy` file in the byte order of the machine."""
        return isinstance(self._stream, _WholeFile) and bool(self._header.dtype.isnative)

    def __str__(self) -> str:
        return f"{self.dtype} {self.shape}"

    def check(self) -> None:
        """Raise InputError where it is damaged, or has not the bytes that its header says."""
        self._stream.check()
        expected = self._header.offset + math.prod(self.shape) * self.dtype.itemsize
        if self._stream.length != expected:
            fault = "cut off" if self._stream.length < expected else "longer than its header says"
            raise InputError(
                f"{fault}: {self._stream.length:,} bytes where its header makes {expected:,}",
                kind="broken",
            )

    def read(self, start: int, count: int) -> NDArray[Any]:
        """Return rows in the byte order of the machine.

        Of an array whose columns lie one after the other, all is kept in memory.
        """
        count = max(min(count, self.shape[0] - start), 0)
        if self._header.is_fortran and len(self.shape) > 1:
            if self._whole is None:
                shape = self.shape[::-1]
                self._whole = self._numbers(0, math.prod(shape)).reshape(shape).T
            return np.ascontiguousarray(self._whole[start : start + count])
        row = math.prod(self.shape[1:])
        return self._numbers(start * row, count * row).reshape(count, *self.shape[1:])

    def _numbers(self, start: int, count: int) -> NDArray[Any]:
        dtype = self._header.dtype
        numbers = np.empty(count, dtype)
        target = numbers.view(np.uint8).data if numbers.nbytes else memoryview(b"")
        first = self._header.offset + start * dtype.itemsize
        for place in range(0, len(target), _BLOCK):
            part = target[place : place + _BLOCK]
            content = self._stream.read_at(first + place, len(part))
            if len(content) < len(part):
                raise InputError("cut off: it has become shorter", kind="broken")
            part[:] = content
        return numbers if dtype.isnative else numbers.astype(self.dtype)


def _read_header(stream: Stream) -> Header:
    # Numpy's parser meets whatever is there: it raises errors of a dozen families.
    file = io.BytesIO(stream.read_at(0, _LARGEST_HEADER))
    try:
        version = np.lib.format.read_magic(file)
        readers = {
            (1, 0): np.lib.format.read_array_header_1_0,
            (2, 0): np.lib.format.read_array_header_2_0,
        }
        shape, is_fortran, dtype = readers[version](file)
        sizes = tuple(int(length) for length in shape)
    except Exception as error:  # see above
        text = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"not readable as numpy data ({text[:200]})", kind="broken") from error
    if min(sizes, default=0) < 0:
        raise InputError(f"not readable as numpy data (shape {sizes})", kind="broken")
    return Header(sizes, dtype, bool(is_fortran), file.tell())


def open_stored(file: PlaceFile) -> dict[str, StoredArray]:
    """Return the arrays in an `.npy` or `.npz` file by name; what it is, its first bytes say.

    Raises:
        InputError: It is neither, or damaged.
    """
    if file.read_at(0, 2) != b"PK":
        return {"array": StoredArray(_WholeFile(file))}
    arrays: dict[str, StoredArray] = {}
    for member in read_directory(file):
        if not member.name.endswith(_SUFFIX):
            continue
        name = member.name.removesuffix(_SUFFIX)
        if name in arrays:
            raise InputError(f"two arrays are called {name}", kind="broken")
        arrays[name] = StoredArray(_open_member(file, member))
    return arrays


class _WholeFile:
    def __init__(self, file: PlaceFile) -> None:
        self.length = file.size
        self.read_at = file.read_at

    def check(self) -> None:
        """Do nothing: an `.npy` has no checksum."""


def _open_member(file: PlaceFile, member: Member) -> Stream:
    if member.is_encrypted or member.method not in (STORED, DEFLATED):
        raise InputError(
            f"{member.name}: encrypted, or packed in a way that numpy does not", kind="unsupported"
        )
    return (_StoredMember if member.method == STORED else _DeflatedMember)(file, member)


def _check_member(stream: Stream, member: Member) -> None:
    checksum = position = 0
    while position <= member.size and (block := stream.read_at(position, _BLOCK)):
        checksum = zlib.crc32(block, checksum)
        position += len(block)
    if position != member.size or checksum != member.checksum:
        raise InputError(f"{member.name} is damaged: its checksum differs", kind="broken")


class _StoredMember:
    """Member of an archive that is not compressed."""

    def __init__(self, file: PlaceFile, member: Member) -> None:
        self._file = file
        self._member = member
        self._start = data_offset(file, member.offset)
        self.length = member.compressed

    def check(self) -> None:
        _check_member(self, self._member)

    def read_at(self, position: int, size: int) -> bytes:
        size = min(size, max(self.length - position, 0))
        return self._file.read_at(self._start + position, size)


class _DeflatedMember:
    """Member that is unpacked while it is read; going back starts again from its beginning."""

    def __init__(self, file: PlaceFile, member: Member) -> None:
        self._file = file
        self._member = member
        self._start = data_offset(file, member.offset)
        self._packed = member.compressed
        self.length = member.size
        self._restart()

    def check(self) -> None:
        _check_member(self, self._member)

    def _restart(self) -> None:
        self._unpack = zlib.decompressobj(-zlib.MAX_WBITS)
        self._taken = 0
        self._position = 0

    def read_at(self, position: int, size: int) -> bytes:
        if position < self._position:
            self._restart()
        while self._position < position and self._next(min(position - self._position, _BLOCK)):
            pass
        content = bytearray()
        while len(content) < size and (block := self._next(size - len(content))):
            content += block
        return bytes(content)

    def _next(self, size: int) -> bytes:
        """Return some of the bytes that follow, none at the end."""
        content = b""
        while not content and not self._unpack.eof:
            packed = self._unpack.unconsumed_tail or self._read_packed()
            try:
                content = self._unpack.decompress(packed, size)
            except zlib.error as error:
                raise InputError(
                    f"{self._member.name} is damaged: {error}", kind="broken"
                ) from error
            if not packed and not content:
                break
        self._position += len(content)
        return content

    def _read_packed(self) -> bytes:
        size = min(_BLOCK, self._packed - self._taken)
        packed = self._file.read_at(self._start + self._taken, size)
        self._taken += len(packed)
        return packed
