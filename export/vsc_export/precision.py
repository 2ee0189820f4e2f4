"""The encoder in another precision. The spike head and the threshold are float32 in all of them.

fp16 is exported as such: the layers hold half-precision weights and the graph holds the casts, so
no pass over the finished graph has to guess which node tolerates what. int8 is made from the
float32 graph by onnxruntime's static quantisation: weights per channel, activations by their range
on calibration rows. Products give float32 and nothing quantised enters the spike head.
"""

import logging
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, get_args

import numpy as np
import onnx
import torch
from numpy.typing import NDArray

from vsc_export.graphs import TAU_INPUT, check_graph, encoder_graph, strip_provenance
from vsc_serve.bundle import Precision
from vsc_serve.errors import ExportError, UsageError
from vsc_training.model import VSC

_QUANTISED: Final = ("Gemm", "MatMul", "Conv")
_FLOAT_OUTPUT: Final = ("Gemm", "MatMul")
"""Products that give float32. What a convolution gives must be quantised for it to run in int8."""
_SPIKE_WEIGHT: Final = "spike_head.weight"
_CALIBRATION_BATCH: Final = 64
_WARNINGS_OFF: Final = 4
_WARNINGS_ON: Final = 2


def parse_precision(text: str) -> Precision:
    """Read the name of a precision. Raises UsageError for any other."""
    for precision in get_args(Precision):
        if text == precision:
            return precision  # type: ignore[no-any-return]  # get_args forgets the type
    raise UsageError(f"`precision` {text}: give {', '.join(get_args(Precision))}.")


def encoder_in(
    precision: Precision, model: VSC, tau: float, opset: int, rows: NDArray[Any]
) -> onnx.ModelProto:
    """Export the encoder in a precision.

    Args:
        precision: Of all layers but the spike head.
        model: The trained model.
        tau: Spike threshold that becomes the default of `tau_logit`.
        opset: ONNX operator set.
        rows: Calibration rows, real ones; only int8 looks at them.

    Raises:
        ExportError: A layer does not export, or cannot be quantised.
    """
    if precision == "fp16":
        return encoder_graph(model, tau, opset, body_type=torch.float16)
    exported = encoder_graph(model, tau, opset)
    return exported if precision == "float32" else _quantised(exported, model, rows)


def _quantised(encoder: onnx.ModelProto, model: VSC, rows: NDArray[Any]) -> onnx.ModelProto:
    inputs = [value for value in encoder.graph.input if value.name == TAU_INPUT]
    for value in inputs:  # while it is an input, the calibration could not fold it
        encoder.graph.input.remove(value)
    try:
        with tempfile.TemporaryDirectory() as folder, _quietly():
            path = Path(folder) / "int8.onnx"
            _quantise(encoder, path, _Calibration(model.data.modality, rows))
            proto = onnx.load(path)
    except Exception as error:  # the tool raises whatever went wrong inside it
        raise ExportError(
            f"`precision=int8`: the encoder cannot be quantised ({str(error)[:200]})."
            " Export with `precision=fp16` or float32."
        ) from error
    proto.graph.input.extend(inputs)
    _join_in_float32(proto.graph)
    return check_graph(strip_provenance(proto))


def _join_in_float32(graph: onnx.GraphProto) -> None:
    """Let what a skip encoder puts side by side be what it was before it was quantised.

    The quantiser gives a tensor that one of its nodes takes to all nodes in its quantised form; the
    spike head must see the input in float32.
    """
    makers = {output: node for node in graph.node for output in node.output}
    for node in graph.node:
        if node.op_type == "Concat":
            for place, name in enumerate(node.input):
                maker = makers.get(name)
                if maker is not None and maker.op_type == "DequantizeLinear":
                    node.input[place] = makers[maker.input[0]].input[0]


def _quantise(encoder: onnx.ModelProto, path: Path, calibration: "_Calibration") -> None:
    from onnxruntime.quantization import QuantType, quantize_static

    quantize_static(
        encoder,
        path,
        calibration,
        per_channel=True,
        activation_type=QuantType.QUInt8,
        # Unsigned: with signed weights, processors without VNNI saturate and give other codes.
        weight_type=QuantType.QUInt8,
        op_types_to_quantize=list(_QUANTISED),
        nodes_to_exclude=_spike_nodes(encoder),
        extra_options={
            "WeightSymmetric": True,  # one zero point for all channels, which convolutions need
            "OpTypesToExcludeOutputQuantization": list(_FLOAT_OUTPUT),
            "DedicatedQDQPair": True,  # or the spike head would read what its neighbour quantised
        },
    )


def _spike_nodes(encoder: onnx.ModelProto) -> list[str]:
    """Return the names of the nodes that multiply with the spike head's weights."""
    names = [
        node.name
        for node in encoder.graph.node
        if any(name.endswith(_SPIKE_WEIGHT) for name in node.input)
    ]
    if not names:
        raise ValueError("the graph has no node with the spike head's weights")
    return names


class _Calibration:
    """Rows in batches, as the quantiser asks for them."""

    def __init__(self, modality: str, rows: NDArray[Any]) -> None:
        starts = range(0, len(rows), _CALIBRATION_BATCH)
        self._batches = iter([{modality: rows[i : i + _CALIBRATION_BATCH]} for i in starts])

    def get_next(self) -> dict[str, NDArray[np.generic]] | None:
        """Return the next batch, None after the last."""
        return next(self._batches, None)


@contextmanager
def _quietly() -> Iterator[None]:
    """Silence advice about passes that this graph does not need."""
    import onnxruntime

    previous = logging.root.manager.disable
    onnxruntime.set_default_logger_severity(_WARNINGS_OFF)
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(previous)
        onnxruntime.set_default_logger_severity(_WARNINGS_ON)
