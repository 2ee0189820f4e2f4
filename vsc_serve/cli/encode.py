"""`vsc encode`: files to codes."""

import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from vsc_serve.cli.options import (
    DeviceOption,
    ForceOption,
    JsonOption,
    ModelOption,
    check_device,
    find_model,
    print_text,
)
from vsc_serve.console import Progress, ending_cleanly, progress, require_extra, say
from vsc_serve.errors import UsageError, VscError

if TYPE_CHECKING:
    from vsc_serve.pipeline import Figures, Outcome, Pool, Request, Scan

_SHARD_ROWS: Final = 100_000
_ONE: Final = {"processes": "process", "threads": "thread"}
_CHOICES: Final = {
    "ids": ("relative", "absolute", "name"),
    "on-error": ("skip", "fail"),
    "view": ("mean", "gamma", "spike"),
}


def encode(
    inputs: Annotated[
        list[str],
        typer.Argument(help="Folders, files, patterns, archives, URLs; - reads a list."),
    ],
    out: Annotated[Path, typer.Option(help="codes.npz, codes.parquet, or a folder for shards.")],
    *,
    model: ModelOption = None,
    tau: Annotated[
        float | None, typer.Option(help="Spike threshold in place of the model's.")
    ] = None,
    view: Annotated[str, typer.Option(help="Values: mean, gamma or spike.")] = "mean",
    max_active: Annotated[
        int | None, typer.Option(help="Keep this many active latents of an image.")
    ] = None,
    uncertainty: Annotated[
        bool, typer.Option("--uncertainty", help="Store gamma and sigma too.")
    ] = False,
    device: DeviceOption = "auto",
    exclude: Annotated[
        list[str] | None, typer.Option(help="Pattern of paths to leave out; repeatable.")
    ] = None,
    ids: Annotated[str, typer.Option(help="relative, absolute or name.")] = "relative",
    update: Annotated[
        bool, typer.Option("--update", help="Encode only what is new or changed since --out.")
    ] = False,
    shard: Annotated[str, typer.Option(help="Do share i of n of the images: 2/4.")] = "1/1",
    shard_rows: Annotated[int, typer.Option(help="Images a shard.")] = _SHARD_ROWS,
    compress: Annotated[bool, typer.Option("--compress", help="Deflate the numbers.")] = False,
    on_error: Annotated[str, typer.Option(help="skip or fail at an unreadable file.")] = "skip",
    strict: Annotated[
        bool, typer.Option("--strict", help="Exit 3 if any file is unreadable.")
    ] = False,
    workers: Annotated[
        int | None, typer.Option(help="Processes (default: all processors; 0: threads).")
    ] = None,
    batch_size: Annotated[int | None, typer.Option(help="Images a batch.")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only say what would be done.")
    ] = False,
    force: ForceOption = False,
    as_json: JsonOption = False,
) -> None:
    """Encode images into a file of sparse codes."""
    from vsc_serve.options import EncodeOptions
    from vsc_serve.pipeline import Request

    request = Request(
        inputs=inputs,
        out=out,
        model=find_model(model),
        options=EncodeOptions(
            tau=tau, view=_one_of("view", view), max_active=max_active, uncertainty=uncertainty
        ),
        device=check_device(device),
        exclude=exclude or [],
        ids=_one_of("ids", ids),
        workers=workers,
        batch_size=_at_least_one("batch-size", batch_size),
        share=_read_share(shard),
        shard_rows=_at_least_one("shard-rows", shard_rows) or _SHARD_ROWS,
        is_update=update,
        compress=compress,
        fails_at_once=_one_of("on-error", on_error) == "fail",
        is_strict=strict,
        force=force,
    )
    with ending_cleanly():
        if dry_run:
            _say_plan(request, as_json=as_json)
        else:
            _encode(request, as_json=as_json)


def _encode(request: "Request", *, as_json: bool) -> None:
    from vsc_serve.pipeline import encode_to_file

    @contextmanager
    def show(unit: str) -> Iterator[Progress]:
        with progress("encode", None, unit) as shown:
            if sys.stderr.isatty():
                Thread(target=_expect, args=(request, shown), daemon=True).start()
            yield shown

    convert = _write_parquet if request.out.suffix == ".parquet" else None
    if convert is not None:
        require_extra("parquet", "pyarrow")
    outcome, scan, pool = encode_to_file(request, say=say, show=show, convert=convert)
    _say_encoded(request, outcome, scan, pool)
    if as_json:
        print_text(json.dumps(_encoded_figures(request, outcome, scan)))


def _expect(request: "Request", shown: Progress) -> None:
    """Count the pictures in folders beside the work, so that the bar can tell the time left."""
    from vsc_serve.sources import find_sources

    if request.share == (1, 1) and all(os.path.isdir(given) for given in request.inputs):  # noqa: PTH112
        with suppress(VscError):
            found = find_sources(request.inputs, exclude=request.exclude, ids=request.ids)
            shown.expect(sum(1 for _ in found))


def _write_parquet(shards: Sequence[Path], out: Path) -> None:
    from vsc_serve.convert import plan, write_file

    write_file(plan(shards, to="parquet"), out)


def _say_plan(request: "Request", *, as_json: bool) -> None:
    """Say what would be done."""
    from vsc_serve.pipeline import plan

    scan, finished, pool = plan(request)
    left = scan.sources - finished
    say("scan", _scanned(scan))
    say("would", f"encode {left:,} images with {pool.workers} {pool.kind} into {request.out}")
    if finished:
        say("resume", f"{finished:,} images are done already")
    if request.is_update and request.out.exists():
        say("update", f"those with the same content as in {request.out} are read, not encoded")
    if as_json:
        figures = {"images": scan.sources, "skipped": dict(scan.skipped), "done": finished}
        print_text(json.dumps(figures | {"workers": pool.workers, "kind": pool.kind}))


def _scanned(scan: "Scan") -> str:
    passed_over = sum(scan.skipped.values())
    reasons = ", ".join(f"{count:,} {why}" for why, count in scan.skipped.most_common(4))
    return (
        f"{scan.sources + passed_over:,} files: {scan.sources:,} images, {passed_over:,} passed"
        f" over{f' ({reasons})' if reasons else ''}"
    )


def _encoded_figures(request: "Request", outcome: "Outcome", scan: "Scan") -> dict[str, Any]:
    figures = outcome.figures
    return {
        "out": str(request.out),
        "errors": outcome.bad,
        "reasons": outcome.reasons,
        "skipped": dict(scan.skipped),
        "images": figures.rows,
        "fresh": figures.fresh,
        "resumed": outcome.resumed,
        "latents": len(figures.firing),
        "active": figures.entries / figures.rows,
        "empty": figures.empty,
        "live": _live(figures),
        "always_on": _always_on(figures),
        "near_threshold": _near_share(figures),
        "seconds": asdict(outcome.seconds) | {"total": outcome.total_s},
    }


def _say_encoded(request: "Request", outcome: "Outcome", scan: "Scan", pool: "Pool") -> None:
    from vsc_serve.pipeline import errors_path

    figures = outcome.figures
    say("scan", _scanned(scan))
    say("encode", _speed(outcome, pool))
    say(
        "codes",
        f"{figures.rows:,} x {len(figures.firing)}, {figures.entries / figures.rows:.1f} active per"
        f" image, {figures.empty:,} empty rows{_kept_energy(request, figures)}",
    )
    live, always_on = _live(figures), _always_on(figures)
    say(
        "features",
        f"{live} live, {len(figures.firing) - live} dead, {always_on} always on{_near(figures)}",
    )
    if outcome.bad:
        reasons = ", ".join(f"{count} {reason}" for reason, count in _frequent(outcome.reasons))
        listed = request.out / "errors.jsonl" if request.is_folder else errors_path(request.out)
        say("skipped", f"{outcome.bad:,} files without a row ({reasons}): {listed}")
    say("wrote", f"{request.out}  {_size(request.out) / 1e3:,.0f} kB")
    say("next", f"vsc search {request.out} --like IMAGE --explain")


def _speed(outcome: "Outcome", pool: "Pool") -> str:
    """Say how fast it went, and where the time did."""
    seconds, rows = outcome.seconds, outcome.figures.rows
    parts = {"read": seconds.read, "decode": seconds.decode, "model": seconds.model}
    busy = max(sum(parts.values()), 1e-9)
    shares = " | ".join(f"{name} {spent / busy:.0%}" for name, spent in parts.items())
    new = outcome.figures.fresh if outcome.figures.fresh < rows else rows
    repeated = f", {new:,} of them new" if new < rows else ""
    return (
        f"{rows:,} images in {outcome.total_s:.1f} s{repeated},"
        f" {rows / max(outcome.total_s, 1e-9):,.0f}/s, {_team(pool)}  ({shares})"
    )


def _team(pool: "Pool") -> str:
    """Say how many worked: `2 processes`, `1 process`."""
    word, space, rest = pool.kind.partition(" ")
    return f"{pool.begun} {_ONE.get(word, word) if pool.begun == 1 else word}{space}{rest}"


def _kept_energy(request: "Request", figures: "Figures") -> str:
    if request.options.max_active is None or not figures.total_energy:
        return ""
    return f", {figures.kept_energy / figures.total_energy:.1%} of the energy kept"


def _live(figures: "Figures") -> int:
    from vsc_serve.analysis.features import LIVE_SHARE

    return int((figures.firing >= LIVE_SHARE * figures.rows).sum())


def _always_on(figures: "Figures") -> int:
    from vsc_serve.analysis.features import ALWAYS_ON_SHARE

    return int((figures.firing > ALWAYS_ON_SHARE * figures.rows).sum())


def _near_share(figures: "Figures") -> float | None:
    decisions = figures.judged * len(figures.firing)
    return figures.near_threshold / decisions if decisions else None


def _near(figures: "Figures") -> str:
    share = _near_share(figures)
    return "" if share is None else f"; {share:.2%} of decisions within 1e-4 of the threshold"


def _frequent(reasons: dict[str, int]) -> list[tuple[str, int]]:
    return sorted(reasons.items(), key=lambda pair: -pair[1])


def _size(out: Path) -> int:
    files = out.iterdir() if out.is_dir() else [out]
    return sum(file.stat().st_size for file in files)


def _one_of(option: str, choice: str) -> Any:
    """Return the choice when it is one of the option's. Raises UsageError."""
    if choice not in _CHOICES[option]:
        raise UsageError(f"--{option} must be one of {', '.join(_CHOICES[option])}, not {choice}")
    return choice


def _at_least_one(option: str, number: int | None) -> int | None:
    if number is not None and number < 1:
        raise UsageError(f"--{option} must be 1 or more, not {number}")
    return number


def _read_share(text: str) -> tuple[int, int]:
    """Read `i/n`: share i of n, from 1. Raises UsageError."""
    number, slash, count = text.partition("/")
    if slash and number.isdecimal() and count.isdecimal() and 1 <= int(number) <= int(count):
        return int(number), int(count)
    raise UsageError(f"--shard must be i/n with i from 1 to n, such as 2/4, not {text}")
