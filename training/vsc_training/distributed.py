"""Several processes that train one model, as `torchrun` starts them.

Each rank works on its share of every batch; DistributedDataParallel averages the gradients. The
sparsity and balance terms depend on means over the whole batch, not over a rank's share of it, so
those means are taken over the ranks: the objective is the one a single process would compute.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from vsc_serve.errors import UsageError


@dataclass(frozen=True)
class Group:
    """The processes that train together."""

    rank: int = 0
    """Number of this process, from 0."""
    size: int = 1
    """Number of processes."""

    @property
    def is_first(self) -> bool:
        """Whether this process writes checkpoints and logs."""
        return self.rank == 0

    def share(self, numbers: Tensor) -> Tensor:
        """Return this rank's part of a batch. Raises UsageError when it cannot be parted evenly."""
        if len(numbers) % self.size:
            raise UsageError(
                f"a batch of {len(numbers)} cannot be shared by {self.size} processes:"
                f" `recipe.batch_size={len(numbers) // self.size * self.size or self.size}`"
            )
        return numbers[self.rank :: self.size]


@contextmanager
def joined_group(device: torch.device) -> Iterator[tuple[Group, torch.device]]:
    """Join the group that `torchrun` describes in the environment; a group of one without it.

    Args:
        device: Kind of device; on CUDA each process of a machine gets its own.

    Yields:
        The group, and the device of this process.

    Raises:
        UsageError: The environment describes a group only in part.
    """
    size = _number("WORLD_SIZE", least=1) if "WORLD_SIZE" in os.environ else 1
    if size == 1:
        yield Group(), device
        return
    _require_rank(size)
    if device.type == "cuda":
        device = torch.device("cuda", _number("LOCAL_RANK", least=0))
        torch.cuda.set_device(device)
        # Without `device_id` NCCL guesses the GPU of a process from its rank.
        dist.init_process_group("nccl", device_id=device)
    else:
        dist.init_process_group("gloo")
    try:
        yield Group(dist.get_rank(), size), device
    finally:
        dist.destroy_process_group()


def _require_rank(size: int) -> None:
    """Raise UsageError unless the environment says which process this is, and where the others."""
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise UsageError(
            f"WORLD_SIZE is {size}, but {', '.join(missing)} {'are' if missing[1:] else 'is'} not"
            " set: start several processes with torchrun, or unset WORLD_SIZE to train in one"
        )
    rank = _number("RANK", least=0)
    if rank >= size:
        raise UsageError(f"RANK is {rank}, but WORLD_SIZE is {size}: start with torchrun")


def _number(name: str, *, least: int) -> int:
    text = os.environ.get(name, "")
    try:
        number = int(text)
    except ValueError:
        number = least - 1
    if number < least:
        raise UsageError(
            f"{name} is {text!r}, not a number from {least} on: start with torchrun, or unset"
            " WORLD_SIZE to train in one process"
        )
    return number


def mean_over_ranks(local: Tensor) -> Tensor:
    """Return the mean over all ranks, with the gradient of this rank's part.

    DistributedDataParallel averages gradients over the ranks, and the average of the parts'
    gradients is the gradient of the mean; so passing on each rank's own is exact.

    Args:
        local: Mean over this rank's share of the batch.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return local
    total = local.detach().clone()
    dist.all_reduce(total)
    return local + (total / dist.get_world_size() - local.detach())


def gather_states(state: Tensor) -> list[Tensor]:
    """Return the random state of every rank, in order."""
    if not (dist.is_available() and dist.is_initialized()):
        return [state]
    gathered: list[Tensor | None] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, state.cpu())
    return [part for part in gathered if part is not None]


def wait_for_all() -> None:
    """Return once every rank has come here."""
    if dist.is_available() and dist.is_initialized():
        dist.barrier()
