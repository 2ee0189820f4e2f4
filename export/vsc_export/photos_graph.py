"""Make the graph of the backbone `photos`: `python -m vsc_export.photos_graph FOLDER`.

The graph and its rule come with the package (vsc_serve/photos); a test makes them again and
compares. Weights are not in it: it points into a file that `vsc_serve.photos` makes.
"""

import json
import sys
from pathlib import Path
from typing import Any, Final

import onnx
from onnx import TensorProto, helper

from vsc_serve.photos.cache import GRAPH, RULE, WEIGHTS
from vsc_serve.photos.network import DIMENSIONS, SIDE, Conv, convolutions

_OPSET: Final = 20
_IR_VERSION: Final = 9
_LEVELS: Final = 255.0
_MIDDLE: Final = 127.0
_RANGE: Final = 128.0


class _Builder:
    """Nodes and initializers, and where the next weights lie in the file."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []
        self._offset = 0

    def conv(self, conv: Conv, taken: str) -> str:
        """Add a convolution, and ReLU6 where it has one; return its output."""
        out = conv.channels[1]
        names = [taken, self._weight(f"{conv.name}.kernel", conv.shape)]
        names.append(self._weight(f"{conv.name}.bias", (out,)))
        given = f"{conv.name}.sum" if conv.is_clipped else f"{conv.name}.out"
        settings: dict[str, Any] = {
            "kernel_shape": [conv.kernel, conv.kernel],
            "strides": [conv.stride, conv.stride],
            "pads": list(conv.pads),
            "group": out if conv.is_depthwise else 1,
        }
        self.nodes.append(helper.make_node("Conv", names, [given], **settings))
        if not conv.is_clipped:
            return given
        clipped = f"{conv.name}.out"
        self.nodes.append(helper.make_node("Clip", [given, "zero", "six"], [clipped]))
        return clipped

    def add(self, one: str, other: str) -> str:
        """Add the sum of two outputs; return it."""
        self.nodes.append(helper.make_node("Add", [one, other], [f"{one}.added"]))
        return f"{one}.added"

    def _weight(self, name: str, shape: tuple[int, ...]) -> str:
        """Add float32 weights that lie in the file, after those before."""
        tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=shape)
        size = 4
        for length in shape:
            size *= length
        tensor.data_location = TensorProto.EXTERNAL
        for key, value in (("location", WEIGHTS), ("offset", self._offset), ("length", size)):
            tensor.external_data.add(key=key, value=str(value))
        self._offset += size
        self.weights.append(tensor)
        return name


def photos_graph() -> onnx.ModelProto:
    """Return the graph: float32 pixels, shape (batch, 3, 224, 224), to embeddings."""
    builder, inputs, current = _Builder(), {}, "pixels"
    for conv in convolutions():
        inputs[conv.name] = current
        current = builder.conv(conv, current)
        if conv.adds_input_of:
            current = builder.add(current, inputs[conv.adds_input_of])
    builder.nodes.append(helper.make_node("GlobalAveragePool", [current], ["mean"]))
    builder.nodes.append(helper.make_node("Flatten", ["mean"], ["embedding"]))
    limits = [
        helper.make_tensor(name, TensorProto.FLOAT, [], [value])
        for name, value in (("zero", 0.0), ("six", 6.0))
    ]
    graph = helper.make_graph(
        builder.nodes,
        "efficientnet_lite0",
        [_port("pixels", ["batch", 3, SIDE, SIDE])],
        [_port("embedding", ["batch", DIMENSIONS])],
        [*limits, *builder.weights],
    )
    opsets = [helper.make_opsetid("", _OPSET)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=_IR_VERSION)


def photos_rule() -> dict[str, Any]:
    """Return how an image becomes the input, as docs/backbones.md describes it."""
    return {
        "height": SIDE,
        "width": SIDE,
        "mean": [_MIDDLE / _LEVELS] * 3,
        "std": [_RANGE / _LEVELS] * 3,
    }


def write(folder: Path) -> None:
    """Write graph and rule into a folder; the same bytes every time."""
    (folder / GRAPH).write_bytes(photos_graph().SerializeToString(deterministic=True))
    (folder / RULE).write_text(json.dumps(photos_rule()) + "\n", encoding="utf-8")


def _port(name: str, shape: list[Any]) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)


if __name__ == "__main__":
    write(Path(sys.argv[1]))
