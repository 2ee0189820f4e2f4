"""Write a bundle: graphs, probes, parity report, model card and manifest, whole or not at all."""

import hashlib
import io
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from PIL import Image

from vsc_export.card import model_card
from vsc_export.graphs import decoder_graph, encoder_graph
from vsc_export.verify import (
    GUARD_BAND,
    Parity,
    measure_parity,
    parity_inputs,
    require_parity,
    run_encoder,
)
from vsc_serve.atomic import atomic_folder
from vsc_serve.bundle import DECODER, ENCODER, MANIFEST, Manifest, Probe, sha256
from vsc_serve.codes import dense_to_csr, threshold_logit
from vsc_serve.errors import ExportError
from vsc_serve.images import read_pixels
from vsc_serve.preprocess import PixelSpec
from vsc_serve.session import open_session
from vsc_training.checkpoint import Checkpoint, load_checkpoint, load_samples
from vsc_training.metrics import Health, find_collapse
from vsc_training.model import VSC

OPSET: Final = 20
WEIGHTS: Final = "weights.bin"
PARITY: Final = "parity.json"
CARD: Final = "README.md"

_PROBE_SIDE: Final = 96
_PROBE_MARGIN: Final = 10 * GUARD_BAND
"""A probe with a spike this close to the threshold would fail on another engine for no reason."""
_PROBE_COUNT: Final = 3
_PROBE_CANDIDATES: Final = 60
_PACKAGES: Final = ("torch", "onnx", "onnxscript", "vsc-serve", "numpy", "pillow")


@dataclass(frozen=True)
class Exported:
    """What an export has written."""

    path: Path
    manifest: Manifest
    parity: Parity


def export_bundle(
    run: Path,
    out: Path,
    *,
    tau: float = 0.5,
    name: str | None = None,
    opset: int = OPSET,
    allow_collapsed: bool = False,
) -> Exported:
    """Turn a run into a bundle. Nothing appears under `out` unless every check passes.

    Args:
        run: Folder that `vsc train` wrote.
        out: Folder to write.
        tau: Spike threshold that becomes the model's own; callers may still override it.
        name: Name of the model; the run's name when None.
        opset: ONNX operator set.
        allow_collapsed: Export a model whose figures say that it has collapsed.

    Raises:
        ExportError: The model has collapsed, does not export, or the export does not compute the
            same.
        UsageError: No checkpoint in `run`, or `tau` is out of range.
    """
    threshold_logit(tau)  # a bad tau is refused before anything is built
    checkpoint = load_checkpoint(run)
    _refuse_collapsed(checkpoint, run, allow_collapsed=allow_collapsed)
    model = checkpoint.build_model()
    with atomic_folder(out) as folder:
        _save_graphs(model, folder, tau, opset)
        inputs = parity_inputs(model, load_samples(run), np.random.default_rng(0))
        parity = measure_parity(model, folder, tau, inputs)
        require_parity(parity)
        (folder / PARITY).write_text(parity.to_json(), encoding="utf-8")
        probes = _write_probes(model, folder, tau)
        manifest = _manifest(checkpoint, name or checkpoint.state.name, tau, opset, probes, folder)
        (folder / CARD).write_text(model_card(checkpoint.state, manifest, parity), encoding="utf-8")
        manifest.files[CARD] = sha256(folder / CARD)
        (folder / MANIFEST).write_text(manifest.to_json(), encoding="utf-8")
    return Exported(out, manifest, parity)


def _refuse_collapsed(checkpoint: Checkpoint, run: Path, *, allow_collapsed: bool) -> None:
    reason = find_collapse(Health(**checkpoint.state.figures), checkpoint.state.recipe)
    if reason and not allow_collapsed:
        raise ExportError(f"{run}: the model has collapsed: {reason}. Or pass --allow-collapsed.")


def _save_graphs(model: VSC, folder: Path, tau: float, opset: int) -> None:
    encoder = encoder_graph(model, tau, opset)
    onnx.save_model(
        encoder,
        folder / ENCODER,
        save_as_external_data=True,
        all_tensors_to_one_file=True,
        location=WEIGHTS,
        size_threshold=1024,
    )
    onnx.save_model(decoder_graph(model, opset), folder / DECODER)
    # onnx makes external data readable by its owner alone; a container runs as somebody else.
    (folder / WEIGHTS).chmod((folder / ENCODER).stat().st_mode)


def _write_probes(model: VSC, folder: Path, tau: float) -> list[Probe]:
    """Write probes whose spikes all lie well away from the threshold.

    Probes are drawn, not taken from the training data: a bundle shows nobody's pictures.
    """
    session = open_session(folder / ENCODER, device="cpu")
    limit = threshold_logit(tau)
    probes: list[Probe] = []
    for number in range(_PROBE_CANDIDATES):
        name, content = _draw_probe(model, np.random.default_rng((1, number)), number)
        rows = _read_rows(content, model.data.pixel_spec)
        code, logit = run_encoder(session, model.data.modality, rows, 1)
        if np.abs(logit - limit).min() <= _PROBE_MARGIN:
            continue
        codes = dense_to_csr(code)
        path = folder / "probes" / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
        probes.append(
            Probe(
                file=f"probes/{name}",
                pixels_sha256=hashlib.sha256(rows.tobytes()).hexdigest(),
                indices=codes.indices.tolist(),
                values=codes.data.astype(float).tolist(),
            )
        )
        if len(probes) == _PROBE_COUNT:
            break
    return probes


def _draw_probe(model: VSC, rng: np.random.Generator, number: int) -> tuple[str, bytes]:
    """Return file name and content of one probe: a blurred blot as JPEG or PNG, or a vector."""
    if model.data.modality == "vector":
        center, scale = model.center.numpy(), float(model.scale)
        vector = center + scale * rng.normal(size=model.data.shape)
        return f"{number}.f32", vector.astype(np.float32).tobytes()
    coarse = rng.integers(0, 256, (6, 6, 3), dtype=np.uint8)
    picture = Image.fromarray(coarse).resize(
        (_PROBE_SIDE, _PROBE_SIDE * 3 // 4), Image.Resampling.BICUBIC
    )
    kind = "JPEG" if number % 2 == 0 else "PNG"
    buffer = io.BytesIO()
    picture.save(buffer, kind)
    return f"{number}.{'jpg' if kind == 'JPEG' else 'png'}", buffer.getvalue()


def _read_rows(content: bytes, spec: PixelSpec | None) -> NDArray[Any]:
    if spec is None:
        return np.frombuffer(content, np.float32)[None]
    return read_pixels(content, spec)[None]


def _manifest(
    checkpoint: Checkpoint, name: str, tau: float, opset: int, probes: list[Probe], folder: Path
) -> Manifest:
    state = checkpoint.state
    files = {
        path.relative_to(folder).as_posix(): sha256(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    return Manifest(
        name=name,
        modality=state.data.modality,
        latent_dim=state.recipe.latent_dim,
        tau=tau,
        alpha=state.recipe.alpha,
        active=state.figures["active"],
        opset=opset,
        files=files,
        probes=probes,
        versions={package: _version(package) for package in _PACKAGES},
        pixel_spec=state.data.pixel_spec,
        input_dim=state.data.input_dim,
    )


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return torch.__version__ if package == "torch" else "unknown"
