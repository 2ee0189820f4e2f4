"""What training asks of a GPU: no waiting in a step, data that fit, kernels that repeat.

Without a GPU, stand-ins show it: torch's `meta` device as a place that is not main memory, and
counts of what would be a transfer. `test_gpu_training` does the same on a real one.
"""

import threading
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from vsc_serve.images import PixelSpec
from vsc_training import dataset, distributed, step
from vsc_training.config import Recipe, load_recipe
from vsc_training.data import Examples
from vsc_training.dataset import BatchOrder, DeviceDataset
from vsc_training.device import repeatable_kernels, uses_bfloat16
from vsc_training.finite import FiniteGuard, NotFinite
from vsc_training.metrics import measure_health
from vsc_training.model import DataSpec
from vsc_training.prefetch import Prefetcher
from vsc_training.schedule import ScheduleTable, progress
from vsc_training.step import Terms, objective_terms
from vsc_training.trainer import Trainer
from vsc_training.warmup import warmup_factor

CPU, ELSEWHERE = torch.device("cpu"), torch.device("meta")


FIXED = ["regularisation=none"]  # a few examples, seen often


def small_recipe(*overrides: str) -> Recipe:
    fields = ["latent_dim=16", "hidden=32", "pseudo_inputs=4", "batch_size=32", "alpha=0.2"]
    return load_recipe("sparse", [*fields, "steps=60", "on_collapse=warn", *FIXED, *overrides])


def noise_examples(count: int = 128) -> Examples:
    rows = np.random.default_rng(0).integers(0, 256, (count, 8, 8, 1), dtype=np.uint8)
    spec = DataSpec(pixel_spec=PixelSpec(height=8, width=8, channels=1))
    return Examples(rows, [str(number) for number in range(count)], spec)


class CountTransfers(TorchDispatchMode):
    """Count what waits for a GPU: numbers read from a tensor, and tensors made of numbers."""

    WAITING = ("aten._local_scalar_dense", "aten.lift_fresh", "aten.nonzero", "aten.bincount")

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = str(func).rpartition(".")[0]
        if name in self.WAITING:
            self.found[name] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("is_compiled", [False, True])
def test_a_step_neither_reads_from_the_device_nor_sends_numbers_to_it(
    monkeypatch: pytest.MonkeyPatch, *, is_compiled: bool
) -> None:
    monkeypatch.setattr(step, "compiled_terms", lambda device: objective_terms)
    fields = ("input_dropout=0.2", "spike=relaxed", "warmup_start=0", "warmup_end=1")
    trainer = Trainer(small_recipe(*fields), noise_examples(), CPU, is_compiled=is_compiled)
    trainer.guard = FiniteGuard(trainer.recipe, ELSEWHERE)  # as on a GPU
    trainer.advance()
    with CountTransfers() as transfers:
        trainer.advance()
        trainer.advance()
    assert not transfers.found
    assert trainer.step == 3


def test_the_order_of_an_epoch_lies_where_the_rows_do_and_goes_there_once() -> None:
    here = BatchOrder(torch.arange(100), 30, 7)
    there = BatchOrder(torch.arange(100), 30, 7, ELSEWHERE)
    assert there.batch(0).device == ELSEWHERE
    assert here.batch(0).untyped_storage().data_ptr() == here.batch(2).untyped_storage().data_ptr()
    assert sorted(torch.cat([here.batch(at) for at in range(3)]).tolist()) != list(range(90))
    assert here.batch(3).tolist() == here.epoch(1)[:30].tolist()


def test_the_table_holds_the_numbers_of_every_step_wherever_one_begins() -> None:
    recipe = small_recipe("steps=10000")
    for first in (0, 4096, 4321):
        table = ScheduleTable(recipe, CPU)
        for at in (first, first + 1, first + 4095, first + 4096, max(first - 1, 0)):
            lam, done = table.at(at)
            assert lam.shape == done.shape == ()
            assert lam == torch.tensor(warmup_factor(at, recipe))
            assert done == torch.tensor(progress(at, recipe))
    assert ScheduleTable(recipe, ELSEWHERE).at(5)[0].device == ELSEWHERE


@pytest.mark.parametrize(("free", "fits"), [(10_000, True), (9_000, False)])
def test_examples_go_to_the_gpu_only_where_they_fit_beside_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free: int, *, fits: bool
) -> None:
    monkeypatch.setattr(dataset, "free_bytes", lambda device: free)
    np.save(tmp_path / "x.npy", np.zeros((100, 64), np.uint8))
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    for rows in (np.zeros((100, 64), np.uint8), mapped):
        held = DeviceDataset.of(rows, ELSEWHERE, needed_bytes=1_500)
        assert isinstance(held.rows, torch.Tensor) == fits
        assert held.index_device == (ELSEWHERE if fits else CPU)


def test_a_mapped_file_is_copied_to_a_device_part_by_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = np.random.default_rng(0).normal(size=(101, 7)).astype(np.float32)
    np.save(tmp_path / "x.npy", rows)
    monkeypatch.setattr(dataset, "_COPIED_AT_ONCE", 10 * rows[:1].nbytes)
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    assert torch.equal(dataset._copied(mapped, CPU), torch.from_numpy(rows))


def test_a_prefetcher_gives_each_step_in_order_and_begins_again_after_a_jump() -> None:
    read: list[int] = []

    def square(number: int) -> int:
        read.append(number)
        return number * number

    ahead = Prefetcher(square)
    assert [ahead.take(at) for at in range(5)] == [0, 1, 4, 9, 16]
    assert max(read) <= 4 + 3, "reads a few steps ahead, not all"
    assert [ahead.take(at) for at in (70, 71, 3)] == [4900, 5041, 9]


def test_a_prefetcher_reads_beside_the_caller_and_raises_where_the_step_is_asked_for() -> None:
    names: list[str] = []

    def read(number: int) -> int:
        names.append(threading.current_thread().name)
        if number == 2:
            raise OSError("the disk is gone")
        return number

    ahead = Prefetcher(read)
    assert [ahead.take(0), ahead.take(1)] == [0, 1]
    with pytest.raises(OSError, match="the disk is gone"):
        ahead.take(2)
    assert all(name.startswith("prefetch") for name in names)


def test_bfloat16_that_a_gpu_only_emulates_is_not_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    def emulated(including_emulation: bool = True) -> bool:  # torch's own
        return including_emulation

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", emulated)
    assert not uses_bfloat16(small_recipe(), torch.device("cuda"))
    assert uses_bfloat16(small_recipe("precision=bfloat16"), torch.device("cuda"))


def test_a_process_of_several_tells_nccl_its_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    started: dict[str, Any] = {}
    monkeypatch.setattr(
        distributed.dist,
        "init_process_group",
        lambda backend, **options: started.update(options, backend=backend),
    )
    monkeypatch.setattr(distributed.dist, "get_rank", lambda: 3)
    monkeypatch.setattr(distributed.dist, "destroy_process_group", lambda: None)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    environment = {"WORLD_SIZE": "4", "RANK": "3", "LOCAL_RANK": "1"}
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with distributed.joined_group(torch.device("cuda")) as (group, device):
        assert (group.rank, group.size) == (3, 4)
    assert device == torch.device("cuda", 1)
    assert started == {"backend": "nccl", "device_id": device}


def test_metrics_come_from_the_device_once_however_many_batches(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    trainer = Trainer(small_recipe(), noise_examples(), CPU)
    trainer.model.eval()
    reads: list[torch.Size] = []
    original = torch.Tensor.cpu

    def counted(tensor: torch.Tensor) -> torch.Tensor:
        reads.append(tensor.shape)
        return original(tensor)

    monkeypatch.setattr(torch.Tensor, "cpu", counted)
    found = []
    for size in (128, 8):
        batches = trainer.dataset.batches(torch.arange(128), size)
        reads.clear()
        with CountTransfers() as transfers:
            health = measure_health(trainer.model, batches, torch.Generator().manual_seed(0))
        found.append((len(reads), dict(transfers.found)))
        assert health.images == 128
    assert found[0] == found[1]
    assert len(reads) == 2


def test_kernels_that_repeat_are_chosen_in_a_step_and_the_settings_come_back() -> None:
    cudnn = torch.backends.cudnn
    trainer = Trainer(small_recipe(), noise_examples(), CPU)
    objective, seen = trainer._objective, []

    def spy(*arguments: Any, **named: Any) -> Terms:
        seen.append((cudnn.deterministic, cudnn.benchmark))
        terms: Terms = objective(*arguments, **named)
        return terms

    trainer._objective = spy  # type: ignore[assignment]  # stands in for the module
    before = cudnn.deterministic, cudnn.benchmark
    cudnn.benchmark = True
    try:
        trainer.advance()
        assert seen == [(True, False)]
        assert (cudnn.deterministic, cudnn.benchmark) == (before[0], True)
        with pytest.raises(RuntimeError), repeatable_kernels():
            raise RuntimeError
        assert cudnn.benchmark
    finally:
        cudnn.deterministic, cudnn.benchmark = before


def test_no_gradient_of_the_last_step_lives_when_a_step_begins() -> None:
    """A compiled step on a GPU writes its gradients where the last one's are."""
    trainer = Trainer(small_recipe(), noise_examples(), CPU)
    objective = trainer._objective

    def spy(*arguments: Any, **named: Any) -> Terms:
        assert all(weight.grad is None for weight in trainer.model.parameters())
        terms: Terms = objective(*arguments, **named)
        return terms

    trainer._objective = spy  # type: ignore[assignment]  # stands in for the module
    for _ in range(3):
        trainer.advance()
    assert any(weight.grad is not None for weight in trainer.model.parameters())


def test_terms_that_are_kept_survive_the_memory_they_came_from() -> None:
    terms = Terms(*(torch.full((), float(number), requires_grad=True) for number in range(5)),
                  torch.ones(2, 3, requires_grad=True), torch.ones(2, 1))  # fmt: skip
    kept = terms.kept()
    with torch.no_grad():
        for term in terms:
            if term is not None:
                term.fill_(-1.0)
    assert [float(term) for term in kept[:5]] == [0.0, 1.0, 2.0, 3.0, 4.0]
    assert not any(term.requires_grad for term in kept if term is not None)
    assert kept.spike_logit.sum() == 6
    assert kept.weights.sum() == 2


def test_a_loss_on_a_device_is_looked_at_later_and_its_step_is_named() -> None:
    recipe = small_recipe()
    guard = FiniteGuard(recipe, CPU)
    guard._is_waiting = False  # as on a GPU
    template = Trainer(recipe, noise_examples(), CPU).advance()
    for number in range(1, 9):
        loss = torch.tensor(float("nan") if number >= 6 else 1.0)
        guard.watch(number, template._replace(loss=loss), [])
    with pytest.raises(NotFinite, match=r"the loss is not finite \(nan\) at step 6") as caught:
        guard.check()
    assert caught.value.step == 6
    guard.check()  # each loss is looked at once


def test_a_loss_on_a_device_is_looked_at_at_the_latest_after_a_thousand_steps() -> None:
    recipe = small_recipe()
    guard = FiniteGuard(recipe, CPU)
    guard._is_waiting = False
    terms = Trainer(recipe, noise_examples(), CPU).advance()._replace(loss=torch.tensor(np.inf))
    for number in range(1, 1024):
        guard.watch(number, terms, [])
    with pytest.raises(NotFinite, match="at step 1: "):
        guard.watch(1024, terms, [])
