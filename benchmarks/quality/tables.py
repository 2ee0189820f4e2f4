"""Markdown tables of results: one row per model and view, mean and spread over the seeds."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from statistics import fmean
from typing import Final, NamedTuple

from benchmarks.quality.metrics import Result


class Column(NamedTuple):
    """A metric in a table."""

    key: str
    """Its name in the results."""
    title: str
    digits: int


COMPARISON: Final = (
    Column("active", "active", 1),
    Column("live", "live", 0),
    Column("varying", "varying", 0),
    Column("always_on", "always on", 0),
    Column("squared_error", "squared error", 2),
    Column("knn", "kNN", 3),
    Column("knn_support", "kNN on supports", 3),
    Column("precision_10", "precision@10", 3),
    Column("linear_probe", "linear probe", 3),
    Column("iwae", "IWAE-50", 1),
    Column("search_cost", "search cost", 2),
    Column("bytes", "bytes", 0),
)
FACTORS: Final = (
    Column("mig", "MIG", 3),
    Column("sap", "SAP", 3),
    Column("dci_disentanglement", "DCI disentanglement", 3),
    Column("dci_completeness", "DCI completeness", 3),
    Column("dci_informativeness", "DCI informativeness", 3),
    Column("correlation", "correlation", 3),
)
TRADE_OFF: Final = (
    Column("search_cost", "search cost", 2),
    Column("bytes", "bytes", 0),
    Column("active", "active", 1),
    Column("squared_error", "squared error", 2),
    Column("knn", "kNN", 3),
    Column("precision_10", "precision@10", 3),
    Column("linear_probe", "linear probe", 3),
)
CLAIM: Final = (
    Column("iwae", "IWAE-50", 1),
    Column("active", "active", 1),
    Column("varying", "varying", 0),
    Column("squared_error", "squared error", 2),
    *FACTORS,
)
SEARCH: Final = (
    Column("active", "active", 1),
    Column("bytes", "bytes", 0),
    Column("search_cost", "search cost", 2),
    Column("recall_10", "recall@10", 3),
    Column("knn", "kNN", 3),
    Column("precision_10", "precision@10", 3),
)


def comparison_table(results: Sequence[Result]) -> str:
    """Return the comparison of all models on one data set, VSC at tau 0.5."""
    rows = [result for result in results if result["view"] in ("", "tau 0.5")]
    return _table(rows, "model", COMPARISON + FACTORS, lambda result: str(result["model"]))


def trade_off_table(results: Sequence[Result]) -> str:
    """Return VSC over tau beside TopK over k, by rising search cost."""
    rows = [result for result in results if result["model"].partition("-")[0] in ("vsc", "topk")]
    rows = [result for result in rows if result["model"] != "vsc-paper"]
    costs = _grouped(rows, _view_name)
    rows.sort(key=lambda result: fmean(_values(costs[_view_name(result)], "search_cost")))
    return _table(rows, "model", TRADE_OFF, _view_name)


def claim_table(results: Sequence[Result]) -> str:
    """Return bound and disentanglement over the latents J, VSC at tau 0.5."""
    rows = [result for result in results if result["view"] in ("", "tau 0.5")]
    rows.sort(key=lambda result: (result["model"], result["latent_dim"]))
    return _table(
        rows, "model, J", CLAIM, lambda result: f"{result['model']}, {result['latent_dim']}"
    )


def search_table(results: Sequence[Result]) -> str:
    """Return every view of every model in the search comparison."""
    return _table(results, "model, view", SEARCH, search_name)


def search_name(result: Result) -> str:
    """Return the model, its active count where that is not in its name, and the view."""
    model, active = result["model"], result["asked"]
    if model == result["view"]:
        return str(model)
    asked = f" at {active}" if model.startswith("vsc") else ""
    return f"{model}{asked}, {result['view']}"


def _view_name(result: Result) -> str:
    return f"{result['model']} {result['view']}".strip()


def _table(
    results: Sequence[Result], head: str, columns: Sequence[Column], name: Callable[[Result], str]
) -> str:
    """Return a table of the columns that any result has a figure for."""
    shown = [column for column in columns if any(_values(results, column.key))]
    lines = [
        f"| {' | '.join([head, 'seeds', *(column.title for column in shown)])} |",
        f"|{'---|' * (len(shown) + 2)}",
    ]
    for label, group in _grouped(results, name).items():
        cells = [_cell(_values(group, column.key), column.digits) for column in shown]
        lines.append(f"| {' | '.join([label, str(len(group)), *cells])} |")
    return "\n".join(lines)


def _grouped(results: Iterable[Result], name: Callable[[Result], str]) -> dict[str, list[Result]]:
    groups: dict[str, list[Result]] = defaultdict(list)
    for result in results:
        groups[name(result)].append(result)
    return groups


def _values(results: Iterable[Result], key: str) -> list[float]:
    return [result["metrics"][key] for result in results if key in result["metrics"]]


def _cell(values: Sequence[float], digits: int) -> str:
    """Return the mean, and half the distance from the lowest to the highest where it shows."""
    if not values:
        return "-"
    text = f"{fmean(values):.{digits}f}"
    spread = f"{(max(values) - min(values)) / 2:.{digits}f}"
    return text if float(spread) == 0 else f"{text} ± {spread}"
