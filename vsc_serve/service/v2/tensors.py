"""Tensors of the Open Inference Protocol v2: read from a request, written into an answer.

A request is JSON, and behind it, where the header Inference-Header-Content-Length says how long
that is, the tensors with a `binary_data_size`, one after the other. Numbers are little endian and
in row-major order; an element of BYTES is its length, uint32, and its bytes.
"""

import base64
import binascii
import json
import struct
from collections.abc import Iterator, Mapping, Sequence
from math import prod
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from vsc_serve.errors import InputError

HEADER_LENGTH: Final = "Inference-Header-Content-Length"

MAX_JSON_BYTES: Final = 8_000_000
"""Bytes of the JSON of a request: read, it takes up to twenty times as much memory. Larger tensors
travel as binary data, which is not read at all."""
_MAX_RANK: Final = 8

_TYPES: Final[dict[str, np.dtype[Any]]] = {
    "BOOL": np.dtype(np.bool_),
    "UINT8": np.dtype(np.uint8),
    "UINT16": np.dtype("<u2"),
    "UINT32": np.dtype("<u4"),
    "UINT64": np.dtype("<u8"),
    "INT8": np.dtype(np.int8),
    "INT16": np.dtype("<i2"),
    "INT32": np.dtype("<i4"),
    "INT64": np.dtype("<i8"),
    "FP16": np.dtype("<f2"),
    "FP32": np.dtype("<f4"),
    "FP64": np.dtype("<f8"),
}
_NAMES: Final = {kind: name for name, kind in _TYPES.items()}
BYTES: Final = "BYTES"


class Wanted(NamedTuple):
    """An output that a client asks for."""

    name: str
    is_binary: bool


class InferenceRequest(NamedTuple):
    """What a client sent."""

    id: str | None
    """Its name for the request, given back with the answer."""
    inputs: dict[str, NDArray[Any]]
    """Tensors by name; BYTES as an array of objects of type bytes."""
    outputs: list[Wanted] | None
    """What it asks for; None for all."""
    is_binary: bool
    """Whether outputs that are not named are to be binary."""


class ProtocolError(InputError):
    """A request that is not one of the protocol, with its id where that could be read."""

    def __init__(self, message: str, request_id: str | None = None) -> None:
        super().__init__(message)
        self.request_id = request_id


def read_request(body: bytes, json_bytes: int | None) -> InferenceRequest:
    """Read the body of a request.

    Args:
        body: JSON, and the binary data behind it.
        json_bytes: Bytes of the JSON, as the header says; None for all of the body.

    Raises:
        ProtocolError: It is not one.
    """
    length = len(body) if json_bytes is None else json_bytes
    if not 0 <= length <= len(body):
        raise ProtocolError(f"{HEADER_LENGTH} is {length}, but the body has {len(body)} bytes")
    head = _read_json(body[:length])
    name = head.get("id")
    if name is not None and not isinstance(name, str):
        raise ProtocolError("`id` must be a string")
    try:
        inputs = _read_inputs(head, memoryview(body)[length:])
        is_binary = _flag(head, "binary_data_output", default=False)
        return InferenceRequest(name, inputs, _read_outputs(head, default=is_binary), is_binary)
    except InputError as error:
        raise ProtocolError(str(error), name) from error


def write_answer(
    head: Mapping[str, Any], tensors: Sequence[tuple[str, NDArray[Any], bool]]
) -> tuple[bytes, int | None]:
    """Write an answer.

    Args:
        head: What it says beside its tensors.
        tensors: Name, values, and whether they are to be binary.

    Returns:
        The body, and the bytes of its JSON; None where nothing is binary.
    """
    listed, binary = [], []
    for name, values, is_binary in tensors:
        entry: dict[str, Any] = {"name": name, "shape": list(values.shape)}
        entry["datatype"] = _NAMES[values.dtype]
        if is_binary:
            data = np.ascontiguousarray(values).tobytes()
            entry["parameters"] = {"binary_data_size": len(data)}
            binary.append(data)
        else:
            entry["data"] = values.ravel().tolist()
        listed.append(entry)
    text = json.dumps({**head, "outputs": listed}, separators=(",", ":")).encode()
    return b"".join([text, *binary]), len(text) if binary else None


def _read_json(text: bytes) -> dict[str, Any]:
    if len(text) > MAX_JSON_BYTES:
        raise ProtocolError(
            f"the JSON of the request is larger than {MAX_JSON_BYTES:,} bytes; send its tensors as"
            " binary data (`binary_data_size`)"
        )
    try:
        head = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ProtocolError(f"the request is not JSON: {error}") from error
    if not isinstance(head, dict):
        raise ProtocolError("the request must be a JSON object")
    return head


def _read_inputs(head: Mapping[str, Any], binary: memoryview) -> dict[str, NDArray[Any]]:
    listed = head.get("inputs")
    if not isinstance(listed, list) or not listed:
        raise InputError("`inputs` must be a list of at least one tensor")
    found: dict[str, NDArray[Any]] = {}
    place = 0
    for entry in listed:
        name, kind, shape = _read_entry(entry)
        if name in found:
            raise InputError(f"input {name!r} is there twice")
        size = _binary_size(entry, name)
        if size is None:
            found[name] = _from_json(entry.get("data"), name, kind, shape)
            continue
        if size > len(binary) - place:
            raise InputError(f"input {name!r}: {size} bytes of binary data, but fewer are there")
        found[name] = _from_binary(binary[place : place + size], name, kind, shape)
        place += size
    if place != len(binary):
        raise InputError(f"{len(binary) - place} bytes of binary data belong to no input")
    return found


def _read_entry(entry: Any) -> tuple[str, Any, tuple[int, ...]]:
    """Return name, data type and shape of a tensor."""
    if not isinstance(entry, dict) or not isinstance(entry.get("name"), str):
        raise InputError("each input must be an object with a `name`")
    name, kind, shape = entry["name"], entry.get("datatype"), entry.get("shape")
    if kind not in [BYTES, *_TYPES]:
        raise InputError(f"input {name!r}: `datatype` must be one of {', '.join(_TYPES)}, BYTES")
    if not isinstance(shape, list) or len(shape) > _MAX_RANK or not all(map(_is_size, shape)):
        raise InputError(f"input {name!r}: `shape` must be a list of sizes, none below 0")
    return name, kind, tuple(shape)


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**31


def _binary_size(entry: Mapping[str, Any], name: str) -> int | None:
    parameters = entry.get("parameters", {})
    if not isinstance(parameters, dict):
        raise InputError(f"input {name!r}: `parameters` must be an object")
    size = parameters.get("binary_data_size")
    if size is None:
        return None
    if not _is_size(size):
        raise InputError(f"input {name!r}: `binary_data_size` must be a number of bytes")
    if "data" in entry:
        raise InputError(f"input {name!r} has both `data` and `binary_data_size`; give one")
    return int(size)


def _from_binary(data: memoryview, name: str, kind: str, shape: tuple[int, ...]) -> NDArray[Any]:
    if kind == BYTES:
        return _as_objects(list(_elements(data, name)), name, shape)
    wanted = prod(shape) * _TYPES[kind].itemsize
    if len(data) != wanted:
        raise InputError(
            f"input {name!r}: {len(data)} bytes of binary data, but {kind} of shape {list(shape)}"
            f" has {wanted}"
        )
    return np.frombuffer(data, _TYPES[kind]).reshape(shape)


def _elements(data: memoryview, name: str) -> Iterator[bytes]:
    """Yield the elements of a tensor of BYTES."""
    place = 0
    while place < len(data):
        if place + 4 > len(data):
            raise InputError(f"input {name!r}: the length of an element is cut short")
        (size,) = struct.unpack_from("<I", data, place)
        place += 4
        if size > len(data) - place:
            raise InputError(f"input {name!r}: an element of {size} bytes is cut short")
        yield bytes(data[place : place + size])
        place += size


def _from_json(data: Any, name: str, kind: str, shape: tuple[int, ...]) -> NDArray[Any]:
    """Return a tensor that stands in the JSON, flat or nested; BYTES are base64."""
    if not isinstance(data, list):
        raise InputError(f"input {name!r}: `data` must be a list, or give `binary_data_size`")
    flat = list(_flat(data, _MAX_RANK))
    if kind == BYTES:
        return _as_objects([_base64(text, name) for text in flat], name, shape)
    types = (bool,) if kind == "BOOL" else (int, float) if kind.startswith("FP") else (int,)
    if not all(type(value) in types for value in flat):
        raise InputError(f"input {name!r}: `data` holds something that is not {kind}")
    _check_count(len(flat), name, shape)
    try:
        with np.errstate(over="ignore"):  # too large for FP16 and FP32: infinity, refused later
            return np.array(flat, _TYPES[kind]).reshape(shape)
    except OverflowError as error:
        raise InputError(f"input {name!r}: `data` holds numbers that {kind} cannot") from error


def _flat(data: list[Any], depth: int) -> Iterator[Any]:
    for value in data:
        if not isinstance(value, list):
            yield value
        elif depth > 1:
            yield from _flat(value, depth - 1)
        else:
            raise InputError(f"`data` is nested deeper than {_MAX_RANK} lists")


def _base64(text: Any, name: str) -> bytes:
    try:
        if not isinstance(text, str):
            raise ValueError("not a string")
        return base64.b64decode(text, validate=True)
    except (ValueError, binascii.Error) as error:
        raise InputError(f"input {name!r}: BYTES in JSON are base64 texts ({error})") from error


def _as_objects(elements: list[bytes], name: str, shape: tuple[int, ...]) -> NDArray[Any]:
    _check_count(len(elements), name, shape)
    found = np.empty(len(elements), np.object_)
    found[:] = elements
    return found.reshape(shape)


def _check_count(count: int, name: str, shape: tuple[int, ...]) -> None:
    if count != prod(shape):
        raise InputError(f"input {name!r}: {count} elements, but the shape is {list(shape)}")


def _read_outputs(head: Mapping[str, Any], *, default: bool) -> list[Wanted] | None:
    listed = head.get("outputs")
    if listed is None or listed == []:
        return None
    if not isinstance(listed, list):
        raise InputError("`outputs` must be a list")
    found: list[Wanted] = []
    for entry in listed:
        if not isinstance(entry, dict) or not isinstance(entry.get("name"), str):
            raise InputError("each output must be an object with a `name`")
        if entry["name"] in [one.name for one in found]:
            raise InputError(f"output {entry['name']!r} is asked for twice")
        found.append(Wanted(entry["name"], _flag(entry, "binary_data", default=default)))
    return found


def _flag(entry: Mapping[str, Any], name: str, *, default: bool) -> bool:
    parameters = entry.get("parameters", {})
    value = parameters.get(name, default) if isinstance(parameters, dict) else None
    if not isinstance(value, bool):
        raise InputError(f"`{name}` must be true or false, in an object `parameters`")
    return value
