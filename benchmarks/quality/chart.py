"""Charts of the search comparison: recall against bytes and against cost, all models."""

import importlib
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, Final

from vsc_serve.errors import UsageError

Result = dict[str, Any]

_FAMILIES: Final = {
    "topk": ("TopK", "#d95f02"),
    "csr": ("CSR", "#7570b3"),
    "vsc-search": ("VSC, recipe search", "#1b7a5a"),
    "vsc-sparse": ("VSC, recipe sparse", "#8c8c8c"),
}
_VIEWS: Final = {
    "plain": ("-", "o"),
    "capped, wider query": (":", "^"),
    "second stage, refitted": ("--", "s"),
    "capped, second stage, refitted": ("-.", "D"),
}
"""Views that are drawn, where a model has them."""
_DOTS_PER_INCH: Final = 130


def draw_charts(results: Sequence[Result], folder: Path) -> None:
    """Draw `search-DATA.png` for each data set of the results, means over the seeds.

    Args:
        results: Lines of a results file. Runs for validation are left out, and of others those with
            the most training, so that a file of several lengths is drawn as one comparison.
        folder: Where the files are written.

    Raises:
        UsageError: matplotlib is not installed.
    """
    by_data: dict[str, list[Result]] = defaultdict(list)
    for result in results:
        if not result["is_validation"] and result["model"] != "dense":
            by_data[result["data"]].append(result)
    for data, lines in by_data.items():
        longest = max(line["rows_seen"] for line in lines)
        drawn = [line for line in lines if line["rows_seen"] == longest]
        _draw(data, drawn, folder / f"search-{data}.png")


def curves(
    results: Sequence[Result], axis: str
) -> dict[tuple[str, str], list[tuple[float, float]]]:
    """Return the points of each curve, from left to right.

    Args:
        results: Of one data set.
        axis: The metric along the horizontal axis: `bytes` or `search_cost`.

    Returns:
        For each family and view, pairs of the axis and recall@10, one for each active count.
    """
    points: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for family in _FAMILIES:
        for view in _VIEWS:
            groups: dict[int, list[Result]] = defaultdict(list)
            for line in results:
                if line["model"].startswith(family) and line["view"] == view:
                    groups[line["asked"]].append(line)
            if groups:
                points[family, view] = sorted(
                    (_mean(group, axis), _mean(group, "recall_10")) for group in groups.values()
                )
    return points


def _draw(data: str, results: Sequence[Result], path: Path) -> None:
    pyplot = _pyplot()
    figure, panels = pyplot.subplots(1, 2, figsize=(11, 5.4), sharey=True, layout="constrained")
    titles = (("bytes", "bytes of a stored row"), ("search_cost", "multiplications per stored row"))
    for panel, (axis, title) in zip(panels, titles, strict=True):
        for (family, view), pairs in curves(results, axis).items():
            name, colour = _FAMILIES[family]
            line, marker = _VIEWS[view]
            places = tuple(zip(*pairs, strict=True))
            panel.plot(
                *places,
                linestyle=line,
                marker=marker,
                color=colour,
                label=f"{name}, {view}",
            )
        panel.set_xscale("log", base=2)
        panel.set_xlabel(title)
        panel.grid(alpha=0.3)
        panel.xaxis.set_major_formatter("{x:g}")
    panels[0].set_ylabel("recall@10 of the dense neighbours")
    # Below both panels: there is no corner that no curve comes near.
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    latents = sorted({result["latent_dim"] for result in results})
    figure.suptitle(f"{data}, J = {', '.join(map(str, latents))}")
    figure.savefig(path, dpi=_DOTS_PER_INCH, metadata={"Software": None})
    pyplot.close(figure)


def _mean(results: Sequence[Result], metric: str) -> float:
    return fmean(result["metrics"][metric] for result in results)


def _pyplot() -> Any:
    try:
        importlib.import_module("matplotlib").use("Agg")
        return importlib.import_module("matplotlib.pyplot")
    except ImportError as error:
        raise UsageError("charts need the package matplotlib: pip install matplotlib") from error
