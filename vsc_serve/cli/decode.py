"""`vsc decode`: codes to images."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vsc_serve.cli.options import (
    DeviceOption,
    ForceOption,
    ModelOption,
    find_model,
    refuse_other_model,
)
from vsc_serve.console import say
from vsc_serve.errors import UsageError

if TYPE_CHECKING:
    from vsc_serve.codes import CodeFile


def decode(
    codes: Annotated[Path, typer.Argument(help="File or folder that `vsc encode` wrote.")],
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
    from vsc_serve.analysis.reconstruct import (
        RECONSTRUCTIONS,
        write_contact_sheet,
        write_reconstructions,
    )
    from vsc_serve.codes import read_codes
    from vsc_serve.decoder import Decoder
    from vsc_serve.outputs import PNG, check_output

    if out is None and sheet is None:
        raise UsageError("nothing to do: give --out DIR, --sheet FILE.png, or both")
    bundle = find_model(model)
    read = [codes, bundle, *([images] if images is not None else [])]
    for path, kind in ((out, RECONSTRUCTIONS), (sheet, PNG)):
        if path is not None:
            check_output(path, kind, force=force, inputs=read)
    stored = read_codes(codes)
    _refuse_other_values(stored)
    chosen = _pick_rows(stored, rows, default_count=None if sheet is None else 10)
    decoder = Decoder.open(bundle, device=device)
    refuse_other_model(stored, decoder.manifest.digest, bundle)
    if out is not None:
        count = write_reconstructions(decoder, stored, rows=_pick_rows(stored, rows), out=out)
        say("wrote", f"{out}  {count} reconstructions")
    if sheet is not None:
        write_contact_sheet(decoder, stored, rows=chosen, images=images, path=sheet)
        say("wrote", f"{sheet}  {len(chosen)} rows")


def _refuse_other_values(stored: "CodeFile") -> None:
    """Raise UsageError for values that are no slab means: a decoder would draw nonsense."""
    from vsc_serve.options import EncodeOptions

    view = EncodeOptions.of_codes(stored.meta).view
    if view != "mean":
        raise UsageError(
            f"these codes hold the view {view}, which no decoder draws. Encode with --view mean."
        )


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
