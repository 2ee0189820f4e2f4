"""One bundle from images to codes: a backbone in front of a model fitted to its embeddings.

The model is exported as a bundle of vectors first, with every check that has. Then the backbone's
nodes are put in front of that encoder, and the whole is compared from pixels to codes: truth is the
backbone as onnxruntime runs it alone, on pixels prepared as in training, and the model in float64.
"""

import json
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray

from vsc_export.backbone_graph import IMAGE, join_graphs
from vsc_export.graphs import check_graph
from vsc_export.metadata import describe_model
from vsc_export.options import DEFAULT, ExportOptions
from vsc_export.parity import Parity, measure_parity
from vsc_export.parity_inputs import image_inputs
from vsc_export.probes import write_probes
from vsc_export.rules import rule_behind
from vsc_export.shapes import check_shapes
from vsc_export.topk import add_topk
from vsc_export.write import (
    CARD,
    PARITY,
    Exported,
    export_bundle,
    file_digests,
    save_graphs,
)
from vsc_serve.atomic import atomic_folder
from vsc_serve.bundle import (
    BUNDLE_FOLDER,
    DECODER,
    ENCODER,
    ENCODER_TOPK,
    LINEAR_MAP,
    MANIFEST,
    STATISTICS,
    Manifest,
    Precision,
)
from vsc_serve.errors import ExportError, UsageError
from vsc_training.backbone import Backbone, BackboneSpec
from vsc_training.checkpoint import Checkpoint, load_checkpoint, load_images
from vsc_training.model import VSC, DataSpec
from vsc_training.onnx_graph import at_opset, is_fp16, opset_of, read_graph


def export_with_backbone(
    run: Path, out: Path, file: Path, options: ExportOptions = DEFAULT
) -> Exported:
    """Turn a run on embeddings and its backbone into one bundle that takes images.

    Args:
        run: Folder that `vsc train` wrote.
        out: Folder to write, whole or not at all.
        file: The backbone's ONNX file; its JSON file lies beside it.
        options: What is asked for.

    Returns:
        What was written, with the comparison from pixels to codes as `end_to_end`.

    Raises:
        ExportError: The backbone is not the run's, does not fit it, or the whole does not compute
            what the parts compute.
        UsageError: What `export_bundle` and `Backbone.open` raise.
    """
    if options.precision != "float32":
        raise UsageError("`precision` and `backbone`: give one of them.")
    graph = read_graph(file)
    backbone = Backbone.open(file)
    checkpoint = load_checkpoint(run)
    require_fit(checkpoint, backbone.spec, run, file)
    of_vectors = replace(options, top_k=None, opset=max(options.opset, opset_of(graph)))
    with tempfile.TemporaryDirectory() as scratch:
        vectors = export_bundle(run, Path(scratch) / "vectors", of_vectors)
        return _join(vectors, checkpoint, run, backbone, graph, out, options.top_k)


def require_fit(checkpoint: Checkpoint, spec: BackboneSpec, run: Path, file: Path) -> None:
    """Raise ExportError unless the run is fitted to this backbone's embeddings."""
    data = checkpoint.state.data
    if data.input_dim is None:
        raise ExportError(
            f"{run}: fitted to images of {data.pixel_spec}, not to embeddings."
            f" Train with `backbone` {file.name}, or export without it."
        )
    if data.input_dim != spec.dim:
        raise ExportError(
            f"{file}: gives {spec.dim} dimensions, but {run} is fitted to vectors of"
            f" {data.input_dim}. Give the backbone that made its training data."
        )
    if data.backbone is not None and data.backbone != spec:
        raise ExportError(
            f"{file}: not the backbone that {run} was trained with:"
            f" {spec.differences(data.backbone)}. Give that one."
        )


def kept_images(checkpoint: Checkpoint, run: Path) -> NDArray[np.uint8] | None:
    """Return the images that a run has kept; None where its vectors came from a file."""
    return load_images(run) if checkpoint.state.data.backbone is not None else None


def _join(
    vectors: Exported,
    checkpoint: Checkpoint,
    run: Path,
    backbone: Backbone,
    graph: onnx.ModelProto,
    out: Path,
    top_k: int | None,
) -> Exported:
    """Write the bundle that takes images from the one that takes vectors."""
    manifest, spec, model = vectors.manifest, backbone.spec, checkpoint.build_model()
    inputs = image_inputs(kept_images(checkpoint, run), spec.pixel_spec, np.random.default_rng(0))
    precision: Precision = "fp16" if is_fp16(graph) else "float32"
    facts = _facts(model, spec, replace(manifest, precision=precision))
    data = DataSpec(pixel_spec=spec.pixel_spec)
    with atomic_folder(out, BUNDLE_FOLDER) as folder:
        encoder = onnx.load(vectors.path / ENCODER)
        joined = join_graphs(at_opset(graph, manifest.opset), spec, encoder)
        decoder = onnx.load(vectors.path / DECODER)
        graphs = save_graphs(check_graph(joined), decoder, folder, facts)
        check_shapes(model, folder, data)
        found = measure_parity(
            model,
            folder,
            manifest.tau,
            inputs,
            precision=precision,
            rule=rule_behind(precision, has_examples="examples" in inputs),
            embed=backbone.embed,
        )
        _require_end_to_end(found)
        overflow = None
        if top_k is not None:
            rows = np.concatenate(list(inputs.values()))
            graphs[ENCODER_TOPK], overflow = add_topk(folder, top_k, rows, facts)
        _write_reports(vectors, spec, found, folder)
        for name in (LINEAR_MAP, STATISTICS):
            if (vectors.path / name).is_file():
                shutil.copyfile(vectors.path / name, folder / name)
        manifest = replace(
            manifest,
            modality=IMAGE,
            pixel_spec=spec.pixel_spec,
            input_dim=None,
            backbone=spec.to_json(),
            precision=precision,
            graphs=graphs,
            probes=write_probes(model, data, folder, manifest.tau, precision),
            files=file_digests(folder),
        )
        (folder / MANIFEST).write_text(manifest.to_json(), encoding="utf-8")
    return replace(vectors, path=out, manifest=manifest, overflow=overflow, end_to_end=found)


def _require_end_to_end(found: Parity) -> None:
    failures = found.failures
    if failures:
        raise ExportError(
            "from pixels to codes the bundle does not compute what backbone and model compute:"
            f" {'; '.join(failures[:3])}. Nothing was written."
        )


def _facts(model: VSC, spec: BackboneSpec, manifest: Manifest) -> dict[str, str]:
    """Return what the graphs say about themselves: they take images, not vectors."""
    facts = describe_model(model, manifest.name, manifest.tau, manifest.precision)
    del facts["vsc.input_dim"]
    return facts | {
        "vsc.modality": IMAGE,
        "vsc.pixel_spec": json.dumps(spec.pixel_spec.to_json(), sort_keys=True),
        "vsc.backbone": json.dumps(spec.to_json(), sort_keys=True),
    }


def _write_reports(vectors: Exported, spec: BackboneSpec, found: Parity, folder: Path) -> None:
    """Write parity.json and the model card, of vectors and of images."""
    report = json.loads((vectors.path / PARITY).read_text(encoding="utf-8"))
    text = json.dumps(report | {"end_to_end": found.report()}, indent=2, sort_keys=True)
    (folder / PARITY).write_text(text + "\n", encoding="utf-8")
    card = (vectors.path / CARD).read_text(encoding="utf-8")
    takes = f"{spec.pixel_spec}, through a backbone that gives vectors of {spec.dim}"
    card = card.replace(f"| input | vectors of {spec.dim} |", f"| input | {takes} |")
    if found.precision != "float32":
        stated = f"| precision | {found.precision} in the backbone; the model is float32 |"
        card = card.replace("| precision | float32 |", stated)
    (folder / CARD).write_text(card + _card_section(spec, found), encoding="utf-8")


def _card_section(spec: BackboneSpec, found: Parity) -> str:
    scaling = f"(pixels / 255 - {list(spec.mean)}) / {list(spec.std)}" if spec.mean else "none"
    same = "are" if found.bytes_equal else "are not in every bit"
    tolerance = found.rule.tolerance
    return f"""
## Backbone

| what | value |
|---|---|
| sha256 | {spec.sha256} |
| takes | {spec.type}, {spec.layout}, {spec.pixel_spec} |
| scaling, inside the graph | {scaling} |
| embedding | `{spec.output}`, {spec.dim} dimensions |

From pixels to codes {sum(found.rows.values())} images were compared with the backbone run alone
and the model in float64: no spike differs outside the guard band of {tolerance.guard_band:g} around
the threshold, {found.flips_inside_band} inside it; values differ by at most
{found.max_value_error:.1e} (allowed: {tolerance.value:g}). Codes {same} the same whatever the batch
size and the number of threads. The decoder gives embeddings, not images; the licence of the
backbone is its maker's.
"""
