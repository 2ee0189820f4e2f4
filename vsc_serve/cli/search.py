"""`vsc search`: the rows most like an image, or like each of many."""

from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vsc_serve.cli.answers import Form, print_groups, print_many, print_one
from vsc_serve.cli.finder import Finder, Metric
from vsc_serve.cli.options import DeviceOption, JsonOption, ModelOption
from vsc_serve.cli.queries import Asked, Index, Rule, Wish, ask_many, ask_wish
from vsc_serve.cli.rerank import Rerank, check_depth, open_stage
from vsc_serve.cli.vectors import answer_vectors, refuse_other_options
from vsc_serve.console import ending_cleanly, say
from vsc_serve.errors import UsageError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from vsc_serve.index.base import Searchable


def search(
    codes: Annotated[Path, typer.Argument(help="What `vsc encode` wrote, or an index.")],
    *,
    like: Annotated[
        list[str] | None, typer.Option(help="An image file, or the id of a row; may be repeated.")
    ] = None,
    unlike: Annotated[
        list[str] | None, typer.Option(help="The same, for what hits are not like.")
    ] = None,
    has: Annotated[
        list[int] | None, typer.Option(help="A feature that hits have; may be repeated.")
    ] = None,
    has_not: Annotated[
        list[int] | None, typer.Option("--not", help="A feature that hits have not.")
    ] = None,
    queries: Annotated[
        str | None, typer.Option(help="Many: codes, or what `vsc encode` takes.")
    ] = None,
    vector: Annotated[
        Path | None, typer.Option(help="Dense vectors of the data's space (.npy), as queries.")
    ] = None,
    duplicates: Annotated[
        float | None, typer.Option(help="Groups of rows with at least this cosine.")
    ] = None,
    top: Annotated[int, typer.Option(help="Hits of each query.", min=1)] = 10,
    metric: Annotated[Metric, typer.Option(help="Score.")] = "cosine",
    query: Annotated[
        Rule, typer.Option(help="Keep more latents than the rows, or the same.")
    ] = "auto",
    with_query: Annotated[
        bool, typer.Option("--with-query", help="Keep the row that is asked with.")
    ] = False,
    rerank: Annotated[
        Rerank, typer.Option(help="Score the best rows again: linear or decoded.")
    ] = "none",
    candidates: Annotated[
        int | None, typer.Option(help="Rows that are scored again (default 200).", min=1)
    ] = None,
    explain: Annotated[bool, typer.Option("--explain", help="List the shared features.")] = False,
    form: Annotated[Form, typer.Option("--format", "-f", help="Format of the result.")] = "table",
    model: ModelOption = None,
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Find the rows most like an image, or like each of many, exactly."""
    wish = Wish(like or [], unlike or [], has or [], has_not or [])
    form = "json" if as_json else form
    _refuse_unclear(wish, queries, vector, duplicates)
    if explain and form in ("trec", "paths"):
        raise UsageError(f"--explain: --format {form} has no place for it")
    depth = check_depth(rerank, candidates, top, explain=explain)
    rows = open_rows(codes)
    if duplicates is not None:
        _print_duplicates(rows, duplicates, form)
        return
    if vector is not None:
        refuse_other_options(
            query=(query, "auto"), metric=(metric, "cosine"), rerank=(rerank, "none")
        )
        with ending_cleanly():
            print_many(answer_vectors(vector, codes, rows, model, top, explain=explain), form)
        return
    index = Index(codes, rows, query, model, device, rerank)
    with ending_cleanly():
        among = _among(rows, wish)
        asked = ask_wish(index, wish, among) if queries is None else ask_many(index, queries)
        stage = open_stage(rerank, codes, rows, model, device)
        say("query", asked.how)
        if stage is not None:
            say("rerank", f"{rerank}: the best {depth} of each query by their codes, scored again")
        find = Finder(
            rows=rows,
            stage=stage,
            top=top,
            depth=depth,
            metric=metric,
            has_shared=explain,
            among=among if with_query else _without(rows, among, asked),
            without_itself=asked.are_rows and not with_query,
        )
        with closing(asked.batches) as batches:
            answers = find.answers(batches)
            if queries is not None:
                print_many(answers, form)
                return
            facts = wish.to_json() | {"metric": metric, "query": asked.rule, "rerank": rerank}
            print_one(next(answers)[0], facts, form)


def _refuse_unclear(
    wish: Wish, queries: str | None, vector: Path | None, duplicates: float | None
) -> None:
    """Raise UsageError where it is not clear what is asked."""
    has_wish = bool(wish.likes or wish.unlikes)
    asked_by = has_wish + sum(given is not None for given in (queries, vector, duplicates))
    has_features = bool(wish.has or wish.has_not)
    takes_no_features = duplicates is not None or vector is not None
    if asked_by > 1 or (takes_no_features and has_features):
        raise UsageError(
            "give one of --like, --queries, --vector and --duplicates; --has and --not go with"
            " --like and --queries"
        )
    if not asked_by and not has_features:
        raise UsageError(
            "give one of --like IMAGE (or the id of a row), --queries FILE and --vector FILE.npy,"
            " or --has FEATURE, or --duplicates COSINE"
        )
    if queries is None and not takes_no_features and not wish.likes and not wish.has:
        raise UsageError("--unlike and --not leave rows out: give --like, --has or --queries too")


def open_rows(path: Path) -> "Searchable":
    """Open an index, or read codes to search them without one. Raises VscError."""
    from vsc_serve.codes import read_codes
    from vsc_serve.index.base import is_index, open_index
    from vsc_serve.index.in_memory import InMemory
    from vsc_serve.index.queries import check_rows

    if is_index(path):
        return open_index(path)
    stored = read_codes(path)
    check_rows(path, stored)
    return InMemory(stored)


def _among(rows: "Searchable", wish: Wish) -> "NDArray[np.bool_] | None":
    """Return which rows have the features that are wished; None where none are."""
    from vsc_serve.index.combine import among_features

    if not wish.has and not wish.has_not:
        return None
    return among_features(rows, wish.has, wish.has_not)


def _without(
    rows: "Searchable", among: "NDArray[np.bool_] | None", asked: Asked
) -> "NDArray[np.bool_] | None":
    """Leave the rows that are asked with out of those that are searched."""
    import numpy as np

    if not asked.themselves:
        return among
    kept = np.ones(rows.rows.shape[0], np.bool_) if among is None else among.copy()
    kept[list(asked.themselves)] = False
    return kept


def _print_duplicates(rows: "Searchable", cosine: float, form: Form) -> None:
    from vsc_serve.index.duplicates import duplicate_groups

    groups = duplicate_groups(rows, cosine)
    named = [[rows.id_of(row) for row in group] for group in groups]
    print_groups(named, form)
    extra = sum(len(group) - 1 for group in groups)
    say("found", f"{len(groups):,} groups, {extra:,} rows more than groups, of {rows.count:,} rows")
