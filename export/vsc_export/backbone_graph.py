"""One graph from pixels to codes: a backbone's nodes in front of an encoder of vectors.

image -> cast, scale, transpose -> backbone -> spike and slab heads -> threshold -> code
"""

from typing import Any, Final

import onnx
from onnx import TensorProto, compose, helper, numpy_helper

from vsc_export.graphs import TAU_INPUT, strip_provenance
from vsc_serve.bundle import EMBEDDING
from vsc_training.backbone import BackboneSpec

IMAGE: Final = "image"
VECTOR: Final = "vector"

_PREFIX: Final = "backbone/"
_PREPARE: Final = "prepare/"


def join_graphs(
    backbone: onnx.ModelProto, spec: BackboneSpec, encoder: onnx.ModelProto
) -> onnx.ModelProto:
    """Put a backbone in front of an encoder of vectors.

    Args:
        backbone: The backbone, with its weights, at the operator set of the encoder.
        spec: Its input, its output, and how pixels become its input.
        encoder: Takes `vector`, with its weights.

    Returns:
        A graph that takes `image`, uint8 (batch, height, width, channels), and gives what the
        encoder gives, and as `embedding` what the backbone gives, float32 (batch, dimensions).
    """
    front = compose.add_prefix(backbone, _PREFIX)
    joined = onnx.ModelProto()
    joined.CopyFrom(encoder)
    graph = joined.graph
    del graph.node[:], graph.input[:]
    graph.node.extend([*_preparing_nodes(spec), *front.graph.node, *_bridge(spec)])
    graph.node.extend(encoder.graph.node)
    row: list[str | int | None] = ["batch", spec.dim]
    graph.output.append(helper.make_tensor_value_info(EMBEDDING, TensorProto.FLOAT, row))
    shape: list[str | int | None] = ["batch", *spec.pixel_spec.shape]
    graph.input.append(helper.make_tensor_value_info(IMAGE, TensorProto.UINT8, shape))
    graph.input.extend(value for value in encoder.graph.input if value.name == TAU_INPUT)
    graph.initializer.extend([*_scaling(spec), *front.graph.initializer])
    graph.sparse_initializer.extend(front.graph.sparse_initializer)
    graph.value_info.extend(front.graph.value_info)
    joined.functions.extend(front.functions)
    joined.ir_version = max(joined.ir_version, front.ir_version)
    known = {one.domain for one in joined.opset_import}
    joined.opset_import.extend(one for one in front.opset_import if one.domain not in known)
    return strip_provenance(joined)


def _preparing_nodes(spec: BackboneSpec) -> list[onnx.NodeProto]:
    """Return the nodes from `image` to the backbone's input, as `BackboneSpec.prepare` goes."""
    steps: list[tuple[str, list[str], dict[str, Any]]] = []
    if spec.type != "uint8":
        steps.append(("Cast", [], {"to": TensorProto.FLOAT}))
        steps.append(("Mul", [f"{_PREPARE}factor"], {}))
        steps.append(("Add", [f"{_PREPARE}offset"], {}))
    if spec.layout == "NCHW":
        steps.append(("Transpose", [], {"perm": [0, 3, 1, 2]}))
    if spec.type == "float16":
        steps.append(("Cast", [], {"to": TensorProto.FLOAT16}))
    steps.append(("Identity", [], {}))
    names = [IMAGE, *(f"{_PREPARE}{number}" for number in range(len(steps) - 1))]
    outputs = [*names[1:], _PREFIX + spec.input]
    return [
        helper.make_node(kind, [name, *others], [output], name=f"{_PREPARE}{kind}_{output}", **rest)
        for name, output, (kind, others, rest) in zip(names, outputs, steps, strict=True)
    ]


def _scaling(spec: BackboneSpec) -> list[onnx.TensorProto]:
    if spec.type == "uint8":
        return []
    return [
        numpy_helper.from_array(spec.factor, f"{_PREPARE}factor"),
        numpy_helper.from_array(spec.offset, f"{_PREPARE}offset"),
    ]


def _bridge(spec: BackboneSpec) -> list[onnx.NodeProto]:
    """Return the nodes from the backbone's output, often float32, to the encoder's input."""
    return [
        helper.make_node(
            "Cast", [_PREFIX + spec.output], [EMBEDDING], name="bridge", to=TensorProto.FLOAT
        ),
        helper.make_node("Identity", [EMBEDDING], [VECTOR], name="to_encoder"),
    ]
