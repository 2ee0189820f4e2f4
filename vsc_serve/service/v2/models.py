"""The two models of the protocol that one bundle gives, named as in its Triton repository.

NAME gives the dense outputs of the encoder graph; NAME_sparse gives codes as padded rows. Both take
pixels or encoded images (or vectors), and a tau for each row.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from vsc_serve.bundle import Manifest, image_spec, url_name
from vsc_serve.codes import CodeRows, Codes, dense_to_csr, stack_codes, take_rows
from vsc_serve.encoder import Encoder
from vsc_serve.errors import InputError
from vsc_serve.images import read_pixels
from vsc_serve.options import EncodeOptions
from vsc_serve.service.state import Limits
from vsc_serve.service.v2.tensors import BYTES, InferenceRequest, Wanted

IMAGE_BYTES: Final = "image_bytes"
TAU: Final = "tau"
SPARSE: Final = "_sparse"
"""What the name of the model of padded rows ends with."""
PADDING: Final = -1
"""Index of a place that holds nothing."""


class Port(NamedTuple):
    """An input or output; its first dimension is the rows."""

    name: str
    datatype: str
    shape: tuple[int, ...]
    """Without the rows; -1 where it differs from request to request."""

    def to_json(self) -> dict[str, Any]:
        """Return it as the metadata of a model have it."""
        return {"name": self.name, "datatype": self.datatype, "shape": [-1, *self.shape]}


@dataclass(frozen=True)
class Model:
    """One of the two models."""

    name: str
    is_sparse: bool
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]

    def wanted(self, request: InferenceRequest) -> list[Wanted]:
        """Return the outputs that a request asks for. Raises InputError for one that is not."""
        if request.outputs is None:
            return [Wanted(port.name, request.is_binary) for port in self.outputs]
        names = [port.name for port in self.outputs]
        for one in request.outputs:
            if one.name not in names:
                raise InputError(
                    f"unexpected output {one.name!r}: model {self.name} has {', '.join(names)}"
                )
        return request.outputs


def models_of(manifest: Manifest) -> dict[str, Model]:
    """Return the models of a bundle by name."""
    spec, latents = manifest.pixel_spec, manifest.latent_dim
    if spec is None:
        inputs = [Port("vector", "FP32", (manifest.input_dim or 0,))]
    else:
        inputs = [Port("image", "UINT8", spec.shape), Port(IMAGE_BYTES, BYTES, (1,))]
    inputs.append(Port(TAU, "FP64", (1,)))
    dense = [Port(name, "FP32", (latents,)) for name in ("code", "spike_logit", "mu", "logvar")]
    sparse = [Port("indices", "INT32", (-1,)), Port("values", "FP32", (-1,))]
    sparse.append(Port("count", "INT32", (1,)))
    name = url_name(manifest)
    models = [
        Model(name, False, tuple(inputs), tuple(dense)),
        Model(name + SPARSE, True, tuple(inputs), tuple(sparse)),
    ]
    return {model.name: model for model in models}


class Inference(NamedTuple):
    """What a model has computed."""

    outputs: dict[str, NDArray[Any]]
    codes: Codes
    """Codes of the rows, for statistics."""
    tau: float | None
    """Their tau, where all rows had the same; None for the model's own."""


def infer(
    encoder: Encoder, model: Model, request: InferenceRequest, names: Sequence[str], limits: Limits
) -> Inference:
    """Compute the outputs of a request.

    Args:
        encoder: What makes the codes.
        model: The model that is asked.
        request: Its inputs.
        names: Outputs wanted.
        limits: How much a request may bring.

    Raises:
        InputError: An input that is missing, unknown, or of another shape or type; too many rows;
            an image that cannot be read; a tau out of range.
    """
    rows = _rows(encoder.manifest, model, request.inputs, limits)
    taus = _taus(request.inputs.get(TAU), len(rows))
    outputs: Mapping[str, NDArray[Any]]
    if model.is_sparse:
        codes = _codes(encoder, rows, taus)
        outputs = dict(zip(("indices", "values", "count"), pad(codes), strict=True))
    else:
        found = _dense(encoder, rows, taus, ["code", *(name for name in names if name != "code")])
        codes, outputs = dense_to_csr(found["code"]), found
    alike = taus[0] if taus and len(set(taus)) == 1 else None
    return Inference({name: outputs[name] for name in names}, codes, alike)


def pad(codes: Codes) -> tuple[NDArray[np.int32], NDArray[np.float32], NDArray[np.int32]]:
    """Return codes as rows of one length, that of the row with most entries (at least 1).

    Returns:
        Indices, rising and then -1, int32, (rows, length); values, 0 where the index is -1,
        float32, (rows, length); entries of each row, int32, (rows, 1).
    """
    count = np.diff(codes.indptr)
    is_entry = np.arange(max(1, int(count.max(initial=0)))) < count[:, None]
    indices = np.full(is_entry.shape, PADDING, np.int32)
    values = np.zeros(is_entry.shape, np.float32)
    indices[is_entry], values[is_entry] = codes.indices, codes.data
    return indices, values, count.astype(np.int32)[:, None]


def _rows(
    manifest: Manifest, model: Model, inputs: Mapping[str, NDArray[Any]], limits: Limits
) -> NDArray[Any]:
    """Return pixels or vectors."""
    ports = {port.name: port for port in model.inputs}
    for name in inputs:
        if name not in ports:
            raise InputError(
                f"unexpected input {name!r}: model {model.name} takes {', '.join(ports)}"
            )
    given = [name for name in inputs if name != TAU]
    if len(given) != 1:
        offered = " or ".join(name for name in ports if name != TAU)
        raise InputError(f"model {model.name} takes one of {offered}; {len(given)} were sent")
    found, port = inputs[given[0]], ports[given[0]]
    if port.datatype == BYTES and found.shape == (len(found),):  # a list of images does as well
        found = found[:, None]
    _check(found, port)
    if not 0 < len(found) <= limits.max_rows:
        raise InputError(f"{len(found)} rows, but a request has 1 to {limits.max_rows:,}")
    return _decoded(found.ravel(), manifest, limits) if port.datatype == BYTES else found


def _check(found: NDArray[Any], port: Port) -> None:
    """Raise InputError where a tensor is not what an input takes."""
    kinds = {"UINT8": np.uint8, "FP32": np.float32, "FP64": np.float64, BYTES: np.object_}
    if found.dtype != kinds[port.datatype]:
        raise InputError(
            f"input {port.name!r} takes {port.datatype}, not"
            f" {BYTES if found.dtype == np.object_ else found.dtype}"
        )
    if found.shape[1:] != port.shape or not found.ndim:
        raise InputError(
            f"unexpected shape for input {port.name!r}: expected {[-1, *port.shape]}, got"
            f" {list(found.shape)}"
        )


def _decoded(images: NDArray[np.object_], manifest: Manifest, limits: Limits) -> NDArray[np.uint8]:
    spec = image_spec(manifest)
    pixels = []
    for row, image in enumerate(images):
        try:
            pixels.append(read_pixels(image, spec, max_pixels=limits.max_pixels))
        except InputError as error:
            raise InputError(f"row {row}: {error}", kind=error.kind, row=row) from error
    return np.stack(pixels)


def _taus(given: NDArray[Any] | None, rows: int) -> list[float] | None:
    """Return the tau of each row; None for the model's own."""
    if given is None:
        return None
    _check(given, Port(TAU, "FP64", (1,)))
    if len(given) != rows:
        raise InputError(f"{len(given)} values of {TAU} for {rows} rows")
    taus: list[float] = given.ravel().tolist()
    for tau in taus:
        if not 0.0 < tau < 1.0:
            raise InputError(f"{TAU} must be above 0 and below 1, not {tau}")
    return taus


def _codes(encoder: Encoder, rows: NDArray[Any], taus: list[float] | None) -> Codes:
    if taus is None:
        return encoder.encode_rows(rows).codes
    groups = _groups(taus)
    parts = [
        encoder.encode_rows(rows[places], EncodeOptions(tau=tau)).codes
        for tau, places in groups.items()
    ]
    stacked = stack_codes(parts, encoder.manifest.latent_dim)
    return take_rows(CodeRows(codes=stacked), _back(groups)).codes


def _dense(
    encoder: Encoder, rows: NDArray[Any], taus: list[float] | None, names: Sequence[str]
) -> dict[str, NDArray[np.float32]]:
    if taus is None:
        return encoder.outputs(rows, names)
    groups = _groups(taus)
    parts = [encoder.outputs(rows[places], names, tau=tau) for tau, places in groups.items()]
    back = _back(groups)
    return {name: np.concatenate([part[name] for part in parts])[back] for name in names}


def _groups(taus: Sequence[float]) -> dict[float, list[int]]:
    """Return the rows of each tau."""
    groups: dict[float, list[int]] = {}
    for row, tau in enumerate(taus):
        groups.setdefault(tau, []).append(row)
    return groups


def _back(groups: Mapping[float, list[int]]) -> NDArray[np.int64]:
    """Return where each row is when the groups are joined."""
    joined = np.array([row for rows in groups.values() for row in rows], np.int64)
    back = np.empty_like(joined)
    back[joined] = np.arange(len(joined))
    return back
