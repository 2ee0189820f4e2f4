"""Write a bundle: graphs, probes, parity report, model card and manifest, whole or not at all."""

from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx
import torch
from numpy.typing import NDArray

from vsc_export.budget import propose_thresholds
from vsc_export.card import Points, model_card
from vsc_export.compaction import csr_graph
from vsc_export.comparison import Truth, exact_codes
from vsc_export.graphs import check_file, decoder_graph
from vsc_export.linear_map import make_linear_map
from vsc_export.metadata import add_metadata, describe_model, signature
from vsc_export.operating_points import Rows, TauPoint, calibrate_tau, measure_trade_off
from vsc_export.options import DEFAULT, ExportOptions
from vsc_export.parity import Parity, measure_parity, require_parity
from vsc_export.parity_inputs import parity_inputs
from vsc_export.precision import encoder_in
from vsc_export.probes import write_probes
from vsc_export.reference import measure_reference, own_rows
from vsc_export.search_points import Neighbours, SearchPoint, measure_search
from vsc_export.shapes import check_shapes
from vsc_export.topk import Overflow, add_topk
from vsc_serve.atomic import atomic_folder
from vsc_serve.bundle import (
    BUNDLE_FOLDER,
    DECODER,
    ENCODER,
    ENCODER_CSR,
    ENCODER_TOPK,
    LINEAR_MAP,
    MANIFEST,
    STATISTICS,
    GraphSignature,
    Manifest,
    sha256,
)
from vsc_serve.domain import ReferenceStatistics
from vsc_serve.errors import ExportError
from vsc_serve.linear_map import write_linear_map
from vsc_serve.session import open_session
from vsc_training.checkpoint import Checkpoint, load_checkpoint, load_samples
from vsc_training.evaluation.dataset import load_labelled
from vsc_training.metrics import Health, find_collapse
from vsc_training.model import VSC

WEIGHTS: Final = "weights.bin"
PARITY: Final = "parity.json"
CARD: Final = "README.md"

_TAU_OF_HEALTH: Final = 0.5
"""Tau at which training measures a model."""
_PACKAGES: Final = ("torch", "onnx", "onnxscript", "vsc-serve", "numpy", "pillow")


@dataclass(frozen=True)
class Exported:
    """What an export has written."""

    path: Path
    manifest: Manifest
    parity: Parity
    trade_off: list[TauPoint]
    """What each setting of tau costs and keeps."""
    search: list[SearchPoint]
    """What a search finds at each of them."""
    overflow: Overflow | None = None
    """What the graph with fixed capacity could not hold, where one was asked for."""
    end_to_end: Parity | None = None
    """Comparison from pixels to codes, where a backbone is in front of the model."""


def export_bundle(run: Path, out: Path, options: ExportOptions = DEFAULT) -> Exported:
    """Turn a run into a bundle. Nothing appears under `out` unless every check passes.

    Args:
        run: Folder that `vsc train` wrote.
        out: Folder to write.
        options: What is asked for.

    Raises:
        ExportError: The model has collapsed, does not export, or the export does not compute the
            same.
        UsageError: No checkpoint in `run`, or no tau gives the active latents that are asked for.
        InputError: The calibration data cannot be used.
    """
    checkpoint = load_checkpoint(run)
    _refuse_collapsed(checkpoint, run, options)
    model = checkpoint.build_model()
    samples = load_samples(run)
    measured = _measured_rows(model, samples, options.calibration)
    truth = exact_codes(model, measured.rows, options.tau)
    neighbours = Neighbours(_as_drawn(model, measured.rows), truth)
    (tau, query_tau), precision = _chosen_taus(neighbours, truth, options), options.precision
    name = options.name or checkpoint.state.name
    facts = describe_model(model, name, tau, precision)
    with atomic_folder(out, BUNDLE_FOLDER) as folder:
        encoder = encoder_in(precision, model, tau, options.opset, measured.rows)
        graphs = save_graphs(encoder, decoder_graph(model, options.opset), folder, facts)
        check_shapes(model, folder)
        inputs = parity_inputs(model, samples, tau, np.random.default_rng(0))
        parity = measure_parity(model, folder, tau, inputs, precision=precision)
        require_parity(parity)
        overflow = None
        if options.top_k is not None:
            rows = np.concatenate(list(inputs.values()))
            graphs[ENCODER_TOPK], overflow = add_topk(folder, options.top_k, rows, facts)
        (folder / PARITY).write_text(parity.to_json(), encoding="utf-8")
        linear_map = make_linear_map(model, neighbours.stored(tau))
        if linear_map is not None:
            write_linear_map(folder / LINEAR_MAP, linear_map)
        trade_off, reference = _measure_codes(checkpoint, run, folder, measured, tau, options)
        (folder / STATISTICS).write_text(reference.to_json(), encoding="utf-8")
        found = measure_search(
            neighbours,
            linear_map,
            [point.tau for point in trade_off],
            own_tau=tau,
            query_tau=query_tau,
        )
        manifest = _manifest(
            checkpoint,
            folder,
            name=name,
            tau=tau,
            query_tau=query_tau,
            active=_own_active(checkpoint, trade_off, tau),
            opset=options.opset,
            precision=precision,
            graphs=graphs,
            probes=write_probes(model, model.data, folder, tau, precision),
        )
        points = Points(trade_off, found, measured)
        card = model_card(checkpoint.state, manifest, parity, points, options.about)
        (folder / CARD).write_text(card, encoding="utf-8")
        manifest.files[CARD] = sha256(folder / CARD)
        (folder / MANIFEST).write_text(manifest.to_json(), encoding="utf-8")
    return Exported(out, manifest, parity, trade_off, found, overflow)


def _refuse_collapsed(checkpoint: Checkpoint, run: Path, options: ExportOptions) -> None:
    reason = find_collapse(Health(**checkpoint.state.metrics), checkpoint.state.recipe)
    if reason and not options.allow_collapsed:
        raise ExportError(
            f"{run}: the model has collapsed: {reason}. Or pass `allow_collapsed=True`."
        )


def _measured_rows(model: VSC, samples: NDArray[Any], calibration: Path | None) -> Rows:
    """Return the rows for tau, int8 and the trade-off curve."""
    if calibration is None:
        return Rows(samples, None, "examples of the training data").thinned()
    found = load_labelled(calibration, model.data)
    return Rows(found.examples.rows, found.labels, "the calibration data").thinned()


def _chosen_taus(
    neighbours: Neighbours, truth: Truth, options: ExportOptions
) -> tuple[float, float | None]:
    """Return the threshold of rows, and of queries where it is not the default."""
    if options.budget is not None:
        return propose_thresholds(options.budget, neighbours)
    if options.active is not None:
        return calibrate_tau(truth.spike_logit, options.active), None
    return options.tau, None


def _as_drawn(model: VSC, rows: NDArray[Any]) -> NDArray[np.float32]:
    """Return rows in the units that the decoder draws in, flattened."""
    scale = 255.0 if model.data.modality == "image" else 1.0
    return rows.reshape(len(rows), -1).astype(np.float32) / np.float32(scale)


def save_graphs(
    encoder: onnx.ModelProto, decoder: onnx.ModelProto, folder: Path, facts: dict[str, str]
) -> dict[str, GraphSignature]:
    """Write the three graphs and their weights; both encoders point into one weights file.

    Returns:
        Inputs and outputs of each graph, by its file.
    """
    onnx.save_model(
        add_metadata(encoder, facts, "encoder"),
        folder / ENCODER,
        save_as_external_data=True,
        all_tensors_to_one_file=True,
        location=WEIGHTS,
        size_threshold=1024,
    )
    if (folder / WEIGHTS).is_file():
        # onnx makes external data readable by its owner alone; a container runs as somebody else.
        (folder / WEIGHTS).chmod((folder / ENCODER).stat().st_mode)
    stored = onnx.load(folder / ENCODER, load_external_data=False)
    compacting = add_metadata(csr_graph(stored), facts, "encoder_csr")
    (folder / ENCODER_CSR).write_bytes(compacting.SerializeToString(deterministic=True))
    onnx.save_model(add_metadata(decoder, facts, "decoder"), folder / DECODER)
    for name in (ENCODER, ENCODER_CSR, DECODER):
        check_file(folder / name)
    graphs = {ENCODER: stored, ENCODER_CSR: compacting, DECODER: decoder}
    return {name: signature(proto) for name, proto in graphs.items()}


def _measure_codes(
    checkpoint: Checkpoint,
    run: Path,
    folder: Path,
    measured: Rows,
    tau: float,
    options: ExportOptions,
) -> tuple[list[TauPoint], ReferenceStatistics]:
    """Return what each tau costs and keeps, and what codes of the model's own data look like."""
    model = checkpoint.build_model()
    encoder = open_session(folder / ENCODER, device="cpu")
    decoder = open_session(folder / DECODER, device="cpu")
    calibration = None if options.calibration is None else measured.rows
    groups = own_rows(run, checkpoint.state.recipe.validation_share, calibration)
    reference = measure_reference(model, encoder, decoder, groups, tau)
    return measure_trade_off(model, encoder, decoder, measured, tau), reference


def _own_active(checkpoint: Checkpoint, trade_off: list[TauPoint], tau: float) -> float:
    """Return the active count at the bundle's tau; at 0.5 that of rows that were not trained on."""
    if tau == _TAU_OF_HEALTH:
        return float(checkpoint.state.metrics["active"])
    return next(point.active for point in trade_off if point.tau == tau)


def _manifest(checkpoint: Checkpoint, folder: Path, **fields: Any) -> Manifest:
    """Return the manifest of a folder: what the checkpoint says, the digests, and `fields`."""
    state = checkpoint.state
    return Manifest(
        modality=state.data.modality,
        latent_dim=state.recipe.latent_dim,
        alpha=state.recipe.alpha,
        files=file_digests(folder),
        versions={package: _version(package) for package in _PACKAGES},
        pixel_spec=state.data.pixel_spec,
        input_dim=state.data.input_dim,
        **fields,
    )


def file_digests(folder: Path) -> dict[str, str]:
    """Return the sha256 of every file in a folder, by its path inside it."""
    return {
        path.relative_to(folder).as_posix(): sha256(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return torch.__version__ if package == "torch" else "unknown"
