"""ONNX files of other makers: read with their weights, and checked for what no export could use.

onnxruntime computes what an export cannot take up: weights behind links, nodes out of order, an
operator set that cannot be raised. What is read here is whole and in order, or an error; training
behind a backbone asks for all of it before it begins.
"""

from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any, Final, NamedTuple

import onnx
from onnx import TensorProto, version_converter
from onnx.external_data_helper import uses_external_data

from vsc_serve.errors import InputError, UsageError

OPSET: Final = 20
"""ONNX operator set of an export that asks for none."""

_HALF: Final = (TensorProto.FLOAT16, TensorProto.BFLOAT16)
_LARGEST_BYTES: Final = 2**31 - 2**24
"""Largest graph with its weights: one message holds no more, and the model needs room as well."""
_ONNX_DOMAINS: Final = ("", "ai.onnx")
_RANDOM: Final = ("Bernoulli", "Multinomial")


def read_graph(path: Path) -> onnx.ModelProto:
    """Read a graph with its weights, nodes in the order that they are computed in.

    Weights may lie in files beside it, and those behind links, as in the cache of a model hub; see
    `_weights_file`.

    Raises:
        UsageError: It is not there.
        InputError: It is no ONNX file, or its weights are missing, cut short, too large or outside.
    """
    if not path.is_file():
        raise UsageError(f"`backbone` {path}: no such file. Check the path.")
    try:
        graph = onnx.load(path, load_external_data=False)
    except Exception as error:  # protobuf and onnx raise their own classes
        raise InputError(f"{path}: onnx cannot read it ({_first_line(error)}).") from error
    outside = [tensor for tensor in _tensors(graph) if uses_external_data(tensor)]
    places = [_place_of(path, tensor) for tensor in outside]
    _check_size(path, path.stat().st_size + sum(place.length or 0 for place in places))
    for tensor, place in zip(outside, places, strict=True):
        tensor.raw_data = _read_weights(path, place)
        del tensor.external_data[:]
        tensor.data_location = TensorProto.DEFAULT
    _check_size(path, graph.ByteSize())
    return _in_order(graph)


def check_exportable(path: Path, opset: int = OPSET) -> None:
    """Check that an export could put a graph in front of a model.

    Raises:
        InputError: It could not: what `read_graph` and `at_opset` raise, or the graph is not valid
            or draws random numbers.
    """
    graph = read_graph(path)
    if fault := find_fault(graph):
        raise InputError(f"{path}: {fault}. Export the backbone again, for inference.")
    at_opset(graph, max(opset, opset_of(graph)))


def find_fault(graph: onnx.ModelProto | str) -> str | None:
    """Say what is wrong with a graph, or with that in a file: not valid, or random. None: nothing.

    Args:
        graph: The graph, or the path of a file whose weights may lie beside it.
    """
    try:
        onnx.checker.check_model(graph, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        return f"is not valid ONNX ({_first_line(error)})"
    if isinstance(graph, str):
        return None
    random_kinds = {node.op_type for node in _nodes(graph) if _is_random(node)}
    if random_kinds:
        return f"draws random numbers ({', '.join(sorted(random_kinds))})"
    return None


def opset_of(graph: onnx.ModelProto) -> int:
    """Return the operator set of a graph."""
    return max(int(one.version) for one in graph.opset_import if one.domain in _ONNX_DOMAINS)


def at_opset(graph: onnx.ModelProto, opset: int) -> onnx.ModelProto:
    """Raise a backbone to a newer operator set. Raises InputError where onnx cannot."""
    found = opset_of(graph)
    if found == opset:
        return graph
    try:
        return version_converter.convert_version(graph, opset)
    except Exception as error:  # the converter raises RuntimeError and others
        raise InputError(
            f"the backbone has operator set {found} and cannot be raised to {opset}"
            f" ({_first_line(error)}). Export the backbone with operator set {opset}."
        ) from error


def is_fp16(graph: onnx.ModelProto) -> bool:
    """Tell whether a graph computes in float16 or bfloat16 anywhere."""
    types = {
        value.type.tensor_type.elem_type for value in (*graph.graph.input, *graph.graph.output)
    }
    types |= {one.i for node in _nodes(graph) for one in node.attribute if one.name == "to"}
    types |= {tensor.data_type for tensor in _tensors(graph)}
    return not types.isdisjoint(_HALF)


def _is_random(node: onnx.NodeProto) -> bool:
    return node.op_type.startswith("Random") or node.op_type in _RANDOM


def _parts(graph: onnx.ModelProto) -> Iterator[Any]:
    """Give the graph, its functions, and the branches inside of them."""
    waiting: list[Any] = [graph.graph, *graph.functions]
    while waiting:
        part = waiting.pop()
        yield part
        for attribute in (one for node in part.node for one in node.attribute):
            waiting += [*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs]


def _nodes(graph: onnx.ModelProto) -> Iterator[onnx.NodeProto]:
    for part in _parts(graph):
        yield from part.node


def _tensors(graph: onnx.ModelProto) -> Iterator[TensorProto]:
    """Give all weights and constants."""
    for part in _parts(graph):
        if isinstance(part, onnx.GraphProto):
            yield from part.initializer
            for sparse in part.sparse_initializer:
                yield from (sparse.values, sparse.indices)
    for attribute in (one for node in _nodes(graph) for one in node.attribute):
        yield from ([attribute.t] if attribute.HasField("t") else [])
        yield from attribute.tensors


class _Place(NamedTuple):
    """Where the values of a tensor lie."""

    location: str
    offset: int
    length: int | None
    """Bytes; None: all from the offset on."""


def _place_of(path: Path, tensor: TensorProto) -> _Place:
    stated = {entry.key: entry.value for entry in tensor.external_data}
    try:
        length = int(stated["length"]) if "length" in stated else None
        place = _Place(stated["location"], int(stated.get("offset", 0)), length)
        if place.offset < 0 or (length or 0) < 0:
            raise ValueError(f"offset {place.offset}, length {length}")
    except (KeyError, ValueError) as error:
        raise InputError(
            f"{path}: does not say where the weights {tensor.name!r} lie ({error})."
        ) from error
    return place


def _read_weights(path: Path, place: _Place) -> bytes:
    weights = _weights_file(path, place.location)
    try:
        with weights.open("rb") as file:
            file.seek(place.offset)
            content = file.read(-1 if place.length is None else place.length)
    except OSError as error:
        raise InputError(
            f"{path}: its weights {place.location} cannot be read ({error.strerror or error})."
        ) from error
    if place.length is not None and len(content) != place.length:
        raise InputError(f"{path}: its weights {place.location} are cut short. Copy them again.")
    return content


def _weights_file(path: Path, location: str) -> Path:
    """Return the file of weights that a graph names, all links resolved.

    The hub's cache holds links to one folder of contents, and hard links are files like any other:
    so the file must lie, when all links are followed, below the folder of the graph, or below the
    folder that the graph itself really lies in. onnxruntime has the same rule.
    """
    named = PurePosixPath(location)
    try:
        real = (path.parent / named).resolve(strict=True)
    except (OSError, RuntimeError, ValueError) as error:
        raise InputError(
            f"{path}: its weights {location!r} are not there. Copy them beside it."
        ) from error
    folders = {path.parent.resolve(), path.resolve().parent}
    is_inside = not named.is_absolute() and ".." not in named.parts
    if not is_inside or not any(real.is_relative_to(folder) for folder in folders):
        raise InputError(
            f"{path}: its weights {location!r} lie outside of its folder ({real})."
            " Copy them beside it."
        )
    if not real.is_file():
        raise InputError(f"{path}: its weights {location!r} are no plain file.")
    return real


def _check_size(path: Path, size: int) -> None:
    if size > _LARGEST_BYTES:
        raise InputError(
            f"{path}: {size / 2**30:.1f} GiB with its weights; an exported graph has to stay below"
            " 2 GiB. Use a smaller backbone, or one with float16 weights."
        )


def _in_order(graph: onnx.ModelProto) -> onnx.ModelProto:
    """Sort the nodes where they stand in another order than that in which they are computed.

    Converters to float16 append their casts at the end; onnxruntime sorts, the checker refuses.
    """
    known = {value.name for value in (*graph.graph.input, *graph.graph.initializer)}
    known |= {sparse.values.name for sparse in graph.graph.sparse_initializer}
    for node in graph.graph.node:
        if not known.issuperset(name for name in node.input if name):
            import onnx_ir

            model = onnx_ir.from_proto(graph)
            model.graph.sort()
            return onnx_ir.to_proto(model)
        known.update(node.output)
    return graph


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
