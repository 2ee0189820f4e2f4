"""`vsc verify`: a finished bundle against its run, on any data, by the rule of its export."""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vsc_export.backbone import kept_images, require_fit
from vsc_export.parity import Parity, measure_parity
from vsc_export.parity_inputs import image_inputs, parity_inputs
from vsc_export.rules import rule_behind
from vsc_serve.bundle import Manifest, open_bundle
from vsc_serve.errors import CheckFailed, InputError, UsageError
from vsc_serve.images import PixelSpec
from vsc_serve.session import Device
from vsc_training.backbone import Backbone
from vsc_training.checkpoint import Checkpoint, load_checkpoint, load_samples
from vsc_training.evaluation.dataset import load_labelled
from vsc_training.model import DataSpec


def verify_bundle(
    path: Path,
    run: Path,
    data: Path | None,
    *,
    row_count: int,
    backbone: Path | None = None,
    device: Device = "cpu",
) -> Parity:
    """Compare a bundle with its run.

    Args:
        path: The bundle.
        run: The run it was exported from.
        data: Real rows to compare on; None takes the examples that the run kept.
        row_count: Real rows at most, evenly spread over the data.
        backbone: ONNX file of the backbone inside the bundle, where there is one.
        device: Device of the engine.

    Raises:
        BundleError: The bundle is damaged.
        InputError: The bundle is not of this run, or the data cannot be used.
        UsageError: The bundle has a backbone and none is given, or the other way round.
        ExportError: The backbone is not the run's.
    """
    manifest = open_bundle(path).manifest
    checkpoint = load_checkpoint(run)
    if backbone is not None:
        opened = Backbone.open(backbone)
        require_fit(checkpoint, opened.spec, run, backbone)
        return _verify_images(path, manifest, checkpoint, run, data, opened, row_count, device)
    if manifest.backbone is not None:
        raise UsageError(f"{path}: has a backbone inside. Give its ONNX file with `backbone`.")
    spec = checkpoint.state.data
    _require_alike(path, manifest, run, checkpoint, spec)
    model = checkpoint.build_model()
    rows = load_samples(run) if data is None else load_labelled(data, spec).examples.rows
    inputs = parity_inputs(model, _thinned(rows, row_count), manifest.tau, np.random.default_rng(0))
    return measure_parity(
        model, path, manifest.tau, inputs, precision=manifest.precision, device=device
    )


def require_verified(parity: Parity, path: Path) -> None:
    """Raise CheckFailed with the first failures when a bundle is not what was trained."""
    failures = parity.failures
    if failures:
        raise CheckFailed(
            f"{path}: does not compute what was trained: {'; '.join(failures[:3])}."
            " Export again, and check that the run is the one that was exported."
        )


def _verify_images(
    path: Path,
    manifest: Manifest,
    checkpoint: Checkpoint,
    run: Path,
    data: Path | None,
    backbone: Backbone,
    row_count: int,
    device: Device,
) -> Parity:
    """Compare a bundle that has a backbone inside, from pixels to codes."""
    if manifest.backbone != backbone.spec.to_json():
        raise UsageError(
            f"{path}: the backbone inside is not the one of `backbone`. Give the file that it was"
            " exported with, or none where there is none inside."
        )
    spec = backbone.spec.pixel_spec
    _require_alike(path, manifest, run, checkpoint, DataSpec(pixel_spec=spec))
    rows = kept_images(checkpoint, run)
    if data is not None:
        rows = load_labelled(data, DataSpec(pixel_spec=spec)).examples.rows
    inputs = image_inputs(
        None if rows is None else _thinned(rows, row_count), spec, np.random.default_rng(0)
    )
    return measure_parity(
        checkpoint.build_model(),
        path,
        manifest.tau,
        inputs,
        precision=manifest.precision,
        rule=rule_behind(manifest.precision, has_examples="examples" in inputs),
        embed=backbone.embed,
        device=device,
    )


def _thinned(rows: NDArray[Any], count: int) -> NDArray[Any]:
    """Return at most so many rows, evenly spread."""
    return rows[np.linspace(0, len(rows) - 1, min(len(rows), count)).astype(np.intp)]


def _require_alike(
    path: Path, manifest: Manifest, run: Path, checkpoint: Checkpoint, spec: DataSpec
) -> None:
    """Raise InputError unless the bundle is of a model like the run's."""
    found = (manifest.latent_dim, manifest.pixel_spec, manifest.input_dim)
    expected = (checkpoint.state.recipe.latent_dim, spec.pixel_spec, spec.input_dim)
    if found != expected:
        raise InputError(
            f"{path}: {_describe(*found)}, but {run} has {_describe(*expected)}."
            " Give the run that the bundle was exported from."
        )


def _describe(latent_dim: int, spec: PixelSpec | None, input_dim: int | None) -> str:
    return f"{latent_dim} latents of {spec or f'vectors of {input_dim}'}"
