"""The service under load: single images and batches, at several numbers of clients."""

import asyncio
import io
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import quantiles
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.gpu.sizes import Sizes
from vsc_serve.models import builtin_model

_START_S = 60.0
_BOUNDARY = "vsc-gpu-boundary"


def run(sizes: Sizes, work: Path) -> dict[str, Any]:
    """Start `vsc serve` with the built-in model and ask it."""
    rng = np.random.default_rng(0)
    image = io.BytesIO()
    Image.fromarray(rng.integers(0, 256, (64, 64, 3), np.uint8)).save(image, "JPEG")
    single = _request("image/jpeg", image.getvalue())
    batch = _request(
        f"multipart/form-data; boundary={_BOUNDARY}",
        _multipart([image.getvalue()] * sizes.serve_rows),
    )
    rows = []
    with _service(sizes, work / "log") as port:
        for name, request, per_request in (
            ("one 64x64 JPEG", single, 1),
            (f"{sizes.serve_rows} of them", batch, sizes.serve_rows),
        ):
            for clients in sizes.serve_clients:
                asyncio.run(_load(port, request, clients, 0.3 * sizes.serve_s))
                seconds, failed = asyncio.run(_load(port, request, clients, sizes.serve_s))
                rows.append(_row(name, clients, per_request, seconds, failed, sizes.serve_s))
    return {"rows": rows, "passed": not any(row["failed"] for row in rows)}


def _row(
    name: str, clients: int, per_request: int, seconds: list[float], failed: int, length_s: float
) -> dict[str, Any]:
    cuts = quantiles(seconds, n=100) if len(seconds) > 1 else [float("nan")] * 99
    return {
        "request": name,
        "clients": clients,
        "requests/s": len(seconds) / length_s,
        "images/s": per_request * len(seconds) / length_s,
        "p50, ms": 1000 * cuts[49],
        "p99, ms": 1000 * cuts[98],
        "failed": failed,
    }


@contextmanager
def _service(sizes: Sizes, log: Path) -> Iterator[int]:
    """Run the service until the block ends; gives its port."""
    command = [sys.executable, "-m", "vsc_serve", "serve", "--model", str(builtin_model())]
    with log.open("wb") as file:
        process = subprocess.Popen(
            [*command, "--device", sizes.device, "--port", "0"], stdout=file, stderr=file
        )
    try:
        yield _wait_for_port(process, log)
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(timeout=60)


def _wait_for_port(process: "subprocess.Popen[bytes]", log: Path) -> int:
    limit = time.monotonic() + _START_S
    while time.monotonic() < limit and process.poll() is None:
        found = re.search(rb"http://127\.0\.0\.1:(\d+)", log.read_bytes())
        if found:
            return int(found[1])
        time.sleep(0.05)
    raise RuntimeError(f"the service did not start: {log.read_text(errors='replace')[-2000:]}")


async def _load(
    port: int, request: bytes, clients: int, length_s: float
) -> tuple[list[float], int]:
    """Send requests from several connections; returns the seconds of each, and the failures."""
    limit = time.perf_counter() + length_s
    found = await asyncio.gather(*(_client(port, request, limit) for _ in range(clients)))
    return [one for seconds, _ in found for one in seconds], sum(failed for _, failed in found)


async def _client(port: int, request: bytes, limit: float) -> tuple[list[float], int]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    seconds: list[float] = []
    failed = 0
    while (began := time.perf_counter()) < limit:
        writer.write(request)
        await writer.drain()
        if await _status(reader) == 200:
            seconds.append(time.perf_counter() - began)
        else:
            failed += 1
    writer.close()
    return seconds, failed


async def _status(reader: asyncio.StreamReader) -> int:
    """Read one whole answer, and return its status."""
    head = await reader.readuntil(b"\r\n\r\n")
    length = re.search(rb"content-length: (\d+)", head, re.IGNORECASE)
    if length:
        await reader.readexactly(int(length[1]))
    return int(head.split()[1])


def _request(media_type: str, body: bytes) -> bytes:
    head = (
        "POST /v1/encode HTTP/1.1\r\nHost: 127.0.0.1\r\nAccept: application/x-npz\r\n"
        f"Content-Type: {media_type}\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


def _multipart(images: list[bytes]) -> bytes:
    parts = [
        f'--{_BOUNDARY}\r\nContent-Disposition: form-data; name="f"; filename="{number}.jpg"\r\n'
        "Content-Type: image/jpeg\r\n\r\n".encode()
        + image
        + b"\r\n"
        for number, image in enumerate(images)
    ]
    return b"".join(parts) + f"--{_BOUNDARY}--\r\n".encode()
