"""The encoder with compacted outputs: values, indices and row counts in place of dense codes.

It is not exported a second time. Nodes are appended to the encoder that is already there, so both
graphs hold the same nodes and point into the same weights file, byte for byte.
"""

from collections.abc import Iterable
from typing import Any, Final

import onnx
from onnx import TensorProto, helper

CSR_OUTPUTS: Final = ("values", "indices", "row_counts")

_PREFIX: Final = "csr_"
"""Begins the names of what is added."""


def csr_graph(encoder: onnx.ModelProto) -> onnx.ModelProto:
    """Return the encoder with the outputs of `CSR_OUTPUTS`.

        values        float32 (nnz)     what is not 0, row after row
        indices       int32 (nnz)       the latent of each value, rising within a row
        row_counts    int32 (batch)     values of each row; their cumulative sum is `indptr`

    A value that is exactly 0 is left out although its spike is on, as it is everywhere: the entries
    are those of the dense code that are not 0. NaN is not 0 and stays visible.

    Args:
        encoder: A graph with the output `code`; its weights may lie in a file beside it.
    """
    proto = onnx.ModelProto()
    proto.CopyFrom(encoder)
    batch = batch_dimension(proto)
    keep_only(proto.graph, "code")
    _append_compaction(proto.graph)
    del proto.graph.output[:]
    proto.graph.output.extend(
        [
            helper.make_tensor_value_info("values", TensorProto.FLOAT, ["nnz"]),
            helper.make_tensor_value_info("indices", TensorProto.INT32, ["nnz"]),
            helper.make_tensor_value_info("row_counts", TensorProto.INT32, [batch]),
        ]
    )
    return proto


def _append_compaction(graph: onnx.GraphProto) -> None:
    """Append the nodes from `code` to the outputs. NonZero gives positions in row-major order."""
    names = [f"{_PREFIX}{name}" for name in ("position", "pair", "column", "is_active", "active")]
    position, pair, column, is_active, active = names
    column_row, axis = f"{_PREFIX}column_row", f"{_PREFIX}latent_axis"
    graph.initializer.extend(
        [
            helper.make_tensor(column_row, TensorProto.INT64, [], [1]),
            helper.make_tensor(axis, TensorProto.INT64, [1], [1]),
        ]
    )
    nodes: list[tuple[str, list[str], str, dict[str, Any]]] = [
        ("NonZero", ["code"], position, {}),
        ("Transpose", [position], pair, {"perm": [1, 0]}),
        ("GatherND", ["code", pair], "values", {}),
        ("Gather", [position, column_row], column, {"axis": 0}),
        ("Cast", [column], "indices", {"to": TensorProto.INT32}),
        ("Cast", ["code"], is_active, {"to": TensorProto.BOOL}),
        ("Cast", [is_active], active, {"to": TensorProto.INT32}),
        ("ReduceSum", [active, axis], "row_counts", {"keepdims": 0}),
    ]
    graph.node.extend(
        helper.make_node(kind, inputs, [output], name=f"{_PREFIX}{output}_{kind}", **attributes)
        for kind, inputs, output, attributes in nodes
    )


def keep_only(graph: onnx.GraphProto, output: str) -> None:
    """Remove the nodes and initializers that the output does not need."""
    needed = {output}
    kept = []
    for node in reversed(graph.node):
        if needed.intersection(node.output):
            needed.update(node.input)
            kept.append(node)
    _replace(graph.node, reversed(kept))
    _replace(graph.initializer, [part for part in graph.initializer if part.name in needed])
    _replace(graph.value_info, [part for part in graph.value_info if part.name in needed])


def _replace(field: "list[onnx.NodeProto]", kept: Iterable[onnx.NodeProto]) -> None:
    """Set a repeated field of a message to some of its own elements."""
    copies = [type(part).FromString(part.SerializeToString()) for part in kept]
    del field[:]
    field.extend(copies)


def batch_dimension(proto: onnx.ModelProto) -> str:
    """Return the name of the free dimension of the rows."""
    name: str = proto.graph.input[0].type.tensor_type.shape.dim[0].dim_param
    return name
