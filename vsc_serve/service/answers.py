"""Write what a request is answered with: rows as JSON or npz, and refusals."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any, Final

from fastapi import HTTPException, Response
from fastapi.responses import JSONResponse

from vsc_serve.codes import Codes, codes_to_bytes
from vsc_serve.images import BadImage
from vsc_serve.options import EncodeOptions
from vsc_serve.service.media import JSON, NPZ, preferred
from vsc_serve.service.reading import Batch
from vsc_serve.service.state import Service

_MAX_ERRORS_HEADER: Final = 4000
"""Bytes of X-Vsc-Errors; proxies commonly refuse headers over 4 to 8 KiB."""

Form = Callable[[Codes, Sequence[str], Sequence[BadImage], Mapping[str, Any]], Response]


def encode_batch(service: Service, batch: Batch, options: EncodeOptions, form: Form) -> Response:
    """Encode a batch and write the answer."""
    encoder = service.encoder
    codes = encoder.encode_rows(batch.rows, options).codes
    domain = service.watch.note(codes, options)
    return form(codes, batch.ids, batch.errors, encoder.provenance(options) | domain)


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


FORMS: Final[dict[str, Form]] = {JSON: _json_answer, NPZ: _npz_answer}
"""How each media type is written; the first one when the client has no preference."""


def form_for(accept: str) -> Form:
    """Return how to answer a client with this Accept header. Raises HTTPException: 406."""
    name = preferred(accept, list(FORMS))
    if name is None:
        raise HTTPException(406, f"cannot answer with {accept}; ask for {' or '.join(FORMS)}")
    return FORMS[name]


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


def nothing_usable(errors: Sequence[BadImage]) -> dict[str, Any]:
    """Return the body of a refusal: the first reason in words, and all of them."""
    first = f"{errors[0].id}: {errors[0].reason}"
    more = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
    return {
        "error": f"no usable input: {first}{more}",
        "errors": [asdict(error) for error in errors],
    }


def refusal(status: int, text: str) -> Response:
    """Return an answer that says why there is no other."""
    return JSONResponse({"error": text}, status)
