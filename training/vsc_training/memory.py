"""Memory: what a run needs, and what this machine has left for it."""

from math import prod
from pathlib import Path
from typing import Final

import torch

from vsc_serve.errors import UsageError
from vsc_training.config import Recipe
from vsc_training.model import VSC, DataSpec, choose_decoder, choose_encoder

_BYTES_PER_PARAMETER: Final = 16
"""Weight, gradient and Adam's two moments in float32."""
_BYTES_IN_CHECKPOINT: Final = 12
"""The same without the gradient, in main memory while it is written."""
_LATENT_TENSORS: Final = 24
"""Tensors of the size (rows, latents) that a step keeps for its gradient, about."""
_VALUE_TENSORS: Final = 6
"""The same of the size of the examples."""
_MEMINFO: Final = Path("/proc/meminfo")
_CONTAINER: Final = (
    Path("/sys/fs/cgroup/memory.max"),
    Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"),
)


def require_memory(recipe: Recipe, data: DataSpec, device: torch.device) -> None:
    """Raise UsageError when the model and one batch cannot fit into memory, before it is built."""
    needed, free = model_bytes(recipe, data, device), free_bytes(device)
    if free is not None and needed > free:
        what = "this GPU" if device.type == "cuda" else "this machine"
        raise UsageError(
            f"training needs at least {_gib(needed)} of memory, and {what} has {_gib(free)} free:"
            f" lower one of latent_dim (now {recipe.latent_dim:,}), hidden ({recipe.hidden:,}),"
            f" layers ({recipe.layers:,}), width ({recipe.width:,}), pseudo_inputs"
            f" ({recipe.pseudo_inputs:,}), batch_size ({recipe.batch_size:,}), or the size of the"
            f" examples ({prod(data.shape):,} values)"
        )


def require_memory_for(byte_count: int, what: str, advice: str) -> None:
    """Raise UsageError when an array cannot fit into memory, before it is made."""
    free = free_bytes(torch.device("cpu"))
    if free is not None and byte_count > free:
        raise UsageError(
            f"{what} take {_gib(byte_count)} of memory, and {_gib(free)} are free: {advice}"
        )


def model_bytes(recipe: Recipe, data: DataSpec, device: torch.device) -> int:
    """Return the bytes that a model, its optimiser and one batch take on a device, at least."""
    rows = recipe.batch_size + recipe.pseudo_inputs
    units = _hidden_units(recipe, data) + _LATENT_TENSORS * recipe.latent_dim
    step = 4 * (rows * units + _VALUE_TENSORS * recipe.batch_size * prod(data.shape))
    stored = 0 if device.type == "cuda" else _BYTES_IN_CHECKPOINT
    return (_BYTES_PER_PARAMETER + stored) * _parameter_count(recipe, data) + step


def _hidden_units(recipe: Recipe, data: DataSpec) -> int:
    """Return the values of a row that the layers keep for the gradient, both ways."""
    encoder, decoder = choose_encoder(recipe, data), choose_decoder(recipe, data)
    layers = recipe.layers * ((encoder != "linear") + (decoder != "linear"))
    beside = 0 if encoder == "mlp" else prod(data.shape)
    return layers * recipe.hidden + beside


def free_bytes(device: torch.device) -> int | None:
    """Return the free memory of a device, at most a container's limit; None where unknown."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    known = [size for size in (_available(), *map(_limit, _CONTAINER)) if size is not None]
    return min(known) if known else None


def _parameter_count(recipe: Recipe, data: DataSpec) -> int:
    """Count the parameters without memory for one of them."""
    try:
        with torch.device("meta"):
            model = VSC(recipe, data)
    except RuntimeError:  # more bytes than 64 bits count
        return 2**63
    return sum(parameter.numel() for parameter in model.parameters())


def _available() -> int | None:
    try:
        lines = _MEMINFO.read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvail"))
    except (OSError, StopIteration, ValueError):
        return None


def _limit(path: Path) -> int | None:
    """Return a container's limit. What it uses counts cached files as well, so it says nothing."""
    try:
        return int(path.read_text(encoding="ascii"))
    except (OSError, ValueError):  # no container, or no limit: `max`
        return None


def _gib(count: int) -> str:
    return f"{count / 2**30:,.1f} GiB"
