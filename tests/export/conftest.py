"""Models with random weights, exports that are made once, and compacting graphs that are wrong."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray

from vsc_export import graphs, settings
from vsc_serve.images import PixelSpec
from vsc_serve.session import OnnxSession, open_session
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


Csr = tuple[NDArray[Any], NDArray[Any], NDArray[Any]]


def _move_a_boundary(values: NDArray[Any], indices: NDArray[Any], counts: NDArray[Any]) -> Csr:
    """The first entry of the second row goes to the first one; every sum stays as it is."""
    moved = counts.copy()
    moved[:2] += (1, -1)
    return values, indices, moved


def _shift_an_index(values: NDArray[Any], indices: NDArray[Any], counts: NDArray[Any]) -> Csr:
    shifted = indices.copy()
    shifted[-1] += 1
    return values, shifted, counts


def _lose_a_row(values: NDArray[Any], indices: NDArray[Any], counts: NDArray[Any]) -> Csr:
    kept = len(values) - counts[-1]
    return values[:kept], indices[:kept], counts[:-1]


def _change_a_bit(values: NDArray[Any], indices: NDArray[Any], counts: NDArray[Any]) -> Csr:
    changed = values.copy()
    changed[-1:] = np.nextafter(changed[-1:], np.float32(np.inf))
    return changed, indices, counts


class _FaultyCsr:
    """A compacting graph that goes wrong on whole batches of one kind of input."""

    def __init__(self, session: OnnxSession, fault: Callable[..., Csr], modality: str) -> None:
        self.engine = session.engine
        self._session, self._fault, self._modality = session, fault, modality

    def run(self, outputs: Sequence[str], feeds: Mapping[str, NDArray[Any]]) -> list[NDArray[Any]]:
        found = self._session.run(outputs, feeds)
        is_hit = self._modality in feeds and len(feeds[self._modality]) == 7 and len(found[0]) > 7
        return list(self._fault(*found)) if is_hit else found


BreakCsr = Callable[[str], None]


@pytest.fixture(params=[_move_a_boundary, _shift_an_index, _lose_a_row, _change_a_bit])
def break_csr(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> BreakCsr:
    """Make every compacting graph that takes `image` (or `vector`) give wrong sparse rows."""
    return _breaker(request.param, monkeypatch)


@pytest.fixture
def move_boundary(monkeypatch: pytest.MonkeyPatch) -> BreakCsr:
    """As `break_csr`, with the fault that no sum shows."""
    return _breaker(_move_a_boundary, monkeypatch)


def _breaker(fault: Callable[..., Csr], monkeypatch: pytest.MonkeyPatch) -> BreakCsr:
    def break_it(modality: str) -> None:
        def open_faulty(path: Path, **options: Any) -> OnnxSession | _FaultyCsr:
            session = open_session(path, **options)
            is_csr = path.name == "encoder_csr.onnx"
            return _FaultyCsr(session, fault, modality) if is_csr else session

        monkeypatch.setattr(settings, "open_session", open_faulty)

    return break_it
