"""`vsc serve`: a model over HTTP."""

from typing import Annotated

import typer

from vsc_serve.cli.options import DeviceOption, ModelOption, find_model
from vsc_serve.console import require_extra


def serve(
    *,
    model: ModelOption = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port; 0 takes a free one.", min=0, max=65535)] = 8000,
    device: DeviceOption = "auto",
    max_body_mb: Annotated[int, typer.Option(help="Largest request, in MB.", min=1)] = 64,
    max_rows: Annotated[int, typer.Option(help="Most images in a request.", min=1)] = 1024,
) -> None:
    """Serve a model over HTTP until SIGTERM."""
    require_extra("serve", "fastapi", "uvicorn", "python_multipart")
    from vsc_serve.service import Limits
    from vsc_serve.service.server import serve as run_service

    limits = Limits(max_body_bytes=max_body_mb * 1_000_000, max_rows=max_rows)
    run_service(find_model(model), host=host, port=port, device=device, limits=limits)
