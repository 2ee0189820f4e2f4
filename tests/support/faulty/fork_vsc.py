"""Run `vsc` many times, each with a fault of its own, and import what it needs only once.

Each line of standard input is a request as JSON, each line of standard output its answer. A run is
a fork of this process, so what it does to itself, down to its end, stays its own.
"""

import json
import os
import resource
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any, NoReturn

from sitecustomize import VARIABLE, Fault, Injector

time.sleep = lambda seconds: None  # before anything takes it for a default

import numpy  # noqa: E402, F401
import onnxruntime  # noqa: E402, F401
import scipy.sparse  # noqa: E402, F401

import vsc_serve.pipeline  # noqa: E402, F401
from vsc_serve import cli  # noqa: E402


def main() -> None:
    """Answer requests until there are no more."""
    for line in sys.stdin:
        talk, written = os.pipe()
        process_id = os.fork()
        if not process_id:
            os.close(talk)
            try:
                _run(json.loads(line), written)
            finally:
                os._exit(1)  # whatever happens, a fork reads no requests
        os.close(written)
        with os.fdopen(talk, encoding="utf-8", errors="replace") as file:
            text = file.read()  # to the end of the command and of its workers
        _, status = os.waitpid(process_id, 0)
        answer = {"code": os.waitstatus_to_exitcode(status), "talk": text}
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


def _run(request: dict[str, Any], talk: int) -> NoReturn:
    """Be the command."""
    nowhere = os.open(os.devnull, os.O_RDWR)
    given = os.open(request["given"], os.O_RDONLY)
    for number, file in enumerate((given, nowhere, talk)):
        os.dup2(file, number)
    os.close(talk)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if request["largest_file"] is not None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (request["largest_file"],) * 2)
    os.environ[VARIABLE] = json.dumps(request["fault"])
    fault = Fault(**request["fault"])
    injector = Injector(fault)
    sys.argv = ["vsc", *request["arguments"]]
    code = _exit_code()
    if fault.action == "none" and fault.mark:
        Path(fault.mark).write_text(str(injector.count), encoding="utf-8")
    os._exit(code)


def _exit_code() -> int:
    try:
        cli.main()
    except SystemExit as end:
        sys.stderr.flush()
        return end.code if isinstance(end.code, int) else 1
    except BaseException:  # noqa: BLE001  # as Python does with what nobody catches
        traceback.print_exc()
        sys.stderr.flush()
        return 1
    return 0


if __name__ == "__main__":
    main()
