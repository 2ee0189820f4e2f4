"""`vsc search`: the rows most like an image."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from vsc_serve.cli.options import (
    Device,
    DeviceOption,
    JsonOption,
    ModelOption,
    find_model,
    print_json,
    print_text,
    refuse_other_model,
)
from vsc_serve.console import say
from vsc_serve.errors import UsageError

if TYPE_CHECKING:
    from vsc_serve.codes import CodeFile, Codes

_Metric = Literal["cosine", "dot"]
"""The same as `index.exact.Metric`; a test compares them."""


def search(
    codes: Annotated[Path, typer.Argument(help="File or folder that `vsc encode` wrote.")],
    like: Annotated[str, typer.Option(help="An image file, or the id of a row.")],
    *,
    top: Annotated[int, typer.Option(help="Hits to print.", min=1)] = 10,
    metric: Annotated[_Metric, typer.Option(help="Score.")] = "cosine",
    explain: Annotated[bool, typer.Option("--explain", help="List the shared features.")] = False,
    model: ModelOption = None,
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Find the rows most like an image, exactly."""
    from dataclasses import asdict

    from vsc_serve.codes import read_codes
    from vsc_serve.index import exact

    stored = read_codes(codes)
    query = _query_code(stored, like, model, device)
    hits = exact.search(stored.codes, query, top=top, metric=metric) if query.nnz else []
    features = {
        hit.row: exact.explain(stored.codes, hit.row, query, metric=metric) if explain else []
        for hit in hits
    }
    if as_json:
        found = [
            {"id": stored.ids[hit.row], **asdict(hit)}
            | ({"shared": [asdict(feature) for feature in features[hit.row]]} if explain else {})
            for hit in hits
        ]
        facts = {"like": like, "metric": metric, "query_active": query.nnz}
        print_json(facts | {"hits": found})
        return
    if not query.nnz:
        say("query", f"the code of {like} is empty: no latent is active, so nothing is like it")
    for hit in hits:
        print_text(f"{hit.score:7.4f}  {stored.ids[hit.row]}")
        for feature in features[hit.row]:
            print_text(
                f"         {feature.score:+.3f}  feature {feature.latent:<5}"
                f" query {feature.query:+.2f}, hit {feature.hit:+.2f}"
            )


def _query_code(stored: "CodeFile", like: str, model: Path | None, device: Device) -> "Codes":
    """Return the code of a row (by id) or of an image file."""
    path = Path(like)
    if like in stored.ids and not path.is_file():
        return stored.codes[[stored.ids.index(like)]]
    if not path.exists():
        raise UsageError(f"--like {like}: no such file, and no row has that id")
    from vsc_serve.encoder import Encoder
    from vsc_serve.options import EncodeOptions

    options = EncodeOptions.of_codes(stored.meta)
    bundle = find_model(model)
    encoder = Encoder.open(bundle, device=device)
    refuse_other_model(stored, encoder.manifest.digest, bundle)
    return encoder.encode_rows(encoder.read([path]), options).codes
