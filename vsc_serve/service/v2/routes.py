"""Routes of the Open Inference Protocol v2 beside its health checks."""

import asyncio
from typing import Any, Final

from fastapi import APIRouter, HTTPException, Request, Response
from fastapi.responses import JSONResponse

from vsc_serve import __version__
from vsc_serve.errors import InputError
from vsc_serve.options import EncodeOptions
from vsc_serve.service.media import JSON, RAW
from vsc_serve.service.state import Service
from vsc_serve.service.v2.models import Model, infer, models_of
from vsc_serve.service.v2.schemas import INFER_REQUEST, INFER_RESPONSES
from vsc_serve.service.v2.tensors import (
    HEADER_LENGTH,
    InferenceRequest,
    ProtocolError,
    read_request,
    write_answer,
)

VERSION: Final = "1"
"""The one version of each model."""

router = APIRouter(prefix="/v2")


@router.get("", summary="The server and what it speaks")
async def server_metadata() -> dict[str, Any]:
    """Name the server, its version and its extensions of the protocol."""
    return {"name": "vsc-serve", "version": __version__, "extensions": ["binary_tensor_data"]}


@router.get("/models/{name}", summary="Inputs and outputs of a model")
@router.get("/models/{name}/versions/{version}", summary="Inputs and outputs of a model")
async def model_metadata(request: Request, name: str, version: str = VERSION) -> dict[str, Any]:
    """Describe a model: NAME gives dense outputs, NAME_sparse codes as padded rows."""
    model = _model(request, name, version)
    return {
        "name": model.name,
        "versions": [VERSION],
        "platform": "vsc-serve",
        "inputs": [port.to_json() for port in model.inputs],
        "outputs": [port.to_json() for port in model.outputs],
    }


@router.get("/models/{name}/ready", summary="Does a model take work?")
@router.get("/models/{name}/versions/{version}/ready", summary="Does a model take work?")
async def model_ready(request: Request, name: str, version: str = VERSION) -> Response:
    """Answer 200 when the model is open and warm, 503 before that and while draining."""
    model = _model(request, name, version)
    phase = _service(request).phase
    if phase == "ready":
        return JSONResponse({"name": model.name, "ready": True})
    return JSONResponse({"error": f"the service is {phase}"}, 503)


_INFER: Final[dict[str, Any]] = {
    "summary": "Encode tensors",
    "response_class": Response,
    "responses": INFER_RESPONSES,
    "openapi_extra": INFER_REQUEST,
}


@router.post("/models/{name}/infer", **_INFER)
@router.post("/models/{name}/versions/{version}/infer", **_INFER)
async def infer_model(request: Request, name: str, version: str = VERSION) -> Response:
    """Encode the tensors of a request; one that cannot be used refuses the whole request."""
    model, service = _model(request, name, version), _service(request)
    if request.headers.get("content-encoding", "identity") != "identity":
        raise HTTPException(415, "a compressed request is not taken; send it as it is")
    length = _json_length(request)
    try:
        body = await request.body()
        return await service.work(_answer, service, model, body, length)
    except ProtocolError as error:
        raise HTTPException(400, _named(error.request_id, str(error))) from error
    except asyncio.CancelledError:  # only a service that is stopping and waits no longer does this
        raise HTTPException(503, "the service stopped before this request was done") from None


def _answer(service: Service, model: Model, body: bytes, json_bytes: int | None) -> Response:
    """Compute the answer, in a worker thread. Raises ProtocolError."""
    request = read_request(body, json_bytes)
    try:
        return _computed(service, model, request)
    except InputError as error:
        raise ProtocolError(str(error), request.id) from error


def _computed(service: Service, model: Model, request: InferenceRequest) -> Response:
    wanted = model.wanted(request)
    names = [one.name for one in wanted]
    found = infer(service.encoder, model, request, names, service.limits)
    domain = service.watch.note(found.codes, EncodeOptions(tau=found.tau))
    head: dict[str, Any] = {"model_name": model.name, "model_version": VERSION}
    if request.id is not None:
        head["id"] = request.id
    head["parameters"] = {"model_digest": service.encoder.manifest.digest}
    head["parameters"] |= {name: ",".join(parts) for name, parts in domain.items()}
    tensors = [(one.name, found.outputs[one.name], one.is_binary) for one in wanted]
    content, length = write_answer(head, tensors)
    if length is None:
        return Response(content, media_type=JSON)
    return Response(content, media_type=RAW, headers={HEADER_LENGTH: str(length)})


def _json_length(request: Request) -> int | None:
    given = request.headers.get(HEADER_LENGTH)
    if given is None:
        return None
    if not given.isdecimal() or not given.isascii() or len(given) > 18:
        raise HTTPException(400, f"{HEADER_LENGTH} must be a number of bytes")
    return int(given)


def _named(request_id: str | None, text: str) -> str:
    """Return a reason as Triton writes it: with the id of the request, if it has one."""
    return text if request_id is None else f"[request id: {request_id}] {text}"


def _model(request: Request, name: str, version: str) -> Model:
    """Return a model. Raises HTTPException: 404 for one that is not there."""
    models = models_of(_service(request).encoder.manifest)
    if name not in models:
        raise HTTPException(404, f"unknown model; there are {', '.join(models)}")
    if version != VERSION:
        raise HTTPException(404, f"model {name} has no such version; it has {VERSION}")
    return models[name]


def _service(request: Request) -> Service:
    service: Service = request.app.state.service
    return service
