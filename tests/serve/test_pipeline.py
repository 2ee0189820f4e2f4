"""From sources to codes: rows and ids stay together whatever files and workers are like."""

import importlib
import json
import re
import sys
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from PIL import Image

from vsc_serve.bundle import open_bundle
from vsc_serve.codes import read_codes
from vsc_serve.encoder import Encoder
from vsc_serve.errors import (
    BundleError,
    InputError,
    Interrupted,
    SourceUnavailable,
    UsageError,
)
from vsc_serve.executors import (
    ChunkResult,
    ChunkSize,
    ExecutorOptions,
    ReadOptions,
    StageSeconds,
    ThreadExecutor,
    open_executor,
)
from vsc_serve.executors.processes import ProcessExecutor
from vsc_serve.executors.read import EncodeSpec, EncodeWorker
from vsc_serve.executors.task import Task
from vsc_serve.executors.worker_process import PathTask, _pack
from vsc_serve.options import PLAIN, EncodeOptions
from vsc_serve.pipeline import Batch, Job, batches, run_job, stream
from vsc_serve.pipeline.shards import ShardStore
from vsc_serve.sources import FileSource, Source, find_sources
from vsc_serve.sources.roots import find_root

HOSTILE = '''
import os, signal, time
from dataclasses import dataclass

@dataclass(frozen=True)
class Killer:
    id: str
    def read(self):
        os.kill(os.getpid(), signal.SIGKILL)

@dataclass(frozen=True)
class Sleeper:
    id: str
    def read(self):
        time.sleep(600)

@dataclass(frozen=True)
class OnceKiller:
    """Brings its worker down the first time only, as when memory was short."""
    id: str
    mark: str
    path: str
    def read(self):
        if not os.path.exists(self.mark):
            open(self.mark, "w").close()
            os.kill(os.getpid(), signal.SIGKILL)
        with open(self.path, "rb") as file:
            return file.read()

@dataclass(frozen=True)
class TwiceKiller:
    """Brings two workers down, as when a machine is short of memory for a while."""
    id: str
    marks: str
    path: str
    def read(self):
        if len(os.listdir(self.marks)) < 2:
            open(os.path.join(self.marks, str(os.getpid())), "w").close()
            os.kill(os.getpid(), signal.SIGKILL)
        with open(self.path, "rb") as file:
            return file.read()

@dataclass(frozen=True)
class Exhausted:
    id: str
    def read(self):
        raise OSError(24, "Too many open files")

@dataclass(frozen=True)
class Gone:
    id: str
    def read(self):
        from vsc_serve.errors import SourceUnavailable
        raise SourceUnavailable(f"{self.id}: Stale file handle.")
'''


@pytest.fixture
def hostile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Sources that bring workers down, in a module that workers can import."""
    folder = tmp_path / "modules"
    folder.mkdir()
    name = f"hostile_{tmp_path.name.replace('-', '_')}"
    (folder / f"{name}.py").write_text(HOSTILE)
    monkeypatch.syspath_prepend(folder)
    return importlib.import_module(name)


def found(folder: Path) -> list[Source]:
    return list(find_sources([str(folder)]))


def threads(encoder: Encoder, workers: int = 2, options: EncodeOptions = PLAIN) -> ThreadExecutor:
    return ThreadExecutor(EncodeWorker(encoder, options, ReadOptions()), workers)


def processes(bundle: Path, workers: int = 2, **limits: Any) -> ProcessExecutor:
    latent_dim = open_bundle(bundle).manifest.latent_dim
    spec = EncodeSpec(model=bundle, options=PLAIN, latent_dim=latent_dim)
    return ProcessExecutor(spec, workers, **limits)


def collect(results: Iterator[Batch]) -> tuple[list[str], bytes, list[tuple[str, str]]]:
    """Ids, all codes as bytes, and what has no row."""
    ids, codes, bad = [], b"", []
    for batch in results:
        assert len(batch.ids) == batch.rows.codes.shape[0]
        ids += batch.ids
        codes += batch.rows.codes.toarray().tobytes()
        bad += batch.rejected
    return ids, codes, bad


def run_in_threads(encoder: Encoder, sources: Iterator[Source], out: Path, **fields: Any) -> Any:
    with threads(encoder, 1) as pool, ShardStore(out).locked():
        return run_job(job(out, **fields), pool, sources, encoder.manifest.latent_dim)


def job(out: Path, **fields: Any) -> Job:
    return Job(inputs=["images"], out=out, model=Path("model"), **fields)


def errors_path(out: Path) -> Path:
    return job(out).errors_path


def test_ten_broken_files_among_a_thousand_shift_no_row(
    fake_encoder: Encoder, tmp_path: Path
) -> None:
    rng = np.random.default_rng(0)
    folder = tmp_path / "images"
    folder.mkdir()
    images = rng.integers(0, 256, (1000, 8, 8), dtype=np.uint8)
    broken = set(range(7, 1000, 100))
    for number, pixels in enumerate(images):
        path = folder / f"{number:04}.png"
        Image.fromarray(pixels).save(path)
        if number in broken:
            path.write_bytes(path.read_bytes()[: 40 if number % 200 else 0])
    out = tmp_path / "codes.npz"
    outcome = run_in_threads(fake_encoder, iter(found(folder)), out, shard_rows=300)
    stored = read_codes(out)
    assert len(stored.ids) == stored.codes.shape[0] == outcome.statistics.images == 990
    listed = [json.loads(line) for line in errors_path(out).read_text().splitlines()]
    assert [one["id"] for one in listed] == [f"{number:04}.png" for number in sorted(broken)]
    numbers = [int(identity.split(".")[0]) for identity in stored.ids]
    assert numbers == sorted(set(range(1000)) - broken)
    expected = fake_encoder.encode(images[numbers][..., None])
    assert stored.codes.toarray().tobytes() == expected.toarray().tobytes()


@pytest.mark.slow
def test_processes_threads_and_any_chunk_give_the_same_rows(
    tiny_bundle: Path, images: Path
) -> None:
    (images / "05.png").write_bytes(b"no image")
    encoder = Encoder.open(tiny_bundle, device="cpu")
    kept = [source for source in found(images) if source.id != "05.png"]
    pixels = np.stack([np.asarray(Image.open(images / one.id))[..., None] for one in kept])
    codes = encoder.encode(pixels).toarray().tobytes()
    expected = ([one.id for one in kept], codes)
    for pool, size in [
        (threads(encoder, 1), None),
        (threads(encoder, 3), 1),
        (processes(tiny_bundle, 1), 7),
        (processes(tiny_bundle, 2), 3),
    ]:
        with pool:
            ids, codes, bad = collect(batches(pool, iter(found(images)), size))
        assert (ids, codes) == expected
        assert [name for name, _ in bad] == ["05.png"]


@pytest.mark.slow
def test_a_program_gets_the_codes_of_a_folder_as_a_stream(tiny_bundle: Path, images: Path) -> None:
    ids, codes, bad = collect(stream(tiny_bundle, [images], device="cpu", exclude=["1*"]))
    assert ids == [f"{number:02}.png" for number in range(40) if number // 10 != 1]
    expected = Encoder.open(tiny_bundle, device="cpu").encode([images / name for name in ids])
    assert codes == expected.toarray().tobytes()
    assert not bad


@pytest.mark.slow
def test_workers_start_together_when_there_is_work_for_them(tiny_bundle: Path) -> None:
    with processes(tiny_bundle, 3) as pool:
        assert pool.started == 1
        pool.expect(16)
        assert pool.started == 1
        pool.expect(17)
        assert pool.started == 2
        pool.expect(1000)
        assert pool.started == 3
        pool.provenance()


@pytest.mark.slow
def test_a_stream_gives_the_same_in_threads_and_in_processes(
    tiny_bundle: Path, images: Path
) -> None:
    options = EncodeOptions(tau=0.3)
    given = collect(stream(tiny_bundle, [images], options, exclude=["1*"], workers=0))
    assert given == collect(stream(tiny_bundle, [images], options, exclude=["1*"], device="cpu"))
    assert given[0]


def test_a_stream_says_what_is_wrong_with_its_first_batch(
    tiny_bundle: Path, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match="no such file or folder"):
        next(stream(tiny_bundle, [tmp_path / "none"], device="cpu", workers=0))


@pytest.mark.slow
def test_a_worker_that_is_killed_costs_the_image_at_fault_and_nothing_else(
    tiny_bundle: Path, images: Path, hostile: ModuleType
) -> None:
    sources = found(images)
    with processes(tiny_bundle) as pool:
        undisturbed = collect(batches(pool, iter(sources), 4))
        sources.insert(9, hostile.Killer("killer.png"))
        ids, codes, bad = collect(batches(pool, iter(sources), 4))
    assert (ids, codes) == undisturbed[:2]
    assert bad == [("killer.png", "crashes its reader (SIGKILL: out of memory?)")]


@pytest.mark.slow
def test_a_worker_that_dies_for_another_reason_costs_nothing(
    tiny_bundle: Path, images: Path, hostile: ModuleType, tmp_path: Path
) -> None:
    sources = found(images)[:6]
    path = str(images / "39.png")
    sources.insert(2, hostile.OnceKiller("again.png", str(tmp_path / "mark"), path))
    with processes(tiny_bundle, 1) as pool:
        ids, _, bad = collect(batches(pool, iter(sources), 7))
    assert ids == [source.id for source in sources]
    assert not bad


@pytest.mark.slow
def test_an_image_that_was_alone_when_its_worker_was_killed_is_tried_once_more(
    tiny_bundle: Path, images: Path, hostile: ModuleType, tmp_path: Path
) -> None:
    (tmp_path / "marks").mkdir()
    sources = found(images)[:4]
    path = str(images / "39.png")
    sources.insert(2, hostile.TwiceKiller("again.png", str(tmp_path / "marks"), path))
    with processes(tiny_bundle, 1) as pool:
        ids, _, bad = collect(batches(pool, iter(sources), 5))
    assert len(list((tmp_path / "marks").iterdir())) == 2
    assert ids == [source.id for source in sources]
    assert not bad


@pytest.mark.slow
def test_a_worker_that_hangs_on_an_image_is_ended_and_the_image_left_out(
    tiny_bundle: Path, images: Path, hostile: ModuleType
) -> None:
    sources = found(images)[:5]
    sources.insert(3, hostile.Sleeper("endless.png"))
    with processes(tiny_bundle, 1, image_limit_s=0.3) as pool:
        ids, _, bad = collect(batches(pool, iter(sources), None))
    assert ids == [f"{number:02}.png" for number in range(5)]
    assert bad == [("endless.png", "crashes its reader (took over 0.3 s)")]


@pytest.mark.slow
def test_a_model_that_cannot_be_opened_is_the_callers_error(
    tiny_bundle: Path, images: Path
) -> None:
    pool = processes(tiny_bundle)
    (tiny_bundle / "encoder.onnx").write_bytes(b"changed")
    with pool, pytest.raises(BundleError, match=r"encoder\.onnx: changed since it was exported"):
        collect(batches(pool, iter(found(images)), None))


def test_a_machine_that_fails_ends_the_run_and_is_not_taken_for_a_bad_image(
    fake_encoder: Encoder, hostile: ModuleType
) -> None:
    with threads(fake_encoder) as pool, pytest.raises(SourceUnavailable, match="machine failed"):
        collect(batches(pool, iter([hostile.Exhausted("a.png")]), None))


def test_a_row_that_the_model_fails_on_is_left_out_alone(
    fake_encoder: Encoder, image_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sources = found(image_folder)
    marked = np.asarray(Image.open(image_folder / "03.png"))
    real = Encoder.encode_counted

    def encode_counted(self: Encoder, rows: Any, options: EncodeOptions = PLAIN) -> Any:
        for number, row in enumerate(rows):
            if (row[..., 0] == marked).all():
                raise InputError(f"row {number}: gives values that are not finite", row=number)
        return real(self, rows, options)

    monkeypatch.setattr(Encoder, "encode_counted", encode_counted)
    with threads(fake_encoder) as pool:
        ids, codes, bad = collect(batches(pool, iter(sources), 6))
    assert bad == [("03.png", "gives values that are not finite")]
    assert ids == [source.id for source in sources if source.id != "03.png"]
    assert len(codes) == 11 * 16 * 4


def test_sources_are_taken_only_a_little_ahead_of_the_codes(
    fake_encoder: Encoder, image_folder: Path
) -> None:
    taken = 0

    def endless() -> Iterator[Source]:
        nonlocal taken
        while True:
            taken += 1
            yield found(image_folder)[0]

    with threads(fake_encoder, 1) as pool:
        results = batches(pool, endless(), 1)
        next(results)
        assert taken <= 4
        next(results)
        assert taken <= 5


def test_an_interrupt_while_resuming_keeps_the_shards_of_the_run_before(
    fake_encoder: Encoder, image_folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "codes.npz"
    sources = found(image_folder)
    fields: dict[str, Any] = {"shard_rows": 3, "batch_size": 1}

    def stopped(place: int) -> Iterator[Source]:
        yield from sources[:place]
        raise KeyboardInterrupt

    for place in (9, 0, 2):
        with pytest.raises(Interrupted, match=r"6 images are done and kept in .*npz\.parts"):
            run_in_threads(fake_encoder, stopped(place), out, **fields)


def test_a_run_that_ends_before_its_first_shard_leaves_no_folder(
    fake_encoder: Encoder, tmp_path: Path
) -> None:
    def stopped() -> Iterator[Source]:
        raise KeyboardInterrupt
        yield

    with pytest.raises(Interrupted, match="nothing was written"):
        run_in_threads(fake_encoder, stopped(), tmp_path / "codes.npz")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_processes_take_only_a_few_chunks_ahead_too(tiny_bundle: Path, images: Path) -> None:
    taken = 0

    def endless() -> Iterator[Source]:
        nonlocal taken
        while True:
            taken += 1
            yield found(images)[0]

    with processes(tiny_bundle, 2) as pool:
        results = batches(pool, endless(), 1)
        for _ in range(50):
            next(results)
        assert taken <= 50 + 2 * 8


def test_an_interrupted_run_keeps_its_shards_and_goes_on_to_the_same_bytes(
    fake_encoder: Encoder, image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (image_folder / "04.png").write_bytes(b"")
    whole, out = tmp_path / "whole.npz", tmp_path / "codes.npz"
    run_in_threads(fake_encoder, iter(found(image_folder)), whole)

    def stopped() -> Iterator[Source]:
        for number, source in enumerate(found(image_folder)):
            if number == 9:
                raise KeyboardInterrupt
            yield source

    fields: dict[str, Any] = {"shard_rows": 3, "batch_size": 1}
    with pytest.raises(Interrupted, match=r"images are done and kept in .*codes\.npz\.parts"):
        run_in_threads(fake_encoder, stopped(), out, **fields)
    assert not out.exists()
    finished = len(list(ShardStore(out).folder.glob("part-*.json")))
    read: list[str] = []
    real = EncodeWorker._take
    monkeypatch.setattr(
        EncodeWorker,
        "_take",
        lambda self, reading, position, source: (
            read.append(source.id),
            real(self, reading, position, source),
        ),
    )
    outcome = run_in_threads(fake_encoder, iter(found(image_folder)), out, **fields)
    has_failed = finished > 1  # 04.png is in the second shard, and is tried again
    assert outcome.resumed == 3 * finished - has_failed > 0
    assert len(read) == 12 - 3 * finished + has_failed
    assert out.read_bytes() == whole.read_bytes()
    assert errors_path(out).read_bytes() == errors_path(whole).read_bytes()
    assert not ShardStore(out).folder.exists()


def test_a_shard_whose_files_have_changed_is_made_again(
    fake_encoder: Encoder, image_folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "codes.npz"

    def stopped() -> Iterator[Source]:
        yield from found(image_folder)[:10]
        raise KeyboardInterrupt

    fields: dict[str, Any] = {"shard_rows": 4, "batch_size": 1}
    with pytest.raises(Interrupted):
        run_in_threads(fake_encoder, stopped(), out, **fields)
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(image_folder / "01.png")
    outcome = run_in_threads(fake_encoder, iter(found(image_folder)), out, **fields)
    assert outcome.resumed == 0
    again = tmp_path / "again.npz"
    run_in_threads(fake_encoder, iter(found(image_folder)), again)
    assert out.read_bytes() == again.read_bytes()


def test_a_run_with_other_options_discards_the_shards_and_says_so(
    fake_encoder: Encoder, image_folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "codes.npz"

    def stopped() -> Iterator[Source]:
        yield from found(image_folder)[:10]
        raise KeyboardInterrupt

    with pytest.raises(Interrupted):
        run_in_threads(fake_encoder, stopped(), out, shard_rows=4, batch_size=1)
    said: list[str] = []
    again = job(out, shard_rows=4)
    options = EncodeOptions(tau=0.3)
    with threads(fake_encoder, 2, options) as pool, ShardStore(out).locked():
        outcome = run_job(
            again,
            pool,
            iter(found(image_folder)),
            16,
            say=lambda label, text: said.append(text),
        )
    assert outcome.resumed == 0
    assert len(said) == 1
    assert said[0].endswith("discarded: another meta")
    assert read_codes(out).meta["tau"] == 0.3


def test_no_readable_image_at_all_is_an_error_with_the_first_reason(
    fake_encoder: Encoder, tmp_path: Path
) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "a.jpg").write_bytes(b"")
    out = tmp_path / "codes.npz"
    with pytest.raises(InputError, match=r"none of 1 inputs can be read; .* a\.jpg: empty"):
        run_in_threads(fake_encoder, iter(found(folder)), out)
    assert errors_path(out).exists()
    assert not out.exists()


def test_the_example_is_a_row_with_active_latents(
    fake_encoder: Encoder, image_folder: Path, tmp_path: Path
) -> None:
    for name, size in (("00.png", 8), ("0 1.png", 8)):
        Image.fromarray(np.full((size, size), 128, np.uint8)).save(image_folder / name)
    out = tmp_path / "codes.npz"
    outcome = run_in_threads(fake_encoder, iter(found(image_folder)), out)
    codes, ids, *_ = read_codes(out)
    assert codes[[0]].nnz == codes[[1]].nnz == 0
    assert outcome.example == ids[int(np.flatnonzero(np.diff(codes.indptr))[0])]


def test_the_codes_of_a_link_are_written_where_it_leads_to(
    fake_encoder: Encoder, image_folder: Path, tmp_path: Path
) -> None:
    other = tmp_path / "another disk"
    other.mkdir()
    for name in ("codes.npz", "codes"):
        (tmp_path / name).symlink_to(other / name)
        store = ShardStore(tmp_path / name)
        assert store.folder == other / f"{name}.parts"
        run_in_threads(fake_encoder, iter(found(image_folder)), tmp_path / name)
        assert (tmp_path / name).is_symlink()
        assert len(read_codes(other / name).ids) == 12


def test_a_task_travels_with_the_root_of_its_files(image_folder: Path) -> None:
    sources = found(image_folder)
    packed = _pack(Task(1, 2, sources))
    assert isinstance(packed, PathTask)
    root = packed.unpack().sources[0].root  # type: ignore[attr-defined]  # files have one
    assert root == find_root(f"{image_folder}/")
    others = [FileSource("a", "a", find_root(str(image_folder.parent)))]
    assert isinstance(_pack(Task(1, 2, [*sources, *others])), Task)


def test_the_list_of_an_earlier_run_is_removed_when_every_file_can_be_read(
    fake_encoder: Encoder, image_folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "codes.npz"
    errors_path(out).write_text('{"id": "a", "reason": "b"}\n')
    run_in_threads(fake_encoder, iter(found(image_folder)), out)
    assert not errors_path(out).exists()


def test_on_error_fail_stops_at_the_first_bad_file_and_names_it(
    fake_encoder: Encoder, image_folder: Path, tmp_path: Path
) -> None:
    (image_folder / "07.png").write_bytes(b"text")
    out = tmp_path / "codes.npz"
    with pytest.raises(InputError, match=r"07\.png: not an image"):
        run_in_threads(fake_encoder, iter(found(image_folder)), out, on_error="fail")
    assert not out.exists()


def test_progress_counts_every_file(fake_encoder: Encoder, image_folder: Path) -> None:
    (image_folder / "zz.jpg").write_text("text")
    seen: list[int] = []

    class Report:
        def update(self, done: int, note: str = "") -> None:
            seen.append(done)

        def expect(self, total: int) -> None:
            raise AssertionError

    out = image_folder.parent / "codes.npz"
    with threads(fake_encoder) as pool, ShardStore(out).locked():
        run_job(job(out), pool, iter(found(image_folder)), 16, report=Report())
    assert seen[-1] == 13


def test_chunks_grow_with_the_speed_and_stay_within_bounds() -> None:
    def result(images: int, seconds: float) -> ChunkResult:
        spent = StageSeconds(decode=seconds)
        rows: Any = None
        return ChunkResult(rows=rows, signatures=[""] * images, seconds=spent)

    size = ChunkSize()
    assert size.value == 16
    size.learn(result(16, 16 * 20e-6))
    assert size.value == 1024
    size.learn(result(16, 16 * 1e-3))
    assert size.value == 64
    size.learn(result(16, 16 * 1.0))
    assert size.value == 8
    fixed = ChunkSize(5)
    fixed.learn(result(16, 16 * 20e-6))
    assert fixed.value == 5


def test_chunks_shrink_towards_the_end_so_that_no_worker_is_left_alone() -> None:
    size = ChunkSize(largest=256, workers=2)
    size.value = 256
    sources: list[Any] = list(range(4000))
    chunks = list(size.cut(iter(sources)))
    lengths = [len(chunk) for chunk in chunks]
    assert list(chain.from_iterable(chunks)) == sources
    assert lengths[:8] == [256] * 8
    assert lengths == sorted(lengths, reverse=True)
    assert lengths[-1] <= 8
    alone = ChunkSize(largest=256)
    alone.value = 256
    assert [len(chunk) for chunk in alone.cut(iter(sources[:600]))] == [256, 256, 88]


def test_a_chunk_that_turns_out_slow_makes_the_next_ones_small_at_once() -> None:
    size = ChunkSize(largest=64, workers=2)
    size.value = 64
    sources: list[Any] = list(range(400))
    chunks = size.cut(iter(sources))
    first = next(chunks)
    size.value = 8
    rest = list(chunks)
    assert [len(first), len(rest[0])] == [64, 8]
    assert [*first, *chain.from_iterable(rest)] == sources


def test_the_default_is_one_process_for_each_usable_processor(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vsc_serve.executors.choose.usable_cpus", lambda: 3)
    bundle = open_bundle(tiny_bundle)
    pool = open_executor(bundle, how=ExecutorOptions(device="cpu"))
    assert (pool.workers, pool.kind) == (3, "processes")
    pool = open_executor(bundle, how=ExecutorOptions(device="cpu", workers=0))
    assert (pool.workers, pool.kind) == (3, "threads")


class Flaky:
    """A source that fails until it is mended: a plugin that is missing, a store that is down."""

    def __init__(self, name: str, path: Path, error: Exception) -> None:
        self.id, self._path = name, path
        self.error: Exception | None = error

    def read(self) -> bytes:
        if self.error is not None:
            raise self.error
        return self._path.read_bytes()


def flaky_sources(folder: Path, places: Sequence[int], error: Exception) -> list[Any]:
    sources: list[Any] = found(folder)
    for place in places:
        sources[place] = Flaky(sources[place].id, folder / sources[place].id, error)
    return sources


@pytest.mark.parametrize("shard_rows", [3, 5, 100])
@pytest.mark.parametrize("batch_size", [1, 2, None])
def test_failures_are_tried_again_and_only_successes_are_reused(
    fake_encoder: Encoder,
    image_folder: Path,
    tmp_path: Path,
    shard_rows: int,
    batch_size: int | None,
) -> None:
    whole, out = tmp_path / "whole.npz", tmp_path / "codes.npz"
    run_in_threads(fake_encoder, iter(found(image_folder)), whole)
    error = InputError("needs pillow-heif", kind="package missing")
    sources = flaky_sources(image_folder, [0, 4, 5, 11], error)
    fields: dict[str, Any] = {"shard_rows": shard_rows, "batch_size": batch_size, "is_strict": True}
    with pytest.raises(InputError, match="`is_strict`: 4 of 12 inputs cannot be read"):
        run_in_threads(fake_encoder, iter(sources), out, **fields)
    sources[4].error = None
    with pytest.raises(InputError, match="`is_strict`: 3 of 12 inputs cannot be read"):
        run_in_threads(fake_encoder, iter(sources), out, **fields)
    listed = [json.loads(line) for line in errors_path(out).read_text().splitlines()]
    assert [one["id"] for one in listed] == [sources[place].id for place in (0, 5, 11)]
    assert {one["kind"] for one in listed} == {"package missing"}
    for place in (0, 5, 11):
        sources[place].error = None
    outcome = run_in_threads(fake_encoder, iter(sources), out, **fields)
    assert (outcome.resumed, outcome.rejected, outcome.statistics.images) == (9, 0, 12)
    assert outcome.statistics.fresh == 12
    assert outcome.statistics.decisions.judged == 12
    assert out.read_bytes() == whole.read_bytes()
    assert not errors_path(out).exists()


def test_a_shard_of_failures_alone_gains_its_rows(
    fake_encoder: Encoder, image_folder: Path, tmp_path: Path
) -> None:
    out, options = tmp_path / "codes.npz", EncodeOptions(uncertainty=False)
    sources = flaky_sources(image_folder, [3, 4, 5], InputError("no", kind="broken"))
    fields: dict[str, Any] = {"shard_rows": 3, "is_strict": True}
    with pytest.raises(InputError, match="3 of 12"):
        run_in_threads(fake_encoder, iter(sources), out, **fields)
    for place in (3, 4, 5):
        sources[place].error = None
    outcome = run_in_threads(fake_encoder, iter(sources), out, **fields)
    assert outcome.statistics.images == 12
    pixels = np.stack([np.asarray(Image.open(image_folder / one.id)) for one in sources])
    expected = fake_encoder.encode_rows(pixels[..., None], options).codes
    assert read_codes(out).codes.toarray().tobytes() == expected.toarray().tobytes()


def test_a_source_that_goes_away_stops_the_run_which_can_resume(
    fake_encoder: Encoder, image_folder: Path, tmp_path: Path
) -> None:
    whole, out = tmp_path / "whole.npz", tmp_path / "codes.npz"
    run_in_threads(fake_encoder, iter(found(image_folder)), whole)
    out.write_bytes(b"earlier codes")
    error = SourceUnavailable("07.png: 503 Service Unavailable.")
    sources = flaky_sources(image_folder, [7], error)
    fields: dict[str, Any] = {"shard_rows": 3, "batch_size": 1}
    with pytest.raises(SourceUnavailable) as stopped:
        run_in_threads(fake_encoder, iter(sources), out, **fields)
    assert stopped.value.exit_code == 3
    assert re.fullmatch(
        r"07\.png: 503 Service Unavailable\. 6 images are done and kept in .*codes\.npz\.parts: run"
        r" the same command again to resume\.",
        str(stopped.value),
    )
    assert out.read_bytes() == b"earlier codes"
    assert not errors_path(out).exists()
    sources[7].error = None
    outcome = run_in_threads(fake_encoder, iter(sources), out, **fields)
    assert outcome.resumed == 6
    assert out.read_bytes() == whole.read_bytes()


@pytest.mark.slow
def test_a_source_that_goes_away_stops_processes_too(
    tiny_bundle: Path, images: Path, hostile: ModuleType
) -> None:
    sources = found(images)
    sources.insert(20, hostile.Gone("gone.png"))
    with (
        processes(tiny_bundle) as pool,
        pytest.raises(SourceUnavailable, match=r"gone\.png: Stale file handle"),
    ):
        collect(batches(pool, iter(sources), 4))


@pytest.mark.slow
def test_workers_take_a_path_object_in_the_import_path(
    tiny_bundle: Path, images: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path, tmp_path / "it's"])
    with processes(tiny_bundle, 1) as pool:
        assert len(collect(batches(pool, iter(found(images)), None))[0]) == 40


def test_an_image_over_the_limit_of_pixels_is_rejected_and_the_limit_can_be_raised(
    fake_encoder: Encoder, image_folder: Path
) -> None:
    Image.new("L", (50, 50)).save(image_folder / "large.png")
    sources = found(image_folder)
    for limit, count in ((64, 12), (2500, 13)):
        read = ReadOptions(max_pixels=limit)
        with ThreadExecutor(EncodeWorker(fake_encoder, PLAIN, read), 1) as pool:
            ids, _, bad = collect(batches(pool, iter(sources), None))
        assert len(ids) == count
        assert [name for name, _ in bad] == ["large.png"][: 13 - count]
