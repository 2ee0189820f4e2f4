"""OpenAPI schemas of the Open Inference Protocol v2."""

from typing import Any, Final, Literal

from pydantic import BaseModel

from vsc_serve.service.media import JSON, RAW
from vsc_serve.service.schemas import ErrorAnswer

Datatype = Literal[
    "BOOL", "UINT8", "UINT16", "UINT32", "UINT64", "INT8", "INT16", "INT32", "INT64",
    "FP16", "FP32", "FP64", "BYTES",
]  # fmt: skip


class InputTensor(BaseModel):
    """A tensor that is sent, flat or nested; BYTES are base64 texts."""

    name: str
    shape: list[int]
    datatype: Datatype
    data: list[Any] | None = None
    """Left out where `parameters` has a `binary_data_size`."""
    parameters: dict[str, Any] = {}


class RequestedOutput(BaseModel):
    """An output that is asked for."""

    name: str
    parameters: dict[str, Any] = {}


class InferRequest(BaseModel):
    """A request; without `outputs` all are given."""

    id: str | None = None
    inputs: list[InputTensor]
    outputs: list[RequestedOutput] | None = None
    parameters: dict[str, Any] = {}


class OutputTensor(BaseModel):
    """A tensor that is given, flat."""

    name: str
    shape: list[int]
    datatype: Datatype
    data: list[float] | None = None
    parameters: dict[str, Any] = {}


class InferAnswer(BaseModel):
    """The outputs of a model."""

    model_name: str
    model_version: str
    id: str | None = None
    outputs: list[OutputTensor]
    parameters: dict[str, Any] = {}


_BYTES_SCHEMA: Final = {"schema": {"type": "string", "format": "binary"}}
_REFUSALS: Final[dict[int | str, str]] = {
    400: "Not a request of the protocol, or an input that cannot be used",
    404: "No such model or version",
    413: "Too many bytes",
    415: "A compressed request",
    503: "The service is stopping",
}
INFER_RESPONSES: Final[dict[int | str, dict[str, Any]]] = {
    200: {"model": InferAnswer, "description": "The outputs", "content": {RAW: _BYTES_SCHEMA}},
    **{status: {"model": ErrorAnswer, "description": text} for status, text in _REFUSALS.items()},
}
INFER_REQUEST: Final = {
    "requestBody": {
        "required": True,
        "content": {
            JSON: {
                "schema": InferRequest.model_json_schema(
                    ref_template="#/components/schemas/{model}"
                )
            },
            RAW: _BYTES_SCHEMA,
        },
    }
}
