"""`vsc encode`: files to codes."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

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
from vsc_serve.console import progress, say
from vsc_serve.errors import UsageError

if TYPE_CHECKING:
    from vsc_serve.encoder import Encoder
    from vsc_serve.pipeline import Encoded


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
    path = find_model(model)
    encoder = Encoder.open(path, device=check_device(device))
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
        print_text(json.dumps(_encoded_figures(out, encoded)))


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
