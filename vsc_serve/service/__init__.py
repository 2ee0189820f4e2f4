"""The HTTP service: images or vectors in, sparse codes out.

`create_app` makes the routes around one open encoder; `vsc_serve.service.server` runs it.
docs/service.md shows every route.

The event loop only reads requests and writes answers, so liveness never waits for work: decoding,
encoding and formatting happen in a bounded number of worker threads.
"""

from vsc_serve.errors import UsageError

try:
    import anyio  # noqa: F401
    import fastapi  # noqa: F401
    import python_multipart  # noqa: F401 - starlette finds out only when a form arrives
    import uvicorn  # noqa: F401 - for `server`; said here with the others
except ImportError as missing:
    raise UsageError(
        f"the service needs a package that is not installed ({missing.name})."
        " Run: pip install 'vsc-serve[serve]'"
    ) from missing

from vsc_serve.service.app import create_app
from vsc_serve.service.media import JSON, NPZ
from vsc_serve.service.state import Limits, Service

__all__ = ["JSON", "NPZ", "Limits", "Service", "create_app"]
