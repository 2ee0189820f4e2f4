"""Fixtures shared by all tests: small images, and a model that needs no training."""

import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from vsc_serve.bundle import Manifest
from vsc_serve.codes import threshold_logit
from vsc_serve.encoder import Encoder
from vsc_serve.images import PixelSpec
from vsc_serve.session import cuda_is_there


class FakeSession:
    """A Session whose model is one fixed linear map: no file, no engine, real codes."""

    engine = "fake 1.0 cpu"

    def __init__(self, input_dim: int, latent_dim: int) -> None:
        rng = np.random.default_rng(0)
        self._weight = rng.normal(size=(input_dim, 2 * latent_dim)).astype(np.float64)

    def run(
        self, outputs: Sequence[str], feeds: Mapping[str, NDArray[Any]]
    ) -> list[NDArray[np.float32]]:
        (rows,) = (value for name, value in feeds.items() if name in ("image", "vector"))
        limit = feeds.get("tau_logit", np.array(threshold_logit(0.5)))
        flat = rows.reshape(len(rows), -1).astype(np.float64) / 255.0 - 0.5
        spike_logit, mu = np.split((flat @ self._weight).astype(np.float32), 2, axis=1)
        named = {
            "code": np.where(spike_logit > limit + 2.0, mu, np.float32(0.0)),
            "spike_logit": spike_logit - 2.0,
            "mu": mu,
        }
        return [named[name] for name in outputs]


@pytest.fixture
def pixel_spec() -> PixelSpec:
    return PixelSpec(height=8, width=8, channels=1)


@pytest.fixture
def fake_session() -> FakeSession:
    """What computes the codes of `fake_encoder`: 64 pixels or numbers in, 16 latents out."""
    return FakeSession(64, 16)


@pytest.fixture
def fake_encoder(fake_session: FakeSession, pixel_spec: PixelSpec) -> Encoder:
    manifest = Manifest(
        name="fake",
        modality="image",
        latent_dim=16,
        tau=0.5,
        alpha=0.1,
        active=4.0,
        opset=20,
        files={"encoder.onnx": "0" * 64},
        probes=[],
        pixel_spec=pixel_spec,
    )
    return Encoder(fake_session, manifest)


def draw_images(folder: Path, names: Sequence[str], size: int) -> Path:
    """Write grey images of noise, always the same ones, and return the folder."""
    rng = np.random.default_rng(1)
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (size, size), np.uint8)).save(folder / name)
    return folder


@pytest.fixture
def vector_encoder() -> Encoder:
    """An encoder of vectors of 64 numbers."""
    manifest = Manifest(
        name="fake",
        modality="vector",
        latent_dim=16,
        tau=0.5,
        alpha=0.1,
        active=4.0,
        opset=20,
        files={"encoder.onnx": "0" * 64},
        probes=[],
        input_dim=64,
    )
    return Encoder(FakeSession(64, 16), manifest)


@pytest.fixture
def image_folder(tmp_path: Path) -> Path:
    """Twelve grey 8x8 images: ten at the top, two in a folder with a non-ASCII name."""
    names = [f"{number:02}.png" if number < 10 else f"größer/{number}.png" for number in range(12)]
    return draw_images(tmp_path / "images", names, 8)


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Forty grey 4x4 images, `00.png` to `39.png`."""
    return draw_images(tmp_path / "images", [f"{number:02}.png" for number in range(40)], 4)


@pytest.fixture(scope="session")
def data_folder() -> Path:
    """Where the data for work on the project lies (VSC_DATA); tests that need it skip without."""
    named = os.environ.get("VSC_DATA")
    if not named:
        pytest.skip("VSC_DATA is not set: docs/development.md says what belongs there")
    return Path(named)


@pytest.fixture(scope="session")
def grey_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two hundred grey 8x8 images of bars, in two class folders."""
    folder = tmp_path_factory.mktemp("grey")
    rng = np.random.default_rng(2)
    for number in range(200):
        is_upright = number % 2 == 0
        pixels = rng.integers(0, 30, (8, 8), dtype=np.uint8)
        place = int(rng.integers(0, 7))
        pixels[
            (slice(None), slice(place, place + 2)) if is_upright else slice(place, place + 2)
        ] += 200
        path = folder / ("upright" if is_upright else "level") / f"{number:03}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(pixels).save(path)
    return folder


@pytest.fixture(scope="session")
def conv_backbone() -> Callable[..., Path]:
    """Write a small convolutional image encoder and the JSON beside it."""
    return _conv_backbone


def _conv_backbone(
    path: Path,
    *,
    stated: dict[str, Any] | None = None,
    with_json: bool = True,
    kind: str = "FLOAT",
    layout: str = "NCHW",
    batch: str | int = "n",
    pooled: bool = True,
    opset: int = 17,
    fp16: bool = False,
    seed: int = 0,
) -> Path:
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    rng = np.random.default_rng(seed)
    weights = {
        "kernel": rng.normal(size=(8, 3, 3, 3)),
        "head": rng.normal(size=(8 * 4, 24)),
        "bias": rng.normal(size=(24,)),
    }
    inner, dtype = (TensorProto.FLOAT16, np.float16) if fp16 else (TensorProto.FLOAT, np.float32)
    nodes = [
        helper.make_node("Cast", ["pixel_values"], ["real"], to=inner),
        helper.make_node("Transpose", ["real"], ["nchw"], perm=[0, 3, 1, 2])
        if layout == "NHWC"
        else helper.make_node("Identity", ["real"], ["nchw"]),
        helper.make_node("Conv", ["nchw", "kernel"], ["maps"], strides=[2, 2], pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["maps"], ["active"]),
        helper.make_node("AveragePool", ["active"], ["means"], kernel_shape=[4, 4], strides=[4, 4]),
        helper.make_node("Flatten", ["means"], ["flat"]),
        helper.make_node("Gemm", ["flat", "head", "bias"], ["embedding"]),
    ]
    shape = [batch, 3, 16, 16] if layout == "NCHW" else [batch, 16, 16, 3]
    output = ("embedding", [batch, 24]) if pooled else ("means", [batch, 8, 2, 2])
    graph = helper.make_graph(
        nodes,
        "conv",
        [helper.make_tensor_value_info("pixel_values", getattr(TensorProto, kind), shape)],
        [helper.make_tensor_value_info(output[0], inner, output[1])],
        [numpy_helper.from_array(value.astype(dtype), name) for name, value in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)
    onnx.save(model, path)
    if with_json:
        scaling = {"mean": [0.5, 0.4, 0.3], "std": [0.25, 0.2, 0.3]}
        text = json.dumps(stated or {"height": 16, "width": 16} | scaling)
        path.with_suffix(".json").write_text(text)
    return path


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory: pytest.TempPathFactory, grey_folder: Path) -> Path:
    """A real run of a small model on `grey_folder`."""
    import torch

    from vsc_training.config import load_recipe
    from vsc_training.data import load_examples
    from vsc_training.fit import fit

    torch.set_num_threads(1)  # small products, and the machine's other cores are busy with tests
    run = tmp_path_factory.mktemp("runs") / "bars"
    overrides = ["latent_dim=16", "hidden=64", "pseudo_inputs=4", "batch_size=32", "alpha=0.2"]
    overrides += [
        "regularisation=none",
        "steps=300",
        "learning_rate=0.005",
        "precision=float32",
        "validation_share=0.2",
    ]
    recipe = load_recipe("sparse", overrides)
    examples = load_examples(grey_folder)
    fit(recipe, examples, run, device=torch.device("cpu"), name="bars")
    return run


@pytest.fixture(scope="session")
def tiny_bundle(tmp_path_factory: pytest.TempPathFactory, tiny_run: Path) -> Path:
    """The bundle of `tiny_run`. Tests that damage it work on a copy."""
    from vsc_export.write import export_bundle

    out = tmp_path_factory.mktemp("bundles") / "bars"
    export_bundle(tiny_run, out)
    return out


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip tests marked `gpu` where there is no GPU, unless VSC_REQUIRE_GPU=1 says there is one."""
    is_optional = os.environ.get("VSC_REQUIRE_GPU") != "1"
    if item.get_closest_marker("gpu") and is_optional and not cuda_is_there():
        pytest.skip("no CUDA device (VSC_REQUIRE_GPU=1 makes this a failure)")
