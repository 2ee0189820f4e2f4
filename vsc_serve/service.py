"""The HTTP service: pictures or vectors in, sparse codes out.

`create_app` makes the routes around one open encoder; `server` runs it. docs/service.md shows
every route.

The event loop only reads requests and writes answers, so liveness never waits for work: decoding,
encoding and formatting happen in a bounded number of worker threads.
"""

import asyncio
import json
import logging
import os
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass, field, fields
from typing import Annotated, Any, Final, Literal, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from vsc_serve import __version__
from vsc_serve.bundle import Manifest
from vsc_serve.codes import Codes, codes_to_bytes
from vsc_serve.encoder import Encoder, image_spec
from vsc_serve.errors import InputError, UsageError
from vsc_serve.images import MAX_PIXELS, BadImage, read_pixels
from vsc_serve.preprocess import PixelSpec

try:
    import anyio
    import python_multipart  # noqa: F401 - starlette finds out only when a form arrives
    import uvicorn  # noqa: F401 - for `server`; said here with the others
    from fastapi import APIRouter, FastAPI, Header, HTTPException, Query, Request, Response
    from fastapi.exceptions import RequestValidationError
    from fastapi.responses import JSONResponse
    from pydantic import BaseModel
    from starlette.datastructures import Headers, UploadFile
    from starlette.exceptions import HTTPException as StarletteHTTPException
    from starlette.formparsers import MultiPartException, MultiPartParser
    from starlette.requests import ClientDisconnect
    from starlette.types import ASGIApp, Message, Receive, Scope, Send
except ImportError as missing:
    raise UsageError(
        f"the service needs a package that is not installed ({missing.name})."
        " Run: pip install 'vsc-serve[serve]'"
    ) from missing

logger = logging.getLogger(__name__)

JSON: Final = "application/json"
NPZ: Final = "application/x-npz"
_MULTIPART: Final = "multipart/form-data"
_RAW: Final = "application/octet-stream"

_DECODE_CHUNK: Final = 32
"""Pictures a thread decodes in one go: enough that changing threads costs little."""

_MAX_ERRORS_HEADER: Final = 4000
"""Bytes of X-Vsc-Errors; proxies commonly refuse headers over 4 to 8 KiB."""

T = TypeVar("T")


def _cpu_count() -> int:
    """Return the number of processors this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@dataclass(frozen=True, kw_only=True)
class Limits:
    """How much one request may bring, and how much is worked on at a time."""

    max_body_bytes: int = 64_000_000
    """Bytes of a request's body."""
    max_rows: int = 1024
    """Pictures or vectors of a request."""
    max_pixels: int = MAX_PIXELS
    """Pixels of a picture; a larger one is refused from its header, before it is decoded."""
    workers: int = field(default_factory=_cpu_count)
    """Threads that decode and encode."""

    def __post_init__(self) -> None:
        for limit in fields(self):
            value = getattr(self, limit.name)
            if value < 1:
                raise UsageError(f"{limit.name} must be at least 1, not {value}")


class Service:
    """What the routes share: the encoder, the worker threads, and whether work is taken."""

    def __init__(self, encoder: Encoder, limits: Limits) -> None:
        self.encoder = encoder
        self.limits = limits
        self.phase: Literal["starting", "ready", "draining"] = "starting"
        self.in_flight = 0
        self._threads = anyio.CapacityLimiter(limits.workers)

    async def work(self, function: Callable[..., T], *args: Any) -> T:
        """Call a function in a worker thread, once one is free."""
        return await anyio.to_thread.run_sync(function, *args, limiter=self._threads)


class Batch(NamedTuple):
    """The rows of one request that can be encoded, and what is wrong with the others."""

    rows: NDArray[Any]
    """Pixels, uint8, (rows, height, width, channels), or vectors, float32, (rows, dimensions)."""
    ids: list[str]
    """Id of each row."""
    errors: list[BadImage]
    """Inputs that have no row."""


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
    app.add_middleware(_Gate, service=service)
    app.add_exception_handler(StarletteHTTPException, _answer_refusal)
    app.add_exception_handler(RequestValidationError, _answer_bad_parameter)
    app.add_exception_handler(InputError, _answer_unusable)
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
            answer = _error(503, "the service is stopping; send the request to another instance")
            answer.headers["Retry-After"] = "1"
            await answer(scope, receive, send)
        elif declared.isdecimal() and int(declared) > limit:
            await _error(413, _too_large(limit))(scope, receive, send)
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
    engine: str
    vsc_serve: str
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
    422: "No input is usable, or tau is out of range",
    503: "The service is stopping",
}
_ENCODE_RESPONSES: Final[dict[int | str, dict[str, Any]]] = {
    200: {"model": EncodeAnswer, "description": "The codes", "content": {NPZ: _BYTES_SCHEMA}},
    **{status: {"model": ErrorAnswer, "description": text} for status, text in _REFUSALS.items()},
}
_ENCODE_REQUEST: Final = {
    "requestBody": {
        "required": True,
        "content": {
            _MULTIPART: _FILES_SCHEMA,
            "image/*": _BYTES_SCHEMA,
            _RAW: _BYTES_SCHEMA,
            JSON: {"schema": Vectors.model_json_schema()},
        },
    }
}


@_router.get("/", summary="Where to look")
async def index() -> dict[str, str]:
    """Say what this is and where it is described."""
    return {
        "name": "vsc-serve",
        "version": __version__,
        "encode": "/v1/encode",
        "models": "/v1/models",
        "health": "/v2/health/ready",
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


@_router.get("/v1/models", summary="Which model is served")
async def models(request: Request) -> dict[str, list[dict[str, Any]]]:
    """Describe the model: what it takes, what a code looks like, and what computes it."""
    encoder = _service(request).encoder
    manifest = encoder.manifest
    spec = manifest.pixel_spec
    model = {
        "name": manifest.name,
        "digest": manifest.digest,
        "modality": manifest.modality,
        "latent_dim": manifest.latent_dim,
        "tau": manifest.tau,
        "pixel_spec": spec.to_json() if spec else None,
        "input_dim": manifest.input_dim,
        "engine": encoder.engine,
    }
    return {"models": [model]}


@_router.post(
    "/v1/encode",
    summary="Encode pictures or vectors",
    response_class=Response,
    responses=_ENCODE_RESPONSES,
    openapi_extra=_ENCODE_REQUEST,
)
async def encode(
    request: Request,
    tau: Annotated[float | None, Query(gt=0.0, lt=1.0)] = None,
    x_image_id: Annotated[str, Header(description="Id of the picture in a raw body")] = "image",
) -> Response:
    """Encode what the body holds; inputs that cannot be used are listed beside the rows.

    Send pictures as multipart file parts (a row's id is the part's filename), or one picture as the
    raw body. A model of vectors takes a JSON object with `vectors` and, if you like, `ids`.
    """
    form = _FORMS[_preferred(",".join(request.headers.getlist("accept")))]
    service = _service(request)
    try:
        batch = await _read_batch(request, service, raw_id=_utf8(x_image_id))
        if not batch.ids:
            raise HTTPException(422, _nothing_usable(batch.errors))
        return await service.work(_encode, service.encoder, batch, tau, form)
    except asyncio.CancelledError:  # only a service that is stopping and waits no longer does this
        raise HTTPException(503, "the service stopped before this request was done") from None


def _service(request: Request) -> Service:
    service: Service = request.app.state.service
    return service


def _preferred(accept: str) -> str:
    """Return the one of `_FORMS` that an Accept header prefers. Raises HTTPException: 406."""
    qualities = dict(map(_media_range, accept.split(","))) if accept.strip() else {"*/*": 1.0}

    def quality(offer: str) -> float:
        matching = (offer, "application/*", "*/*")  # the most specific one counts
        return next((qualities[name] for name in matching if name in qualities), 0.0)

    best = max(_FORMS, key=quality)
    if quality(best) <= 0.0:
        raise HTTPException(406, f"cannot answer with {accept}; ask for {' or '.join(_FORMS)}")
    return best


def _media_range(text: str) -> tuple[str, float]:
    """Split `type/subtype; q=0.5` into its name and its quality, 1 where no number is given."""
    name, *parameters = (part.strip().lower() for part in text.split(";"))
    given = next((part[2:] for part in parameters if part.startswith("q=")), "1")
    try:
        return name, float(given)
    except ValueError:
        return name, 1.0


async def _read_batch(request: Request, service: Service, *, raw_id: str) -> Batch:
    """Read the inputs of a request. Raises HTTPException: 400, 413 or 415."""
    manifest = service.encoder.manifest
    # RFC 9110, section 8.3: a body without a type may be taken for bytes.
    media_type = request.headers.get("content-type", _RAW).partition(";")[0].strip().lower()
    if not _takes(manifest, media_type):
        raise HTTPException(415, _wrong_type(manifest, media_type))
    if media_type == JSON:
        body = await request.body()
        return await service.work(_parse_vectors, body, manifest, service.limits.max_rows)
    if media_type == _MULTIPART:
        pictures = await _read_parts(request, service.limits)
    else:
        pictures = await _read_raw(request, raw_id)
    return await _decode(pictures, service)


def _takes(manifest: Manifest, media_type: str) -> bool:
    if manifest.modality == "vector":
        return media_type == JSON
    return media_type in (_MULTIPART, _RAW) or media_type.startswith("image/")


def _wrong_type(manifest: Manifest, media_type: str) -> str:
    if manifest.modality == "vector":
        wanted = (
            f'vectors of length {manifest.input_dim}: send {JSON} with {{"vectors": [[...], ...]}}'
        )
    else:
        wanted = f"images: send {_MULTIPART} with file parts, or one image as image/* or {_RAW}"
    return f"model {manifest.name} does not take {media_type or 'this'}; it encodes {wanted}"


async def _read_raw(request: Request, name: str) -> list[tuple[str, bytes]]:
    body = await request.body()
    if not body:
        raise HTTPException(400, "the request is empty; send at least one image")
    return [(name, body)]


def _utf8(header: str) -> str:
    """Read a header's bytes as UTF-8 where they are; HTTP itself only knows latin-1."""
    try:
        return header.encode("latin-1").decode("utf-8")
    except UnicodeError:
        return header


async def _read_parts(request: Request, limits: Limits) -> list[tuple[str, bytes]]:
    """Return the pictures of a multipart body with their ids, in order."""
    try:
        form = await _PartParser(request.headers, request.stream(), limits.max_rows).parse()
    except MultiPartException as error:
        raise HTTPException(400, f"broken multipart body: {error.message}") from error
    try:
        pictures = [await _read_part(name, part) for name, part in form.multi_items()]
    finally:
        await form.close()
    if not pictures:
        raise HTTPException(400, "the request is empty; send at least one image")
    return pictures


async def _read_part(name: str, part: UploadFile | str) -> tuple[str, bytes]:
    if isinstance(part, str):
        raise HTTPException(400, f"part {name!r} has no filename; send images as file parts")
    return part.filename or name, await part.read()


class _PartParser(MultiPartParser):
    """A multipart parser that keeps files in memory and counts parts before it stores them."""

    spool_max_size = 2**62  # `_Gate` bounds the body, so a file needs no disk to spill to

    def __init__(self, headers: Headers, stream: Any, max_parts: int) -> None:
        super().__init__(headers, stream, max_files=max_parts, max_fields=max_parts)
        self._max_parts = max_parts
        self._part_count = 0

    def on_part_begin(self) -> None:
        """Refuse a part too many with 413."""
        self._part_count += 1
        if self._part_count > self._max_parts:
            raise HTTPException(413, _too_many(self._max_parts))
        super().on_part_begin()


def _too_many(max_rows: int) -> str:
    return f"more than {max_rows:,} inputs; send fewer at a time"


async def _decode(pictures: Sequence[tuple[str, bytes]], service: Service) -> Batch:
    """Decode pictures, in as many threads at a time as are free."""
    spec = image_spec(service.encoder.manifest)
    starts = range(0, len(pictures), _DECODE_CHUNK)
    chunks = [pictures[start : start + _DECODE_CHUNK] for start in starts]
    decoded = await asyncio.gather(
        *(service.work(_decode_chunk, chunk, spec, service.limits.max_pixels) for chunk in chunks)
    )
    return Batch(
        np.concatenate([batch.rows for batch in decoded]),
        [name for batch in decoded for name in batch.ids],
        [error for batch in decoded for error in batch.errors],
    )


def _decode_chunk(pictures: Sequence[tuple[str, bytes]], spec: PixelSpec, max_pixels: int) -> Batch:
    rows, ids, errors = [], [], []
    for name, picture in pictures:
        try:
            rows.append(read_pixels(picture, spec, max_pixels=max_pixels))
        except InputError as error:
            errors.append(BadImage(name, str(error)))
        else:
            ids.append(name)
    return Batch(np.stack(rows) if rows else np.empty((0, *spec.shape), np.uint8), ids, errors)


def _parse_vectors(body: bytes, manifest: Manifest, max_rows: int) -> Batch:
    """Read the vectors of a JSON body. Raises HTTPException: 400 or 413."""
    given, names = _parse_body(body)
    if len(given) > max_rows:
        raise HTTPException(413, _too_many(max_rows))
    dimensions = manifest.input_dim or 0
    rows, ids, errors = [], [], []
    for name, values in zip(names, given, strict=True):
        try:
            rows.append(_to_vector(values, dimensions))
        except InputError as error:
            errors.append(BadImage(name, str(error)))
        else:
            ids.append(name)
    return Batch(np.stack(rows) if rows else np.empty((0, dimensions), np.float32), ids, errors)


def _parse_body(body: bytes) -> tuple[list[Any], list[str]]:
    """Return the `vectors` and `ids` of a JSON body; ids are row numbers where it has none."""
    try:
        stored = json.loads(body) if body else {}
    except (ValueError, RecursionError) as error:
        raise HTTPException(400, f"the body is not JSON: {error}") from error
    if not isinstance(stored, dict) or not set(stored) <= {"vectors", "ids"}:
        raise HTTPException(400, 'the body must be {"vectors": [[...], ...], "ids": [...]}')
    vectors = stored.get("vectors", [])
    if not isinstance(vectors, list) or not vectors:
        raise HTTPException(400, "the request is empty; send at least one vector in `vectors`")
    ids = stored.get("ids", [str(row) for row in range(len(vectors))])
    if not isinstance(ids, list) or not all(map(_is_text, ids)):
        raise HTTPException(400, "`ids` must be a list of strings")
    if len(ids) != len(vectors):
        raise HTTPException(400, f"{len(ids)} ids for {len(vectors)} vectors")
    return vectors, ids


def _is_text(name: Any) -> bool:
    """Tell whether this is a string that UTF-8 can hold; JSON also allows half a character."""
    return isinstance(name, str) and not any("\ud800" <= letter <= "\udfff" for letter in name)


def _to_vector(values: Any, dimensions: int) -> NDArray[np.float32]:
    """Return one float32 vector. Raises InputError with the reason."""
    try:
        vector = np.array(values)
    except ValueError:  # a list of lists of different lengths
        vector = np.array(None)
    if vector.ndim != 1 or (vector.dtype.kind not in "iuf"):
        raise InputError("not a list of numbers")
    if len(vector) != dimensions:
        raise InputError(f"{len(vector)} numbers, but the model takes {dimensions}")
    with np.errstate(over="ignore"):
        vector = vector.astype(np.float32)
    if not np.isfinite(vector).all():
        raise InputError("holds values that are not finite in float32")
    return vector


_Form = Callable[[Codes, Sequence[str], Sequence[BadImage], Mapping[str, Any]], Response]


def _encode(encoder: Encoder, batch: Batch, tau: float | None, form: _Form) -> Response:
    codes = encoder.encode(batch.rows, tau=tau)
    return form(codes, batch.ids, batch.errors, encoder.provenance(tau=tau))


def _json_answer(
    codes: Codes, ids: Sequence[str], errors: Sequence[BadImage], meta: Mapping[str, Any]
) -> Response:
    bounds = zip(codes.indptr[:-1].tolist(), codes.indptr[1:].tolist(), strict=True)
    rows = [
        {
            "id": name,
            "indices": codes.indices[start:end].tolist(),
            "values": codes.data[start:end].tolist(),
        }
        for name, (start, end) in zip(ids, bounds, strict=True)
    ]
    found = {"latent_dim": codes.shape[1], "rows": rows, "errors": [asdict(bad) for bad in errors]}
    return JSONResponse({**meta, **found})


def _npz_answer(
    codes: Codes, ids: Sequence[str], errors: Sequence[BadImage], meta: Mapping[str, Any]
) -> Response:
    """Answer with the bytes `vsc encode` writes; what has no row is told in headers."""
    headers = {"X-Vsc-Error-Count": str(len(errors))}
    if errors:
        headers["X-Vsc-Errors"] = _errors_header(errors)
    body = codes_to_bytes(codes, ids, dict(meta))
    return Response(body, media_type=NPZ, headers=headers)


_FORMS: Final[dict[str, _Form]] = {JSON: _json_answer, NPZ: _npz_answer}
"""How each media type is written; the first one when the client has no preference."""


def _errors_header(errors: Sequence[BadImage]) -> str:
    """Return as many errors as fit in a header, as a JSON array in ASCII."""
    listed: list[str] = []
    size = 0
    for error in errors:
        entry = json.dumps(asdict(error))
        size += len(entry) + 2
        if size > _MAX_ERRORS_HEADER:
            break
        listed.append(entry)
    return f"[{', '.join(listed)}]"


def _nothing_usable(errors: Sequence[BadImage]) -> dict[str, Any]:
    first = f"{errors[0].id}: {errors[0].reason}"
    more = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
    return {
        "error": f"no usable input: {first}{more}",
        "errors": [asdict(error) for error in errors],
    }


def _error(status: int, text: str) -> Response:
    return JSONResponse({"error": text}, status)


async def _answer_refusal(_request: Request, error: Exception) -> Response:
    assert isinstance(error, StarletteHTTPException)
    detail: Any = error.detail
    content = detail if isinstance(detail, dict) else {"error": detail}
    return JSONResponse(content, error.status_code, headers=error.headers)


async def _answer_bad_parameter(_request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    reasons = [f"{fault['loc'][-1]}: {fault['msg']}" for fault in error.errors()]
    return _error(422, "; ".join(reasons))


async def _answer_unusable(_request: Request, error: Exception) -> Response:
    return _error(422, str(error))


async def _answer_disconnect(_request: Request, _error_: Exception) -> Response:
    return _error(400, "the connection was closed before the request was complete")


async def _answer_bug(_request: Request, error: Exception) -> Response:
    # The server logs the traceback; a client gets to know only that it was not its fault.
    return _error(500, f"internal error ({type(error).__name__}); the log of the service says more")


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
