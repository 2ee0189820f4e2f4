"""A Triton model repository from a bundle: folders that Triton Inference Server loads as they are.

    NAME/         the onnxruntime backend: dense codes, spike logits, means; batched by the server
    NAME_topk/    the same for `encoder_topk.onnx`, where the bundle has one
    NAME_sparse/  the Python backend: sparse codes as padded rows; another tau; encoded images

Each holds `config.pbtxt` and the version folder `1`. The files are copies of the bundle's, so a
repository gives the codes that the bundle was checked for. The same bundle gives the same bytes.
"""

import json
import shutil
from collections.abc import Iterable, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Final, NamedTuple

from vsc_serve.atomic import atomic_folder
from vsc_serve.bundle import ENCODER, ENCODER_TOPK, Bundle, Manifest, open_bundle, url_name
from vsc_serve.outputs import marked, write_marker

MAX_BATCH_SIZE: Final = 256
"""Rows that the server puts into one run."""
MAX_QUEUE_SIZE: Final = 1024
"""Requests that may wait; the server refuses further ones instead of growing."""
VERSION: Final = "1"

_DATA_TYPES: Final = {"uint8": "TYPE_UINT8", "float32": "TYPE_FP32", "int32": "TYPE_INT32"}
_ANY: Final = -1
_KIND: Final = "triton"

REPOSITORY: Final = marked(
    "a Triton model repository", _KIND, *(f"*/{name}" for name in ("config.pbtxt", f"{VERSION}/*"))
)
"""What `write_repository` writes."""


class TensorConfig(NamedTuple):
    """An input or output as config.pbtxt describes it, without the batch dimension."""

    name: str
    data_type: str
    dims: Sequence[int]
    is_optional: bool = False


def write_repository(bundle: Path, out: Path) -> list[str]:
    """Write a Triton model repository.

    Args:
        bundle: Folder that `vsc export` wrote.
        out: Folder to write, whole or not at all.

    Returns:
        The names of the models in it.

    Raises:
        BundleError: The bundle is missing or damaged.
        InputError: The folder cannot be written.
    """
    opened = open_bundle(bundle)
    name = url_name(opened.manifest)
    with atomic_folder(out, REPOSITORY) as repository:
        _write_onnx_model(repository / name, opened, ENCODER)
        if ENCODER_TOPK in opened.manifest.files:
            _write_onnx_model(repository / f"{name}_topk", opened, ENCODER_TOPK)
        _write_python_model(repository / f"{name}_sparse", opened)
        names = sorted(path.name for path in repository.iterdir())
        write_marker(repository, _KIND)  # a file here is no model to the server
        return names


def _write_onnx_model(folder: Path, bundle: Bundle, graph: str) -> None:
    manifest = bundle.manifest
    outputs = _topk_outputs(manifest) if graph == ENCODER_TOPK else _dense_outputs(manifest)
    config = _config(folder.name, "onnxruntime", "KIND_AUTO", manifest, [_rows(manifest)], outputs)
    _write_model(folder, config, bundle, {graph: "model.onnx"})


def _write_python_model(folder: Path, bundle: Bundle) -> None:
    inputs = [_rows(bundle.manifest)._replace(is_optional=bundle.manifest.modality == "image")]
    if bundle.manifest.modality == "image":
        inputs.append(TensorConfig("image_bytes", "TYPE_STRING", [1], is_optional=True))
    inputs.append(TensorConfig("tau", "TYPE_FP64", [1], is_optional=True))
    outputs = [
        TensorConfig("indices", "TYPE_INT32", [_ANY]),
        TensorConfig("values", "TYPE_FP32", [_ANY]),
        TensorConfig("count", "TYPE_INT32", [1]),
    ]
    config = _config(folder.name, "python", "KIND_CPU", bundle.manifest, inputs, outputs)
    _write_model(folder, config, bundle, {ENCODER: ENCODER})
    code = (files("vsc_export") / "triton_model.py").read_text(encoding="utf-8")
    (folder / VERSION / "model.py").write_text(code, encoding="utf-8")


def _write_model(folder: Path, config: str, bundle: Bundle, graphs: dict[str, str]) -> None:
    """Write the configuration, and copy graphs and weights into the version folder."""
    (folder / VERSION).mkdir(parents=True)
    (folder / "config.pbtxt").write_text(config, encoding="utf-8")
    weights = {name: name for name in bundle.manifest.files if name.endswith(".bin")}
    for source, target in (graphs | weights).items():
        shutil.copyfile(bundle.path / source, folder / VERSION / target)


def _rows(manifest: Manifest) -> TensorConfig:
    if manifest.pixel_spec is not None:
        return TensorConfig("image", "TYPE_UINT8", manifest.pixel_spec.shape)
    return TensorConfig("vector", "TYPE_FP32", [manifest.input_dim or 0])


def _dense_outputs(manifest: Manifest) -> list[TensorConfig]:
    names = ("code", "spike_logit", "mu", "logvar")
    return [TensorConfig(name, "TYPE_FP32", [manifest.latent_dim]) for name in names]


def _topk_outputs(manifest: Manifest) -> list[TensorConfig]:
    """Return the outputs as the manifest describes them: `int32 (batch, 16)`."""
    described = manifest.graphs[ENCODER_TOPK]["outputs"]
    return [_tensor(name, text) for name, text in described.items()]


def _tensor(name: str, described: str) -> TensorConfig:
    dtype, _, shape = described.partition(" ")
    _batch, *dims = shape.strip("()").split(", ")
    return TensorConfig(name, _DATA_TYPES[dtype], [int(dim) for dim in dims])


def _config(
    name: str,
    backend: str,
    kind: str,
    manifest: Manifest,
    inputs: Sequence[TensorConfig],
    outputs: Sequence[TensorConfig],
) -> str:
    """Return the text of config.pbtxt."""
    return f"""# Written by vsc-serve. max_batch_size, queue and instances may be changed.
name: "{name}"
backend: "{backend}"
max_batch_size: {MAX_BATCH_SIZE}
input [
{_tensors(inputs)}
]
output [
{_tensors(outputs)}
]
dynamic_batching {{
  default_queue_policy {{ max_queue_size: {MAX_QUEUE_SIZE} }}
}}
instance_group [ {{ kind: {kind} count: 1 }} ]
model_warmup [
  {{
    name: "one row"
    batch_size: 1
    inputs {{
      key: "{inputs[0].name}"
      value {{ data_type: {inputs[0].data_type} dims: {list(inputs[0].dims)} zero_data: true }}
    }}
  }}
]
{_parameters(manifest)}"""


def _tensors(tensors: Iterable[TensorConfig]) -> str:
    return ",\n".join(
        f'  {{ name: "{tensor.name}" data_type: {tensor.data_type} dims: {list(tensor.dims)}'
        f"{' optional: true' if tensor.is_optional else ''} }}"
        for tensor in tensors
    )


def _parameters(manifest: Manifest) -> str:
    """Return what the server tells clients about the model, and model.py reads."""
    spec = manifest.pixel_spec.to_json() if manifest.pixel_spec else None
    stored = {
        "vsc_model": manifest.name,
        "vsc_digest": manifest.digest,
        "vsc_modality": manifest.modality,
        "vsc_pixel_spec": json.dumps(spec, sort_keys=True),
        "vsc_tau": repr(manifest.tau),
        "vsc_threads": "0",
    }
    return "".join(
        f"parameters {{ key: {json.dumps(name)} value {{ string_value: {json.dumps(value)} }} }}\n"
        for name, value in stored.items()
    )
