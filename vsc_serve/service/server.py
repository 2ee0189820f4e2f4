"""Run the service: listen, and drain when told to stop.

`serve`, which `vsc serve` calls, opens a bundle and runs the application of `service` until
SIGTERM or SIGINT. While it drains it goes on answering health checks, and a signal is no failure.
"""

import asyncio
import logging
import signal
import socket
from pathlib import Path
from types import FrameType
from typing import Final

from vsc_serve import __version__
from vsc_serve.console import LineFormatter
from vsc_serve.encoder import Encoder
from vsc_serve.errors import UsageError
from vsc_serve.service import Limits, Service, create_app
from vsc_serve.session import Device

# isort: split
# After `service`, which says what to install where these are missing.
import uvicorn
from fastapi import FastAPI

logger = logging.getLogger(__name__)

_CLOSING_S: Final = 5
"""Seconds that connections get to close once no request is in flight."""


def serve(
    model: Path,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    device: Device = "auto",
    limits: Limits | None = None,
    drain_timeout_s: float = 30.0,
) -> None:
    """Open a bundle and serve it until SIGTERM or SIGINT; what `vsc serve` does.

    Each encoder call computes on one thread, and several run side by side: for requests that come
    together this is faster than one call on all processors.

    Args:
        model: Folder that `vsc export` wrote.
        host: Address to listen on.
        port: Port to listen on; 0 takes a free one.
        device: `cpu`, `cuda` (an error where there is none), or `auto`.
        limits: How much a request may bring.
        drain_timeout_s: Seconds that requests in flight get to finish once the service is stopped.

    Raises:
        BundleError: The bundle is damaged.
        DeviceError: The device or onnxruntime is not there.
        UsageError: The address cannot be listened on.
    """
    # Process 1 of a container ignores SIGTERM by default; `run` replaces this handler.
    signal.signal(signal.SIGTERM, _leave)
    encoder = Encoder.open(model, device=device, threads=1)
    run(create_app(encoder, limits), host=host, port=port, drain_timeout_s=drain_timeout_s)


def run(
    app: FastAPI, *, host: str = "127.0.0.1", port: int = 8000, drain_timeout_s: float = 30.0
) -> None:
    """Serve an application of `create_app` until SIGTERM or SIGINT, then drain and return.

    Draining: readiness turns 503, new work is refused with 503, requests in flight finish. A second
    signal, or the end of the timeout, closes their connections; the process then ends with the
    computation it is in, whose result is dropped.

    Args:
        app: What `create_app` returned.
        host: Address to listen on.
        port: Port to listen on; 0 takes a free one. The log line at the start names it.
        drain_timeout_s: Seconds that requests in flight get to finish.

    Raises:
        UsageError: The address cannot be listened on.
    """
    _log_to_stderr()
    config = uvicorn.Config(
        app,
        lifespan="on",
        access_log=False,
        log_config=None,
        log_level=logging.WARNING,
        server_header=False,
        timeout_graceful_shutdown=_CLOSING_S,
    )
    with _listen(host, port) as listener:
        _Server(config, app.state.service, drain_timeout_s).run(sockets=[listener])


class _Server(uvicorn.Server):
    """uvicorn, but it goes on answering while it drains, and a signal is no failure."""

    def __init__(self, config: uvicorn.Config, service: Service, drain_timeout_s: float) -> None:
        super().__init__(config)
        self._service = service
        self._drain_timeout_s = drain_timeout_s

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin to drain; at the second signal, stop waiting."""
        self._service.phase = "draining"
        self.force_exit = self.should_exit
        self.should_exit = True

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to accept connections, and say where."""
        await super().startup(sockets)
        encoder = self._service.encoder
        for listener in sockets or []:
            logger.info(
                "vsc-serve %s: model %s (%s) on %s, listening on %s",
                __version__,
                encoder.manifest.name,
                encoder.manifest.digest,
                encoder.engine,
                _url(listener),
            )

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Wait for requests in flight, still answering health checks, then close."""
        service = self._service
        logger.info("stopping; requests in flight: %d", service.in_flight)
        deadline = asyncio.get_running_loop().time() + self._drain_timeout_s
        while service.in_flight and not self.force_exit:
            if asyncio.get_running_loop().time() > deadline:
                logger.warning(
                    "not done in %g s and cut off; requests: %d",
                    self._drain_timeout_s,
                    service.in_flight,
                )
                self.config.timeout_graceful_shutdown = 0
                break
            await asyncio.sleep(0.02)
        await super().shutdown(sockets)


def _listen(host: str, port: int) -> socket.socket:
    """Return a listening socket. Raises UsageError when the address is taken or cannot be used."""
    if not 0 <= port <= 65535:
        raise UsageError(f"`port` must be between 0 and 65535, not {port}")
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        raise UsageError(
            f"cannot listen on {host}, port {port} ({error.strerror})."
            " Choose another `host` or `port`."
        ) from error


def _url(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _log_to_stderr() -> None:
    """Log to stderr, through the handlers that are there already if there are any."""
    handler = logging.StreamHandler()
    handler.setFormatter(LineFormatter("%(asctime)s %(levelname)s %(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    logging.getLogger("vsc_serve").setLevel(logging.INFO)


def _leave(_sig: int, _frame: FrameType | None) -> None:
    raise SystemExit(0)
