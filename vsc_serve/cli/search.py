"""`vsc search`: the rows most like an image, or like each of many."""

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from vsc_serve.cli.answers import Answer, Found, print_many, print_one
from vsc_serve.cli.options import DeviceOption, JsonOption, ModelOption
from vsc_serve.cli.queries import Index, Rule, ask_like, ask_many
from vsc_serve.cli.rerank import Rerank, SecondStage, check_depth, open_stage
from vsc_serve.cli.vectors import answer_vectors, refuse_other_options
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
    vector: Annotated[
        Path | None, typer.Option(help="Dense vectors of the data's space (.npy), as queries.")
    ] = None,
    top: Annotated[int, typer.Option(help="Hits of each query.", min=1)] = 10,
    metric: Annotated[_Metric, typer.Option(help="Score.")] = "cosine",
    query: Annotated[
        Rule, typer.Option(help="Keep more latents than the rows, or the same.")
    ] = "auto",
    rerank: Annotated[
        Rerank, typer.Option(help="Score the best rows again: linear or decoded.")
    ] = "none",
    candidates: Annotated[
        int | None, typer.Option(help="Rows that are scored again (default 200).", min=1)
    ] = None,
    explain: Annotated[bool, typer.Option("--explain", help="List the shared features.")] = False,
    model: ModelOption = None,
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Find the rows most like an image, or like each of many, exactly."""
    from vsc_serve.codes import read_codes
    from vsc_serve.index.queries import check_rows

    if sum(given is not None for given in (like, queries, vector)) != 1:
        raise UsageError(
            "give one of --like IMAGE (or the id of a row), --queries FILE and --vector FILE.npy"
        )
    depth = check_depth(rerank, candidates, top, explain=explain)
    rows = read_codes(codes)
    check_rows(codes, rows)
    if vector is not None:
        refuse_other_options(
            query=(query, "auto"), metric=(metric, "cosine"), rerank=(rerank, "none")
        )
        with ending_cleanly():
            answers = answer_vectors(vector, codes, rows, model, top, explain=explain)
            print_many(answers, as_json=as_json)
        return
    index = Index(codes, rows, query, model, device, rerank)
    with ending_cleanly():
        asked = ask_like(index, like) if like is not None else ask_many(index, str(queries))
        stage = open_stage(rerank, codes, rows, model, device)
        say("query", asked.how)
        if stage is not None:
            say("rerank", f"{rerank}: the best {depth} of each query by their codes, scored again")
        find = _Finder(rows, stage, top, depth, metric, has_shared=explain)
        with closing(asked.batches) as batches:
            answers = _answers(find, batches)
            if like is None:
                print_many(answers, as_json=as_json)
            else:
                facts = {"like": like, "metric": metric, "query": asked.rule, "rerank": rerank}
                print_one(next(answers)[0], facts, as_json=as_json)


def _answers(find: "_Finder", batches: "Iterator[Batch]") -> Iterator[list[Answer]]:
    """Answer queries batch by batch; those that could not be read come last."""
    rejected: list[Answer] = []
    for batch in batches:
        rejected += [Answer(name, 0, [], reason) for name, reason in batch.rejected]
        yield find.answers(batch)
    yield rejected


class _Finder:
    """Finds the hits of queries, and says why.

    Args:
        rows: What is searched.
        stage: Scores the first stage's hits again, if there is one.
        top: Hits wanted.
        depth: Hits wanted of the first stage.
        metric: Score of the first stage.
        has_shared: Whether hits say what makes up their score.
    """

    def __init__(
        self,
        rows: "CodeFile",
        stage: SecondStage | None,
        top: int,
        depth: int,
        metric: _Metric,
        *,
        has_shared: bool,
    ) -> None:
        self._rows, self._stage, self._metric = rows, stage, metric
        self._top, self._depth, self._has_shared = top, depth, has_shared

    def answers(self, batch: "Batch") -> list[Answer]:
        """Answer the queries of a batch."""
        codes = batch.rows.codes
        hits = self._hits(batch)
        queries = zip(batch.ids, (codes[[place]] for place in range(len(hits))), hits, strict=True)
        return [
            Answer(name, code.nnz, self._found(place, batch, code, of_query))
            for place, (name, code, of_query) in enumerate(queries)
        ]

    def _hits(self, batch: "Batch") -> "list[list[Hit]]":
        """Return the hits of each query, none of one whose code is empty."""
        from vsc_serve.index.exact import search_many

        queries, targets = batch.rows.codes, batch.rows.targets
        nearest = search_many(self._rows.codes, queries, top=self._depth, metric=self._metric)
        actives = (queries.indptr[1:] - queries.indptr[:-1]).tolist()
        if self._stage is None or targets is None:
            return [nearest.hits(place) if active else [] for place, active in enumerate(actives)]
        candidates = [
            rows if active else rows[:0] for rows, active in zip(nearest.rows, actives, strict=True)
        ]
        return self._stage.rerank(candidates, targets, self._top)

    def _found(self, place: int, batch: "Batch", code: "Codes", hits: "list[Hit]") -> list[Found]:
        from vsc_serve.index.exact import explain

        ids, targets = self._rows.ids, batch.rows.targets
        if not self._has_shared:
            return [Found(ids[hit.row], hit, None) for hit in hits]
        if self._stage is not None and targets is not None:
            parts = zip(hits, self._stage.explain(hits, targets[place]), strict=True)
            return [Found(ids[hit.row], hit, shared, bias) for hit, (shared, bias) in parts]
        shared_by = (explain(self._rows.codes, hit.row, code, metric=self._metric) for hit in hits)
        return [
            Found(ids[hit.row], hit, shared) for hit, shared in zip(hits, shared_by, strict=True)
        ]
