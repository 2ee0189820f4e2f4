"""The HTTP service: every route in-process, and start, drain and refusal in a real process."""

import asyncio
import concurrent.futures
import contextlib
import dataclasses
import functools
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Iterator
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import anyio
import httpx
import numpy as np
import pytest
from anyio.from_thread import BlockingPortal, start_blocking_portal
from fastapi import FastAPI
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from vsc_serve.codes import codes_to_bytes, dense_to_csr, read_codes
from vsc_serve.encoder import Encoder
from vsc_serve.errors import UsageError
from vsc_serve.models import builtin_model
from vsc_serve.options import EncodeOptions
from vsc_serve.service import JSON, NPZ, Limits, answers, create_app, reading, server, watch
from vsc_serve.service.server import serve
from vsc_serve.session import Session

PNG = "image/png"


def png(seed: int, size: tuple[int, int] = (8, 8)) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, size, dtype=np.uint8)
    buffer = BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def file_parts(*named: tuple[str, bytes]) -> list[tuple[str, tuple[str, bytes, str]]]:
    return [("images", (name, content, PNG)) for name, content in named]


class AppClient:
    """An HTTP client of an application in this process, from its start to its end."""

    def __init__(self, encoder: Encoder, limits: Limits | None = None) -> None:
        self._app = create_app(encoder, limits)
        self._stack = contextlib.ExitStack()
        self._portal: BlockingPortal

    def __enter__(self) -> "AppClient":
        self._portal = self._stack.enter_context(start_blocking_portal())
        lifespan = self._app.router.lifespan_context(self._app)
        self._stack.enter_context(self._portal.wrap_async_context_manager(lifespan))
        return self

    def __exit__(self, *exception: Any) -> None:
        self._stack.close()

    def get(self, url: str) -> httpx.Response:
        return self._portal.call(functools.partial(self._request, "GET", url))

    def post(self, url: str, **options: Any) -> httpx.Response:
        return self._portal.call(functools.partial(self._request, "POST", url, **options))

    async def _request(self, method: str, url: str, **options: Any) -> httpx.Response:
        async with in_process(self._app) as client:
            return await client.request(method, url, **options)


def in_process(app: FastAPI) -> httpx.AsyncClient:
    """Return a client whose requests go straight into the application."""
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    return httpx.AsyncClient(transport=transport, base_url="http://test")


class Recorder:
    """A Session that counts its runs, and waits in them for as long as `gate` is closed."""

    def __init__(self, wrapped: Any) -> None:
        self.engine = wrapped.engine
        self.gate = threading.Event()
        self.gate.set()
        self.entered = threading.Event()
        self.threads: set[int] = set()
        self.at_once = self.most_at_once = 0
        self._wrapped = wrapped
        self._lock = threading.Lock()

    def run(self, outputs: Any, feeds: Any) -> list[NDArray[np.float32]]:
        with self._lock:
            self.threads.add(threading.get_ident())
            self.at_once += 1
            self.most_at_once = max(self.most_at_once, self.at_once)
        self.entered.set()
        assert self.gate.wait(30)
        with self._lock:
            self.at_once -= 1
        return self._wrapped.run(outputs, feeds)


@pytest.fixture
def client(fake_encoder: Encoder) -> Iterator[AppClient]:
    with AppClient(fake_encoder) as client:
        yield client


@pytest.fixture
def vector_encoder(fake_encoder: Encoder, fake_session: Session) -> Encoder:
    manifest = dataclasses.replace(
        fake_encoder.manifest, name="embeds", modality="vector", pixel_spec=None, input_dim=64
    )
    return Encoder(fake_session, manifest)


@pytest.fixture
def vector_client(vector_encoder: Encoder) -> Iterator[AppClient]:
    with AppClient(vector_encoder) as client:
        yield client


def limited(encoder: Encoder, **limits: int) -> AppClient:
    return AppClient(encoder, Limits(**limits))


# Answers to good requests


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    seeds=st.lists(st.integers(0, 9), min_size=1, max_size=70),
    tau=st.none() | st.floats(0.01, 0.99),
)
def test_npz_answer_is_what_the_encoder_itself_gives(client, fake_encoder, seeds, tau):
    ids = [f"größe {row}/{seed}.png" for row, seed in enumerate(seeds)]
    images = [png(seed) for seed in seeds]
    answer = client.post(
        "/v1/encode",
        params={} if tau is None else {"tau": tau},
        files=file_parts(*zip(ids, images, strict=True)),
        headers={"Accept": NPZ},
    )
    codes = fake_encoder.encode(images, tau=tau)
    assert answer.status_code == 200
    assert answer.headers["content-type"] == NPZ
    assert answer.content == codes_to_bytes(codes, ids, fake_encoder.provenance(tau=tau))


def test_json_answer_holds_the_same_codes_with_their_provenance(client, fake_encoder):
    images = [png(seed) for seed in range(3)]
    parts = file_parts(*((f"{row}.png", image) for row, image in enumerate(images)))
    answer = client.post("/v1/encode", files=parts, params={"tau": 0.3})
    codes = fake_encoder.encode(images, tau=0.3)
    found = answer.json()
    assert answer.headers["content-type"] == JSON
    assert found["latent_dim"] == 16
    assert found["errors"] == []
    assert found.items() >= fake_encoder.provenance(tau=0.3).items()
    assert [row["id"] for row in found["rows"]] == ["0.png", "1.png", "2.png"]
    for row, expected in zip(found["rows"], codes, strict=True):
        assert row["indices"] == expected.indices.tolist()
        np.testing.assert_array_equal(np.float32(row["values"]), expected.data)
    assert codes.nnz > 0


@pytest.mark.parametrize("media_type", [PNG, "image/whatever", "application/octet-stream", None])
def test_a_raw_body_is_one_image(client, fake_encoder, media_type):
    headers = {"Content-Type": media_type} if media_type else {}
    answer = client.post("/v1/encode", content=png(5), headers=headers)
    expected = fake_encoder.encode([png(5)])
    (row,) = answer.json()["rows"]
    assert row["id"] == "image"
    assert row["indices"] == expected.indices.tolist()


@pytest.mark.parametrize("name", ["cat.png", "größer/Ω.png"])
def test_the_id_of_a_raw_body_comes_from_its_header(client, name):
    answer = client.post("/v1/encode", content=png(5), headers={b"X-Image-Id": name.encode()})
    assert [row["id"] for row in answer.json()["rows"]] == [name]


def test_a_part_without_a_filename_in_its_header_takes_the_name_of_its_field(client):
    body = (
        b'--x\r\nContent-Disposition: form-data; name="cat"; filename=""\r\n\r\n'
        + png(1)
        + b"\r\n--x--\r\n"
    )
    answer = client.post(
        "/v1/encode", content=body, headers={"Content-Type": "multipart/form-data; boundary=x"}
    )
    assert [row["id"] for row in answer.json()["rows"]] == ["cat"]


def test_an_image_without_active_latents_keeps_its_row(client):
    answer = client.post("/v1/encode", content=png(5), params={"tau": 0.9999999})
    assert answer.json()["rows"] == [{"id": "image", "indices": [], "values": []}]


def test_vectors_are_encoded_under_their_ids(vector_client, vector_encoder):
    vectors = np.random.default_rng(0).normal(size=(3, 64)).astype(np.float32) * 300
    body = {"vectors": vectors.tolist(), "ids": ["a", "b", "c"]}
    answer = vector_client.post("/v1/encode", json=body, headers={"Accept": NPZ})
    codes = vector_encoder.encode(vectors)
    expected = codes_to_bytes(codes, ["a", "b", "c"], vector_encoder.provenance())
    assert answer.content == expected
    assert codes.nnz > 0


def test_vectors_without_ids_are_numbered(vector_client):
    answer = vector_client.post("/v1/encode", json={"vectors": [[0] * 64, [1.5] * 64]})
    assert [row["id"] for row in answer.json()["rows"]] == ["0", "1"]


# One bad input among good ones


def test_a_bad_image_gets_an_error_entry_and_the_others_their_rows(client, fake_encoder):
    parts = file_parts(("a", png(0)), ("b", b"GIF, not"), ("c", b""), ("d", png(3)))
    found = client.post("/v1/encode", files=parts).json()
    assert [row["id"] for row in found["rows"]] == ["a", "d"]
    assert [error["id"] for error in found["errors"]] == ["b", "c"]
    assert "not an image" in found["errors"][0]["reason"]
    assert "empty file" in found["errors"][1]["reason"]
    expected = fake_encoder.encode([png(0), png(3)])
    assert [row["indices"] for row in found["rows"]] == [row.indices.tolist() for row in expected]


def test_npz_answer_lists_bad_images_in_headers(client, fake_encoder, tmp_path):
    parts = file_parts(("a", png(0)), ("ö", b"no\r\nimage"), ("d", png(3)))
    answer = client.post("/v1/encode", files=parts, headers={"Accept": NPZ})
    (error,) = json.loads(answer.headers["x-vsc-errors"])
    assert answer.headers["x-vsc-error-count"] == "1"
    assert error["id"] == "ö"
    assert "not an image" in error["reason"]
    (tmp_path / "codes.npz").write_bytes(answer.content)
    assert read_codes(tmp_path / "codes.npz").ids == ["a", "d"]


def test_many_bad_images_do_not_overflow_the_header(client):
    parts = file_parts(("good", png(0)), *((f"{row}{'x' * 50}", b"bad") for row in range(500)))
    answer = client.post("/v1/encode", files=parts, headers={"Accept": NPZ})
    listed = json.loads(answer.headers["x-vsc-errors"])
    assert answer.headers["x-vsc-error-count"] == "500"
    assert len(answer.headers["x-vsc-errors"]) <= 4000
    assert 10 < len(listed) < 500
    assert listed[0]["id"].startswith("0x")


def test_a_bad_vector_gets_an_error_entry(vector_client):
    good = [0.5] * 64
    bad = [[1.0, 2.0], [*good[:-1], 1e39], [*good[:-1], "1"], 7, [good], [[1], [1, 2]], None]
    answer = vector_client.post(
        "/v1/encode",
        content=json.dumps({"vectors": [good, *bad, good]}),
        headers={"Content-Type": JSON},
    )
    found = answer.json()
    assert [row["id"] for row in found["rows"]] == ["0", "8"]
    assert [error["id"] for error in found["errors"]] == ["1", "2", "3", "4", "5", "6", "7"]
    assert found["errors"][0]["reason"] == "2 numbers, but the model takes 64"
    assert "not finite" in found["errors"][1]["reason"]
    assert {error["reason"] for error in found["errors"][2:]} == {"not a list of numbers"}


# Refusals


def assert_refused(answer: httpx.Response, status: int, *words: str) -> None:
    assert answer.status_code == status
    assert answer.headers["content-type"] == JSON
    for word in words:
        assert word in answer.json()["error"]


def test_no_usable_image_at_all_is_refused_with_every_reason(client):
    parts = file_parts(("a", b"bad"), ("b", b""))
    answer = client.post("/v1/encode", files=parts, headers={"Accept": NPZ})
    assert_refused(answer, 422, "no usable input: a: not an image", "(and 1 more)")
    assert [error["id"] for error in answer.json()["errors"]] == ["a", "b"]


@pytest.mark.parametrize(
    "request_",
    [
        {},
        {"content": b"", "headers": {"Content-Type": PNG}},
        {"content": b"--x--\r\n", "headers": {"Content-Type": "multipart/form-data; boundary=x"}},
    ],
)
def test_a_request_without_an_image_is_refused(client, request_):
    assert_refused(client.post("/v1/encode", **request_), 400, "empty")


@pytest.mark.parametrize(
    ("content_type", "body", "word"),
    [
        ("multipart/form-data", b"x", "boundary"),
        ("multipart/form-data; boundary=x", b"what is this", "multipart"),
        (
            "multipart/form-data; boundary=x",
            b'--x\r\nContent-Disposition: form-data; name="a"\r\n\r\n1\r\n--x--\r\n',
            "'a' has no filename",
        ),
    ],
)
def test_a_malformed_multipart_body_is_refused(client, content_type, body, word):
    answer = client.post("/v1/encode", content=body, headers={"Content-Type": content_type})
    assert_refused(answer, 400, word)


def test_other_media_types_are_refused_with_what_the_model_takes(client):
    for media_type in (JSON, "text/plain", "application/x-www-form-urlencoded"):
        answer = client.post("/v1/encode", content=png(1), headers={"Content-Type": media_type})
        assert_refused(answer, 415, "fake", media_type, "multipart/form-data", "image/*")


def test_a_body_of_more_values_than_its_rows_can_have_is_refused_unread(vector_client, monkeypatch):
    monkeypatch.setattr(reading, "_parse_body", lambda _: pytest.fail("it was read"))
    for body in (
        b'{"vectors": [' + b"[1]," * 1024 * 100 + b"[1]]}",
        b'{"ids": [' + b'"",' * 1024 * 200 + b"]}",
        b"{" + b'"a":1,' * 1024 * 100 + b"}",
    ):
        answer = vector_client.post("/v1/encode", content=body, headers={"Content-Type": JSON})
        assert_refused(answer, 413, "more than 1,024 inputs")


def test_as_many_rows_as_are_allowed_pass_with_ids_full_of_commas(vector_client):
    body = {"vectors": [[0.5] * 64] * 1024, "ids": [f"{row}[,:{{" * 5 for row in range(1024)]}
    answer = vector_client.post("/v1/encode", json=body)
    assert [row["id"] for row in answer.json()["rows"]] == body["ids"]


def test_a_service_works_in_as_many_threads_as_the_container_allows(monkeypatch):
    monkeypatch.setattr("vsc_serve.cpus.cgroup_quota", lambda *_: 1.0)
    assert Limits().workers == 1


def test_an_image_sent_to_a_model_of_vectors_is_refused(vector_client):
    raw = vector_client.post("/v1/encode", content=png(1), headers={"Content-Type": PNG})
    assert_refused(raw, 415, "embeds", "vectors of length 64", JSON)
    assert_refused(vector_client.post("/v1/encode", files=file_parts(("a", png(1)))), 415)


@pytest.mark.parametrize(
    ("body", "word"),
    [
        (b"", "empty"),
        (b"{", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b"\xff\xfe", "not JSON"),
        (b"[]", "vectors"),
        (b'{"vectors": [], "ids": []}', "empty"),
        (b'{"vectors": 3}', "empty"),
        (b'{"vectors": [[1]], "names": ["a"]}', "ids"),
        (b'{"vectors": [[1]], "ids": ["a", "b"]}', "2 ids for 1 vectors"),
        (b'{"vectors": [[1]], "ids": [1]}', "list of strings"),
        (b'{"vectors": [[1]], "ids": ["\\ud800"]}', "list of strings"),
    ],
)
def test_a_malformed_body_of_vectors_is_refused(vector_client, body, word):
    answer = vector_client.post("/v1/encode", content=body, headers={"Content-Type": JSON})
    assert_refused(answer, 400, word)


@pytest.mark.parametrize(
    ("accept", "media_type"),
    [
        (None, JSON),
        ("", JSON),
        ("*/*", JSON),
        ("application/*", JSON),
        (NPZ, NPZ),
        ("Application/X-Npz", NPZ),
        (f"{JSON};q=0.5, {NPZ}", NPZ),
        (f"{JSON}, {NPZ};q=0.9", JSON),
        (f"text/html, {NPZ};q=0.1", NPZ),
        (f"*/*;q=0.1, {JSON};q=0", NPZ),
        (f"{NPZ};q=nonsense", NPZ),
    ],
)
def test_the_accept_header_chooses_the_answer(client, accept, media_type):
    headers = {"Content-Type": PNG} | ({} if accept is None else {"Accept": accept})
    answer = client.post("/v1/encode", content=png(1), headers=headers)
    assert (answer.status_code, answer.headers["content-type"]) == (200, media_type)


@pytest.mark.parametrize("accept", ["text/html", f"{JSON};q=0", "image/*"])
def test_an_answer_that_cannot_be_given_is_refused(client, accept):
    answer = client.post("/v1/encode", content=png(1), headers={"Accept": accept})
    assert_refused(answer, 406, accept, JSON, NPZ)


@pytest.mark.parametrize("asked", [{}, {"tau": 0.2}, {"tau": 0.05, "stored_tau": 0.4}])
def test_queries_are_what_the_encoder_gives_and_the_answer_says_so(client, fake_encoder, asked):
    images = [png(seed) for seed in range(3)]
    parts = file_parts(*((f"{row}.png", image) for row, image in enumerate(images)))
    options = EncodeOptions(view="query", **asked)
    codes = fake_encoder.encode_rows(fake_encoder.read(images), options).codes
    meta = fake_encoder.provenance(options)
    assert (meta["view"], meta["tau"]) == ("query", asked.get("tau", 0.1))
    answer = client.post("/v1/encode", files=parts, params={"as": "query"} | asked)
    found = answer.json()
    assert found.items() >= meta.items()
    assert [row["indices"] for row in found["rows"]] == [code.indices.tolist() for code in codes]
    as_npz = client.post(
        "/v1/encode", files=parts, params={"as": "query"} | asked, headers={"Accept": NPZ}
    )
    assert as_npz.content == codes_to_bytes(codes, [f"{row}.png" for row in range(3)], meta)
    assert "stored_tau" not in client.post("/v1/encode", files=parts).json()


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ("as=query&tau=0.6", "thresholds out of order"),
        ("as=query&stored_tau=0.05", "thresholds out of order"),
        ("stored_tau=0.4", "send as=query too"),
        ("as=question", "as: "),
        ("as=query&stored_tau=1", "stored_tau: "),
    ],
)
def test_queries_that_cannot_be_are_refused(client, asked, words):
    answer = client.post(f"/v1/encode?{asked}", content=png(1), headers={"Content-Type": PNG})
    assert_refused(answer, 422, words)


@pytest.mark.parametrize("tau", ["0", "1", "-1", "2", "nan", "inf", "much", ""])
def test_a_tau_out_of_range_is_refused(client, tau):
    answer = client.post(f"/v1/encode?tau={tau}", content=png(1), headers={"Content-Type": PNG})
    assert_refused(answer, 422, "tau")


def test_a_body_over_the_limit_is_refused_from_its_length(fake_encoder):
    async def unread() -> AsyncIterator[bytes]:
        raise AssertionError("the body was read")
        yield b""

    with limited(fake_encoder, max_body_bytes=1000) as client:
        answer = client.post("/v1/encode", content=unread(), headers={"Content-Length": "1001"})
        assert_refused(answer, 413, "1,000 bytes")
        assert client.post("/v1/encode", content=b"x" * 1000).status_code == 422


def test_a_large_image_needs_no_disk(client, monkeypatch, tmp_path):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "missing"))
    large = png(0, (1200, 1200))
    assert len(large) > 2**20
    assert client.post("/v1/encode", files=file_parts(("large", large))).status_code == 200


@pytest.mark.parametrize("media_type", [PNG, "multipart/form-data; boundary=x"])
def test_a_body_of_unknown_length_is_refused_once_it_is_too_long(fake_encoder, media_type):
    sent = 0

    async def chunks() -> AsyncIterator[bytes]:
        nonlocal sent
        start = b'--x\r\nContent-Disposition: form-data; name="a"; filename="a"\r\n\r\n'
        for chunk in [start, *[b"x" * 100] * 50]:
            sent += 1
            yield chunk

    with limited(fake_encoder, max_body_bytes=1000) as client:
        answer = client.post("/v1/encode", content=chunks(), headers={"Content-Type": media_type})
    assert_refused(answer, 413, "1,000 bytes")
    assert sent < 15


def test_too_many_inputs_are_refused(fake_encoder, vector_encoder):
    with limited(fake_encoder, max_rows=2) as client:
        parts = file_parts(("a", png(0)), ("b", png(1)), ("c", png(2)))
        assert_refused(client.post("/v1/encode", files=parts), 413, "more than 2 inputs")
        assert client.post("/v1/encode", files=parts[:2]).status_code == 200
    with limited(vector_encoder, max_rows=2) as client:
        answer = client.post("/v1/encode", json={"vectors": [[0] * 64] * 3})
        assert_refused(answer, 413, "more than 2 inputs")


def test_an_image_over_the_pixel_limit_is_refused_before_it_is_decoded(fake_encoder):
    truncated = png(0, (100, 100))[:200]  # its header is whole, its pixels are not
    with limited(fake_encoder, max_pixels=9999) as client:
        answer = client.post("/v1/encode", content=truncated)
        assert_refused(answer, 422, "too large: 100x100", "9,999 pixels")


def test_other_paths_and_methods_answer_in_json(client):
    assert_refused(client.get("/nothing"), 404, "Not Found")
    assert_refused(client.get("/v1/encode"), 405, "Not Allowed")


def test_a_bug_reaches_the_client_without_its_traceback(fake_encoder, monkeypatch):
    monkeypatch.setattr(answers, "codes_to_bytes", lambda *_: 1 // 0)
    with AppClient(fake_encoder) as client:
        answer = client.post("/v1/encode", content=png(1), headers={"Accept": NPZ})
    assert_refused(answer, 500, "ZeroDivisionError")
    assert "Traceback" not in answer.text


def test_a_model_that_gives_no_finite_number_is_an_error_for_the_client(fake_encoder):
    class Broken:
        engine = "broken"

        def run(self, outputs: Any, feeds: Any) -> list[NDArray[np.float32]]:
            found = np.zeros((1, 16), np.float32)
            found[0, 3] = np.nan if feeds["image"].any() else 0
            return [found] * len(outputs)

    with AppClient(Encoder(Broken(), fake_encoder.manifest)) as client:
        assert_refused(client.post("/v1/encode", content=png(1)), 422, "not finite")


@pytest.mark.parametrize("name", ["max_body_bytes", "max_rows", "max_pixels", "workers"])
def test_a_limit_below_one_is_a_usage_error(name):
    with pytest.raises(UsageError, match=f"{name} must be at least 1, not 0"):
        Limits(**{name: 0})


# Health, description


def test_the_service_is_ready_only_after_a_warm_up(fake_encoder, fake_session):
    session = Recorder(fake_session)
    app = create_app(Encoder(session, fake_encoder.manifest))

    async def scenario() -> None:
        async with in_process(app) as client:
            assert_refused(await client.get("/v2/health/ready"), 503, "starting")
            assert (await client.get("/v2/health/live")).json() == {"live": True}
            assert not session.entered.is_set()
            async with app.router.lifespan_context(app):
                assert session.entered.is_set()
                assert (await client.get("/v2/health/ready")).json() == {"ready": True}

    anyio.run(scenario)


def test_a_model_of_vectors_warms_up_too(vector_client):
    assert vector_client.get("/v2/health/ready").status_code == 200


def test_models_describes_what_is_served(client, vector_client, fake_encoder, pixel_spec):
    (model,) = client.get("/v1/models").json()["models"]
    assert model == {
        "name": "fake",
        "digest": fake_encoder.manifest.digest,
        "modality": "image",
        "latent_dim": 16,
        "tau": 0.5,
        "query_tau": 0.1,
        "pixel_spec": pixel_spec.to_json(),
        "input_dim": None,
        "engine": "fake 1.0 cpu",
        "domain": None,
    }
    (model,) = vector_client.get("/v1/models").json()["models"]
    assert (model["pixel_spec"], model["input_dim"]) == (None, 64)


def metric(client: AppClient, name: str) -> float | None:
    lines = [line for line in client.get("/metrics").text.splitlines() if line.startswith(name)]
    return float(lines[0].rpartition(" ")[2]) if lines else None


def test_images_unlike_the_model_s_own_data_are_said_to_be_so() -> None:
    rng = np.random.default_rng(0)
    noise = [rng.integers(0, 256, (32, 32, 3), dtype=np.uint8) for _ in range(40)]
    images = []
    for pixels in noise:
        buffer = BytesIO()
        Image.fromarray(pixels).save(buffer, "PNG")
        images.append(buffer.getvalue())
    parts = file_parts(*((f"{row}.png", image) for row, image in enumerate(images)))
    with AppClient(Encoder.open(builtin_model(), device="cpu")) as client:
        assert "out_of_domain" not in client.post("/v1/encode", files=parts[:5]).json()
        assert metric(client, "vsc_out_of_domain") is None  # too few to say
        assert client.get("/v1/models").json()["models"][0]["domain"] is None
        assert "out_of_domain" not in client.post("/v1/encode?tau=0.3", files=parts).json()
        answer = client.post("/v1/encode", files=parts).json()
        assert "empty" in answer["out_of_domain"]
        recent = client.get("/v1/models").json()["models"][0]["domain"]
        assert recent["images"] == 45
        assert recent["out_of_domain"] == answer["out_of_domain"]
        assert metric(client, "vsc_out_of_domain{") == 1
        assert metric(client, "vsc_rows_total{") == 85


def test_recent_rows_are_the_last_thousand_or_two(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "RECENT", 30)
    watching = watch.DomainWatch(Encoder.open(builtin_model(), device="cpu"))
    empty, full = (dense_to_csr(np.full((30, 256), value, np.float32)) for value in (0, 1))
    seen = []
    for codes in (empty, full[:20], full[:20]):
        watching.note(codes, EncodeOptions())
        recent = watching.recent()
        assert recent is not None
        seen.append((recent.images, recent.empty_share))
    assert seen == [(30, 1.0), (50, 0.6), (40, 0.0)]


def test_a_model_whose_own_threshold_is_below_that_of_queries_is_described(fake_encoder):
    low = Encoder(fake_encoder._session, dataclasses.replace(fake_encoder.manifest, tau=0.05))
    with AppClient(low) as client:
        (model,) = client.get("/v1/models").json()["models"]
        assert (model["tau"], model["query_tau"]) == (0.05, 0.1)
        assert client.post("/v1/encode", content=png(1)).status_code == 200
        refused = client.post("/v1/encode?as=query", content=png(1))
        assert_refused(refused, 422, "thresholds out of order")


def test_the_root_points_to_routes_that_exist(client):
    found = client.get("/").json()
    described = client.get(found["openapi"]).json()["paths"]
    assert {found[name] for name in ("encode", "models", "health", "metrics")} <= described.keys()


def test_openapi_names_every_media_type_and_refusal_of_encode(client):
    described = client.get("/openapi.json").json()["paths"]["/v1/encode"]["post"]
    assert {"multipart/form-data", "image/*", JSON} <= described["requestBody"]["content"].keys()
    assert described["responses"]["200"]["content"].keys() == {JSON, NPZ}
    refusals = {"400", "406", "413", "415", "422", "503"}
    assert refusals <= described["responses"].keys()
    for status in refusals:
        schema = described["responses"][status]["content"][JSON]["schema"]
        assert schema["$ref"].endswith("/ErrorAnswer")
    names = [parameter["name"] for parameter in described["parameters"]]
    assert names == ["tau", "as", "stored_tau", "x-image-id"]


# Threads


def test_liveness_answers_while_every_worker_is_busy(fake_encoder, fake_session):
    session = Recorder(fake_session)
    app = create_app(Encoder(session, fake_encoder.manifest), Limits(workers=2))

    async def scenario() -> None:
        async with app.router.lifespan_context(app), in_process(app) as client:
            session.gate.clear()
            work = [
                asyncio.create_task(client.post("/v1/encode", content=png(row))) for row in range(6)
            ]
            while session.at_once < 2:
                await asyncio.sleep(0.01)
            assert (await client.get("/v2/health/live")).status_code == 200
            assert (await client.get("/v2/health/ready")).status_code == 200
            session.gate.set()
            assert [answer.status_code for answer in await asyncio.gather(*work)] == [200] * 6

    anyio.run(scenario)
    assert session.most_at_once == 2
    assert threading.get_ident() not in session.threads


# Real processes

HELD_SERVICE = """
import sys
import numpy as np
from vsc_serve.bundle import Manifest
from vsc_serve.encoder import Encoder
from vsc_serve.images import PixelSpec
from vsc_serve.service.server import run
from vsc_serve.service import create_app

class Held:
    engine = "held"
    def run(self, outputs, feeds):
        if feeds["image"].any() and sys.argv[1] == "held":  # not the warm-up
            print("encoding", flush=True)
            sys.stdin.readline()
        return [np.ones((len(feeds["image"]), 4), np.float32)] * len(outputs)

manifest = Manifest(
    name="held", modality="image", latent_dim=4, tau=0.5, alpha=0.1, active=4.0, opset=20,
    files={"encoder.onnx": "0" * 64}, probes=[],
    pixel_spec=PixelSpec(height=8, width=8, channels=1),
)
run(create_app(Encoder(Held(), manifest)), port=0, drain_timeout_s=float(sys.argv[2]))
"""


class Running(NamedTuple):
    process: "subprocess.Popen[str]"
    url: str

    def release(self) -> None:
        """Let an encoder that is held go on."""
        self.process.stdin.write("\n")
        self.process.stdin.flush()


@contextlib.contextmanager
def running(mode: str, drain_timeout_s: float = 20.0) -> Iterator[Running]:
    """Start HELD_SERVICE, wait until it says where it listens, and kill it if it is still there."""
    process = subprocess.Popen(
        [sys.executable, "-c", HELD_SERVICE, mode, str(drain_timeout_s)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    watchdog = threading.Timer(60, process.kill)
    watchdog.start()
    try:
        assert process.stderr is not None
        line = process.stderr.readline()
        found = re.search(r"model held .* on held, listening on (http://127\.0\.0\.1:\d+)$", line)
        assert found, line + process.stderr.read()
        yield Running(process, found[1])
    finally:
        watchdog.cancel()
        process.kill()
        process.communicate()


def wait_for_status(url: str, status: int) -> httpx.Response:
    deadline = time.monotonic() + 10
    while (answer := httpx.get(url)).status_code != status:
        assert time.monotonic() < deadline, answer.text
        time.sleep(0.02)
    return answer


@pytest.mark.slow
@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_drains_the_service(sent):
    with running("held") as service, concurrent.futures.ThreadPoolExecutor() as pool:
        process, url = service
        assert httpx.get(f"{url}/v2/health/ready").status_code == 200
        slow = pool.submit(httpx.post, f"{url}/v1/encode", content=png(1), timeout=30)
        assert process.stdout.readline() == "encoding\n"
        process.send_signal(sent)
        draining = wait_for_status(f"{url}/v2/health/ready", 503)
        assert draining.json()["error"] == "the service is draining"
        refused = httpx.post(f"{url}/v1/encode", content=png(1))
        assert_refused(refused, 503, "stopping")
        assert refused.headers["retry-after"] == "1"
        assert httpx.get(f"{url}/v2/health/live").status_code == 200
        assert not slow.done()
        service.release()
        assert slow.result().json()["rows"][0]["indices"] == [0, 1, 2, 3]
        assert process.wait(10) == 0
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{url}/v2/health/live")


@pytest.mark.slow
def test_an_idle_service_stops_without_waiting_for_an_open_connection():
    with running("free") as (process, url), httpx.Client() as client:
        assert client.get(f"{url}/v2/health/live").status_code == 200
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
        # Had it waited, uvicorn would say that the time for closing was exceeded.
        (line,) = process.stderr.read().splitlines()
        assert line.endswith("stopping; requests in flight: 0")


@pytest.mark.slow
def test_a_request_longer_than_the_drain_timeout_is_cut_off_and_reported():
    with (
        running("held", drain_timeout_s=0.2) as service,
        concurrent.futures.ThreadPoolExecutor() as pool,
    ):
        process, url = service
        slow = pool.submit(httpx.post, f"{url}/v1/encode", content=png(1), timeout=30)
        process.stdout.readline()
        process.send_signal(signal.SIGTERM)
        assert_refused(slow.result(), 503, "stopped before this request was done")
        service.release()
        assert process.wait(10) == 0
        log = process.stderr.read()
        assert "not done in 0.2 s and cut off; requests: 1" in log
        assert "Traceback" not in log


@pytest.mark.slow
def test_an_upload_that_stalls_does_not_hold_up_the_end():
    with running("free", drain_timeout_s=0.2) as (process, url):
        stalled = http.client.HTTPConnection(url.removeprefix("http://"), timeout=10)
        stalled.putrequest("POST", "/v1/encode")
        stalled.putheader("Content-Length", "1000")
        stalled.endheaders(b"only this")
        assert httpx.get(f"{url}/v2/health/live").status_code == 200
        process.send_signal(signal.SIGTERM)
        answer = stalled.getresponse()
        assert answer.status == 503
        assert "stopped before" in json.loads(answer.read())["error"]
        assert process.wait(5) == 0


@pytest.mark.slow
def test_a_second_signal_does_not_wait_for_requests():
    with (
        running("held") as service,
        concurrent.futures.ThreadPoolExecutor() as pool,
    ):
        process, url = service
        slow = pool.submit(httpx.post, f"{url}/v1/encode", content=png(1), timeout=30)
        process.stdout.readline()
        process.send_signal(signal.SIGTERM)
        wait_for_status(f"{url}/v2/health/ready", 503)
        process.send_signal(signal.SIGINT)
        assert_refused(slow.result(), 503, "stopped before this request was done")
        service.release()
        assert process.wait(10) == 0


@pytest.mark.slow
def test_a_large_upload_reads_its_refusal_and_a_broken_one_leaves_no_traceback():
    with running("free") as (process, url):
        answer = httpx.post(f"{url}/v1/encode", content=bytes(65 * 1024 * 1024))
        assert_refused(answer, 413, "64,000,000 bytes")
        broken = http.client.HTTPConnection(url.removeprefix("http://"))
        broken.putrequest("POST", "/v1/encode")
        broken.putheader("Content-Length", "1000")
        broken.endheaders(b"only this")
        broken.close()
        assert httpx.post(f"{url}/v1/encode", content=png(1)).status_code == 200
        process.send_signal(signal.SIGTERM)
        assert process.wait(10) == 0
        assert "Traceback" not in process.stderr.read()


def test_a_port_in_use_is_a_usage_error(fake_encoder):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        message = f"cannot listen on 127.0.0.1, port {port} .*in use.*another `host` or `port`"
        with pytest.raises(UsageError, match=message):
            server.run(create_app(fake_encoder), port=port)


@pytest.mark.parametrize(
    ("host", "port", "message"),
    [
        ("127.0.0.1", 99999, "`port` must be between 0 and 65535, not 99999"),
        ("no.such.host.invalid", 0, "cannot listen on no.such.host.invalid, port 0"),
    ],
)
def test_an_impossible_address_is_a_usage_error(fake_encoder, host, port, message):
    with pytest.raises(UsageError, match=message):
        server.run(create_app(fake_encoder), host=host, port=port)


def test_serve_opens_the_bundle_and_passes_everything_on(fake_encoder, monkeypatch):
    calls: list[Any] = []
    monkeypatch.setattr(
        Encoder, "open", lambda path, **options: calls.append((path, options)) or fake_encoder
    )
    monkeypatch.setattr(server, "run", lambda app, **options: calls.append((app, options)))
    before = signal.getsignal(signal.SIGTERM)
    try:
        serve(
            Path("model"),
            host="::1",
            port=7,
            device="cpu",
            limits=Limits(max_pixels=5),
            drain_timeout_s=3,
        )
        with pytest.raises(SystemExit) as stopped:
            signal.raise_signal(signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert stopped.value.code == 0
    opened, (app, options) = calls
    assert opened == (Path("model"), {"device": "cpu", "threads": 1})
    assert options == {"host": "::1", "port": 7, "drain_timeout_s": 3}
    assert app.state.service.encoder is fake_encoder
    assert app.state.service.limits.max_pixels == 5


@pytest.mark.slow
@pytest.mark.parametrize("package", ["fastapi", "uvicorn", "python_multipart"])
def test_a_missing_package_is_one_line_with_the_install_command(package):
    code = f"import sys; sys.modules[{package!r}] = None; import vsc_serve.service"
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, env=os.environ
    )
    last_line = found.stderr.strip().splitlines()[-1]
    assert f"UsageError: the service needs a package that is not installed ({package})" in last_line
    assert last_line.endswith("Run: pip install 'vsc-serve[serve]'")
