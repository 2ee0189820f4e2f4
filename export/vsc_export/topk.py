"""The encoder with a fixed number of slots a row, for runtimes that want fixed shapes.

A sparse code has as many entries as it has. A graph with K slots a row must say what becomes of
the others: here the K entries of largest magnitude are kept, and how many are missing is an output
of its own, so nothing is cut off in silence. Like the compacting graph it is made by appending
nodes to the encoder, and points into the same weights file.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from vsc_export.compaction import batch_dimension, keep_only
from vsc_export.graphs import check_file
from vsc_export.metadata import add_metadata, signature
from vsc_serve.bundle import ENCODER, ENCODER_TOPK, GraphSignature
from vsc_serve.errors import ExportError, UsageError
from vsc_serve.session import Session, open_session

TOPK_OUTPUTS: Final = ("indices", "values", "count", "overflow")

_PREFIX: Final = "topk_"
_BATCHES: Final = (1, 7, 256)


@dataclass(frozen=True)
class Overflow:
    """What a graph with K slots could not hold, on the rows it was checked on."""

    rows: int
    """Rows checked."""
    overflowing: int
    """Rows with more entries than slots."""
    most: int
    """Entries of the row with most."""


def topk_graph(encoder: onnx.ModelProto, latent_dim: int, capacity: int) -> onnx.ModelProto:
    """Return the encoder with the outputs of `TOPK_OUTPUTS`.

        indices     int32 (batch, K)     latents of the kept entries, rising, then -1
        values      float32 (batch, K)   their values, and 0 where the index is -1
        count       int32 (batch, 1)     entries of the code, kept or not
        overflow    int32 (batch, 1)     entries that did not fit: max(count - K, 0)

    Where more than K are active, those of largest magnitude are kept; of equals the lower latent.

    Args:
        encoder: A graph with the output `code`; its weights may lie in a file beside it.
        latent_dim: Latents J.
        capacity: Slots K a row, from 1 to J.

    Raises:
        UsageError: `capacity` is out of range.
    """
    if not 1 <= capacity <= latent_dim:
        raise UsageError(f"`top_k` must be from 1 to {latent_dim} (the latents), not {capacity}")
    proto = onnx.ModelProto()
    proto.CopyFrom(encoder)
    batch = batch_dimension(proto)
    keep_only(proto.graph, "code")
    proto.graph.initializer.extend(_constants(latent_dim, capacity))
    proto.graph.node.extend([*_selecting_nodes(), *_counting_nodes()])
    del proto.graph.output[:]
    widths = dict(zip(TOPK_OUTPUTS, (capacity, capacity, 1, 1), strict=True))
    proto.graph.output.extend(
        helper.make_tensor_value_info(
            name, TensorProto.FLOAT if name == "values" else TensorProto.INT32, [batch, width]
        )
        for name, width in widths.items()
    )
    return proto


def add_topk(
    folder: Path, capacity: int, rows: NDArray[Any], facts: dict[str, str]
) -> tuple[GraphSignature, Overflow]:
    """Write `encoder_topk.onnx` beside the encoder of a folder, and compare the two.

    Args:
        folder: Holds `encoder.onnx`.
        capacity: Slots K a row.
        rows: Rows to compare on.
        facts: What the graph says about itself.

    Returns:
        Inputs and outputs of the graph, and how often the capacity did not suffice on these rows.

    Raises:
        UsageError: `capacity` is out of range.
        ExportError: The graph is not valid, or differs from the dense one.
    """
    encoder = onnx.load(folder / ENCODER, load_external_data=False)
    latent_dim = encoder.graph.output[0].type.tensor_type.shape.dim[1].dim_value
    graph = add_metadata(topk_graph(encoder, latent_dim, capacity), facts, "encoder_topk")
    (folder / ENCODER_TOPK).write_bytes(graph.SerializeToString(deterministic=True))
    check_file(folder / ENCODER_TOPK)
    return signature(graph), check_topk(folder, encoder.graph.input[0].name, rows, capacity)


def check_topk(folder: Path, modality: str, rows: NDArray[Any], capacity: int) -> Overflow:
    """Compare the graph in a folder with the dense one beside it, entry by entry.

    Args:
        folder: Holds `encoder.onnx` and `encoder_topk.onnx`.
        modality: Name of the input.
        rows: Rows to compare on.
        capacity: Slots K a row.

    Returns:
        How often the capacity did not suffice on these rows.

    Raises:
        ExportError: The two graphs differ.
    """
    dense_session = open_session(folder / ENCODER, device="cpu")
    session = open_session(folder / ENCODER_TOPK, device="cpu")
    (dense,) = dense_session.run(["code"], {modality: rows})
    expected = keep_largest(dense, capacity)
    for batch_size in _BATCHES:
        found = _run(session, modality, rows, batch_size)
        for name, array in expected.items():
            if found[name].tobytes() != array.tobytes():
                raise ExportError(
                    f"{ENCODER_TOPK}: {name} is not what {ENCODER} gives, at batch {batch_size}."
                    " Nothing was written."
                )
    count = expected["count"]
    return Overflow(len(rows), int((count > capacity).sum()), int(count.max(initial=0)))


def keep_largest(dense: NDArray[np.float32], capacity: int) -> dict[str, NDArray[Any]]:
    """Compute in numpy what the graph does: the rule it is checked against.

    Args:
        dense: Codes, shape (rows, latents).
        capacity: Slots K a row.

    Returns:
        The outputs by name.
    """
    latent_dim = dense.shape[1]
    is_active = dense != 0
    magnitude = np.where(is_active, np.abs(dense), np.float32(-1.0))
    order = np.argsort(-magnitude, axis=1, kind="stable")[:, :capacity]
    is_kept = np.take_along_axis(is_active, order, axis=1)
    latents = np.sort(np.where(is_kept, order, latent_dim), axis=1)
    is_entry = latents < latent_dim
    values = np.take_along_axis(dense, np.minimum(latents, latent_dim - 1), axis=1)
    count = is_active.sum(axis=1, keepdims=True)
    return {
        "indices": np.where(is_entry, latents, -1).astype(np.int32),
        "values": np.where(is_entry, values, np.float32(0.0)),
        "count": count.astype(np.int32),
        "overflow": np.maximum(count - capacity, 0).astype(np.int32),
    }


def _run(
    session: Session, modality: str, rows: NDArray[Any], batch_size: int
) -> dict[str, NDArray[Any]]:
    parts = [
        session.run(TOPK_OUTPUTS, {modality: rows[start : start + batch_size]})
        for start in range(0, len(rows), batch_size)
    ]
    return {
        name: np.concatenate(arrays)
        for name, arrays in zip(TOPK_OUTPUTS, zip(*parts, strict=True), strict=True)
    }


def _constants(latent_dim: int, capacity: int) -> list[onnx.TensorProto]:
    values: dict[str, NDArray[Any]] = {
        "capacity": np.array([capacity], np.int64),
        "latents": np.array(latent_dim, np.int64),
        "last": np.array(latent_dim - 1, np.int64),
        "minus_one": np.array(-1, np.int64),
        "zero": np.array(0.0, np.float32),
        "below": np.array(-1.0, np.float32),
        "latent_axis": np.array([1], np.int64),
        "capacity_32": np.array(capacity, np.int32),
        "zero_32": np.array(0, np.int32),
    }
    return [numpy_helper.from_array(value, _PREFIX + name) for name, value in values.items()]


def _selecting_nodes() -> list[onnx.NodeProto]:
    """Return the nodes from `code` to indices and values.

    The kept entries are found by magnitude and then sorted by latent; a place without an entry is
    numbered J meanwhile, which sorts it to the end.
    """
    return [
        _node("Cast", ["code"], ["is_active"], to=TensorProto.BOOL),
        _node("Abs", ["code"], ["magnitude"]),
        _node("Where", ["is_active", "magnitude", "below"], ["score"]),
        _node("TopK", ["score", "capacity"], ["best", "chosen"], axis=1, largest=1, sorted=1),
        _node("GreaterOrEqual", ["best", "zero"], ["is_kept"]),
        _node("Where", ["is_kept", "chosen", "latents"], ["unordered"]),
        _node("TopK", ["unordered", "capacity"], ["ordered", "_"], axis=1, largest=0, sorted=1),
        _node("Less", ["ordered", "latents"], ["is_entry"]),
        _node("Min", ["ordered", "last"], ["readable"]),
        _node("GatherElements", ["code", "readable"], ["read"], axis=1),
        _node("Where", ["is_entry", "read", "zero"], ["values"]),
        _node("Where", ["is_entry", "ordered", "minus_one"], ["latent"]),
        _node("Cast", ["latent"], ["indices"], to=TensorProto.INT32),
    ]


def _counting_nodes() -> list[onnx.NodeProto]:
    return [
        _node("Cast", ["is_active"], ["ones"], to=TensorProto.INT32),
        _node("ReduceSum", ["ones", "latent_axis"], ["count"], keepdims=1),
        _node("Sub", ["count", "capacity_32"], ["surplus"]),
        _node("Max", ["surplus", "zero_32"], ["overflow"]),
    ]


def _node(kind: str, inputs: list[str], outputs: list[str], **attributes: Any) -> onnx.NodeProto:
    """Return a node; names other than `code` and those of the outputs get the prefix."""
    name = f"{_PREFIX}{outputs[0]}_{kind}"
    return helper.make_node(kind, _named(inputs), _named(outputs), name=name, **attributes)


def _named(names: list[str]) -> list[str]:
    return [name if name in ("code", *TOPK_OUTPUTS) else _PREFIX + name for name in names]
