"""How much each part does, on a GPU and in a dry run on a CPU."""

from dataclasses import dataclass
from typing import Final

from vsc_serve.session import Device


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Sizes of every part."""

    device: Device
    """Where models run."""
    parity_inputs: int
    """Inputs of the parity matrix."""
    parity_batches: tuple[int, ...]
    """Batch sizes of the parity matrix."""
    train_images: int
    train_steps: int
    train_batch: int
    train_hidden: int
    train_limit_s: float
    """Seconds after which a training stops; the rate is then of the steps done."""
    encode_scale: float
    """Share of the images of `benchmarks.encode`."""
    encode_rounds: int
    serve_clients: tuple[int, ...]
    """Clients at a time."""
    serve_s: float
    """Seconds of load at each number of clients."""
    serve_rows: int
    """Images of a batch request."""


FULL: Final = Sizes(
    device="cuda",
    parity_inputs=4096,
    parity_batches=(1, 7, 32, 256),
    train_images=60_000,
    train_steps=70_000,
    train_batch=500,
    train_hidden=3000,
    train_limit_s=110.0,
    encode_scale=1.0,
    encode_rounds=2,
    serve_clients=(1, 16, 64),
    serve_s=5.0,
    serve_rows=64,
)
"""The paper's schedule (Tonolini et al. 2019, supplement), and loads that keep a GPU busy."""

DRY: Final = Sizes(
    device="cpu",
    parity_inputs=64,
    parity_batches=(1, 7),
    train_images=600,
    train_steps=20,
    train_batch=50,
    train_hidden=32,
    train_limit_s=20.0,
    encode_scale=0.005,
    encode_rounds=1,
    serve_clients=(1, 4),
    serve_s=0.3,
    serve_rows=8,
)
