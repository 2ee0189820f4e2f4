"""The device that was asked for, or a reason why not."""

import ctypes
import logging
import subprocess
import sys
from importlib.metadata import PackageNotFoundError
from types import SimpleNamespace

import numpy as np
import pytest

from vsc_serve import session
from vsc_serve.bundle import ENCODER
from vsc_serve.errors import BundleError, DeviceError
from vsc_serve.session import CPU_PROVIDER, CUDA_PROVIDER, cuda_is_there, open_session


class FakeOnnxruntime(SimpleNamespace):
    """Stands in for onnxruntime on a machine whose CUDA works, is broken, or was never built in."""

    __version__ = "9.9"

    def __init__(self, *, available=(CUDA_PROVIDER, CPU_PROVIDER), on_cuda=None):
        super().__init__(opened=[], preloaded=False)
        self._available = list(available)
        self._on_cuda = on_cuda

    def get_available_providers(self):
        return self._available

    def preload_dlls(self):
        self.preloaded = True

    def SessionOptions(self):
        return SimpleNamespace()

    def InferenceSession(self, path, options, *, providers, enable_fallback):
        assert enable_fallback == 0
        providers = [one if isinstance(one, str) else one[0] for one in providers]
        self.opened.append((providers, options.intra_op_num_threads))
        if self._on_cuda and CUDA_PROVIDER in providers:
            providers = self._on_cuda(providers)
        return SimpleNamespace(get_providers=lambda: providers)


def fail_on_cuda(_providers):
    raise RuntimeError("CUDA failure 100: no CUDA-capable device is detected\nmore")


def lose_cuda(_providers):
    return [CPU_PROVIDER]


@pytest.fixture
def install(monkeypatch):
    """Put a fake onnxruntime in place, on a machine with (or without) an NVIDIA driver."""

    def put(fake, *, has_driver=True):
        monkeypatch.setitem(sys.modules, "onnxruntime", fake)
        monkeypatch.setattr(session, "installed_flavours", lambda: {"onnxruntime-gpu": "9.9"})
        driver = (lambda name: SimpleNamespace()) if has_driver else ctypes.CDLL
        monkeypatch.setattr(ctypes, "CDLL", driver)
        return fake

    return put


def test_a_graph_runs_on_the_cpu_and_says_what_computed_it(tiny_bundle):
    opened = open_session(tiny_bundle / ENCODER, device="cpu", threads=1)
    assert opened.engine.startswith("onnxruntime ")
    assert opened.engine.endswith(" cpu")
    feeds = {"image": np.zeros((2, 4, 4, 1), np.uint8), "tau_logit": np.array(np.float32(0))}
    code, mu = opened.run(["code", "mu"], feeds)
    assert code.shape == (2, 6)
    np.testing.assert_array_equal(code, np.where(mu > 0, mu, 0))


def test_a_file_that_is_no_graph_is_a_bundle_error_and_stdout_stays_clean(tiny_bundle, capfd):
    path = tiny_bundle / ENCODER
    whole = path.read_bytes()
    for content in (whole[: len(whole) // 2], b"", b"not a graph"):
        path.write_bytes(content)
        with pytest.raises(
            BundleError, match=r"encoder.onnx: cannot be loaded \(no ONNX graph .*Exp"
        ):
            open_session(path, device="cpu")
    path.unlink()
    with pytest.raises(BundleError, match=r"encoder.onnx: cannot be loaded \(.*No such file"):
        open_session(path, device="cpu")
    assert capfd.readouterr().out == ""


@pytest.mark.gpu
def test_cuda_computes_what_the_cpu_computes(tiny_bundle):
    on_cuda = open_session(tiny_bundle / ENCODER, device="cuda")
    on_cpu = open_session(tiny_bundle / ENCODER, device="cpu")
    assert on_cuda.engine.endswith(" cuda")
    pixels = np.random.default_rng(0).integers(0, 256, (9, 4, 4, 1), dtype=np.uint8)
    feeds = {"image": pixels, "tau_logit": np.array(np.float32(0))}
    (found,), (expected,) = on_cuda.run(["mu"], feeds), on_cpu.run(["mu"], feeds)
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_cuda_asked_for_and_not_there_stops_with_the_remedy(tiny_bundle):
    if cuda_is_there():
        pytest.skip("this machine has CUDA")
    with pytest.raises(
        DeviceError, match=r"^`device=.cuda.`: .*Run: .*'vsc-serve\[gpu\]'.*`device="
    ):
        open_session(tiny_bundle / ENCODER, device="cuda")


def test_an_onnxruntime_without_cuda_is_told_from_a_cuda_that_does_not_load(tiny_bundle, install):
    install(FakeOnnxruntime(available=[CPU_PROVIDER]))
    with pytest.raises(DeviceError, match=r"the installed onnxruntime has no CUDA\. Run: pip un"):
        open_session(tiny_bundle / ENCODER, device="cuda")
    install(FakeOnnxruntime(on_cuda=lose_cuda))
    with pytest.raises(DeviceError, match=r"its libraries did not load \(CUDA 13, cuDNN 9 and"):
        open_session(tiny_bundle / ENCODER, device="cuda")
    install(FakeOnnxruntime(on_cuda=fail_on_cuda))
    with pytest.raises(
        DeviceError, match=r"no CUDA-capable device is detected \(CUDA 13"
    ) as caught:
        open_session(tiny_bundle / ENCODER, device="cuda")
    assert "\n" not in str(caught.value)


def test_a_broken_graph_is_not_blamed_on_cuda(tiny_bundle, install, monkeypatch):
    install(FakeOnnxruntime())

    def refuse(*_args):
        raise RuntimeError("bad protobuf")

    monkeypatch.setattr(session, "_load", refuse)
    for device in ("cuda", "auto", "cpu"):
        with pytest.raises(BundleError, match=r"cannot load it \(bad protobuf\)"):
            open_session(tiny_bundle / ENCODER, device=device)


def test_auto_takes_cuda_where_it_works(tiny_bundle, install):
    fake = install(FakeOnnxruntime())
    assert open_session(tiny_bundle / ENCODER, threads=3).engine == "onnxruntime 9.9 cuda"
    assert fake.preloaded
    assert fake.opened == [([CUDA_PROVIDER, CPU_PROVIDER], 3)]


@pytest.mark.parametrize("on_cuda", [fail_on_cuda, lose_cuda])
def test_auto_goes_on_with_the_cpu_and_says_so(tiny_bundle, install, caplog, on_cuda):
    install(FakeOnnxruntime(on_cuda=on_cuda))
    with caplog.at_level(logging.WARNING):
        assert open_session(tiny_bundle / ENCODER).engine == "onnxruntime 9.9 cpu"
    assert [record.getMessage()[:15] for record in caplog.records] == ["using the CPU: "]


def test_auto_does_not_try_cuda_without_a_driver(tiny_bundle, install, caplog, monkeypatch):
    fake = install(FakeOnnxruntime(), has_driver=False)

    def no_driver(name):
        raise OSError(name)

    monkeypatch.setattr(ctypes, "CDLL", no_driver)
    assert open_session(tiny_bundle / ENCODER).engine == "onnxruntime 9.9 cpu"
    assert [providers for providers, _ in fake.opened] == [[CPU_PROVIDER]]
    assert not caplog.records


def test_both_flavours_installed_is_an_error_that_says_what_to_remove(tiny_bundle, monkeypatch):
    monkeypatch.setattr(session, "version", lambda name: "1.31.1")
    with pytest.raises(DeviceError, match=r"both installed .* pip uninstall -y onnxruntime onnxru"):
        open_session(tiny_bundle / ENCODER)


def test_no_onnxruntime_is_an_error_with_the_install_command(tiny_bundle, monkeypatch):
    def not_found(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr(session, "version", not_found)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(DeviceError, match=r"not installed. Run: pip install 'vsc-serve\[cpu\]'"):
        open_session(tiny_bundle / ENCODER)


def test_onnxruntime_is_told_not_to_report_its_use() -> None:
    code = (
        "import os; os.environ.pop('ORT_DISABLE_TELEMETRY', None);"
        "from vsc_serve.session import cuda_is_there; cuda_is_there();"
        "print(os.environ['ORT_DISABLE_TELEMETRY'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "1"
