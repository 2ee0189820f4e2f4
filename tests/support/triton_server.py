"""A real Triton server on loopback: the one that nvidia-pytriton carries, on the CPU."""

import contextlib
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest


class Ports(NamedTuple):
    grpc: int
    http: int


@contextlib.contextmanager
def triton_server(repository: Path, model: str, folder: Path) -> Iterator[Ports]:
    """Serve a model of a repository; skip the test where VSC_TRITON names no environment."""
    environment = os.environ.get("VSC_TRITON")
    if not environment:
        pytest.skip("VSC_TRITON is not set: docs/development.md says what to install for it")
    pytest.importorskip("tritonclient.grpc")
    ports = Ports(free_port(), free_port())
    with (folder / "log.txt").open("wb") as log:
        process = _start(Path(environment), repository / model, folder, ports, log)
        try:
            _wait_until_ready(process, ports.grpc, model, folder / "log.txt")
            yield ports
        finally:
            process.terminate()
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _start(
    environment: Path, model: Path, folder: Path, ports: Ports, log: Any
) -> "subprocess.Popen[bytes]":
    """Start it with the Python of that environment.

    The Python backend wants its stub beside it, and finds the environment by the path to python.
    """
    python = environment / "bin" / "python"
    question = (
        "import sys, sysconfig as s; print(s.get_path('purelib'), s.get_config_var('LIBDIR'))"
    )
    done = subprocess.run([python, "-c", question], check=True, capture_output=True, text=True)
    packages, libraries = done.stdout.split()
    version = Path(packages).parent.name.removeprefix("python")
    server = Path(packages) / "pytriton" / "tritonserver"
    backends = folder / "backends"
    shutil.copytree(server / "backends", backends)
    stub = server / "python_backend_stubs" / version / "triton_python_backend_stub"
    shutil.copy(stub, backends / "python")
    models = folder / "models"
    shutil.copytree(model, models / model.name)
    options = {
        "--model-repository": models,
        "--backend-directory": backends,
        "--grpc-address": "127.0.0.1",
        "--grpc-port": ports.grpc,
        "--http-address": "127.0.0.1",
        "--http-port": ports.http,
        "--allow-metrics": "false",
    }
    return subprocess.Popen(
        [
            server / "bin" / "tritonserver",
            *(str(word) for pair in options.items() for word in pair),
        ],
        env=os.environ
        | {
            "PATH": f"{environment / 'bin'}{os.pathsep}{os.environ['PATH']}",
            "LD_LIBRARY_PATH": f"{Path(packages) / 'nvidia_pytriton.libs'}:{libraries}",
        },
        stdout=log,
        stderr=subprocess.STDOUT,
    )


def _wait_until_ready(process: "subprocess.Popen[bytes]", port: int, model: str, log: Path) -> None:
    from tritonclient import grpc
    from tritonclient.utils import InferenceServerException

    deadline = time.monotonic() + 60
    with grpc.InferenceServerClient(f"127.0.0.1:{port}") as client:
        while time.monotonic() < deadline and process.poll() is None:
            try:
                if client.is_model_ready(model):
                    return
            except InferenceServerException:
                pass
            time.sleep(0.1)
    pytest.fail(f"the server did not become ready:\n{log.read_text(errors='replace')[-3000:]}")
