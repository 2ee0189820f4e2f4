"""`vsc export` and `vsc demo`; torch and onnx are imported inside, so that help stays fast."""

from pathlib import Path
from typing import Annotated

import typer

from vsc_serve.console import require_extra, say

app = typer.Typer()


@app.command()
def export(
    run: Annotated[Path, typer.Argument(help="Folder that `vsc train` wrote.")],
    out: Annotated[Path, typer.Option(help="Bundle to write.")],
    *,
    tau: Annotated[float, typer.Option(help="Spike threshold in (0, 1) to build in.")] = 0.5,
    name: Annotated[
        str | None, typer.Option(help="Name of the model (default: the run's).")
    ] = None,
    opset: Annotated[int, typer.Option(help="ONNX operator set.", min=18)] = 20,
    allow_collapsed: Annotated[
        bool, typer.Option("--allow-collapsed", help="Export a collapsed model as well.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace the bundle.")] = False,
) -> None:
    """Write a run as a bundle of ONNX files, after proving that they compute the same."""
    require_extra("export", "torch", "onnx", "onnxscript")
    from vsc_export.write import export_bundle
    from vsc_serve.atomic import refuse_existing

    refuse_existing(out, force=force)
    done = export_bundle(run, out, tau=tau, name=name, opset=opset, allow_collapsed=allow_collapsed)
    parity, manifest = done.parity, done.manifest
    say("parity", _parity_line(parity.rows, len(parity.comparisons), parity.near_threshold_share))
    size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    say(
        "wrote",
        f"{out}  {manifest.name}, J={manifest.latent_dim}, tau={manifest.tau:g}, {size / 1e6:.1f}"
        " MB",
    )
    say("next", f"vsc encode images/ --out codes.npz --model {out}")


@app.command()
def demo(
    *,
    out: Annotated[Path, typer.Option(help="Folder for everything it makes.")] = Path("vsc-demo"),
    force: Annotated[bool, typer.Option("--force", help="Replace the folder.")] = False,
) -> None:
    """Make pictures, train, export, encode, search and draw; then print the commands."""
    require_extra("export,cpu", "torch", "onnx", "onnxscript")
    from vsc_export.demo import run_demo

    run_demo(out, force=force)


def _parity_line(rows: dict[str, int], comparison_count: int, near_share: float) -> str:
    total = sum(rows.values())
    return (
        f"{total} inputs x {comparison_count} settings: same spikes, same values"
        f"  ({near_share:.3%} of spikes near the threshold)"
    )
