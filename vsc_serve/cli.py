"""The command line. Each command reads its arguments, calls one function and prints.

Results go to stdout, talk and progress to stderr. Heavy modules are imported inside the commands,
and `train`, `export` and `demo` join through the entry-point group `vsc.commands`, so `vsc --help`
loads none of it.
"""

import json
import logging
import os
import sys
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from vsc_serve.console import progress, require_extra, say
from vsc_serve.errors import Interrupted, UsageError, VscError

if TYPE_CHECKING:
    from vsc_serve.codes import CodeFile, Codes
    from vsc_serve.encoder import Encoder
    from vsc_serve.pipeline import Encoded

app = typer.Typer(
    name="vsc",
    help="Sparse codes for images: train, export, encode, search, serve.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

_DEFAULT_MODEL: Final = Path("model")
_DEVICES: Final = ("auto", "cpu", "cuda")

ModelOption = Annotated[
    Path | None, typer.Option(help="Bundle to use (default: $VSC_MODEL, else ./model).")
]
DeviceOption = Annotated[str, typer.Option(help="auto, cpu or cuda.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON to stdout.")]
ForceOption = Annotated[bool, typer.Option("--force", help="Replace the output.")]


@app.callback(invoke_without_command=True)
def _version(
    *, version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False
) -> None:
    if version:
        from vsc_serve import __version__

        _print(f"vsc-serve {__version__}")
        raise typer.Exit


@app.command()
def encode(
    inputs: Annotated[
        list[Path], typer.Argument(help="Folders and image files; or one .npy or .npz.")
    ],
    out: Annotated[Path, typer.Option(help="File to write, codes.npz.")],
    *,
    model: ModelOption = None,
    tau: Annotated[
        float | None, typer.Option(help="Spike threshold in place of the model's.")
    ] = None,
    device: DeviceOption = "auto",
    strict: Annotated[
        bool, typer.Option("--strict", help="Exit 3 if any file is unreadable.")
    ] = False,
    force: ForceOption = False,
    as_json: JsonOption = False,
) -> None:
    """Encode images into a file of sparse codes."""
    from vsc_serve.arrays import SUFFIXES
    from vsc_serve.atomic import refuse_existing
    from vsc_serve.codes import write_codes
    from vsc_serve.encoder import Encoder
    from vsc_serve.errors import InputError
    from vsc_serve.images import find_images
    from vsc_serve.pipeline import encode_files, errors_path, require_rows, write_bad_images

    refuse_existing(out, force=force)
    path = _find_model(model)
    encoder = Encoder.open(path, device=_device(device))
    say(
        "model",
        f"{path}  {encoder.manifest.name}, J={encoder.manifest.latent_dim}, {encoder.engine}",
    )
    if any(given.suffix in SUFFIXES for given in inputs):
        encoded = _encode_array(encoder, inputs, tau)
    else:
        sources = find_images(inputs)
        with progress("encode", len(sources), "images") as shown:
            encoded = encode_files(encoder, sources, tau=tau, report=shown)
    errors = errors_path(out)
    write_bad_images(errors, encoded.bad)
    require_rows(encoded)
    if strict and encoded.bad:
        raise InputError(
            f"--strict: {len(encoded.bad)} of {len(encoded.bad) + len(encoded.ids)} files cannot be"
            f" read, see {errors}."
            " No codes were written."
        )
    write_codes(out, encoded.codes, encoded.ids, encoder.provenance(tau=tau))
    _say_encoded(out, encoded)
    if as_json:
        _print(json.dumps(_encoded_figures(out, encoded)))


@app.command()
def decode(
    codes: Annotated[Path, typer.Argument(help="File that `vsc encode` wrote.")],
    *,
    out: Annotated[Path | None, typer.Option(help="Folder for one PNG per row.")] = None,
    sheet: Annotated[
        Path | None, typer.Option(help="PNG to draw: inputs, reconstructions, active features.")
    ] = None,
    images: Annotated[
        Path | None, typer.Option(help="Folder that was encoded, to show the inputs in --sheet.")
    ] = None,
    rows: Annotated[str | None, typer.Option(help="Rows, as START:STOP.")] = None,
    model: ModelOption = None,
    device: DeviceOption = "auto",
    force: ForceOption = False,
) -> None:
    """Draw what codes say: reconstructions, or a contact sheet."""
    from vsc_serve.atomic import refuse_existing
    from vsc_serve.codes import read_codes
    from vsc_serve.encoder import Decoder

    if out is None and sheet is None:
        raise UsageError("nothing to do: give --out DIR, --sheet FILE.png, or both")
    for path in (out, sheet):
        if path is not None:
            refuse_existing(path, force=force)
    stored = read_codes(codes)
    chosen = _pick_rows(stored, rows, default_count=None if sheet is None else 10)
    bundle = _find_model(model)
    decoder = Decoder.open(bundle, device=_device(device))
    _warn_other_model(stored, decoder.manifest.digest, bundle)
    if out is not None:
        from vsc_serve.analysis.reconstruct import write_reconstructions

        count = write_reconstructions(decoder, stored, rows=_pick_rows(stored, rows), out=out)
        say("wrote", f"{out}  {count} reconstructions")
    if sheet is not None:
        from vsc_serve.analysis.reconstruct import write_contact_sheet

        write_contact_sheet(decoder, stored, rows=chosen, images=images, path=sheet)
        say("wrote", f"{sheet}  {len(chosen)} rows")


@app.command()
def search(
    codes: Annotated[Path, typer.Argument(help="File that `vsc encode` wrote.")],
    like: Annotated[str, typer.Option(help="An image file, or the id of a row.")],
    *,
    top: Annotated[int, typer.Option(help="Hits to print.", min=1)] = 10,
    metric: Annotated[str, typer.Option(help="cosine or dot.")] = "cosine",
    explain: Annotated[bool, typer.Option("--explain", help="List the shared features.")] = False,
    model: ModelOption = None,
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Find the rows most like an image, exactly."""
    from dataclasses import asdict

    from vsc_serve.codes import read_codes
    from vsc_serve.index import exact

    if metric not in exact.METRICS:
        raise UsageError(f"--metric must be one of {', '.join(exact.METRICS)}, not {metric}")
    chosen: exact.Metric = metric  # type: ignore[assignment]  # checked above
    stored = read_codes(codes)
    query = _query_code(stored, like, model, device)
    hits = exact.search(stored.codes, query, top=top, metric=chosen)
    features = {
        hit.row: exact.explain(stored.codes, hit.row, query, metric=chosen) if explain else []
        for hit in hits
    }
    if as_json:
        found = [
            {"id": stored.ids[hit.row], **asdict(hit)}
            | ({"shared": [asdict(feature) for feature in features[hit.row]]} if explain else {})
            for hit in hits
        ]
        _print(json.dumps({"like": like, "metric": metric, "hits": found}))
        return
    for hit in hits:
        _print(f"{hit.score:7.4f}  {stored.ids[hit.row]}")
        for feature in features[hit.row]:
            _print(
                f"         {feature.score:+.3f}  feature {feature.latent:<5}"
                f" query {feature.query:+.2f}, hit {feature.hit:+.2f}"
            )


@app.command()
def info(
    path: Annotated[Path, typer.Argument(help="A run, a bundle, or a codes file.")],
    *,
    as_json: JsonOption = False,
) -> None:
    """Say what a run, a bundle or a codes file is."""
    from vsc_serve.analysis.describe import describe

    facts = describe(path)
    if as_json:
        _print(json.dumps(facts, indent=2))
        return
    width = max(len(name) for name in facts)
    for name, value in facts.items():
        _print(f"{name:<{width}}  {value}")


@app.command()
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
    from vsc_serve.server import serve as run_service
    from vsc_serve.service import Limits

    limits = Limits(max_body_bytes=max_body_mb * 1_000_000, max_rows=max_rows)
    run_service(_find_model(model), host=host, port=port, device=_device(device), limits=limits)


@app.command()
def doctor(*, as_json: JsonOption = False) -> None:
    """Say what is installed, which engines load, and what to do."""
    from vsc_serve.analysis.doctor import examine

    findings = examine()
    if as_json:
        _print(json.dumps([vars(finding) for finding in findings]))
    else:
        for finding in findings:
            _print(f"{finding.mark:<5} {finding.name:<16} {finding.text}")
    if any(finding.mark == "FAIL" for finding in findings):
        raise typer.Exit(1)


def main() -> None:
    """Run `vsc`. A VscError becomes one line on stderr and the exit code of its class."""
    logging.basicConfig(format="%(levelname)s %(message)s", stream=sys.stderr)
    for entry_point in sorted(entry_points(group="vsc.commands"), key=lambda entry: entry.name):
        app.add_typer(entry_point.load())
    try:
        code = app(standalone_mode=False)
    except VscError as error:
        _fail(error)
    except KeyboardInterrupt:
        _fail(Interrupted("interrupted. Nothing is half-written; run the same command again."))
    except typer.Abort:
        sys.exit(Interrupted.exit_code)
    except Exception as error:
        if not hasattr(error, "format_message"):  # what typer raises for wrong arguments has it
            raise
        _fail(UsageError(f"{error.format_message()} See vsc --help."))
    sys.exit(code if isinstance(code, int) else 0)


def _fail(error: VscError) -> None:
    sys.stderr.write(f"vsc: {error}\n")
    sys.exit(error.exit_code)


def _print(text: str) -> None:
    """Print to stdout; file names that are not valid text are escaped, not fatal."""
    sys.stdout.write(text.encode("utf-8", "backslashreplace").decode("utf-8") + "\n")


def _find_model(given: Path | None) -> Path:
    """Return the bundle to use: as given, else $VSC_MODEL, else ./model."""
    if given is not None:
        return given
    named = os.environ.get("VSC_MODEL")
    if named:
        return Path(named)
    if _DEFAULT_MODEL.is_dir():
        return _DEFAULT_MODEL
    from vsc_serve.errors import BundleError

    raise BundleError(
        "no model: give --model DIR, set VSC_MODEL, or make ./model with `vsc train` and `vsc"
        " export`"
    )


def _device(choice: str) -> Any:
    if choice not in _DEVICES:
        raise UsageError(f"--device must be one of {', '.join(_DEVICES)}, not {choice}")
    return choice


def _pick_rows(stored: "CodeFile", rows: str | None, default_count: int | None = None) -> range:
    """Read START:STOP; without it the first `default_count` rows, or all."""
    row_count = stored.codes.shape[0]
    if rows is None:
        return range(row_count)[:default_count]
    start, separator, stop = rows.partition(":")
    try:
        first = int(start) if start else 0
        last = int(stop) if stop else (row_count if separator else first + 1)
    except ValueError:
        raise UsageError(f"--rows {rows}: expected START:STOP, for example 0:10") from None
    picked = range(row_count)[first:last]
    if not picked:
        raise UsageError(f"--rows {rows}: no such rows; there are {row_count}, from 0")
    return picked


def _query_code(stored: "CodeFile", like: str, model: Path | None, device: str) -> "Codes":
    """Return the code of a row (by id) or of an image file."""
    path = Path(like)
    if like in stored.ids and not path.is_file():
        return stored.codes[[stored.ids.index(like)]]
    if not path.exists():
        raise UsageError(f"--like {like}: no such file, and no row has that id")
    from vsc_serve.encoder import Encoder

    bundle = _find_model(model)
    encoder = Encoder.open(bundle, device=_device(device))
    _warn_other_model(stored, encoder.manifest.digest, bundle)
    return encoder.encode([path], tau=stored.meta.get("tau"))


def _warn_other_model(stored: "CodeFile", digest: str, bundle: Path) -> None:
    made_by = stored.meta.get("model_digest")
    if made_by is not None and made_by != digest:
        raise UsageError(
            f"the codes were made by model {stored.meta.get('model')} ({made_by}), but {bundle}"
            f" is {digest}."
            " Codes of two models cannot be compared: give the --model that made them."
        )


def _encode_array(encoder: "Encoder", inputs: list[Path], tau: float | None) -> "Encoded":
    """Encode one numpy file. Its rows have numbers for ids, so it cannot join other inputs."""
    from vsc_serve.arrays import read_rows
    from vsc_serve.pipeline import encode_array

    if len(inputs) > 1:
        raise UsageError("an .npy or .npz file is encoded by itself: give no other input with it")
    if not inputs[0].is_file():
        raise UsageError(f"{inputs[0]}: no such file. Check the path.")
    source = read_rows(inputs[0])
    if not source.ids:
        raise UsageError(f"{inputs[0]}: holds no rows. Nothing was written.")
    with progress("encode", len(source.ids), "rows") as shown:
        return encode_array(encoder, source, tau=tau, report=shown)


def _encoded_figures(out: Path, encoded: "Encoded") -> dict[str, Any]:
    from dataclasses import asdict

    from vsc_serve.analysis.features import feature_summary

    return {
        "out": str(out),
        "errors": len(encoded.bad),
        **feature_summary(encoded.codes),
        **asdict(encoded.timings),
    }


def _say_encoded(out: Path, encoded: "Encoded") -> None:
    from vsc_serve.analysis.features import feature_summary
    from vsc_serve.pipeline import count_reasons, errors_path

    figures, timings = feature_summary(encoded.codes), encoded.timings
    busy = max(timings.read_s + timings.encode_s, 1e-9)
    say(
        "encode",
        f"{figures['images']:,} images in {timings.total_s:.1f} s,"
        f" {figures['images'] / max(timings.total_s, 1e-9):,.0f}/s"
        f"  (decode {timings.read_s / busy:.0%} | model {timings.encode_s / busy:.0%})",
    )
    say(
        "codes",
        f"{figures['images']:,} x {figures['latents']}, {figures['active']:.1f} active per image,"
        f" {figures['live']} features live, {figures['always_on']} always on, {figures['empty']}"
        " empty rows",
    )
    if encoded.bad:
        reasons = ", ".join(f"{count} {reason}" for reason, count in count_reasons(encoded.bad))
        say("skipped", f"{len(encoded.bad)} files without a row ({reasons}): {errors_path(out)}")
    say("wrote", f"{out}  {out.stat().st_size / 1e3:,.0f} kB")
    say("next", f"vsc search {out} --like IMAGE --explain")
