"""Backbone files and what is said of them: what cannot be exported is found before training."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray

from vsc_serve.errors import InputError, UsageError
from vsc_training import onnx_graph
from vsc_training.backbone import Backbone, digest
from vsc_training.cli import train
from vsc_training.onnx_graph import check_exportable, read_graph

MakeBackbone = Callable[..., Path]

SIDE = 16
DIM = 24
STATED = {"height": SIDE, "width": SIDE, "mean": [0.5, 0.4, 0.3], "std": [0.25, 0.2, 0.3]}


def by_hand(pixels: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Scale pixels as the JSON says, written down independently."""
    scaled = (pixels.astype(np.float64) / 255.0 - STATED["mean"]) / STATED["std"]
    return scaled.transpose(0, 3, 1, 2)


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
@pytest.mark.parametrize("kind", ["float32", "float16", "uint8"])
def test_the_prepared_pixels_are_what_the_file_takes(
    kind: str,
    layout: str,
    tmp_path: Path,
    conv_backbone: MakeBackbone,
) -> None:
    types = {"float32": "FLOAT", "float16": "FLOAT16", "uint8": "UINT8"}
    stated: dict[str, Any] = {"height": SIDE, "width": SIDE, "layout": layout}
    if kind != "uint8":
        stated |= {"mean": STATED["mean"], "std": STATED["std"]}
    file = conv_backbone(tmp_path / "b.onnx", kind=types[kind], layout=layout, stated=stated)
    backbone = Backbone.open(file)
    pixels = np.random.default_rng(0).integers(0, 256, (3, SIDE, SIDE, 3), dtype=np.uint8)
    prepared = backbone.spec.prepare(pixels)
    expected = pixels.transpose(0, 3, 1, 2) if kind == "uint8" else by_hand(pixels)
    if layout == "NHWC":
        expected = expected.transpose(0, 2, 3, 1)
    assert prepared.dtype == kind
    np.testing.assert_allclose(prepared, expected, atol=2e-3 if kind == "float16" else 1e-5)
    assert backbone.embed(pixels).shape == (3, DIM)
    assert backbone.embed(pixels[:0]).shape == (0, DIM)


FAULTS: list[tuple[dict[str, Any], dict[str, Any], type[Exception], str]] = [
    ({}, {"mean": None}, UsageError, r"mean must be 3 numbers, .* No scaling is mean 0 and std 1"),
    ({}, {"std": [1, 0, 1]}, UsageError, "std must be above 0"),
    ({}, {"heigth": 3}, UsageError, "no field 'heigth'. Did you mean height?"),
    ({}, {"height": 32}, UsageError, r"is \['n', 3, 16, 16\], but b.json says NCHW with 32x16"),
    ({}, {"layout": "NHWC"}, UsageError, "says NHWC with 16x16 pixels of 3 channels. Correct"),
    ({}, {"layout": "CHW"}, UsageError, "layout is 'CHW'; give NCHW or NHWC"),
    ({}, {"resample": "nearest"}, UsageError, "resample must be one of bilinear, bicubic, not 'ne"),
    ({}, {"crop_pct": 0}, UsageError, "crop_pct must be above 0 and at most 1, not 0"),
    ({}, {"output": "pooled"}, UsageError, r"Write one of embedding into b.json: .* 'pooled'"),
    ({"kind": "UINT8"}, {}, UsageError, "takes uint8 and scales inside. Remove them"),
    ({"kind": "INT32"}, {}, InputError, r"is tensor\(int32\) .* four dimensions of fl"),
    ({"batch": 1}, {}, InputError, "fixed batch of 1. Export it with a free batch dimension"),
    ({"pooled": False}, {}, InputError, r"is \(5, 8, 2, 2\) for 5 images; one vector each"),
    ({}, {"std": [True, 1, 1]}, UsageError, "std must be 3 numbers, one for each channel"),
    ({}, {"mean": [float("nan")] * 3}, UsageError, r"mean must be 3 numbers, .* found \[nan"),
    ({}, {"std": [1e-45] * 3}, UsageError, "std must be above 0"),
    (
        {},
        {"mean": [-1, 0, 0]},
        UsageError,
        r"mean \[-1.0, .* not for pixels in \[0, 1\]",
    ),
]


@pytest.mark.parametrize(
    ("mean", "std", "advice"),
    [
        (
            [123.675, 116.28, 103.53],
            [58.395, 57.12, 57.375],
            '"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]',
        ),
        ([127.5] * 3, [1.0] * 3, '"mean": [0.5, 0.5, 0.5], "std": [0.00392157, '),
        ([0.5] * 3, [127.5] * 3, '"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]'),
    ],
)
def test_a_mean_for_pixels_from_0_to_255_is_refused_with_what_to_write(
    mean: list[float], std: list[float], advice: str, tmp_path: Path, conv_backbone: MakeBackbone
) -> None:
    file = conv_backbone(tmp_path / "b.onnx", stated=STATED | {"mean": mean, "std": std})
    message = f"if yours are for pixels from 0 to 255, write {advice}"
    with pytest.raises(UsageError, match=re.escape(message)):
        Backbone.open(file)


@pytest.mark.parametrize(("graph", "stated", "error", "message"), FAULTS)
def test_what_does_not_fit_is_an_error_that_says_what_to_change(
    graph: dict[str, Any],
    stated: dict[str, Any],
    error: type[Exception],
    message: str,
    tmp_path: Path,
    conv_backbone: MakeBackbone,
) -> None:
    file = conv_backbone(tmp_path / "b.onnx", stated=STATED | stated, **graph)
    with pytest.raises(error, match=message):
        Backbone.open(file)


def test_without_the_json_the_error_shows_what_to_write(
    tmp_path: Path, conv_backbone: MakeBackbone
) -> None:
    file = conv_backbone(tmp_path / "b.onnx", with_json=False)
    with pytest.raises(
        UsageError, match=r'b.json: not there. .* \{"height": 16, "width": 16, "mean'
    ):
        Backbone.open(file)


def test_the_digest_covers_weights_in_a_file_of_their_own(
    tmp_path: Path, conv_backbone: MakeBackbone
) -> None:
    file = conv_backbone(tmp_path / "b.onnx")
    alone = digest(file)
    onnx.save(
        onnx.load(file),
        file,
        save_as_external_data=True,
        location="b.weights",
        size_threshold=0,
    )
    outside = digest(file)
    assert outside != alone
    weights = tmp_path / "b.weights"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\1")
    assert digest(file) != outside


# what computes, but cannot be exported


def edit(file: Path, change: Callable[[onnx.ModelProto], None]) -> Path:
    graph = onnx.load(file)
    change(graph)
    onnx.save(graph, file)
    return file


def with_outside_weights(file: Path) -> onnx.ModelProto:
    """Move the weights of a graph to `b.weights` beside it, and return the graph as it was."""
    whole = onnx.load(file)
    outside = {"save_as_external_data": True, "location": "b.weights", "size_threshold": 0}
    onnx.save(onnx.load(file), file, **outside)
    return whole


def weights_of(graph: onnx.ModelProto) -> dict[str, NDArray[Any]]:
    return {one.name: onnx.numpy_helper.to_array(one) for one in graph.graph.initializer}


def test_weights_are_read_from_a_hubs_cache_and_through_hard_links(
    tmp_path: Path, conv_backbone: MakeBackbone
) -> None:
    blobs, snapshot, hard = (tmp_path / name for name in ("blobs", "snapshots/1", "hard"))
    for folder in (blobs, snapshot, hard):
        folder.mkdir(parents=True)
    whole = with_outside_weights(conv_backbone(blobs / "b.onnx"))
    for source, name in (("b.onnx", "b.onnx"), ("b.weights", "b.weights"), ("b.json", "b.json")):
        (hard / name).hardlink_to(blobs / source)
        blob = (blobs / source).rename(blobs / f"hash-of-{name}")
        (snapshot / name).symlink_to(f"../../blobs/{blob.name}")
    for folder in (snapshot, hard):
        check_exportable(folder / "b.onnx")
        read = weights_of(read_graph(folder / "b.onnx"))
        assert read.keys() == weights_of(whole).keys()
        for name, values in weights_of(whole).items():
            np.testing.assert_array_equal(read[name], values)
        assert Backbone.open(folder / "b.onnx").spec.dim == DIM


@pytest.mark.parametrize("location", ["../b.weights", "{absolute}", "link", "missing", "folder"])
def test_weights_outside_of_the_folder_are_refused(
    location: str, tmp_path: Path, conv_backbone: MakeBackbone
) -> None:
    inside = tmp_path / "inside"
    (inside / "folder").mkdir(parents=True)
    file = conv_backbone(inside / "b.onnx")
    with_outside_weights(file)
    outside = (inside / "b.weights").rename(tmp_path / "b.weights")
    (inside / "link").symlink_to("../b.weights")
    graph = onnx.load(file, load_external_data=False)
    for tensor in graph.graph.initializer:
        (named,) = (entry for entry in tensor.external_data if entry.key == "location")
        named.value = location.format(absolute=outside.resolve())
    file.write_bytes(graph.SerializeToString())
    with pytest.raises(
        InputError, match=r"its weights '.*' (lie outside|are not there|are no plain file)"
    ):
        read_graph(file)


def test_weights_that_are_cut_short_are_refused(
    tmp_path: Path, conv_backbone: MakeBackbone
) -> None:
    file = conv_backbone(tmp_path / "b.onnx")
    with_outside_weights(file)
    weights = tmp_path / "b.weights"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(InputError, match=r"its weights b\.weights are cut short"):
        read_graph(file)


def test_nodes_in_another_order_than_they_are_computed_in_are_sorted(
    tmp_path: Path, conv_backbone: MakeBackbone
) -> None:
    """As a converter to float16 leaves them: onnxruntime takes it, the checker does not."""

    def move_the_first_node_to_the_end(graph: onnx.ModelProto) -> None:
        nodes = list(graph.graph.node)
        del graph.graph.node[:]
        graph.graph.node.extend([*nodes[1:], nodes[0]])

    file = edit(conv_backbone(tmp_path / "b.onnx"), move_the_first_node_to_the_end)
    check_exportable(file)
    kinds = [node.op_type for node in read_graph(file).graph.node]
    assert kinds == ["Cast", "Identity", "Conv", "Relu", "AveragePool", "Flatten", "Gemm"]


def add_noise(graph: onnx.ModelProto) -> None:
    nodes = graph.graph.node
    nodes[1].output[0] = "still"
    noise = onnx.helper.make_node("RandomNormalLike", ["still"], ["noise"], scale=1e-6)
    added = onnx.helper.make_node("Add", ["still", "noise"], ["nchw"])
    rest = list(nodes[2:])
    del nodes[2:]
    nodes.extend([noise, added, *rest])


def name_an_unknown_operator(graph: onnx.ModelProto) -> None:
    graph.graph.node[3].op_type = "Rule"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (add_noise, r"draws random numbers \(RandomNormalLike\)"),
        (name_an_unknown_operator, "is not valid ONNX"),
    ],
)
def test_what_no_export_could_use_is_found_in_the_file(
    change: Callable[[onnx.ModelProto], None],
    message: str,
    tmp_path: Path,
    conv_backbone: MakeBackbone,
) -> None:
    file = edit(conv_backbone(tmp_path / "b.onnx"), change)
    with pytest.raises(InputError, match=f"{message}.*Export the backbone again"):
        check_exportable(file)


def test_a_file_that_is_no_graph_or_too_large_is_refused(
    tmp_path: Path, conv_backbone: MakeBackbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "text.onnx").write_text("no graph at all")
    with pytest.raises(InputError, match=r"text\.onnx: onnx cannot read it"):
        read_graph(tmp_path / "text.onnx")
    with pytest.raises(UsageError, match="no such file"):
        read_graph(tmp_path / "none.onnx")
    monkeypatch.setattr(onnx_graph, "_LARGEST_BYTES", 1000)
    with pytest.raises(InputError, match="has to stay below 2 GiB"):
        read_graph(conv_backbone(tmp_path / "b.onnx"))


def test_an_embedding_that_depends_on_the_batch_is_refused(
    tmp_path: Path, conv_backbone: MakeBackbone
) -> None:
    """As with dynamic quantisation, whose step follows the largest value of the batch."""

    def scale_by_the_batch(graph: onnx.ModelProto) -> None:
        nodes = graph.graph.node
        nodes[-1].output[0] = "own"
        largest = onnx.helper.make_node("ReduceMax", ["own"], ["largest"], keepdims=0)
        nodes.extend([largest, onnx.helper.make_node("Div", ["own", "largest"], ["embedding"])])

    file = edit(conv_backbone(tmp_path / "b.onnx"), scale_by_the_batch)
    with pytest.raises(InputError, match="depends on the others in its batch"):
        Backbone.open(file)


def test_an_embedding_that_is_not_finite_is_refused(
    tmp_path: Path, conv_backbone: MakeBackbone
) -> None:
    def take_the_logarithm(graph: onnx.ModelProto) -> None:
        graph.graph.node[-1].output[0] = "own"
        graph.graph.node.append(onnx.helper.make_node("Log", ["own"], ["embedding"]))

    file = edit(conv_backbone(tmp_path / "b.onnx"), take_the_logarithm)
    with pytest.raises(InputError, match="gives values that are NaN or infinite"):
        Backbone.open(file)


def test_training_refuses_such_a_backbone_before_it_embeds_and_leaves_nothing(
    tmp_path: Path, conv_backbone: MakeBackbone, grey_folder: Path
) -> None:
    file = edit(conv_backbone(tmp_path / "b.onnx"), add_noise)
    with pytest.raises(InputError, match="draws random numbers"):
        train(grey_folder, tmp_path / "run", backbone=file, threads=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b.json", "b.onnx"]
