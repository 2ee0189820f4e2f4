"""`vsc export` and `vsc demo`; torch and onnx are imported inside, so that help stays fast."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vsc_export.fit_cli import fit
from vsc_export.talk import parity_line, say_next, say_written, write_model
from vsc_serve.cli.options import (
    AllowCollapsedOption,
    BackboneOption,
    DeviceOption,
    find_backbone,
    print_json,
)
from vsc_serve.console import require_extra, say
from vsc_serve.errors import UsageError
from vsc_training.threads import sleep_when_idle

if TYPE_CHECKING:
    from vsc_export.topk import Overflow
    from vsc_export.write import Exported

app = typer.Typer()
app.command()(fit)


@app.command()
def export(
    run: Annotated[Path, typer.Argument(help="Folder that `vsc train` wrote.")],
    out: Annotated[Path, typer.Option(help="Bundle to write.")],
    *,
    tau: Annotated[
        float | None, typer.Option(help="Spike threshold in (0, 1) to build in (default 0.5).")
    ] = None,
    calibrate_tau: Annotated[
        str | None,
        typer.Option(metavar="active=N", help="Choose tau for N active latents per row."),
    ] = None,
    budget: Annotated[
        str | None,
        typer.Option(metavar="bytes=N|cost=C", help="Choose tau, and that of queries, for it."),
    ] = None,
    calibration: Annotated[
        Path | None,
        typer.Option(help="Data for tau, int8 and the card (default: the run's examples)."),
    ] = None,
    precision: Annotated[
        str, typer.Option(help="float32, fp16 or int8; the spike head is float32 in all.")
    ] = "float32",
    name: Annotated[
        str | None, typer.Option(help="Name of the model (default: the run's).")
    ] = None,
    opset: Annotated[int, typer.Option(help="ONNX operator set.", min=18)] = 20,
    top_k: Annotated[
        int | None, typer.Option(help="Write an encoder with K slots a row as well.", min=1)
    ] = None,
    triton: Annotated[
        Path | None, typer.Option(help="Folder for a Triton model repository.")
    ] = None,
    backbone: BackboneOption = None,
    about: Annotated[
        Path | None, typer.Option(help="Markdown for the top of the model card.", exists=True)
    ] = None,
    allow_collapsed: AllowCollapsedOption = False,
    force: Annotated[bool, typer.Option("--force", help="Replace the bundle.")] = False,
) -> None:
    """Write a run as a bundle of ONNX files, after proving that they compute the same."""
    require_extra("export", "torch", "onnx", "onnxscript")
    sleep_when_idle()
    from vsc_export.budget import parse_budget
    from vsc_export.operating_points import parse_goal
    from vsc_export.options import ExportOptions
    from vsc_export.precision import parse_precision
    from vsc_export.triton import REPOSITORY
    from vsc_serve.bundle import BUNDLE_FOLDER
    from vsc_serve.outputs import check_output

    file = find_backbone(backbone)
    given = [path for path in (run, calibration, file, about) if path is not None]
    check_output(out, BUNDLE_FOLDER, force=force, inputs=given)
    if triton is not None:
        check_output(triton, REPOSITORY, force=force, inputs=[*given, out])
    options = ExportOptions(
        tau=_chosen_tau(tau, calibrate_tau, budget),
        name=name,
        opset=opset,
        precision=parse_precision(precision),
        active=parse_goal(calibrate_tau) if calibrate_tau else None,
        budget=parse_budget(budget) if budget else None,
        calibration=calibration,
        top_k=top_k,
        about=about.read_text(encoding="utf-8") if about else "",
        allow_collapsed=allow_collapsed,
    )
    done = write_model(run, out, options, file)
    manifest = done.manifest
    if calibrate_tau:
        say("tau", f"{manifest.tau:g} gives {manifest.active:.2f} active latents per row")
    if budget:
        say("budget", _budget_line(done))
    say_written(done)
    if top_k is not None and done.overflow is not None:
        say("top-k", _overflow_line(top_k, done.overflow))
    if triton is not None:
        _write_triton(out, triton)
    say_next(done)


@app.command("triton")
def write_triton(
    model: Annotated[Path, typer.Argument(help="Bundle that `vsc export` wrote.")],
    out: Annotated[Path, typer.Option(help="Model repository to write.")],
    *,
    force: Annotated[bool, typer.Option("--force", help="Replace the repository.")] = False,
) -> None:
    """Write a bundle as a model repository for Triton Inference Server."""
    from vsc_export.triton import REPOSITORY
    from vsc_serve.outputs import check_output

    check_output(out, REPOSITORY, force=force, inputs=[model])
    _write_triton(model, out)


@app.command()
def verify(
    model: Annotated[Path, typer.Argument(help="Bundle that `vsc export` wrote.")],
    run: Annotated[Path, typer.Argument(help="Run that it was exported from.")],
    data: Annotated[
        Path | None, typer.Argument(help="Folder, npz or npy (default: the run's examples).")
    ] = None,
    *,
    rows: Annotated[
        int, typer.Option(help="Rows at most, evenly spread over the data.", min=1)
    ] = 10_000,
    backbone: BackboneOption = None,
    device: DeviceOption = "cpu",
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Measure on any data whether a bundle computes what its run was trained to."""
    require_extra("export", "torch", "onnx", "onnxscript")
    sleep_when_idle()
    from vsc_export.verify import require_verified, verify_bundle

    file = find_backbone(backbone)
    parity = verify_bundle(model, run, data, row_count=rows, backbone=file, device=device)
    if as_json:
        print_json(json.loads(parity.to_json()), indent=2)
    else:
        say("parity", parity_line(parity))
        for comparison in parity.comparisons:
            say("", str(comparison))
    require_verified(parity, model)


@app.command()
def demo(
    *,
    out: Annotated[Path, typer.Option(help="Folder for everything it makes.")] = Path("vsc-demo"),
    force: Annotated[bool, typer.Option("--force", help="Replace the folder.")] = False,
) -> None:
    """Make images, train, export, encode, search and draw; then print the commands."""
    require_extra("export,cpu", "torch", "onnx", "onnxscript")
    from vsc_export.demo import run_demo

    run_demo(out, force=force)


def _write_triton(model: Path, out: Path) -> None:
    from vsc_export.triton import write_repository

    say("triton", f"{out}  {', '.join(write_repository(model, out))}")


def _overflow_line(capacity: int, overflow: "Overflow") -> str:
    return (
        f"{capacity} slots a row: {overflow.overflowing} of {overflow.rows} rows checked have more"
        f" entries, {overflow.most} at most"
    )


def _budget_line(done: "Exported") -> str:
    manifest = done.manifest
    point = next(point for point in done.search if point.tau == manifest.tau)
    return (
        f"tau {point.tau:g}, of queries {point.query_tau:g}: {manifest.active:.2f} active latents,"
        f" {8 * manifest.active:.0f} bytes per row, search cost {point.search_cost:.2f}, neighbour"
        f" recall@10 {point.recall:.3f}"
    )


def _chosen_tau(tau: float | None, *goals: str | None) -> float:
    """Return the tau that was asked for; it cannot be given and chosen at once."""
    if sum(one is not None for one in (tau, *goals)) > 1:
        raise UsageError("--tau, --calibrate-tau and --budget: give one of them.")
    return 0.5 if tau is None else tau
