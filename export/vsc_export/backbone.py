"""One bundle from pictures to codes: a backbone in front of a model fitted to its embeddings.

    image -> cast, scale, transpose -> backbone -> spike and slab heads -> threshold -> code

The model is exported as a bundle of vectors first, with every check that has. Then the backbone's
nodes are put in front of that encoder, and the whole is compared from pixels to codes: truth is the
backbone as onnxruntime runs it alone, on pixels prepared as in training, and the model in float64.
"""

import json
import logging
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, compose, helper, numpy_helper, version_converter

from vsc_export.comparison import Comparison, Setting, compare, exact_codes
from vsc_export.graphs import TAU_INPUT, check_graph, strip_provenance
from vsc_export.metadata import describe_model
from vsc_export.probes import write_probes
from vsc_export.topk import add_topk
from vsc_export.verify import VALUE_TOLERANCE, run_csr_encoder, run_encoder
from vsc_export.write import (
    CARD,
    OPSET,
    PARITY,
    Exported,
    export_bundle,
    file_digests,
    save_graphs,
)
from vsc_serve.atomic import atomic_folder
from vsc_serve.bundle import BUNDLE_FOLDER, DECODER, ENCODER, ENCODER_CSR, ENCODER_TOPK, MANIFEST
from vsc_serve.codes import dense_to_csr
from vsc_serve.errors import ExportError, UsageError
from vsc_serve.images import PixelSpec
from vsc_serve.session import open_session
from vsc_training.backbone import Backbone, BackboneSpec
from vsc_training.checkpoint import Checkpoint, load_checkpoint, load_pictures
from vsc_training.model import VSC, DataSpec

logger = logging.getLogger(__name__)

IMAGE: Final = "image"
VECTOR: Final = "vector"

_PREFIX: Final = "backbone/"
_PREPARE: Final = "prepare/"
_NOISE_COUNT: Final = 16
_LEVELS: Final = (0, 127, 255)
_BATCH_SIZES: Final = (1, 7, 64)
_THREAD_COUNTS: Final = (1, 2)


@dataclass(frozen=True)
class EndToEnd:
    """How the codes of pictures compare with backbone and model run one after the other."""

    rows: dict[str, int]
    """Pictures compared, by kind."""
    bytes_equal: bool
    """Whether the codes were the same bytes at every batch size and thread count."""
    comparisons: list[Comparison]

    @property
    def failures(self) -> list[str]:
        """What is not parity, one line each."""
        return [str(found) for found in self.comparisons if not _is_parity(found)]

    def to_json(self) -> dict[str, Any]:
        """Return it as the part `end_to_end` of parity.json."""
        return asdict(self) | {"failures": self.failures, "passed": not self.failures}


def export_with_backbone(
    run: Path,
    out: Path,
    file: Path,
    *,
    opset: int = OPSET,
    top_k: int | None = None,
    **options: Any,
) -> tuple[Exported, EndToEnd]:
    """Turn a run on embeddings and its backbone into one bundle that takes pictures.

    Args:
        run: Folder that `vsc train` wrote.
        out: Folder to write, whole or not at all.
        file: The backbone's ONNX file; its JSON file lies beside it.
        opset: ONNX operator set, or the backbone's where that is newer.
        top_k: Places a row of an encoder with fixed shapes, written as well when given.
        options: What else `export_bundle` takes.

    Raises:
        ExportError: The backbone is not the run's, does not fit it, or the whole does not compute
            what the parts compute.
        UsageError: What `export_bundle` and `Backbone.open` raise.
    """
    if options.get("precision", "float32") != "float32":
        raise UsageError("--precision and --backbone: give one of them.")
    backbone = Backbone.open(file)
    checkpoint = load_checkpoint(run)
    _require_fit(checkpoint, backbone.spec, run, file)
    graph = _load(file)
    opset = max(opset, _opset(graph))
    with tempfile.TemporaryDirectory() as scratch:
        vectors = export_bundle(run, Path(scratch) / "vectors", opset=opset, **options)
        return _join(vectors, checkpoint, run, backbone, graph, out, top_k)


def join_graphs(
    backbone: onnx.ModelProto, spec: BackboneSpec, encoder: onnx.ModelProto
) -> onnx.ModelProto:
    """Put a backbone in front of an encoder of vectors.

    Args:
        backbone: The backbone, with its weights, at the operator set of the encoder.
        spec: Its input, its output, and how pixels become its input.
        encoder: Takes `vector`, with its weights.

    Returns:
        A graph that takes `image`, uint8 (batch, height, width, channels), and gives what the
        encoder gives.
    """
    front = compose.add_prefix(backbone, _PREFIX)
    joined = onnx.ModelProto()
    joined.CopyFrom(encoder)
    graph = joined.graph
    del graph.node[:], graph.input[:]
    graph.node.extend([*_preparing_nodes(spec), *front.graph.node, _bridge(spec)])
    graph.node.extend(encoder.graph.node)
    shape: list[str | int | None] = ["batch", *spec.pixel_spec.shape]
    graph.input.append(helper.make_tensor_value_info(IMAGE, TensorProto.UINT8, shape))
    graph.input.extend(value for value in encoder.graph.input if value.name == TAU_INPUT)
    graph.initializer.extend([*_scaling(spec), *front.graph.initializer])
    graph.sparse_initializer.extend(front.graph.sparse_initializer)
    graph.value_info.extend(front.graph.value_info)
    joined.functions.extend(front.functions)
    joined.ir_version = max(joined.ir_version, front.ir_version)
    known = {one.domain for one in joined.opset_import}
    joined.opset_import.extend(one for one in front.opset_import if one.domain not in known)
    return strip_provenance(joined)


def _join(
    vectors: Exported,
    checkpoint: Checkpoint,
    run: Path,
    backbone: Backbone,
    graph: onnx.ModelProto,
    out: Path,
    top_k: int | None,
) -> tuple[Exported, EndToEnd]:
    """Write the bundle that takes pictures from the one that takes vectors."""
    manifest, spec, model = vectors.manifest, backbone.spec, checkpoint.build_model()
    pictures = _pictures(checkpoint, run, spec.pixel_spec)
    facts = _facts(model, spec, manifest.name, manifest.tau)
    with atomic_folder(out, BUNDLE_FOLDER) as folder:
        encoder = onnx.load(vectors.path / ENCODER)
        joined = join_graphs(_at_opset(graph, manifest.opset), spec, encoder)
        decoder = onnx.load(vectors.path / DECODER)
        graphs = save_graphs(check_graph(joined), decoder, folder, facts)
        found = _compare(model, backbone, folder, manifest.tau, pictures)
        if found.failures:
            raise ExportError(
                "from pixels to codes the bundle does not compute what backbone and model compute:"
                f" {'; '.join(found.failures[:3])}. Nothing was written."
            )
        overflow = None
        if top_k is not None:
            rows = np.concatenate(list(pictures.values()))
            graphs[ENCODER_TOPK], overflow = add_topk(folder, top_k, rows, facts)
        _write_reports(vectors, spec, found, folder)
        data = DataSpec(pixel_spec=spec.pixel_spec)
        manifest = replace(
            manifest,
            modality=IMAGE,
            pixel_spec=spec.pixel_spec,
            input_dim=None,
            backbone=spec.to_json(),
            graphs=graphs,
            probes=write_probes(model, data, folder, manifest.tau, manifest.precision),
            files=file_digests(folder),
        )
        (folder / MANIFEST).write_text(manifest.to_json(), encoding="utf-8")
    return replace(vectors, path=out, manifest=manifest, overflow=overflow), found


def _require_fit(checkpoint: Checkpoint, spec: BackboneSpec, run: Path, file: Path) -> None:
    """Raise ExportError unless the run is fitted to this backbone's embeddings."""
    data = checkpoint.state.data
    if data.input_dim is None:
        raise ExportError(
            f"{run}: fitted to pictures of {data.pixel_spec}, not to embeddings."
            f" Train with --backbone {file.name}, or export without it."
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


def _load(file: Path) -> onnx.ModelProto:
    try:
        return onnx.load(file)
    except Exception as error:  # protobuf and onnx raise their own classes
        raise ExportError(f"{file}: onnx cannot read it ({str(error)[:200]}).") from error


def _opset(graph: onnx.ModelProto) -> int:
    return max(int(one.version) for one in graph.opset_import if one.domain in ("", "ai.onnx"))


def _at_opset(graph: onnx.ModelProto, opset: int) -> onnx.ModelProto:
    """Raise a backbone to a newer operator set."""
    found = _opset(graph)
    if found == opset:
        return graph
    try:
        return version_converter.convert_version(graph, opset)
    except Exception as error:  # the converter raises RuntimeError and others
        raise ExportError(
            f"the backbone has operator set {found} and cannot be raised to {opset}"
            f" ({str(error)[:200]}). Export the backbone with operator set {opset}."
        ) from error


def _preparing_nodes(spec: BackboneSpec) -> list[onnx.NodeProto]:
    """Return the nodes from `image` to the backbone's input, as `BackboneSpec.prepare` goes."""
    steps: list[tuple[str, list[str], dict[str, Any]]] = []
    if spec.type != "uint8":
        steps.append(("Cast", [], {"to": TensorProto.FLOAT}))
        steps.append(("Mul", [f"{_PREPARE}factor"], {}))
        steps.append(("Add", [f"{_PREPARE}offset"], {}))
    if spec.layout == "NCHW":
        steps.append(("Transpose", [], {"perm": [0, 3, 1, 2]}))
    if spec.type == "float16":
        steps.append(("Cast", [], {"to": TensorProto.FLOAT16}))
    steps.append(("Identity", [], {}))
    names = [IMAGE, *(f"{_PREPARE}{number}" for number in range(len(steps) - 1))]
    outputs = [*names[1:], _PREFIX + spec.input]
    return [
        helper.make_node(kind, [name, *others], [output], name=f"{_PREPARE}{kind}_{output}", **rest)
        for name, output, (kind, others, rest) in zip(names, outputs, steps, strict=True)
    ]


def _scaling(spec: BackboneSpec) -> list[onnx.TensorProto]:
    if spec.type == "uint8":
        return []
    return [
        numpy_helper.from_array(spec.factor, f"{_PREPARE}factor"),
        numpy_helper.from_array(spec.offset, f"{_PREPARE}offset"),
    ]


def _bridge(spec: BackboneSpec) -> onnx.NodeProto:
    """Return the node from the backbone's output to the encoder's input; it is often float32."""
    output = _PREFIX + spec.output
    return helper.make_node("Cast", [output], [VECTOR], name="bridge", to=TensorProto.FLOAT)


def _facts(model: VSC, spec: BackboneSpec, name: str, tau: float) -> dict[str, str]:
    """Return what the graphs say about themselves: they take pictures, not vectors."""
    facts = describe_model(model, name, tau, "float32")
    del facts["vsc.input_dim"]
    return facts | {
        "vsc.modality": IMAGE,
        "vsc.pixel_spec": json.dumps(spec.pixel_spec.to_json(), sort_keys=True),
        "vsc.backbone": json.dumps(spec.to_json(), sort_keys=True),
    }


def _pictures(checkpoint: Checkpoint, run: Path, spec: PixelSpec) -> dict[str, NDArray[np.uint8]]:
    """Return the pictures that are compared, by kind; real ones where the run has kept some."""
    rng = np.random.default_rng(0)
    made = {
        "noise": rng.integers(0, 256, (_NOISE_COUNT, *spec.shape), dtype=np.uint8),
        "constants": np.stack([np.full(spec.shape, level, np.uint8) for level in _LEVELS]),
    }
    if checkpoint.state.data.backbone is None:
        return made
    return {"examples": load_pictures(run)} | made


def _compare(
    model: VSC,
    backbone: Backbone,
    folder: Path,
    tau: float,
    pictures: dict[str, NDArray[np.uint8]],
) -> EndToEnd:
    rows = np.concatenate(list(pictures.values()))
    truth = exact_codes(model, backbone.embed(rows), tau)
    comparisons, seen = [], set()
    for setting, code, logit, csr_equal in _run_settings(folder, rows):
        comparisons.append(compare(truth, code, logit, setting, csr_equal=csr_equal))
        seen.add(code.tobytes())
    counts = {kind: len(part) for kind, part in pictures.items()}
    return EndToEnd(counts, len(seen) == 1, comparisons)


def _run_settings(
    folder: Path, rows: NDArray[np.uint8]
) -> Iterator[tuple[Setting, NDArray[np.float32], NDArray[np.float32], bool]]:
    for threads in _THREAD_COUNTS:
        dense = open_session(folder / ENCODER, device="cpu", threads=threads)
        compacting = open_session(folder / ENCODER_CSR, device="cpu", threads=threads)
        for size in _BATCH_SIZES:
            code, logit = run_encoder(dense, IMAGE, rows, size)
            values, indices, _ = run_csr_encoder(compacting, IMAGE, rows, size)
            expected = dense_to_csr(code)
            is_same = np.array_equal(values, expected.data) and np.array_equal(
                indices, expected.indices
            )
            setting = Setting(engine=dense.engine, batch_size=size, threads=threads)
            yield setting, code, logit, is_same


def _is_parity(found: Comparison) -> bool:
    return (
        found.flips_outside_band == 0
        and found.max_value_error <= VALUE_TOLERANCE
        and found.not_finite == 0
        and found.csr_equal
    )


def _write_reports(vectors: Exported, spec: BackboneSpec, found: EndToEnd, folder: Path) -> None:
    """Write parity.json and the model card, of vectors and of pictures."""
    report = json.loads((vectors.path / PARITY).read_text(encoding="utf-8"))
    text = json.dumps(report | {"end_to_end": found.to_json()}, indent=2, sort_keys=True)
    (folder / PARITY).write_text(text + "\n", encoding="utf-8")
    card = (vectors.path / CARD).read_text(encoding="utf-8")
    takes = f"{spec.pixel_spec}, through a backbone that gives vectors of {spec.dim}"
    card = card.replace(f"| input | vectors of {spec.dim} |", f"| input | {takes} |")
    (folder / CARD).write_text(card + _card_section(spec, found), encoding="utf-8")


def _card_section(spec: BackboneSpec, found: EndToEnd) -> str:
    scaling = f"(pixels / 255 - {list(spec.mean)}) / {list(spec.std)}" if spec.mean else "none"
    same = "are" if found.bytes_equal else "are not in every bit"
    return f"""
## Backbone

| what | value |
|---|---|
| sha256 | {spec.sha256} |
| takes | {spec.type}, {spec.layout}, {spec.pixel_spec} |
| scaling, inside the graph | {scaling} |
| embedding | `{spec.output}`, {spec.dim} dimensions |

From pixels to codes {sum(found.rows.values())} pictures were compared with the backbone run alone
and the model in float64: no spike differs outside the guard band. Codes {same} the same whatever
the batch size and the number of threads. The decoder gives embeddings, not pictures; the licence of
the backbone is its maker's.
"""
