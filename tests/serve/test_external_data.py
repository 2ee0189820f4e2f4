"""Every file that a graph could take weights from is found, and none outside its folder is read."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from google.protobuf.descriptor import Descriptor
from onnx import TensorProto, helper

from vsc_serve.bundle import ENCODER, MANIFEST, Manifest, open_bundle, sha256
from vsc_serve.errors import BundleError
from vsc_serve.external_data import MESSAGES, check_external_files, external_files
from vsc_serve.session import open_session

Place = Callable[[TensorProto], onnx.ModelProto]


def external(location: str) -> TensorProto:
    """Four weights that lie in a file."""
    tensor = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[4])
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in (("location", location), ("offset", "0"), ("length", "16")):
        entry = tensor.external_data.add()
        entry.key, entry.value = key, value
    return tensor


def in_initializer(tensor: TensorProto) -> onnx.ModelProto:
    add = helper.make_node("Add", ["x", "w"], ["y"])
    ports = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [4]) for name in "xy"]
    graph = helper.make_graph([add], "g", ports[:1], ports[1:], [tensor])
    return helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", 20)])


def in_attribute(tensor: TensorProto) -> onnx.ModelProto:
    model = in_initializer(tensor)
    del model.graph.initializer[:]
    node = model.graph.node.add(op_type="Constant", output=["w"])
    attribute = node.attribute.add(name="value", type=onnx.AttributeProto.TENSOR)
    attribute.t.CopyFrom(tensor)
    return model


def in_attribute_list(tensor: TensorProto) -> onnx.ModelProto:
    model = in_attribute(tensor)
    attribute = model.graph.node[-1].attribute[0]
    attribute.tensors.append(attribute.t)
    attribute.ClearField("t")
    return model


def in_sparse_values(tensor: TensorProto) -> onnx.ModelProto:
    model = in_initializer(TensorProto())
    model.graph.sparse_initializer.add().values.CopyFrom(tensor)
    return model


def in_sparse_attribute(tensor: TensorProto) -> onnx.ModelProto:
    model = in_attribute(TensorProto())
    model.graph.node[-1].attribute[0].sparse_tensors.add().indices.CopyFrom(tensor)
    return model


def in_branch(tensor: TensorProto) -> onnx.ModelProto:
    model = in_initializer(TensorProto())
    branch = model.graph.node.add(op_type="If").attribute.add(name="then_branch")
    branch.g.CopyFrom(in_attribute(tensor).graph)
    return model


def in_function(tensor: TensorProto) -> onnx.ModelProto:
    model = in_initializer(TensorProto())
    model.functions.add().node.extend(in_branch(tensor).graph.node)
    return model


def in_training(tensor: TensorProto) -> onnx.ModelProto:
    model = in_initializer(TensorProto())
    model.training_info.add().algorithm.CopyFrom(in_initializer(tensor).graph)
    return model


PLACES = [in_initializer, in_attribute, in_attribute_list, in_sparse_values, in_sparse_attribute]
PLACES += [in_branch, in_function, in_training]


def saved(path: Path, model: onnx.ModelProto) -> Path:
    path.write_bytes(model.SerializeToString())
    return path


@pytest.mark.parametrize("place", PLACES)
def test_a_file_of_weights_is_found_wherever_its_tensor_stands(
    tmp_path: Path, place: Place
) -> None:
    assert external_files(saved(tmp_path / "g.onnx", place(external("../w.bin")))) == {"../w.bin"}


def messages_of(root: Descriptor) -> dict[str, dict[int, str]]:
    """Fields that hold messages, of every message that a model can hold."""
    found: dict[str, dict[int, str]] = {}
    left = [root]
    while left:
        message = left.pop()
        inner = [field for field in message.fields if field.message_type is not None]
        found[message.name] = {field.number: field.message_type.name for field in inner}
        left += [field.message_type for field in inner if field.message_type.name not in found]
    return found


def test_the_table_has_every_way_to_a_tensor_that_onnx_has() -> None:
    messages = messages_of(onnx.ModelProto.DESCRIPTOR)
    leading = {"TensorProto"}
    while (
        more := {name for name, fields in messages.items() if leading & set(fields.values())}
        - leading
    ):
        leading |= more
    expected = {
        name: {number: kind for number, kind in messages[name].items() if kind in leading}
        for name in leading
    }
    location = {13: "StringStringEntryProto"}
    assert TensorProto.DESCRIPTOR.fields_by_name["external_data"].number == 13
    assert expected | {"TensorProto": location, "StringStringEntryProto": {}} == MESSAGES


def test_a_graph_without_such_files_names_none(tiny_bundle: Path) -> None:
    assert external_files(tiny_bundle / ENCODER) == set()


def test_the_last_of_two_values_is_found_as_well(tmp_path: Path) -> None:
    tensor = external("w.bin")
    field = b"\x12\x06../out"  # the field `value`, once more: a reader takes the last one
    entry = tensor.external_data[0].SerializeToString() + field
    content = in_initializer(tensor).SerializeToString()
    old = tensor.external_data[0].SerializeToString()
    raw = b"\x6a" + bytes([len(entry)]) + entry
    model = TensorProto(name="w", data_type=1, dims=[4], data_location=1).SerializeToString() + raw
    assert TensorProto.FromString(model).external_data[0].value == "../out"
    graph = b"\x2a" + bytes([len(model)]) + model
    path = tmp_path / "g.onnx"
    path.write_bytes(b"\x3a" + bytes([len(graph)]) + graph)
    assert external_files(path) == {"w.bin", "../out"}
    assert old in content


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "empty"),
        (b"not a graph", "damaged"),
        (b"\x3a\x7f", "cut off"),
        (b"\x3a", "cut off"),
        (b"\x08" + b"\x80" * 11, "damaged"),
        (b"\x0b\x0c", "damaged"),
        (b"\x00\x00", "damaged"),
        (b"\xba\x80\x80\x80\x80\x01\x00", "damaged"),
    ],
    ids=repr,
)
def test_what_is_no_graph_is_refused(tmp_path: Path, content: bytes, reason: str) -> None:
    (tmp_path / "g.onnx").write_bytes(content)
    with pytest.raises(ValueError, match=rf"no ONNX graph \(.*{reason}"):
        external_files(tmp_path / "g.onnx")


def test_a_graph_of_endless_parts_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vsc_serve.external_data._MAX_FIELDS", 1000)
    (tmp_path / "g.onnx").write_bytes(b"\x08\x01" * 1001)
    with pytest.raises(ValueError, match="too many parts"):
        external_files(tmp_path / "g.onnx")


def test_a_graph_that_is_nested_without_end_is_refused(tmp_path: Path) -> None:
    content = b"\x0a\x08location"  # the key of an entry
    for depth in range(20_001):  # a graph in an attribute of a node of a graph
        tag = (b"\x32", b"\x2a", b"\x0a")[depth % 3]
        content = tag + varint(len(content)) + content
    (tmp_path / "g.onnx").write_bytes(b"\x3a" + varint(len(content)) + content)
    with pytest.raises(ValueError, match="too many parts"):
        external_files(tmp_path / "g.onnx")


def varint(number: int) -> bytes:
    """Write a number as protobuf does."""
    parts = []
    while number > 0x7F:
        parts.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*parts, number])


LOCATIONS = ["../secret.bin", "{folder}/secret.bin", "link.bin", "pipe.bin", "gone.bin", ""]
LOCATIONS += ["*/_ORT_MEM_ADDR_/*", "a/../../secret.bin"]


@pytest.mark.timeout(30)
@pytest.mark.parametrize("place", [in_initializer, in_attribute])
@pytest.mark.parametrize("location", LOCATIONS)
def test_a_graph_with_weights_elsewhere_is_not_loaded(
    tmp_path: Path, place: Place, location: str
) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (tmp_path / "secret.bin").write_bytes(np.ones(4, np.float32).tobytes())
    (folder / "link.bin").symlink_to("../secret.bin")
    os.mkfifo(folder / "pipe.bin")
    path = saved(folder / "g.onnx", place(external(location.format(folder=tmp_path))))
    with pytest.raises(BundleError, match=r"g.onnx: cannot be loaded \(.*Export again"):
        open_session(path, device="cpu")


def test_a_location_without_a_value_is_an_empty_one_and_refused(tmp_path: Path) -> None:
    tensor = external("w.bin")
    tensor.external_data[0].ClearField("value")
    path = saved(tmp_path / "g.onnx", in_initializer(tensor))
    assert external_files(path) == {""}
    with pytest.raises(ValueError, match="takes weights from ''"):
        check_external_files(path)


@pytest.mark.parametrize("place", [in_initializer, in_attribute])
def test_a_graph_with_weights_beside_it_is_loaded(tmp_path: Path, place: Place) -> None:
    (tmp_path / "w.bin").write_bytes(np.full(4, 2, np.float32).tobytes())
    path = saved(tmp_path / "g.onnx", place(external("w.bin")))
    assert check_external_files(path) == {"w.bin"}
    (found,) = open_session(path, device="cpu").run(["y"], {"x": np.ones(4, np.float32)})
    assert found.tolist() == [3, 3, 3, 3]


def test_a_bundle_takes_no_weights_from_a_file_without_a_digest(tiny_bundle: Path) -> None:
    (tiny_bundle / "extra.bin").write_bytes(np.ones(4, np.float32).tobytes())
    saved(tiny_bundle / ENCODER, in_initializer(external("extra.bin")))
    text = (tiny_bundle / MANIFEST).read_text(encoding="utf-8")
    manifest = Manifest.from_json(text, tiny_bundle)
    files = manifest.files | {ENCODER: sha256(tiny_bundle / ENCODER)}
    text = text.replace(manifest.files[ENCODER], files[ENCODER])
    (tiny_bundle / MANIFEST).write_text(text, encoding="utf-8")
    with pytest.raises(
        BundleError, match=r'encoder.onnx: takes weights from "extra.bin", which is not listed'
    ):
        open_bundle(tiny_bundle)


def test_a_bundle_in_a_hub_cache_opens(tiny_bundle: Path, tmp_path: Path) -> None:
    root = tmp_path / "models--a--b"
    snapshot = root / "snapshots" / "rev"
    snapshot.mkdir(parents=True)
    (root / "blobs").mkdir()
    for number, path in enumerate(sorted(tiny_bundle.iterdir())):
        shutil.copy(path, root / "blobs" / str(number))
        (snapshot / path.name).symlink_to(f"../../blobs/{number}")
    assert open_bundle(snapshot).manifest == open_bundle(tiny_bundle).manifest
    open_session(snapshot / ENCODER, device="cpu")
