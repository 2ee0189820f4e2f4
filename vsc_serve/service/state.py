"""State shared by all requests: limits, the encoder, and the threads that work."""

from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any, Literal, TypeVar

import anyio

from vsc_serve.cpus import usable_cpus
from vsc_serve.encoder import Encoder
from vsc_serve.errors import UsageError
from vsc_serve.images import MAX_PIXELS
from vsc_serve.service.watch import DomainWatch

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Limits:
    """How much one request may bring, and how much is worked on at a time."""

    max_body_bytes: int = 64_000_000
    """Bytes of a request's body."""
    max_rows: int = 1024
    """Images or vectors of a request."""
    max_pixels: int = MAX_PIXELS
    """Pixels of an image; a larger one is refused from its header, before it is decoded."""
    workers: int = field(default_factory=usable_cpus)
    """Threads that decode and encode."""

    def __post_init__(self) -> None:
        for limit in fields(self):
            value = getattr(self, limit.name)
            if value < 1:
                raise UsageError(f"{limit.name} must be at least 1, not {value}")


class Service:
    """State of the service: the encoder, the worker threads, and whether work is taken."""

    def __init__(self, encoder: Encoder, limits: Limits) -> None:
        self.encoder = encoder
        self.limits = limits
        self.watch = DomainWatch(encoder)
        self.phase: Literal["starting", "ready", "draining"] = "starting"
        self.in_flight = 0
        self._threads = anyio.CapacityLimiter(limits.workers)

    async def work(self, function: Callable[..., T], *args: Any) -> T:
        """Call a function in a worker thread, once one is free."""
        return await anyio.to_thread.run_sync(function, *args, limiter=self._threads)
