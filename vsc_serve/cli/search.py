"""`vsc search`: the rows most like an image, or like each of many."""

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from vsc_serve.cli.answers import Answer, Found, print_many, print_one
from vsc_serve.cli.options import DeviceOption, JsonOption, ModelOption
from vsc_serve.cli.queries import Index, Rule, ask_like, ask_many
from vsc_serve.console import ending_cleanly, say
from vsc_serve.errors import UsageError

if TYPE_CHECKING:
    from vsc_serve.codes import CodeFile, Codes
    from vsc_serve.index.exact import Hit
    from vsc_serve.pipeline import Batch

_Metric = Literal["cosine", "dot"]
"""The same as `index.exact.Metric`; a test compares them."""


def search(
    codes: Annotated[Path, typer.Argument(help="File or folder that `vsc encode` wrote.")],
    *,
    like: Annotated[str | None, typer.Option(help="An image file, or the id of a row.")] = None,
    queries: Annotated[
        str | None, typer.Option(help="Many: codes, or what `vsc encode` takes.")
    ] = None,
    top: Annotated[int, typer.Option(help="Hits of each query.", min=1)] = 10,
    metric: Annotated[_Metric, typer.Option(help="Score.")] = "cosine",
    query: Annotated[
        Rule, typer.Option(help="Keep more latents than the rows, or the same.")
    ] = "auto",
    explain: Annotated[bool, typer.Option("--explain", help="List the shared features.")] = False,
    model: ModelOption = None,
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Find the rows most like an image, or like each of many, exactly."""
    from vsc_serve.codes import read_codes
    from vsc_serve.index.queries import check_rows

    if (like is None) == (queries is None):
        raise UsageError("give one of --like IMAGE (or the id of a row) and --queries FILE")
    rows = read_codes(codes)
    check_rows(codes, rows)
    index = Index(codes, rows, query, model, device)
    with ending_cleanly():
        asked = ask_like(index, like) if like is not None else ask_many(index, str(queries))
        say("query", asked.how)
        with closing(asked.batches) as batches:
            answers = _answers(rows, batches, top, metric, has_shared=explain)
            if like is None:
                print_many(answers, as_json=as_json)
            else:
                facts = {"like": like, "metric": metric, "query": asked.rule}
                print_one(next(answers)[0], facts, as_json=as_json)


def _answers(
    rows: "CodeFile", batches: "Iterator[Batch]", top: int, metric: _Metric, *, has_shared: bool
) -> Iterator[list[Answer]]:
    """Answer queries batch by batch; those that could not be read come last."""
    rejected: list[Answer] = []
    for batch in batches:
        rejected += [Answer(name, 0, [], reason) for name, reason in batch.rejected]
        codes = batch.rows.codes
        hits = _first_stage(rows, codes, top, metric)
        queries = zip(batch.ids, (codes[[place]] for place in range(len(hits))), hits, strict=True)
        yield [
            Answer(name, code.nnz, _found(rows, of_query, code, metric, has_shared=has_shared))
            for name, code, of_query in queries
        ]
    yield rejected


def _first_stage(
    rows: "CodeFile", queries: "Codes", top: int, metric: _Metric
) -> "list[list[Hit]]":
    """Return the hits of each query, none of one whose code is empty."""
    from vsc_serve.index.exact import search_many

    nearest = search_many(rows.codes, queries, top=top, metric=metric)
    actives = (queries.indptr[1:] - queries.indptr[:-1]).tolist()
    return [nearest.hits(place) if active else [] for place, active in enumerate(actives)]


def _found(
    rows: "CodeFile", hits: "list[Hit]", code: "Codes", metric: _Metric, *, has_shared: bool
) -> list[Found]:
    from vsc_serve.index.exact import explain

    shared = [
        explain(rows.codes, hit.row, code, metric=metric) if has_shared else None for hit in hits
    ]
    return [Found(rows.ids[hit.row], hit, one) for hit, one in zip(hits, shared, strict=True)]
