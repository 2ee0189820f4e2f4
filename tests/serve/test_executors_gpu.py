"""Models that take pixels from reading processes, as they do on GPUs; here they run on the CPU."""

import gc
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from PIL import Image

from vsc_export.compaction import csr_graph
from vsc_serve import encoder as encoder_module
from vsc_serve.bundle import ENCODER, ENCODER_CSR, Bundle, Manifest, open_bundle, sha256
from vsc_serve.compaction import COMPACT
from vsc_serve.cuda import PinnedArray, cuda_count, provider_options
from vsc_serve.encoder import Encoder
from vsc_serve.errors import BundleError, InputError
from vsc_serve.executors import ExecutorOptions, choose, gpu, open_executor
from vsc_serve.executors.gpu import GpuExecutor, encode_on, read_spec
from vsc_serve.executors.processes import ProcessExecutor
from vsc_serve.executors.task import Encode
from vsc_serve.models import builtin_model
from vsc_serve.options import PLAIN, EncodeOptions
from vsc_serve.pipeline import batches, stream
from vsc_serve.session import BoundSession, Session, SessionPool, open_graph, open_session
from vsc_serve.sources import Source, find_sources


@pytest.fixture
def images(images: Path) -> Path:
    """Forty grey 4x4 images, one of them broken."""
    (images / "17.png").write_bytes(b"no image")
    return images


def found(folder: Path, times: int = 1) -> list[Source]:
    return list(find_sources([str(folder)])) * times


def bound(bundle: Path, name: str = ENCODER, batch_size: int = 256) -> BoundSession:
    return BoundSession(open_session(bundle / name, device="cpu", threads=1), batch_size)


def pool_of(bundle: Path, encoders: list[list[Encode]], workers: int = 2) -> GpuExecutor:
    spec = read_spec(open_bundle(bundle).manifest, sum(map(len, encoders)))
    return GpuExecutor(spec, ProcessExecutor(spec, workers), encoders, {})


def dense(bundle: Path) -> Encode:
    encoder = Encoder(bound(bundle), open_bundle(bundle).manifest)
    return encode_on(encoder, PLAIN)


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 7, None])
def test_the_rows_are_those_of_a_model_alone(
    tiny_bundle: Path, images: Path, size: int | None
) -> None:
    sources = found(images, 4)
    with pool_of(
        tiny_bundle, [[dense(tiny_bundle), dense(tiny_bundle)], [dense(tiny_bundle)]]
    ) as pool:
        results = list(batches(pool, iter(sources), size))
        assert all(busy > 0 for busy in pool.busy_s[: len(results)])
    ids = [name for batch in results for name in batch.ids]
    assert ids == [source.id for source in sources if source.id != "17.png"]
    assert [name for batch in results for name, _ in batch.rejected] == ["17.png"] * 4
    expected = Encoder.open(tiny_bundle, device="cpu").encode([images / name for name in ids])
    codes = np.concatenate([batch.rows.codes.toarray() for batch in results])
    assert codes.tobytes() == expected.toarray().tobytes()


@pytest.mark.slow
def test_readers_wait_while_the_models_are_busy(tiny_bundle: Path, images: Path) -> None:
    taken = 0

    def endless() -> Iterator[Source]:
        nonlocal taken
        for source in found(images, 100):
            taken += 1
            yield source

    with pool_of(tiny_bundle, [[dense(tiny_bundle)]], workers=1) as pool:
        results = batches(pool, endless(), 2)
        for _ in range(20):
            next(results)
        assert taken <= 2 * (20 + 4 + 3 + 1)


@pytest.mark.slow
def test_a_row_that_the_model_fails_on_is_left_out_alone(tiny_bundle: Path, images: Path) -> None:
    marked = np.asarray(Image.open(images / "03.png"))
    inner = dense(tiny_bundle)

    def failing(pixels: NDArray[np.uint8]) -> Any:
        if any((row[..., 0] == marked).all() for row in pixels):
            raise InputError("row 0: gives values that are not finite", row=0)
        return inner(pixels)

    with pool_of(tiny_bundle, [[failing]]) as pool:
        results = list(batches(pool, iter(found(images)), None))
    bad = [one for batch in results for one in batch.rejected]
    assert bad[0] == ("03.png", "gives values that are not finite")
    assert sum(len(batch.ids) for batch in results) == 38


@pytest.fixture
def compact(tiny_bundle: Path) -> Encoder:
    proto = csr_graph(onnx.load(tiny_bundle / ENCODER))
    onnx.save(proto, tiny_bundle / ENCODER_CSR)
    manifest: Manifest = open_bundle(tiny_bundle).manifest
    return Encoder(bound(tiny_bundle, ENCODER_CSR), manifest, COMPACT)


@pytest.mark.parametrize(
    ("options", "graph"),
    [
        ({"tau": 0.2}, ENCODER_CSR),
        ({"view": "query"}, ENCODER),
        ({"view": "query", "tau": 0.2}, ENCODER),
    ],
)
def test_queries_are_made_from_dense_outputs(
    compact: Encoder,
    tiny_bundle: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: dict[str, Any],
    graph: str,
) -> None:
    opened: list[str] = []

    def noting(bundle: Bundle, name: str, **others: Any) -> Session:
        opened.append(name)
        return open_graph(bundle, name, **others)

    monkeypatch.setattr(gpu, "open_graph", noting)
    chosen, files = EncodeOptions(**options), compact.manifest.files
    with_csr = files | {ENCODER_CSR: sha256(tiny_bundle / ENCODER_CSR)}
    bundle = Bundle(tiny_bundle, replace(compact.manifest, files=with_csr))
    ((encode, _),), provenance = gpu.open_encoders(bundle, chosen, "cpu", 1)
    assert opened == [graph]
    pixels = np.random.default_rng(0).integers(0, 256, (100, 4, 4, 1), np.uint8)
    expected = Encoder.open(tiny_bundle, device="cpu").encode_rows(pixels, chosen).codes
    np.testing.assert_array_equal(encode(pixels).rows.codes.toarray(), expected.toarray())
    assert provenance["view"] == chosen.view


@pytest.mark.parametrize("count", [0, 1, 255, 256, 257, 600])
def test_codes_compacted_by_the_graph_are_the_dense_ones(
    compact: Encoder, tiny_bundle: Path, count: int
) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (count, 4, 4, 1), np.uint8)
    options = EncodeOptions(tau=0.4)
    found = compact.encode_counted(pixels, options)
    expected = Encoder.open(tiny_bundle, device="cpu").encode_counted(pixels, options)
    assert found.rows.codes.shape == expected.rows.codes.shape
    for name in ("data", "indices", "indptr"):
        left, right = getattr(found.rows.codes, name), getattr(expected.rows.codes, name)
        np.testing.assert_array_equal(left, right)
    kept, judged = found.decisions.kept_energy, found.decisions.judged
    assert kept == pytest.approx(expected.decisions.kept_energy)
    assert (judged, expected.decisions.judged) == (0, count)


def test_a_bound_session_gives_what_a_plain_one_gives(tiny_bundle: Path) -> None:
    plain = open_session(tiny_bundle / ENCODER, device="cpu", threads=1)
    session = bound(tiny_bundle, batch_size=16)
    assert session.engine == plain.engine
    rng = np.random.default_rng(0)
    for count in (16, 3, 1, 9):
        feeds = {
            "image": rng.integers(0, 256, (count, 4, 4, 1), np.uint8),
            "tau_logit": np.array(0.1, np.float32),
        }
        for left, right in zip(
            session.run(["code", "mu"], feeds), plain.run(["code", "mu"], feeds), strict=True
        ):
            np.testing.assert_array_equal(left[:count], right)


def test_a_bound_session_takes_another_threshold_than_the_graphs_own() -> None:
    bundle = open_bundle(builtin_model())
    plain = open_session(bundle.path / ENCODER, device="cpu", threads=1)
    images = np.random.default_rng(0).integers(0, 256, (5, 32, 32, 3), np.uint8)
    for tau_logit in (-2.0, 0.0, 2.0):
        feeds = {"image": images, "tau_logit": np.array(tau_logit, np.float32)}
        (found,) = BoundSession(plain, 8).run(["code"], feeds)
        np.testing.assert_array_equal(found[:5], plain.run(["code"], feeds)[0])


def test_a_batch_takes_the_smallest_size_that_holds_it(tiny_bundle: Path) -> None:
    plain = open_session(tiny_bundle / ENCODER, device="cpu", threads=1)
    session = BoundSession(plain, 16, 4, 1)
    rng = np.random.default_rng(0)
    for count, size in ((1, 1), (2, 4), (4, 4), (5, 16), (16, 16), (3, 4)):
        images = rng.integers(0, 256, (count, 4, 4, 1), np.uint8)
        feeds = {"image": images, "tau_logit": np.array(0.1, np.float32)}
        (found,) = session.run(["code"], feeds)
        assert len(found) == size
        np.testing.assert_array_equal(found[:count], plain.run(["code"], feeds)[0])


def test_threads_share_the_sessions_of_a_pool(tiny_bundle: Path) -> None:
    plain = open_session(tiny_bundle / ENCODER, device="cpu", threads=1)
    pool = SessionPool(plain, 16, 4, lanes=2)
    assert pool.engine == plain.engine
    rng = np.random.default_rng(0)
    inputs = [rng.integers(0, 256, (1 + turn % 9, 4, 4, 1), np.uint8) for turn in range(60)]

    def encode(images: NDArray[np.uint8]) -> Any:
        feeds = {"image": images, "tau_logit": np.array(0.1, np.float32)}
        return pool.run(["code"], feeds)[0][: len(images)], plain.run(["code"], feeds)[0]

    with ThreadPoolExecutor(8) as threads:
        for found_codes, expected in threads.map(encode, inputs):
            np.testing.assert_array_equal(found_codes, expected)
    with pytest.raises(Exception, match="nothing"):
        pool.run(["nothing"], {"image": inputs[0]})
    for _ in range(4):  # a failure does not keep its lane
        encode(inputs[0])


@pytest.mark.parametrize(
    ("usable", "asked", "readers"), [(16, None, 14), (2, None, 1), (1, None, 1), (16, 16, 16)]
)
def test_readers_leave_processors_to_what_feeds_the_gpu(
    tiny_bundle: Path,
    monkeypatch: pytest.MonkeyPatch,
    usable: int,
    asked: int | None,
    readers: int,
) -> None:
    def on_cpu(*_: Any) -> tuple[list[list[Encode]], dict[str, Any]]:
        return [[dense(tiny_bundle)]], {}

    monkeypatch.setattr(choose, "open_encoders", on_cpu)
    monkeypatch.setattr(choose, "usable_cpus", lambda: usable)
    how = ExecutorOptions(device="cuda", workers=asked)
    assert open_executor(open_bundle(tiny_bundle), how=how).workers == readers


def test_pinned_memory_without_cuda_is_ordinary_memory() -> None:
    pinned = PinnedArray((3, 4), np.uint8)
    assert pinned.array.shape == (3, 4)
    assert not pinned.array.any()
    if not cuda_count():
        assert not pinned.is_pinned


def test_pinned_memory_is_portable_and_is_unpinned_when_nobody_holds_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls: list[tuple[str, int]] = []

    class Runtime:
        def cudaHostRegister(self, address: Any, size: Any, flags: Any) -> int:
            calls.append(("register", flags.value))
            return 0

        def cudaHostUnregister(self, address: Any) -> int:
            calls.append(("unregister", 0))
            return 0

    monkeypatch.setattr("vsc_serve.cuda._runtime", Runtime)
    pinned = PinnedArray((3,), np.uint8)
    assert pinned.is_pinned
    del pinned
    gc.collect()
    assert calls == [("register", 1), ("unregister", 0)]


def test_kernels_are_not_chosen_by_timing_and_round_to_float32() -> None:
    options = provider_options(1, allows_tf32=False)
    assert (options["device_id"], options["use_tf32"]) == ("1", "0")
    assert options["cudnn_conv_algo_search"] == "HEURISTIC"
    assert provider_options(0, allows_tf32=True)["use_tf32"] == "1"


def test_auto_falls_back_to_the_cpu_when_a_gpu_gives_other_codes(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    real = encoder_module.open_graph

    def open_graph(bundle: Any, name: str, *, device: str, **options: Any) -> Any:
        session = real(bundle, name, device="cpu", **options)
        return session if device == "cpu" else Rounded(session)

    monkeypatch.setattr(encoder_module, "open_graph", open_graph)
    encoder = Encoder.open(tiny_bundle, device="auto")
    assert encoder.engine.endswith("cpu")
    assert "using the CPU: " in caplog.text
    assert "gives another code than at export" in caplog.text
    with pytest.raises(BundleError, match="gives another code than at export"):
        Encoder.open(tiny_bundle, device="cuda")


class Rounded:
    """A session that computes as TF32 does: off by more than the probes allow."""

    engine = "onnxruntime 9.9 cuda"

    def __init__(self, session: Any) -> None:
        self._session = session

    def run_bound(self, outputs: Any, feeds: Any) -> Any:
        return [value * np.float32(1.003) for value in self._session.run(outputs, feeds)]


@pytest.mark.gpu
def test_every_gpu_gives_the_codes_of_the_cpu(tiny_bundle: Path, images: Path) -> None:
    results = list(stream(tiny_bundle, [images], device="cuda", batch_size=7))
    ids = [name for batch in results for name in batch.ids]
    assert ids == [source.id for source in found(images) if source.id != "17.png"]
    expected = Encoder.open(tiny_bundle, device="cpu").encode([images / name for name in ids])
    codes = np.concatenate([batch.rows.codes.toarray() for batch in results])
    np.testing.assert_allclose(codes, expected.toarray(), atol=1e-4)
