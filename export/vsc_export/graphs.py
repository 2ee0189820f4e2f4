"""The graphs that are exported: the encoder with its threshold inside, and the decoder.

A graph holds inference and nothing else: pixels come in as they are read, normalisation and the
threshold are inside, and no node draws a random number. Paths, code lines and times that the
exporter leaves behind are removed, so that the same checkpoint gives the same bytes.
"""

import copy
import logging
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import numpy as np
import onnx
import torch
from onnx import numpy_helper
from torch import Tensor, nn

from vsc_serve.codes import threshold_logit
from vsc_serve.errors import ExportError
from vsc_training.model import LOGVAR_RANGE, SPIKE_LOGIT_LIMIT, VSC, DataSpec
from vsc_training.networks import head_input
from vsc_training.onnx_graph import find_fault

TAU_INPUT: Final = "tau_logit"
"""Input of the encoder that has a default: ln(tau / (1 - tau))."""
ENCODER_OUTPUTS: Final = ("code", "spike_logit", "mu", "logvar")
DECODER_OUTPUTS: Final = ("mean",)

_EXAMPLE_BATCH: Final = 2
"""An example batch of 1 makes the exporter fix the batch size."""


class EncoderGraph(nn.Module):
    """Pixels (or vectors) to code, spike logits, slab means and log-variances.

    The spike head and the threshold compute in the type of the spike head's weights whatever the
    rest does: a logit that is off by a thousandth turns a spike over.
    """

    def __init__(self, model: VSC, *, body_type: torch.dtype | None = None) -> None:
        """Take the layers of a model. A `body_type` converts copies of all but the spike head."""
        super().__init__()
        self.model = model
        body_type = body_type or model.spike_head.weight.dtype
        self.body = copy.deepcopy(model.encoder).to(body_type)
        # Two products in place of one: the compacting graph leaves the second out.
        latent_dim = model.recipe.latent_dim
        self.mu_head = _part_of(model.slab_head, slice(None, latent_dim)).to(body_type)
        self.logvar_head = _part_of(model.slab_head, slice(latent_dim, None)).to(body_type)
        self.body_type = body_type

    def forward(self, rows: Tensor, tau_logit: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Encode deterministically: code_j = mu_j where spike_logit_j > tau_logit, else 0.

        Args:
            rows: uint8 (images, height, width, channels), or float32 (vectors, dimensions).
            tau_logit: Threshold on the spike logit, a scalar.
        """
        model = self.model
        exact_type = model.spike_head.weight.dtype
        if model.data.modality == "image":
            # Flat: onnxruntime divides images of one channel number by number, 40 times slower.
            scaled = (rows.flatten(1).to(exact_type) / 255.0).unflatten(1, model.data.shape)
        else:
            scaled = (rows.to(exact_type) - model.center) / model.scale
        hidden = self.body(scaled.to(self.body_type))
        seen = head_input(hidden, scaled, model.encoder_kind)
        spike_logit = model.spike_head(seen.to(exact_type))
        spike_logit = spike_logit.clamp(-SPIKE_LOGIT_LIMIT, SPIKE_LOGIT_LIMIT)
        mu = self.mu_head(seen.to(self.body_type)).to(exact_type)
        logvar = self.logvar_head(seen.to(self.body_type)).to(exact_type).clamp(*LOGVAR_RANGE)
        # A product with the mask would give -0.0 and NaN; torch.zeros_like would leave shape nodes.
        code = torch.where(spike_logit > tau_logit, mu, 0.0)
        return code, spike_logit, mu, logvar


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


def encoder_graph(
    model: VSC, tau: float, opset: int, *, body_type: torch.dtype | None = None
) -> onnx.ModelProto:
    """Export the encoder. `tau` becomes the default of the input `tau_logit`.

    Args:
        model: The trained model.
        tau: Spike threshold in (0, 1).
        opset: ONNX operator set.
        body_type: Type of all layers but the spike head; None leaves them as they are.

    Raises:
        ExportError: A layer does not export.
    """
    rows = example_rows(model.data, _EXAMPLE_BATCH)
    limit = torch.tensor(threshold_logit(tau))
    modality = model.data.modality
    batch = torch.export.Dim("batch")
    proto = _export(
        EncoderGraph(model, body_type=body_type),
        (rows, limit),
        (modality, TAU_INPUT),
        ENCODER_OUTPUTS,
        ({0: batch}, None),
        opset,
    )
    # An initializer with the name of an input is that input's default (ONNX IR, version 4 and
    # later).
    proto.graph.initializer.append(numpy_helper.from_array(limit.numpy(), TAU_INPUT))
    return check_graph(proto)


def decoder_graph(model: VSC, opset: int) -> onnx.ModelProto:
    """Export the decoder. Raises ExportError when a layer does not export."""
    code = torch.zeros(_EXAMPLE_BATCH, model.recipe.latent_dim)
    batch = torch.export.Dim("batch")
    return check_graph(
        _export(DecoderGraph(model), (code,), ("code",), DECODER_OUTPUTS, ({0: batch},), opset)
    )


def example_rows(data: DataSpec, count: int) -> Tensor:
    """Return rows of the right shape and type for an encoder graph; random, from a fixed seed."""
    rng = np.random.default_rng(0)
    shape = (count, *data.shape)
    if data.modality == "image":
        return torch.from_numpy(rng.integers(0, 256, shape, dtype=np.uint8))
    return torch.from_numpy(rng.normal(size=shape).astype(np.float32))


def _part_of(head: nn.Linear, units: slice) -> nn.Linear:
    """Return a layer that computes some of the units of another one."""
    weight, bias = head.weight.detach()[units], head.bias.detach()[units]
    part = nn.Linear(head.in_features, len(bias), dtype=weight.dtype)
    part.load_state_dict({"weight": weight, "bias": bias})
    return part


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
    return strip_provenance(program.model_proto)


def strip_provenance(proto: onnx.ModelProto) -> onnx.ModelProto:
    """Remove what says where and when the graph was made, in place."""
    for part in (proto, proto.graph, *proto.graph.node, *proto.graph.value_info, *proto.functions):
        del part.metadata_props[:]
        part.doc_string = ""
    for value in (*proto.graph.input, *proto.graph.output, *proto.graph.initializer):
        del value.metadata_props[:]
        value.doc_string = ""
    return proto


def check_graph(proto: onnx.ModelProto) -> onnx.ModelProto:
    """Return the graph when it is valid and no node draws random numbers. Raises ExportError."""
    _require_sound(proto)
    return proto


def check_file(path: Path) -> None:
    """Check a graph with its weights as they lie on the disk. Raises ExportError."""
    _require_sound(str(path))


def _require_sound(graph: onnx.ModelProto | str) -> None:
    if fault := find_fault(graph):
        raise ExportError(f"the exported graph {fault}")
