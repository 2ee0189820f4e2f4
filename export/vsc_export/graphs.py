"""The graphs that are exported: the encoder with its threshold inside, and the decoder.

A graph holds inference and nothing else: pixels come in as they are read, normalisation and the
threshold are inside, and no node draws a random number. Paths, code lines and times that the
exporter leaves behind are removed, so that the same checkpoint gives the same bytes.
"""

import logging
import warnings
from collections.abc import Sequence
from typing import Final

import numpy as np
import onnx
import torch
from onnx import numpy_helper
from torch import Tensor, nn

from vsc_serve.codes import threshold_logit
from vsc_serve.errors import ExportError
from vsc_training.model import LOGVAR_RANGE, SPIKE_LOGIT_LIMIT, VSC

TAU_INPUT: Final = "tau_logit"
"""Input of the encoder that has a default: ln(tau / (1 - tau))."""
ENCODER_OUTPUTS: Final = ("code", "spike_logit", "mu", "logvar")
DECODER_OUTPUTS: Final = ("mean",)

_EXAMPLE_BATCH: Final = 2
"""An example batch of 1 makes the exporter fix the batch size."""


class EncoderGraph(nn.Module):
    """Pixels (or vectors) to code, spike logits, slab means and log-variances."""

    def __init__(self, model: VSC) -> None:
        super().__init__()
        self.model = model

    def forward(self, rows: Tensor, tau_logit: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Encode deterministically: code_j = mu_j where spike_logit_j > tau_logit, else 0.

        Args:
            rows: uint8 (images, height, width, channels), or float32 (vectors, dimensions).
            tau_logit: Threshold on the spike logit, a scalar.
        """
        model = self.model
        if model.data.modality == "image":
            scaled = rows.to(model.spike_head.weight.dtype) / 255.0
        else:
            scaled = (rows.to(model.spike_head.weight.dtype) - model.center) / model.scale
        hidden = model.encoder(scaled)
        spike_logit = model.spike_head(hidden).clamp(-SPIKE_LOGIT_LIMIT, SPIKE_LOGIT_LIMIT)
        mu, logvar = model.slab_head(hidden).chunk(2, dim=1)
        # A product with the mask would give -0.0 and NaN; torch.zeros_like would leave shape nodes.
        code = torch.where(spike_logit > tau_logit, mu, 0.0)
        return code, spike_logit, mu, logvar.clamp(*LOGVAR_RANGE)


class DecoderGraph(nn.Module):
    """Code to the mean of the likelihood."""

    def __init__(self, model: VSC) -> None:
        super().__init__()
        self.model = model

    def forward(self, code: Tensor) -> Tensor:
        """Decode: images in [0, 1], vectors in their own units."""
        raw: Tensor = self.model.decoder(code)
        if self.model.data.modality == "vector":
            return raw * self.model.scale + self.model.center
        return torch.sigmoid(raw)


def encoder_graph(model: VSC, tau: float, opset: int) -> onnx.ModelProto:
    """Export the encoder. `tau` becomes the default of the input `tau_logit`.

    Raises:
        ExportError: A layer does not export.
    """
    rows = example_rows(model, _EXAMPLE_BATCH)
    limit = torch.tensor(threshold_logit(tau))
    modality = model.data.modality
    batch = torch.export.Dim("batch")
    proto = _export(
        EncoderGraph(model),
        (rows, limit),
        (modality, TAU_INPUT),
        ENCODER_OUTPUTS,
        ({0: batch}, None),
        opset,
    )
    # An initializer with the name of an input is that input's default (ONNX IR, version 4 and
    # later).
    proto.graph.initializer.append(numpy_helper.from_array(limit.numpy(), TAU_INPUT))
    return _checked(proto)


def decoder_graph(model: VSC, opset: int) -> onnx.ModelProto:
    """Export the decoder. Raises ExportError when a layer does not export."""
    code = torch.zeros(_EXAMPLE_BATCH, model.recipe.latent_dim)
    batch = torch.export.Dim("batch")
    return _checked(
        _export(DecoderGraph(model), (code,), ("code",), DECODER_OUTPUTS, ({0: batch},), opset)
    )


def example_rows(model: VSC, count: int) -> Tensor:
    """Return rows of the right shape and type for the encoder graph; random, from a fixed seed."""
    rng = np.random.default_rng(0)
    shape = (count, *model.data.shape)
    if model.data.modality == "image":
        return torch.from_numpy(rng.integers(0, 256, shape, dtype=np.uint8))
    return torch.from_numpy(rng.normal(size=shape).astype(np.float32))


def _export(
    graph: nn.Module,
    example: tuple[Tensor, ...],
    inputs: Sequence[str],
    outputs: Sequence[str],
    dynamic_shapes: tuple[object, ...],
    opset: int,
) -> onnx.ModelProto:
    exporter_log = logging.getLogger("torch.onnx")
    level = exporter_log.level
    exporter_log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the exporter warns of its own internals
            program = torch.onnx.export(
                graph.eval(),
                example,
                input_names=list(inputs),
                output_names=list(outputs),
                dynamic_shapes=dynamic_shapes,
                opset_version=opset,
                dynamo=True,
                verbose=False,
            )
    except Exception as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise ExportError(
            f"{type(graph).__name__}: cannot be exported to ONNX ({reason[0][:200]})."
            " A layer of the model has no ONNX form."
        ) from error
    finally:
        exporter_log.setLevel(level)
    if program is None:
        raise ExportError(f"{type(graph).__name__}: the exporter gave no graph")
    return _stripped(program.model_proto)


def _stripped(proto: onnx.ModelProto) -> onnx.ModelProto:
    """Remove what says where and when the graph was made."""
    for part in (proto, proto.graph, *proto.graph.node, *proto.graph.value_info, *proto.functions):
        del part.metadata_props[:]
        part.doc_string = ""
    for value in (*proto.graph.input, *proto.graph.output, *proto.graph.initializer):
        del value.metadata_props[:]
        value.doc_string = ""
    return proto


def _checked(proto: onnx.ModelProto) -> onnx.ModelProto:
    """Check the graph, and that no node draws random numbers."""
    try:
        onnx.checker.check_model(proto, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ExportError(f"the exported graph is not valid ONNX ({error})") from error
    random_nodes = {
        node.op_type
        for node in proto.graph.node
        if node.op_type.startswith("Random") or node.op_type in ("Bernoulli", "Multinomial")
    }
    if random_nodes:
        raise ExportError(
            f"the exported graph draws random numbers ({', '.join(sorted(random_nodes))})"
        )
    return proto
