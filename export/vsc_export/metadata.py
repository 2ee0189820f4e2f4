"""What an ONNX file says about itself, readable by any runtime without the manifest.

Flat strings under `metadata_props`: onnxruntime gives them as `custom_metadata_map`. Neither a path
nor a time nor the version of vsc-serve is among them: the same run must give the same bytes, and a
new version of the program alone must not make a new model. Versions are in the manifest.
"""

import json
from collections.abc import Iterable

import numpy as np
import onnx
from onnx import helper

from vsc_serve.bundle import FORMAT, GraphSignature, Precision
from vsc_serve.codes import threshold_logit
from vsc_training.model import VSC

RULE = "code_j = mu_j where spike_logit_j > tau_logit, else 0"


def describe_model(model: VSC, name: str, tau: float, precision: Precision) -> dict[str, str]:
    """Return what every graph of a bundle says.

    Args:
        model: The trained model.
        name: Its name.
        tau: Spike threshold that is the graph's own.
        precision: Precision of the encoder.
    """
    spec = model.data.pixel_spec
    takes = (
        {"vsc.pixel_spec": json.dumps(spec.to_json(), sort_keys=True)}
        if spec
        else {"vsc.input_dim": str(model.data.input_dim)}
    )
    return takes | {
        "vsc.format": str(FORMAT),
        "vsc.name": name,
        "vsc.modality": model.data.modality,
        "vsc.latent_dim": str(model.recipe.latent_dim),
        "vsc.tau": repr(tau),
        "vsc.tau_logit": repr(float(threshold_logit(tau))),
        "vsc.rule": RULE,
        "vsc.precision": precision,
    }


def add_metadata(proto: onnx.ModelProto, facts: dict[str, str], kind: str) -> onnx.ModelProto:
    """Set the metadata of a graph, in place of any it has.

    Args:
        proto: The graph.
        facts: What `describe_model` says.
        kind: `encoder`, `encoder_csr` or `decoder`.
    """
    del proto.metadata_props[:]
    helper.set_model_props(proto, dict(sorted((facts | {"vsc.kind": kind}).items())))
    return proto


def signature(proto: onnx.ModelProto) -> GraphSignature:
    """Return names, types and shapes of inputs and outputs: `uint8 (batch, 28, 28, 1)`."""
    return {
        "inputs": _describe_values(proto.graph.input),
        "outputs": _describe_values(proto.graph.output),
    }


def _describe_values(values: Iterable[onnx.ValueInfoProto]) -> dict[str, str]:
    described = {}
    for value in values:
        kind = value.type.tensor_type
        dtype: np.dtype[np.generic] = helper.tensor_dtype_to_np_dtype(kind.elem_type)
        shape = ", ".join(str(dim.dim_param or dim.dim_value) for dim in kind.shape.dim)
        described[value.name] = f"{dtype} ({shape})"
    return described
