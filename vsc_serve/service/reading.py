"""Read what a request brings: images or vectors, with their ids, and what is wrong with some."""

import asyncio
import json
from collections.abc import Sequence
from typing import Any, Final, NamedTuple

import numpy as np
from fastapi import HTTPException, Request
from numpy.typing import NDArray
from starlette.datastructures import Headers, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser

from vsc_serve.bundle import Manifest, image_spec
from vsc_serve.errors import InputError
from vsc_serve.images import BadImage, PixelSpec, read_pixels
from vsc_serve.service.media import JSON, MULTIPART, RAW
from vsc_serve.service.state import Limits, Service

_DECODE_CHUNK: Final = 32
"""Images a thread decodes in one go: enough that changing threads costs little."""


_SPARE_VALUES: Final = 64
"""Values that a row may have beside its vector: its id, and what in the id looks like one."""


class Batch(NamedTuple):
    """The rows of one request that can be encoded, and what is wrong with the others."""

    rows: NDArray[Any]
    """Pixels, uint8, (rows, height, width, channels), or vectors, float32, (rows, dimensions)."""
    ids: list[str]
    """Id of each row."""
    errors: list[BadImage]
    """Inputs that have no row."""


async def read_batch(request: Request, service: Service, *, raw_id: str) -> Batch:
    """Read the inputs of a request.

    Args:
        request: The request.
        service: Encoder, limits and threads.
        raw_id: Header with the id of the image in a raw body.

    Raises:
        HTTPException: 400, 413 or 415.
    """
    manifest = service.encoder.manifest
    # RFC 9110, section 8.3: a body without a type may be taken for bytes.
    media_type = request.headers.get("content-type", RAW).partition(";")[0].strip().lower()
    if not _takes(manifest, media_type):
        raise HTTPException(415, _wrong_type(manifest, media_type))
    if media_type == JSON:
        body = await request.body()
        return await service.work(_parse_vectors, body, manifest, service.limits.max_rows)
    if media_type == MULTIPART:
        images = await _read_parts(request, service.limits)
    else:
        images = await _read_raw(request, _utf8(raw_id))
    return await _decode(images, service)


def _takes(manifest: Manifest, media_type: str) -> bool:
    if manifest.modality == "vector":
        return media_type == JSON
    return media_type in (MULTIPART, RAW) or media_type.startswith("image/")


def _wrong_type(manifest: Manifest, media_type: str) -> str:
    if manifest.modality == "vector":
        wanted = (
            f'vectors of length {manifest.input_dim}: send {JSON} with {{"vectors": [[...], ...]}}'
        )
    else:
        wanted = f"images: send {MULTIPART} with file parts, or one image as image/* or {RAW}"
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
    """Return the images of a multipart body with their ids, in order."""
    try:
        form = await _PartParser(request.headers, request.stream(), limits.max_rows).parse()
    except MultiPartException as error:
        raise HTTPException(400, f"broken multipart body: {error.message}") from error
    try:
        images = [await _read_part(name, part) for name, part in form.multi_items()]
    finally:
        await form.close()
    if not images:
        raise HTTPException(400, "the request is empty; send at least one image")
    return images


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


async def _decode(images: Sequence[tuple[str, bytes]], service: Service) -> Batch:
    """Decode images, in as many threads at a time as are free."""
    spec = image_spec(service.encoder.manifest)
    starts = range(0, len(images), _DECODE_CHUNK)
    chunks = [images[start : start + _DECODE_CHUNK] for start in starts]
    decoded = await asyncio.gather(
        *(service.work(_decode_chunk, chunk, spec, service.limits.max_pixels) for chunk in chunks)
    )
    return Batch(
        np.concatenate([batch.rows for batch in decoded]),
        [name for batch in decoded for name in batch.ids],
        [error for batch in decoded for error in batch.errors],
    )


def _decode_chunk(images: Sequence[tuple[str, bytes]], spec: PixelSpec, max_pixels: int) -> Batch:
    rows, ids, errors = [], [], []
    for name, image in images:
        try:
            rows.append(read_pixels(image, spec, max_pixels=max_pixels))
        except InputError as error:
            errors.append(BadImage(name, str(error), error.kind))
        else:
            ids.append(name)
    return Batch(np.stack(rows) if rows else np.empty((0, *spec.shape), np.uint8), ids, errors)


def _parse_vectors(body: bytes, manifest: Manifest, max_rows: int) -> Batch:
    """Read the vectors of a JSON body. Raises HTTPException: 400 or 413."""
    if _value_count(body) > max_rows * ((manifest.input_dim or 0) + _SPARE_VALUES):
        raise HTTPException(413, _too_many(max_rows))
    given, names = _parse_body(body)
    if len(given) > max_rows:
        raise HTTPException(413, _too_many(max_rows))
    dimensions = manifest.input_dim or 0
    rows, ids, errors = [], [], []
    for name, values in zip(names, given, strict=True):
        try:
            rows.append(_to_vector(values, dimensions))
        except InputError as error:
            errors.append(BadImage(name, str(error), error.kind))
        else:
            ids.append(name)
    return Batch(np.stack(rows) if rows else np.empty((0, dimensions), np.float32), ids, errors)


def _value_count(body: bytes) -> int:
    """Return a bound on the values of a JSON text, without reading it: each follows one of these.

    A value of two bytes takes a hundred once it is read, and the rows are counted only then.
    """
    return sum(map(body.count, (b"[", b",", b":", b"{")))


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
