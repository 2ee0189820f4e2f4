"""The Open Inference Protocol, asked by the unmodified `tritonclient`: this service, and a Triton.

Every test of the first part runs against both; the real Triton where VSC_TRITON names one
(docs/development.md). What only the service has comes after.
"""

import contextlib
import io
import json
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import numpy as np
import pytest
import uvicorn
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image
from triton_server import triton_server
from tritonclient import http as triton
from tritonclient.utils import InferenceServerException

from vsc_export.triton import write_repository
from vsc_serve.bundle import open_bundle
from vsc_serve.codes import Codes, build_csr
from vsc_serve.encoder import Encoder
from vsc_serve.images import read_pixels
from vsc_serve.service import Limits, create_app
from vsc_serve.service.v2.models import models_of
from vsc_serve.service.v2.tensors import MAX_JSON_BYTES, ProtocolError, read_request

SPARSE = "bars_sparse"
ROWS = 40


class Asked(NamedTuple):
    """A server, and what it ought to answer."""

    client: Any
    encoder: Encoder
    pixels: NDArray[np.uint8]
    address: str

    def infer(self, feeds: dict[str, tuple[NDArray[Any], str]], **options: Any) -> Any:
        return self.client.infer(SPARSE, inputs_of(feeds), **options)


@pytest.fixture(scope="module")
def encoder(tiny_bundle: Path) -> Encoder:
    return Encoder.open(tiny_bundle, device="cpu")


@pytest.fixture(scope="module")
def pixels(grey_folder: Path, encoder: Encoder) -> NDArray[np.uint8]:
    assert encoder.manifest.pixel_spec is not None
    paths = sorted(grey_folder.rglob("*.png"))[:: 200 // ROWS]
    return np.stack([read_pixels(path, encoder.manifest.pixel_spec) for path in paths])


@pytest.fixture(scope="module")
def service(encoder: Encoder) -> Iterator[str]:
    with serving(encoder, Limits(max_rows=ROWS)) as address:
        yield address


@contextlib.contextmanager
def serving(encoder: Encoder, limits: Limits) -> Iterator[str]:
    """Run the service on a free port of loopback, in a thread."""
    config = uvicorn.Config(create_app(encoder, limits), log_config=None, lifespan="on")
    server = uvicorn.Server(config)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
        thread.start()
        deadline = time.monotonic() + 30
        while not server.started and time.monotonic() < deadline:
            time.sleep(0.01)
        try:
            yield f"127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join(30)


@pytest.fixture(scope="module", params=["service", "triton"])
def asked(
    request: pytest.FixtureRequest,
    tiny_bundle: Path,
    encoder: Encoder,
    pixels: NDArray[np.uint8],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Asked]:
    with contextlib.ExitStack() as stack:
        if request.param == "service":
            address = request.getfixturevalue("service")
        else:
            repository = tmp_path_factory.mktemp("repository") / "models"
            write_repository(tiny_bundle, repository)
            folder = tmp_path_factory.mktemp("server")
            ports = stack.enter_context(triton_server(repository, SPARSE, folder))
            address = f"127.0.0.1:{ports.http}"
        client = triton.InferenceServerClient(address)
        stack.callback(client.close)
        yield Asked(client, encoder, pixels, address)


def inputs_of(
    feeds: dict[str, tuple[NDArray[Any], str]], *, is_binary: bool = True
) -> list[triton.InferInput]:
    inputs = []
    for name, (array, kind) in feeds.items():
        inputs.append(triton.InferInput(name, list(array.shape), kind))
        inputs[-1].set_data_from_numpy(array, binary_data=is_binary)
    return inputs


def codes_of(answer: Any) -> Codes:
    indices, values, count = (answer.as_numpy(name) for name in ("indices", "values", "count"))
    is_entry = indices >= 0
    np.testing.assert_array_equal(is_entry, np.arange(indices.shape[1]) < count)
    bounds = np.cumsum([0, *count[:, 0]])
    return build_csr(values[is_entry], indices[is_entry], bounds, latent_dim=16)


def assert_same(found: Codes, expected: Codes) -> None:
    for part in ("data", "indices", "indptr"):
        np.testing.assert_array_equal(getattr(found, part), getattr(expected, part), strict=True)


def as_png(pixels: NDArray[np.uint8]) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels[..., 0]).save(buffer, "PNG")
    return buffer.getvalue()


def image_bytes(images: Sequence[bytes]) -> NDArray[np.object_]:
    found = np.empty((len(images), 1), object)
    found[:, 0] = images
    return found


# What both do


def test_health_and_metadata_are_those_of_the_protocol(asked: Asked) -> None:
    assert asked.client.is_server_live()
    assert asked.client.is_server_ready()
    assert asked.client.is_model_ready(SPARSE)
    assert asked.client.is_model_ready(SPARSE, "1")
    assert "binary_tensor_data" in asked.client.get_server_metadata()["extensions"]
    metadata = asked.client.get_model_metadata(SPARSE)
    assert (metadata["name"], metadata["versions"]) == (SPARSE, ["1"])
    ports = {
        port["name"]: (port["datatype"], port["shape"])
        for port in metadata["inputs"] + metadata["outputs"]
    }
    assert ports == {
        "image": ("UINT8", [-1, 8, 8, 1]),
        "image_bytes": ("BYTES", [-1, 1]),
        "tau": ("FP64", [-1, 1]),
        "indices": ("INT32", [-1, -1]),
        "values": ("FP32", [-1, -1]),
        "count": ("INT32", [-1, 1]),
    }


@pytest.mark.parametrize("rows", [1, 3, ROWS])
@pytest.mark.parametrize("is_binary", [True, False])
def test_pixels_give_the_codes_of_the_encoder(asked: Asked, rows: int, is_binary: bool) -> None:
    inputs = inputs_of({"image": (asked.pixels[:rows], "UINT8")}, is_binary=is_binary)
    names = ("indices", "values", "count")
    outputs = [triton.InferRequestedOutput(name, binary_data=is_binary) for name in names]
    answer = asked.client.infer(SPARSE, inputs, outputs=outputs, request_id="abc")
    assert_same(codes_of(answer), asked.encoder.encode(asked.pixels[:rows]))
    response = answer.get_response()
    assert (response["model_name"], response["model_version"]) == (SPARSE, "1")
    assert response["id"] == "abc"


def test_without_named_outputs_all_come(asked: Asked) -> None:
    answer = asked.infer({"image": (asked.pixels[:2], "UINT8")})
    assert_same(codes_of(answer), asked.encoder.encode(asked.pixels[:2]))


def test_encoded_images_give_the_codes_of_their_files(asked: Asked) -> None:
    images = [as_png(row) for row in asked.pixels[:3]]
    answer = asked.infer({"image_bytes": (image_bytes(images), "BYTES")})
    assert_same(codes_of(answer), asked.encoder.encode(images))


def test_each_row_may_have_a_tau_of_its_own(asked: Asked) -> None:
    taus = np.array([0.1, 0.9, 0.1, 0.4])
    feeds = {"image": (asked.pixels[:4], "UINT8"), "tau": (taus[:, None], "FP64")}
    found = codes_of(asked.infer(feeds))
    for row, tau in enumerate(taus.tolist()):
        expected = asked.encoder.encode(asked.pixels[row : row + 1], tau=tau)
        assert_same(found[[row]], expected)


@pytest.mark.parametrize(
    ("feeds", "reason"),
    [
        ({"image": ((2, 5, 8, 1), "UINT8")}, "unexpected shape for input 'image'"),
        ({"image": ((2, 8, 8, 1), "FP32")}, "image"),
        ({"other": ((2, 8, 8, 1), "UINT8")}, "other"),
        ({"tau": ((2, 1), "FP64")}, "image"),
    ],
)
def test_a_wrong_input_is_refused_with_its_reason(
    asked: Asked, feeds: dict[str, tuple[tuple[int, ...], str]], reason: str
) -> None:
    kinds = {"UINT8": np.uint8, "FP32": np.float32, "FP64": np.float64}
    arrays = {name: (np.full(shape, 1, kinds[kind]), kind) for name, (shape, kind) in feeds.items()}
    with pytest.raises(InferenceServerException, match=reason):
        asked.infer(arrays)


def test_a_bad_tau_and_a_bad_image_are_refused(asked: Asked) -> None:
    tau = (np.array([[1.5]]), "FP64")
    with pytest.raises(InferenceServerException, match="tau must be above 0 and below 1"):
        asked.infer({"image": (asked.pixels[:1], "UINT8"), "tau": tau})
    with pytest.raises(InferenceServerException, match="not an image"):
        asked.infer({"image_bytes": (image_bytes([b"no"]), "BYTES")})


def test_unknown_models_versions_and_outputs_are_refused(asked: Asked) -> None:
    for model, version in (("nope", ""), (SPARSE, "9")):
        with pytest.raises(InferenceServerException):
            asked.client.get_model_metadata(model, version)
        inputs = inputs_of({"image": (asked.pixels[:1], "UINT8")})
        with pytest.raises(InferenceServerException):
            asked.client.infer(model, inputs, model_version=version)
    with pytest.raises(InferenceServerException, match="nope"):
        asked.infer(
            {"image": (asked.pixels[:1], "UINT8")},
            outputs=[triton.InferRequestedOutput("nope")],
        )


def test_an_error_names_the_request(asked: Asked) -> None:
    with pytest.raises(InferenceServerException, match=r"\[request id: abc\]"):
        asked.infer({"image": (asked.pixels[:1, :5], "UINT8")}, request_id="abc")


# What only the service does


def post(address: str, body: bytes, **headers: str) -> httpx.Response:
    url = f"http://{address}/v2/models/{SPARSE}/infer"
    return httpx.post(url, content=body, headers=headers, trust_env=False, timeout=30)


def test_the_other_model_gives_the_dense_outputs_of_the_graph(
    service: str, encoder: Encoder, pixels: NDArray[np.uint8]
) -> None:
    with contextlib.closing(triton.InferenceServerClient(service)) as client:
        answer = client.infer("bars", inputs_of({"image": (pixels, "UINT8")}))
        asked = client.infer(
            "bars",
            inputs_of({"image": (pixels[:2], "UINT8"), "tau": (np.array([[0.9], [0.1]]), "FP64")}),
            outputs=[triton.InferRequestedOutput("code"), triton.InferRequestedOutput("mu")],
        )
    expected = encoder.outputs(pixels, ["code", "spike_logit", "mu", "logvar"])
    for name, values in expected.items():
        np.testing.assert_array_equal(answer.as_numpy(name), values, strict=True)
    np.testing.assert_array_equal(answer.as_numpy("code"), encoder.encode(pixels).toarray())
    rows = [encoder.encode(pixels[[row]], tau=tau).toarray() for row, tau in ((0, 0.9), (1, 0.1))]
    np.testing.assert_array_equal(asked.as_numpy("code"), np.concatenate(rows))
    assert asked.as_numpy("logvar") is None


def test_images_in_json_are_base64_and_may_be_a_plain_list(
    service: str, encoder: Encoder, pixels: NDArray[np.uint8]
) -> None:
    import base64

    images = [as_png(row) for row in pixels[:2]]
    texts = [base64.b64encode(image).decode() for image in images]
    tensor = {"name": "image_bytes", "shape": [2], "datatype": "BYTES", "data": texts}
    answer = post(service, json.dumps({"inputs": [tensor]}).encode())
    assert answer.status_code == 200, answer.text
    expected = encoder.encode(images)
    found = {output["name"]: output["data"] for output in answer.json()["outputs"]}
    assert found["count"] == np.diff(expected.indptr).tolist()
    assert [index for index in found["indices"] if index >= 0] == expected.indices.tolist()


@pytest.mark.parametrize(
    ("body", "status", "reason"),
    [
        (b"", 400, "not JSON"),
        (b"[]", 400, "JSON object"),
        (b'{"inputs": []}', 400, "at least one tensor"),
        (b'{"inputs": [{"name": "image"}]}', 400, "`datatype`"),
        (b'{"id": 3, "inputs": []}', 400, "`id`"),
        (b"[" * 100_000, 400, "not JSON"),
        (b"0" * (MAX_JSON_BYTES + 1), 400, "binary data"),
    ],
)
def test_a_body_that_is_no_request_is_400_with_the_reason(
    service: str, body: bytes, status: int, reason: str
) -> None:
    answer = post(service, body)
    assert (answer.status_code, reason in answer.json()["error"]) == (status, True), answer.text


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"shape": [1, 8, 8, 2]}, "64 bytes of binary data, but UINT8"),
        ({"shape": [-1]}, "`shape`"),
        ({"shape": [2**40]}, "`shape`"),
        ({"datatype": "UINT9"}, "`datatype`"),
        ({"parameters": {"binary_data_size": 63}}, "63 bytes of binary data"),
        ({"parameters": {"binary_data_size": 65}}, "fewer are there"),
        ({"parameters": {"binary_data_size": -1}}, "number of bytes"),
        ({"parameters": 3}, "`parameters` must be an object"),
        ({"data": [1]}, "give one"),
        ({"datatype": "BYTES"}, "cut short"),
    ],
)
def test_binary_data_that_do_not_fit_their_tensor_are_refused(
    service: str, change: dict[str, Any], reason: str
) -> None:
    tensor = {"name": "image", "shape": [1, 8, 8, 1], "datatype": "UINT8"}
    head = {"inputs": [tensor | {"parameters": {"binary_data_size": 64}} | change]}
    text = json.dumps(head).encode()
    answer = post(
        service, text + b"\xff" * 64, **{"Inference-Header-Content-Length": str(len(text))}
    )
    assert (answer.status_code, reason in answer.json()["error"]) == (400, True), answer.text


def test_more_rows_than_the_limit_and_a_compressed_body_are_refused(
    service: str, pixels: NDArray[np.uint8]
) -> None:
    with contextlib.closing(triton.InferenceServerClient(service)) as client:
        too_many = np.concatenate([pixels, pixels[:1]])
        with pytest.raises(InferenceServerException, match=f"a request has 1 to {ROWS}"):
            client.infer(SPARSE, inputs_of({"image": (too_many, "UINT8")}))
        with pytest.raises(InferenceServerException, match="compressed"):
            client.infer(
                SPARSE,
                inputs_of({"image": (pixels[:1], "UINT8")}),
                request_compression_algorithm="gzip",
            )


def test_a_length_of_the_json_that_is_no_number_is_refused(service: str) -> None:
    for length, reason in (("-3", "number of bytes"), ("9" * 30, "number"), ("9", "is 9, but")):
        answer = post(service, b"{}", **{"Inference-Header-Content-Length": length})
        assert (answer.status_code, reason in answer.json()["error"]) == (400, True), answer.text


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=300), st.one_of(st.none(), st.integers(-2, 400)))
def test_no_body_makes_anything_but_a_protocol_error(body: bytes, length: int | None) -> None:
    with contextlib.suppress(ProtocolError):
        read_request(body, length)


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4)
    ),
    max_leaves=12,
)
_TENSOR = st.fixed_dictionaries(
    {},
    optional={
        "name": st.sampled_from(["image", "tau", ""]) | _JSON,
        "datatype": st.sampled_from(["UINT8", "FP32", "BYTES", "BOOL", "FP16"]) | _JSON,
        "shape": st.lists(st.integers(0, 3), max_size=3) | _JSON,
        "data": _JSON,
        "parameters": st.fixed_dictionaries({"binary_data_size": st.integers(0, 40)}) | _JSON,
    },
)


@settings(max_examples=300, deadline=None)
@given(
    st.fixed_dictionaries({"inputs": st.lists(_TENSOR, max_size=3)}, optional={"outputs": _JSON})
)
def test_no_json_makes_anything_but_a_protocol_error(head: dict[str, Any]) -> None:
    text = json.dumps(head).encode()
    with contextlib.suppress(ProtocolError):
        read_request(text + b"\1" * 40, len(text))


def test_a_model_of_vectors_takes_vectors(encoder: Encoder) -> None:
    from dataclasses import replace

    manifest = replace(
        encoder.manifest, modality="vector", pixel_spec=None, input_dim=7, name="a b"
    )
    models = models_of(manifest)
    assert list(models) == ["a_b", "a_b_sparse"]
    assert [port.to_json() for port in models["a_b"].inputs] == [
        {"name": "vector", "datatype": "FP32", "shape": [-1, 7]},
        {"name": "tau", "datatype": "FP64", "shape": [-1, 1]},
    ]


def test_the_models_are_those_of_the_triton_repository(tiny_bundle: Path, tmp_path: Path) -> None:
    names = set(write_repository(tiny_bundle, tmp_path / "repository"))
    assert set(models_of(open_bundle(tiny_bundle).manifest)) <= names
