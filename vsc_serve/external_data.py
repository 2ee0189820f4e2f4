"""Which files an ONNX graph takes its weights from, read without onnx.

A graph names files of weights in the `external_data` of its tensors, and an engine opens what they
name: older ones also `../../etc/passwd`, or an address in memory. This is the least of a protobuf
reader that finds every such name, wherever a tensor may stand in a graph. It is stricter than the
format where that costs nothing: what it does not understand, it refuses.

Format: https://protobuf.dev/programming-guides/encoding and onnx.proto of onnx 1.23.
"""

import mmap
from collections.abc import Iterator
from pathlib import Path
from typing import Final, TypeAlias

from vsc_serve.untrusted import inside, open_plain

_Buffer: TypeAlias = "bytes | mmap.mmap"

MESSAGES: Final[dict[str, dict[int, str]]] = {
    "ModelProto": {7: "GraphProto", 20: "TrainingInfoProto", 25: "FunctionProto"},
    "TrainingInfoProto": {1: "GraphProto", 2: "GraphProto"},
    "GraphProto": {1: "NodeProto", 5: "TensorProto", 15: "SparseTensorProto"},
    "FunctionProto": {7: "NodeProto", 11: "AttributeProto"},
    "NodeProto": {5: "AttributeProto"},
    "AttributeProto": {
        5: "TensorProto",
        6: "GraphProto",
        10: "TensorProto",
        11: "GraphProto",
        22: "SparseTensorProto",
        23: "SparseTensorProto",
    },
    "SparseTensorProto": {1: "TensorProto", 2: "TensorProto"},
    "TensorProto": {13: "StringStringEntryProto"},
    "StringStringEntryProto": {},
}
"""Fields that lead to a tensor, of each message that can hold one."""

_MAX_FIELDS: Final = 4_000_000
"""Fields that are looked at: some seconds. Graphs of large models have a hundred thousand."""

_MAX_DEPTH: Final = 100
"""Messages inside one another; protobuf's own readers stop there too."""

_KEY: Final = b"location"

_VARINT, _EIGHT_BYTES, _BYTES, _FOUR_BYTES = 0, 1, 2, 5
"""Wire types. Groups (3, 4), which onnx never writes, are refused."""


def check_external_files(path: Path) -> set[str]:
    """Return the files that a graph takes weights from; all are plain files in its folder.

    Args:
        path: The `.onnx` file.

    Raises:
        ValueError: It is no graph, or names a file outside its folder, or no plain file.
        OSError: A file is not there, or cannot be read.
    """
    names = external_files(path)
    for name in names:
        try:
            open_plain(inside(path.parent, name)).close()
        except ValueError as error:
            raise ValueError(f"takes weights from {name[:100]!r}: {error}") from error
    return names


def external_files(path: Path) -> set[str]:
    """Return the names of the files that a graph takes weights from, as it gives them.

    Raises:
        ValueError: It is no ONNX graph.
        OSError: It is not there, or cannot be read.
    """
    with open_plain(path) as file:
        try:
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
                return set(_locations(content))
        except ValueError as error:  # an empty file cannot be mapped
            raise ValueError(f"no ONNX graph ({error})") from error


def _locations(content: _Buffer) -> Iterator[str]:
    """Yield the locations of all tensors of a serialised model."""
    left = _MAX_FIELDS
    open_messages = [("ModelProto", 0, len(content), 0)]
    while open_messages:
        message, start, end, depth = open_messages.pop()
        texts = []
        for field, first, last in _fields(content, start, end):
            left -= 1
            if not left or depth > _MAX_DEPTH:
                raise ValueError("it has too many parts")
            if first >= 0 and field in MESSAGES[message]:
                if content.find(_KEY, first, last) >= 0:  # most nodes have none, and cost no more
                    open_messages.append((MESSAGES[message][field], first, last, depth + 1))
            elif first >= 0 and message == "StringStringEntryProto":
                texts.append((field, bytes(content[first:last])))
        if (1, _KEY) in texts:  # with a key that is there twice, readers take the last value
            named = [text.decode("utf-8") for field, text in texts if field == 2]
            yield from named or [""]


def _fields(content: _Buffer, start: int, end: int) -> Iterator[tuple[int, int, int]]:
    """Yield number, start and end of the fields of a message; -1 and -1 for those of numbers."""
    place = start
    while place < end:
        tag, place = _varint(content, place, end)
        wire_type, first = tag & 7, -1
        if not 0 < tag >> 3 < 2**29:  # beyond, readers differ in which bits they drop
            raise ValueError("damaged")
        if wire_type == _VARINT:
            _, place = _varint(content, place, end)
        elif wire_type == _BYTES:
            length, first = _varint(content, place, end)
            place = first + length
        elif wire_type in (_EIGHT_BYTES, _FOUR_BYTES):
            place += 8 if wire_type == _EIGHT_BYTES else 4
        else:
            raise ValueError("damaged")
        if place > end:
            raise ValueError("cut off")
        yield tag >> 3, first, place if first >= 0 else -1


def _varint(content: _Buffer, place: int, end: int) -> tuple[int, int]:
    """Return a number of up to 64 bits, seven to a byte, and where it ends."""
    number = 0
    for position in range(10):
        if place + position >= end:
            raise ValueError("cut off")
        byte = content[place + position]
        number |= (byte & 0x7F) << (7 * position)
        if byte < 0x80:
            return number, place + position + 1
    raise ValueError("damaged")
