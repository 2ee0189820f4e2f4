"""`vsc encode`: files to codes."""

import json
import os
import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal

import typer

from vsc_serve.cli.options import (
    DeviceOption,
    ForceOption,
    JsonOption,
    ModelOption,
    find_model,
    print_text,
)
from vsc_serve.cli.translate import as_options
from vsc_serve.console import Progress, ending_cleanly, progress, require_extra, say
from vsc_serve.errors import UsageError, VscError

if TYPE_CHECKING:
    from vsc_serve.codes import CodeStatistics
    from vsc_serve.pipeline import Encoded, Job, Scan

_SHARD_ROWS: Final = 100_000
_MAX_PIXELS: Final = 89_478_485
_ONE: Final = {"processes": "process", "threads": "thread"}

# The same as `View`, `Ids` and `OnError`, which importing would load scipy for `vsc --help`; a test
# compares them.
_View = Literal["mean", "gamma", "spike", "query"]
_As = Literal["rows", "query"]
_Ids = Literal["relative", "absolute", "name"]
_OnError = Literal["skip", "fail"]


def encode(
    inputs: Annotated[
        list[str],
        typer.Argument(help="Folders, files, patterns, archives, URLs, -."),
    ],
    out: Annotated[Path, typer.Option(help="codes.npz, .parquet, or a folder.")],
    *,
    model: ModelOption = None,
    tau: Annotated[
        float | None, typer.Option(help="Spike threshold in place of the model's.")
    ] = None,
    view: Annotated[_View | None, typer.Option(help="What values are (default: mean).")] = None,
    made_as: Annotated[_As, typer.Option("--as", help="Rows or wide queries.")] = "rows",
    stored_tau: Annotated[
        float | None, typer.Option(help="Tau of the rows that queries are for.")
    ] = None,
    max_active: Annotated[
        int | None, typer.Option(help="Keep this many active latents of an image.")
    ] = None,
    uncertainty: Annotated[
        bool, typer.Option("--uncertainty", help="Store gamma and sigma too.")
    ] = False,
    refit: Annotated[
        bool, typer.Option("--refit", help="Values that decode nearest to the data.")
    ] = False,
    device: DeviceOption = "auto",
    exclude: Annotated[
        list[str] | None, typer.Option(help="Pattern of paths to leave out; repeatable.")
    ] = None,
    ids: Annotated[_Ids, typer.Option(help="How rows are named.")] = "relative",
    update: Annotated[
        bool, typer.Option("--update", help="Encode only what is new or has changed.")
    ] = False,
    shard: Annotated[str, typer.Option(help="Do share i of n: 2/4.")] = "1/1",
    shard_rows: Annotated[int, typer.Option(help="Images a shard.")] = _SHARD_ROWS,
    compress: Annotated[bool, typer.Option("--compress", help="Deflate the numbers.")] = False,
    on_error: Annotated[_OnError, typer.Option(help="What an unreadable file does.")] = "skip",
    strict: Annotated[
        bool, typer.Option("--strict", help="Exit 3 if any file is unreadable.")
    ] = False,
    workers: Annotated[
        int | None, typer.Option(help="Processes (default: all processors; 0: threads).")
    ] = None,
    batch_size: Annotated[int | None, typer.Option(help="Images a batch.")] = None,
    max_pixels: Annotated[
        int, typer.Option(help="Largest image that is decoded, in pixels.", min=1)
    ] = _MAX_PIXELS,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only say what would be done.")
    ] = False,
    force: ForceOption = False,
    as_json: JsonOption = False,
) -> None:
    """Encode images into a file of sparse codes."""
    from vsc_serve.executors import ExecutorOptions, ReadOptions
    from vsc_serve.options import EncodeOptions
    from vsc_serve.pipeline import Job

    job = Job(
        inputs=inputs,
        out=out,
        model=find_model(model),
        options=EncodeOptions(
            tau=tau,
            view=_choose_view(view, made_as),
            max_active=max_active,
            uncertainty=uncertainty,
            stored_tau=stored_tau,
            refit=refit,
        ),
        executor=ExecutorOptions(
            device=device,
            workers=workers,
            read=ReadOptions(max_pixels=max_pixels),
        ),
        batch_size=batch_size,
        exclude=exclude or [],
        ids=ids,
        share=_read_share(shard),
        shard_rows=shard_rows,
        is_update=update,
        compress=compress,
        on_error=on_error,
        is_strict=strict,
        force=force,
    )
    with ending_cleanly():
        if dry_run:
            _say_plan(job, as_json=as_json)
        else:
            _encode(job, given_model=model, as_json=as_json)


def _choose_view(view: _View | None, made_as: _As) -> _View:
    if made_as == "query" and view is not None:
        raise UsageError("--as query sets the values of queries: leave --view out")
    return "query" if made_as == "query" else view or "mean"


def _encode(job: "Job", *, given_model: Path | None, as_json: bool) -> None:
    from vsc_serve.pipeline import encode_to_file

    @contextmanager
    def show(unit: str) -> Iterator[Progress]:
        with progress("encode", None, unit) as shown:
            if sys.stderr.isatty():
                Thread(target=_expect, args=(job, shown), daemon=True).start()
            yield shown

    convert = _write_parquet if job.out.suffix == ".parquet" else None
    if convert is not None:
        require_extra("parquet", "pyarrow")
    encoded = encode_to_file(job, say=_say, show=show, convert=convert)
    _say_encoded(job, encoded)
    say("next", _next_command(job, given_model, encoded.outcome.example))
    if as_json:
        print_text(json.dumps(_encoded_metrics(job, encoded)))


def _say(label: str, text: str) -> None:
    say(label, as_options(text))


def _next_command(job: "Job", given_model: Path | None, example: str) -> str:
    """Return a command that works as it stands. `example` is the id of a row."""
    if job.out.suffix == ".parquet":
        script = f"import pyarrow.parquet; print(pyarrow.parquet.read_table({str(job.out)!r}))"
        return shlex.join(["python", "-c", script])
    if job.options.view == "query":
        return shlex.join(["vsc", "search", "CODES", "--queries", str(job.out)])
    command = ["vsc", "search", str(job.out), f"--like={example}", "--explain"]
    if not example.startswith("-"):
        command[3:4] = ["--like", example]
    return shlex.join([*command, *([] if given_model is None else ["--model", str(given_model)])])


def _expect(job: "Job", shown: Progress) -> None:
    """Count the images in folders beside the work, so that the bar can tell the time left."""
    from vsc_serve.sources import find_sources

    if job.share == (1, 1) and all(os.path.isdir(given) for given in job.inputs):  # noqa: PTH112
        with suppress(VscError):
            found = find_sources(job.inputs, exclude=job.exclude, ids=job.ids)
            shown.expect(sum(1 for _ in found))


def _write_parquet(shards: Sequence[Path], out: Path) -> None:
    from vsc_serve.convert import plan, write_file

    write_file(plan(shards, to="parquet"), out)


def _say_plan(job: "Job", *, as_json: bool) -> None:
    """Say what would be done."""
    from vsc_serve.pipeline import plan

    scan, finished, executor = plan(job)
    left = scan.sources - finished
    say("scan", _scanned(scan))
    say("would", f"encode {left:,} images with {executor.workers} {executor.kind} into {job.out}")
    if finished:
        say("resume", f"{finished:,} images are done already")
    if job.is_update and job.out.exists():
        say("update", f"those with the same content as in {job.out} are read, not encoded")
    if as_json:
        counts = {"images": scan.sources, "skipped": dict(scan.skipped), "done": finished}
        print_text(json.dumps(counts | {"workers": executor.workers, "kind": executor.kind}))


def _scanned(scan: "Scan") -> str:
    passed_over = sum(scan.skipped.values())
    reasons = ", ".join(f"{count:,} {why}" for why, count in scan.skipped.most_common(4))
    return (
        f"{scan.sources + passed_over:,} files: {scan.sources:,} images, {passed_over:,} passed"
        f" over{f' ({reasons})' if reasons else ''}"
    )


def _encoded_metrics(job: "Job", encoded: "Encoded") -> dict[str, Any]:
    outcome, statistics = encoded.outcome, encoded.outcome.statistics
    return {
        "out": str(job.out),
        "errors": outcome.rejected,
        "reasons": outcome.reasons,
        "skipped": dict(encoded.scan.skipped),
        **statistics.summary(),
        "fresh": statistics.fresh,
        "resumed": outcome.resumed,
        "near_threshold": statistics.near_share,
        "domain": None if outcome.domain is None else outcome.domain.to_json(),
        "seconds": asdict(outcome.seconds) | {"total": outcome.total_s},
    }


def _say_encoded(job: "Job", encoded: "Encoded") -> None:
    outcome, statistics = encoded.outcome, encoded.outcome.statistics
    say("scan", _scanned(encoded.scan))
    say("encode", _speed(encoded))
    say(
        "codes",
        f"{statistics.images:,} x {statistics.latents}, {statistics.active:.1f} active per"
        f" image, {statistics.empty:,} empty rows{_kept_energy(job, statistics)}",
    )
    say(
        "features",
        f"{statistics.live} live, {statistics.dead} dead, {statistics.always_on} always"
        f" on{_near(statistics)}",
    )
    if outcome.domain is not None and outcome.domain.out_of_domain:
        outside = ", ".join(outcome.domain.out_of_domain)
        say("domain", f"far outside the model's own data ({outside}): {outcome.domain}")
        say("", f"the features may not fit these images: {_fit_command(job)}")
    if outcome.rejected:
        frequent = sorted(outcome.reasons.items(), key=lambda pair: -pair[1])
        reasons = ", ".join(f"{count} {kind}" for kind, count in frequent)
        say("skipped", f"{outcome.rejected:,} inputs without a row ({reasons}): {job.errors_path}")
    say("wrote", f"{job.out}  {_size(job.out) / 1e3:,.0f} kB")


def _fit_command(job: "Job") -> str:
    """Return how a model of these inputs is made."""
    if job.is_array:
        return shlex.join(["vsc", "train", job.inputs[0], "--out", "run/"])
    return shlex.join(["vsc", "fit", job.inputs[0], "--out", "model/"])


def _speed(encoded: "Encoded") -> str:
    """Say how fast it went, and where the time did."""
    outcome, statistics = encoded.outcome, encoded.outcome.statistics
    seconds, images = outcome.seconds, statistics.images
    parts = {"read": seconds.read, "decode": seconds.decode, "model": seconds.model}
    busy = max(sum(parts.values()), 1e-9)
    shares = " | ".join(f"{name} {spent / busy:.0%}" for name, spent in parts.items())
    is_all_new = statistics.fresh >= images
    repeated = "" if is_all_new else f", {statistics.fresh:,} of them new"
    return (
        f"{images:,} images in {outcome.total_s:.1f} s{repeated},"
        f" {images / max(outcome.total_s, 1e-9):,.0f}/s, {_workers(encoded)}  ({shares})"
    )


def _workers(encoded: "Encoded") -> str:
    """Say how many worked: `2 processes`, `1 process`."""
    started = encoded.executor.started
    word, space, rest = encoded.executor.kind.partition(" ")
    return f"{started} {_ONE.get(word, word) if started == 1 else word}{space}{rest}"


def _kept_energy(job: "Job", statistics: "CodeStatistics") -> str:
    decisions = statistics.decisions
    if job.options.max_active is None or not decisions.total_energy:
        return ""
    return f", {decisions.kept_energy / decisions.total_energy:.1%} of the energy kept"


def _near(statistics: "CodeStatistics") -> str:
    share = statistics.near_share
    return "" if share is None else f"; {share:.2%} of decisions within 1e-4 of the threshold"


def _size(out: Path) -> int:
    files = out.iterdir() if out.is_dir() else [out]
    return sum(file.stat().st_size for file in files)


def _read_share(text: str) -> tuple[int, int]:
    """Read `i/n`: share i of n, from 1. Raises UsageError."""
    number, slash, count = text.partition("/")
    if slash and number.isdecimal() and count.isdecimal() and 1 <= int(number) <= int(count):
        return int(number), int(count)
    raise UsageError(f"--shard must be i/n with i from 1 to n, such as 2/4, not {text}")
