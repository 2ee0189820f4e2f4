"""The Triton repository: what the server loads, and the codes that come out of it.

The files are checked against Triton's own schema, and `model.py` is run with a stand-in for the
module that the server gives it. With VSC_TRITON (docs/development.md) a real server runs them.
"""

import importlib.util
import io
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime
import pytest
from numpy.typing import NDArray
from PIL import Image
from triton_server import triton_server

from vsc_export.triton import MAX_BATCH_SIZE, write_repository
from vsc_serve.bundle import open_bundle, url_name
from vsc_serve.codes import Codes, build_csr
from vsc_serve.encoder import Encoder
from vsc_serve.errors import BundleError
from vsc_serve.images import read_pixels

_TYPES = {
    "tensor(uint8)": "TYPE_UINT8",
    "tensor(float)": "TYPE_FP32",
    "tensor(int32)": "TYPE_INT32",
}


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory, tiny_bundle: Path) -> Path:
    out = tmp_path_factory.mktemp("triton") / "repository"
    assert {"bars", "bars_sparse"} <= set(write_repository(tiny_bundle, out))
    return out


@pytest.fixture(scope="module")
def pixels(grey_folder: Path, encoder: Encoder) -> NDArray[np.uint8]:
    """Forty images of both classes, with codes of different lengths."""
    assert encoder.manifest.pixel_spec is not None
    paths = sorted(grey_folder.rglob("*.png"))[::5]
    rows = np.stack([read_pixels(path, encoder.manifest.pixel_spec) for path in paths])
    assert len(set(np.diff(encoder.encode(rows).indptr))) > 1
    return rows


@pytest.fixture(scope="module")
def encoder(tiny_bundle: Path) -> Encoder:
    return Encoder.open(tiny_bundle, device="cpu")


def parse_config(path: Path) -> Any:
    """Read a config.pbtxt as the server does: unknown fields and wrong types are errors."""
    text_format = pytest.importorskip("google.protobuf.text_format")
    schema = pytest.importorskip("tritonclient.grpc.model_config_pb2")
    return text_format.Parse(path.read_text(encoding="utf-8"), schema.ModelConfig())


def test_every_config_is_what_tritons_schema_allows(repository: Path) -> None:
    for folder in filter(Path.is_dir, repository.iterdir()):
        config = parse_config(folder / "config.pbtxt")
        assert config.name == folder.name
        assert config.max_batch_size == MAX_BATCH_SIZE
        assert config.HasField("dynamic_batching")
        assert config.dynamic_batching.default_queue_policy.max_queue_size > 0
        assert len(config.instance_group) == 1
        assert {path.name for path in folder.iterdir()} == {"config.pbtxt", "1"}


def test_the_schema_check_sees_a_field_that_does_not_exist(
    repository: Path, tmp_path: Path
) -> None:
    text = (repository / "bars" / "config.pbtxt").read_text()
    (tmp_path / "config.pbtxt").write_text(text.replace("max_batch_size", "max_batch"))
    with pytest.raises(Exception, match="max_batch"):
        parse_config(tmp_path / "config.pbtxt")


def test_the_onnx_config_names_what_the_graph_has(repository: Path) -> None:
    """Tritons onnxruntime backend refuses other names, types, shapes, or another input count."""
    for folder in filter(Path.is_dir, repository.iterdir()):
        config = parse_config(folder / "config.pbtxt")
        if config.backend != "onnxruntime":
            continue
        session = onnxruntime.InferenceSession(folder / "1" / "model.onnx")
        inputs = {value.name: value for value in session.get_inputs()}
        outputs = {value.name: value for value in session.get_outputs()}
        assert [one.name for one in config.input] == list(inputs)
        assert [one.name for one in config.output] == list(outputs)
        for stated in (*config.input, *config.output):
            value = (inputs | outputs)[stated.name]
            assert (
                stated.DESCRIPTOR.fields_by_name["data_type"]
                .enum_type.values_by_number[stated.data_type]
                .name
                == _TYPES[value.type]
            )
            assert list(stated.dims) == list(value.shape[1:])
            assert isinstance(value.shape[0], str)  # a free batch: the server sets it


def test_the_repository_holds_the_bundles_own_graph_and_weights(
    repository: Path, tiny_bundle: Path
) -> None:
    for name, graph in (("bars", "model.onnx"), ("bars_sparse", "encoder.onnx")):
        version = repository / name / "1"
        assert (version / graph).read_bytes() == (tiny_bundle / "encoder.onnx").read_bytes()
        assert (version / "weights.bin").read_bytes() == (tiny_bundle / "weights.bin").read_bytes()
    stated = parse_config(repository / "bars" / "config.pbtxt").parameters
    manifest = open_bundle(tiny_bundle).manifest
    assert stated["vsc_digest"].string_value == manifest.digest
    assert float(stated["vsc_tau"].string_value) == manifest.tau


def test_the_same_bundle_gives_the_same_bytes(
    repository: Path, tiny_bundle: Path, tmp_path: Path
) -> None:
    write_repository(tiny_bundle, tmp_path / "again")
    written = sorted(path.relative_to(repository) for path in repository.rglob("*"))
    assert written == sorted(
        p.relative_to(tmp_path / "again") for p in tmp_path.rglob("again/**/*")
    )
    for path in written:
        if (repository / path).is_file():
            assert (repository / path).read_bytes() == (tmp_path / "again" / path).read_bytes()


def test_a_folder_that_is_no_bundle_writes_nothing(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="no model bundle there"):
        write_repository(tmp_path / "missing", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_name_becomes_one_that_a_url_takes(tiny_bundle: Path) -> None:
    from dataclasses import replace

    manifest = open_bundle(tiny_bundle).manifest
    assert url_name(replace(manifest, name="größe 2/b")) == "gr_e_2_b"
    assert url_name(replace(manifest, name="..")) == "model"


# model.py, with a stand-in for the module of the server


@dataclass
class FakeTensor:
    name: str
    array: NDArray[Any]

    def as_numpy(self) -> NDArray[Any]:
        return self.array


@dataclass
class FakeResponse:
    tensors: Sequence[FakeTensor] = ()
    error: Exception | None = None

    def output(self, name: str) -> NDArray[Any]:
        (found,) = (tensor.array for tensor in self.tensors if tensor.name == name)
        return found


@dataclass
class FakeRequest:
    inputs: dict[str, NDArray[Any]] = field(default_factory=dict)


def fake_utilities() -> ModuleType:
    module = ModuleType("triton_python_backend_utils")

    def get_input_tensor_by_name(request: FakeRequest, name: str) -> FakeTensor | None:
        return FakeTensor(name, request.inputs[name]) if name in request.inputs else None

    parts = SimpleNamespace(
        Tensor=FakeTensor,
        TritonError=type("TritonError", (Exception,), {}),
        InferenceResponse=FakeResponse,
        get_input_tensor_by_name=get_input_tensor_by_name,
    )
    module.__dict__.update(vars(parts))
    return module


@pytest.fixture(scope="module")
def server_model(repository: Path) -> Any:
    """The model class of the written model.py, initialised as the server does it."""
    folder = repository / "bars_sparse"
    sys.modules["triton_python_backend_utils"] = fake_utilities()
    try:
        spec = importlib.util.spec_from_file_location("model", folder / "1" / "model.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    finally:
        del sys.modules["triton_python_backend_utils"]
    model = module.TritonPythonModel()
    parameters = parse_config(folder / "config.pbtxt").parameters
    stored = {name: {"string_value": value.string_value} for name, value in parameters.items()}
    model.initialize(
        {
            "model_config": json.dumps({"parameters": stored}),
            "model_repository": str(folder),
            "model_version": "1",
            "model_instance_kind": "CPU",
            "model_instance_device_id": "0",
        }
    )
    return model


def to_codes(indices: NDArray[Any], values: NDArray[Any], count: NDArray[Any]) -> Codes:
    """Turn padded rows into codes, as docs/triton.md tells clients to."""
    is_entry = indices >= 0
    np.testing.assert_array_equal(is_entry, np.arange(indices.shape[1]) < count)
    assert not values[~is_entry].any()
    return build_csr(
        values[is_entry], indices[is_entry], np.cumsum([0, *count[:, 0]]), latent_dim=16
    )


def same_codes(one: Codes, other: Codes) -> bool:
    return all(
        np.asarray(getattr(one, part)).tobytes() == np.asarray(getattr(other, part)).tobytes()
        for part in ("data", "indices", "indptr")
    )


def response_codes(response: FakeResponse) -> Codes:
    assert response.error is None, response.error
    return to_codes(*(response.output(name) for name in ("indices", "values", "count")))


def test_requests_that_the_server_batches_each_get_their_own_codes(
    server_model: Any, encoder: Encoder, pixels: NDArray[np.uint8]
) -> None:
    parts = [pixels[:3], pixels[3:4], pixels[4:]]
    responses = server_model.execute([FakeRequest({"image": part}) for part in parts])
    for part, response in zip(parts, responses, strict=True):
        assert same_codes(response_codes(response), encoder.encode(part))


def test_every_row_may_have_its_own_tau(
    server_model: Any, encoder: Encoder, pixels: NDArray[np.uint8]
) -> None:
    taus = [0.1, 0.5, 0.9, 0.3]
    request = FakeRequest({"image": pixels[:4], "tau": np.array(taus)[:, None]})
    (response,) = server_model.execute([request])
    found = response_codes(response)
    for row, tau in enumerate(taus):
        expected = encoder.encode(pixels[row : row + 1], tau=tau)
        assert same_codes(found[row : row + 1], expected)


def test_encoded_images_give_the_codes_of_their_files(
    server_model: Any, encoder: Encoder, pixels: NDArray[np.uint8]
) -> None:
    content = [as_png(row) for row in pixels[:3]]
    (response,) = server_model.execute([FakeRequest({"image_bytes": as_bytes_input(content)})])
    assert same_codes(response_codes(response), encoder.encode(content))


def test_a_bad_request_does_not_fail_the_others_in_its_batch(
    server_model: Any, encoder: Encoder, pixels: NDArray[np.uint8]
) -> None:
    bad = {
        "give one of the inputs image and image_bytes": {},
        "tau must be above 0 and below 1": {"image": pixels[:1], "tau": np.array([[1.5]])},
        "not an image, or cut off": {"image_bytes": as_bytes_input([b"not an image"])},
    }
    good = FakeRequest({"image": pixels[:2]})
    *failed, answered = server_model.execute([*(FakeRequest(one) for one in bad.values()), good])
    for reason, response in zip(bad, failed, strict=True):
        assert reason in str(response.error)
    assert same_codes(response_codes(answered), encoder.encode(pixels[:2]))


def test_rows_without_an_entry_are_padded_to_one(server_model: Any, pixels: Any) -> None:
    request = FakeRequest({"image": pixels[:2], "tau": np.full((2, 1), 1 - 1e-12)})
    (response,) = server_model.execute([request])
    np.testing.assert_array_equal(response.output("indices"), [[-1], [-1]])
    np.testing.assert_array_equal(response.output("count"), [[0], [0]])


def as_png(pixels: NDArray[np.uint8]) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels[..., 0]).save(buffer, "PNG")
    return buffer.getvalue()


def as_bytes_input(content: Sequence[bytes]) -> NDArray[np.object_]:
    array = np.empty((len(content), 1), object)
    array[:, 0] = content
    return array


# the real server


@pytest.fixture(scope="module")
def server(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """A Triton server with the sparse model on loopback; gives its gRPC port."""
    with triton_server(repository, "bars_sparse", tmp_path_factory.mktemp("server")) as ports:
        yield ports.grpc


def ask(port: int, feeds: dict[str, tuple[NDArray[Any], str]]) -> Any:
    from tritonclient import grpc

    inputs = []
    for name, (array, kind) in feeds.items():
        inputs.append(grpc.InferInput(name, list(array.shape), kind))
        inputs[-1].set_data_from_numpy(array)
    with grpc.InferenceServerClient(f"127.0.0.1:{port}") as client:
        return client.infer("bars_sparse", inputs, client_timeout=30)


def answer_codes(answer: Any) -> Codes:
    return to_codes(*(answer.as_numpy(name) for name in ("indices", "values", "count")))


@pytest.mark.slow
def test_the_real_server_gives_exactly_the_codes_of_the_encoder(
    server: int, encoder: Encoder, pixels: NDArray[np.uint8]
) -> None:
    answer = ask(server, {"image": (pixels, "UINT8")})
    assert same_codes(answer_codes(answer), encoder.encode(pixels))
    taus = np.full((len(pixels), 1), 0.2)
    answer = ask(server, {"image": (pixels, "UINT8"), "tau": (taus, "FP64")})
    assert same_codes(answer_codes(answer), encoder.encode(pixels, tau=0.2))


@pytest.mark.slow
def test_the_real_server_takes_encoded_images(
    server: int, encoder: Encoder, pixels: NDArray[np.uint8]
) -> None:
    content = [as_png(row) for row in pixels[:3]]
    answer = ask(server, {"image_bytes": (as_bytes_input(content), "BYTES")})
    assert same_codes(answer_codes(answer), encoder.encode(content))


@pytest.mark.slow
def test_the_real_server_gives_the_reason_of_a_bad_request(
    server: int, pixels: NDArray[np.uint8]
) -> None:
    from tritonclient.utils import InferenceServerException

    tau = (np.array([[1.5]]), "FP64")
    with pytest.raises(InferenceServerException, match="tau must be above 0 and below 1"):
        ask(server, {"image": (pixels[:1], "UINT8"), "tau": tau})
    with pytest.raises(InferenceServerException, match="not an image"):
        ask(server, {"image_bytes": (as_bytes_input([b"not an image"]), "BYTES")})
    with pytest.raises(InferenceServerException, match="unexpected shape for input 'image'"):
        ask(server, {"image": (pixels[:1, :5], "UINT8")})
