"""The web application: its routes, what it refuses before it reads, and what errors become."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated, Any, Literal

import numpy as np
from fastapi import APIRouter, FastAPI, Header, HTTPException, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from numpy.typing import NDArray
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from vsc_serve import __version__
from vsc_serve.bundle import Manifest
from vsc_serve.encoder import Encoder
from vsc_serve.errors import InputError, UsageError
from vsc_serve.options import EncodeOptions, View, query_tau
from vsc_serve.service import v2
from vsc_serve.service.answers import encode_batch, form_for, nothing_usable, refusal
from vsc_serve.service.media import METRICS
from vsc_serve.service.reading import read_batch
from vsc_serve.service.schemas import ENCODE_REQUEST, ENCODE_RESPONSES
from vsc_serve.service.state import Limits, Service


def create_app(encoder: Encoder, limits: Limits | None = None) -> FastAPI:
    """Make the web application around an open encoder.

    Args:
        encoder: What makes the codes.
        limits: How much a request may bring.

    Returns:
        The application. It gets ready in its lifespan, by encoding a blank input.
    """
    service = Service(encoder, limits or Limits())
    app = FastAPI(
        title="vsc-serve",
        summary="Sparse codes for images and embeddings",
        version=__version__,
        lifespan=_warm_up,
        docs_url=None,  # these pages load their scripts from a third party's server
        redoc_url=None,
    )
    app.state.service = service
    app.include_router(_router)
    app.include_router(v2.router)
    app.add_middleware(_Gate, service=service)
    app.add_exception_handler(StarletteHTTPException, _answer_refusal)
    app.add_exception_handler(RequestValidationError, _answer_bad_parameter)
    app.add_exception_handler(InputError, _answer_unusable)
    app.add_exception_handler(UsageError, _answer_unusable)
    app.add_exception_handler(ClientDisconnect, _answer_disconnect)
    app.add_exception_handler(Exception, _answer_bug)
    return app


class _Gate:
    """Middleware that refuses work while draining, and large bodies; it counts what it lets in."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app = app
        self._service = service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        limit = self._service.limits.max_body_bytes
        declared = Headers(scope=scope).get("content-length", "")
        if self._service.phase == "draining":
            answer = refusal(503, "the service is stopping; send the request to another instance")
            answer.headers["Retry-After"] = "1"
            await answer(scope, receive, send)
        elif declared.isdecimal() and int(declared) > limit:
            await refusal(413, _too_large(limit))(scope, receive, send)
        else:
            await self._count(scope, _limited(receive, limit), send)

    async def _count(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._service.in_flight += 1
        try:
            await self._app(scope, receive, send)
        finally:
            self._service.in_flight -= 1


def _limited(receive: Receive, limit: int) -> Receive:
    """Wrap the reading of a body so that it ends with 413 once more than `limit` bytes came."""
    seen = 0

    async def receive_some() -> Message:
        nonlocal seen
        message = await receive()
        seen += len(message.get("body", b""))
        if seen > limit:
            raise HTTPException(413, _too_large(limit))
        return message

    return receive_some


def _too_large(limit: int) -> str:
    return f"the request is larger than {limit:,} bytes; send fewer or smaller inputs at a time"


_router = APIRouter()


@_router.get("/", summary="Where to look")
async def index() -> dict[str, str]:
    """Say what this is and where it is described."""
    return {
        "name": "vsc-serve",
        "version": __version__,
        "encode": "/v1/encode",
        "models": "/v1/models",
        "health": "/v2/health/ready",
        "metrics": "/metrics",
        "openapi": "/openapi.json",
    }


@_router.get("/v2/health/live", summary="Does the process answer?")
async def live() -> dict[str, bool]:
    """Answer 200 as long as the process runs, whatever it is busy with."""
    return {"live": True}


@_router.get(
    "/v2/health/ready",
    summary="Does the service take work?",
    responses={503: {"description": "Starting or stopping"}},
)
async def ready(request: Request) -> Response:
    """Answer 200 when the model is open and warm, 503 before that and while draining."""
    phase = _service(request).phase
    if phase == "ready":
        return JSONResponse({"ready": True})
    return JSONResponse({"ready": False, "error": f"the service is {phase}"}, 503)


@_router.get("/metrics", summary="Metrics for Prometheus", response_class=Response)
async def metrics(request: Request) -> Response:
    """Say what was encoded, and how the last rows differ from the model's own data."""
    return Response(_service(request).watch.metrics(), media_type=METRICS)


@_router.get("/v1/models", summary="Which model is served")
async def models(request: Request) -> dict[str, list[dict[str, Any]]]:
    """Describe the model: what it takes, what a code looks like, and what computes it."""
    encoder, recent = _service(request).encoder, _service(request).watch.recent()
    manifest = encoder.manifest
    spec = manifest.pixel_spec
    model = {
        "name": manifest.name,
        "digest": manifest.digest,
        "modality": manifest.modality,
        "latent_dim": manifest.latent_dim,
        "tau": manifest.tau,
        "query_tau": query_tau(manifest),
        "pixel_spec": spec.to_json() if spec else None,
        "input_dim": manifest.input_dim,
        "engine": encoder.engine,
        "domain": None if recent is None else recent.to_json(),
    }
    return {"models": [model]}


@_router.post(
    "/v1/encode",
    summary="Encode images or vectors",
    response_class=Response,
    responses=ENCODE_RESPONSES,
    openapi_extra=ENCODE_REQUEST,
)
async def encode(
    request: Request,
    tau: Annotated[float | None, Query(gt=0.0, lt=1.0)] = None,
    made_as: Annotated[Literal["rows", "query"], Query(alias="as")] = "rows",
    stored_tau: Annotated[float | None, Query(gt=0.0, lt=1.0)] = None,
    x_image_id: Annotated[str, Header(description="Id of the image in a raw body")] = "image",
) -> Response:
    """Encode what the body holds; inputs that cannot be used are listed beside the rows.

    Send images as multipart file parts (a row's id is the part's filename), or one image as the
    raw body. A model of vectors takes a JSON object with `vectors` and, if you like, `ids`.
    `as=query` encodes queries, which keep more latents than the rows they are for (`stored_tau`).
    """
    form = form_for(",".join(request.headers.getlist("accept")))
    service = _service(request)
    if stored_tau is not None and made_as != "query":
        raise HTTPException(422, "stored_tau: is for queries; send as=query too")
    view: View = "query" if made_as == "query" else "mean"
    options = EncodeOptions(tau=tau, view=view, stored_tau=stored_tau)
    options.thresholds(service.encoder.manifest)  # refused before the body is read
    try:
        batch = await read_batch(request, service, raw_id=x_image_id)
        if not batch.ids:
            raise HTTPException(422, nothing_usable(batch.errors))
        return await service.work(encode_batch, service, batch, options, form)
    except asyncio.CancelledError:  # only a service that is stopping and waits no longer does this
        raise HTTPException(503, "the service stopped before this request was done") from None


def _service(request: Request) -> Service:
    service: Service = request.app.state.service
    return service


async def _answer_refusal(_request: Request, error: Exception) -> Response:
    assert isinstance(error, StarletteHTTPException)
    detail: Any = error.detail
    content = detail if isinstance(detail, dict) else {"error": detail}
    return JSONResponse(content, error.status_code, headers=error.headers)


async def _answer_bad_parameter(_request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    reasons = [f"{fault['loc'][-1]}: {fault['msg']}" for fault in error.errors()]
    return refusal(422, "; ".join(reasons))


async def _answer_unusable(_request: Request, error: Exception) -> Response:
    return refusal(422, str(error))


async def _answer_disconnect(_request: Request, _error_: Exception) -> Response:
    return refusal(400, "the connection was closed before the request was complete")


async def _answer_bug(_request: Request, error: Exception) -> Response:
    # The server logs the traceback; a client gets to know only that it was not its fault.
    return refusal(
        500, f"internal error ({type(error).__name__}); the log of the service says more"
    )


@asynccontextmanager
async def _warm_up(app: FastAPI) -> AsyncIterator[None]:
    """Encode one blank input before the first connection is accepted."""
    service: Service = app.state.service
    await service.work(service.encoder.encode, _blank(service.encoder.manifest))
    if service.phase == "starting":  # and not stopped already
        service.phase = "ready"
    yield


def _blank(manifest: Manifest) -> NDArray[Any]:
    if manifest.pixel_spec is not None:
        return np.zeros((1, *manifest.pixel_spec.shape), np.uint8)
    return np.zeros((1, manifest.input_dim or 0), np.float32)
