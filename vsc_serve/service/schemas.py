"""OpenAPI schemas of the bodies of requests and answers."""

from typing import Any, Final

from pydantic import BaseModel

from vsc_serve.images import BadImage
from vsc_serve.service.media import JSON, MULTIPART, NPZ, RAW


class Row(BaseModel):
    """The code of one input: the latents that are on, and their values."""

    id: str
    indices: list[int]
    values: list[float]


class EncodeAnswer(BaseModel):
    """A JSON answer to `/v1/encode`: provenance, rows in input order, and what failed."""

    model: str
    model_digest: str
    tau: float
    view: str
    stored_tau: float | None = None
    """Of queries (`as=query`): the tau of the rows they are for; else it is left out."""
    engine: str
    vsc_serve: str
    out_of_domain: list[str] | None = None
    """What is far outside the model's own data: some of `active`, `empty` and `features`; else it
    is left out."""
    latent_dim: int
    rows: list[Row]
    errors: list[BadImage]


class ErrorAnswer(BaseModel):
    """Why a request was refused."""

    error: str
    errors: list[BadImage] = []
    """The reason for each input, where there was one at all."""


class Vectors(BaseModel):
    """A JSON request to a model of vectors. Without `ids` the rows are numbered from 0."""

    vectors: list[list[float]]
    ids: list[str] | None = None


_BYTES_SCHEMA: Final = {"schema": {"type": "string", "format": "binary"}}
_FILES_SCHEMA: Final = {"schema": {"type": "object", "additionalProperties": {"format": "binary"}}}

_REFUSALS: Final[dict[int | str, str]] = {
    400: "Nothing to encode, or a malformed body",
    406: "The Accept header names nothing that can be answered",
    413: "Too many bytes or too many inputs",
    415: "The model does not take this media type",
    422: "No input is usable, or a tau is out of range or order",
    503: "The service is stopping",
}
ENCODE_RESPONSES: Final[dict[int | str, dict[str, Any]]] = {
    200: {"model": EncodeAnswer, "description": "The codes", "content": {NPZ: _BYTES_SCHEMA}},
    **{status: {"model": ErrorAnswer, "description": text} for status, text in _REFUSALS.items()},
}
ENCODE_REQUEST: Final = {
    "requestBody": {
        "required": True,
        "content": {
            MULTIPART: _FILES_SCHEMA,
            "image/*": _BYTES_SCHEMA,
            RAW: _BYTES_SCHEMA,
            JSON: {"schema": Vectors.model_json_schema()},
        },
    }
}
