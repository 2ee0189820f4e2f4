"""Models with random weights, and exports that are made once: each takes a second."""

import hashlib
from collections.abc import Callable
from typing import Any

import onnx
import pytest
import torch

from vsc_export import graphs
from vsc_serve.images import PixelSpec
from vsc_training.config import load_recipe
from vsc_training.model import VSC, DataSpec

_EXPORT = graphs._export
_exported: dict[str, onnx.ModelProto] = {}


def _random_model(network: str = "mlp", *, vectors: bool = False) -> VSC:
    torch.manual_seed(0)
    fields = ["latent_dim=24", "hidden=32", "width=4", f"network={network}"]
    data = DataSpec(pixel_spec=PixelSpec(height=16, width=16, channels=3))
    return VSC(load_recipe("sparse", fields), DataSpec(input_dim=10) if vectors else data).eval()


@pytest.fixture(scope="session")
def random_model() -> Callable[..., VSC]:
    """Make a model of a network (`mlp`, `conv`), for 16x16 colour images or vectors of 10."""
    return _random_model


@pytest.fixture
def cached_exports(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the exporter once for the same layers, weights and operator set, in the whole session."""
    monkeypatch.setattr(graphs, "_export", _cached_export)


def _cached_export(graph: torch.nn.Module, *arguments: Any) -> onnx.ModelProto:
    digest = hashlib.sha256(repr((type(graph), graph, arguments[1:])).encode())
    for name, value in graph.state_dict().items():
        digest.update(f"{name} {value.dtype}".encode() + value.numpy().tobytes())
    key = digest.hexdigest()
    if key not in _exported:
        _exported[key] = _EXPORT(graph, *arguments)
    copy = onnx.ModelProto()
    copy.CopyFrom(_exported[key])
    return copy
