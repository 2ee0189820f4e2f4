"""Compare codes of vectors as search indexes: recall, labels, cost and bytes of every view.

From the repository's root:

    python -m benchmarks.quality.search --data text=wordnet.npz --latents 1024 --seeds 0,1,2

README.md in the folder above says what is measured, and where the data is to be had. A run whose
results are in the file is not done again.
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

import torch

from benchmarks.quality.chart import draw_charts
from benchmarks.quality.data import Dataset, load_dataset, read_sources, split_off
from benchmarks.quality.search_models import (
    MODELS,
    ROWS_SEEN,
    SearchRun,
    digest,
    fit_search_model,
    search_runs,
)
from benchmarks.quality.search_views import (
    ACTIVE,
    SearchData,
    dense_view,
    measure_views,
    metrics_of,
    search_data,
)
from benchmarks.quality.tables import search_table
from vsc_serve.errors import UsageError, VscError

_VALIDATION_SHARE: Final = 0.1

Result = dict[str, Any]


def main(arguments: Sequence[str] | None = None) -> int:
    """Do the runs that have no results yet and print one table for each data set."""
    try:
        given = _parser().parse_args(arguments)
        torch.set_num_threads(1)
        for name, source in read_sources(given.data).items():
            dataset = load_dataset(source)
            if given.validation:
                dataset = split_off(dataset.train, _VALIDATION_SHARE, b"validation")
            runs = list(_runs(given, name))
            _do(runs, dataset, given)
            _print(name, given, runs, dataset)
        if given.charts:
            draw_charts(_lines(given.out), given.charts)
    except VscError as error:
        sys.stderr.write(f"{error}\n")
        return error.exit_code
    return 0


def read_results(path: Path, runs: Sequence[SearchRun], dataset: Dataset) -> list[Result]:
    """Read the results of runs, in their order; what other settings gave is left out."""
    spec, lines = dataset.train.spec, _lines(path)
    wanted = [json.loads(json.dumps(asdict(run) | {"digest": digest(run, spec)})) for run in runs]
    return [line for run in wanted for line in lines if run.items() <= line.items()]


def measure(run: SearchRun, dataset: Dataset, weights: Path | None) -> list[Result]:
    """Fit one model and measure every view of it."""
    data = _search_data(run.data, dataset)
    began = time.process_time()
    shared = asdict(run) | {"digest": digest(run, dataset.train.spec)}
    if run.kind == "dense":
        return [shared | {"view": "dense", "asked": 0, "metrics": _rounded(dense_view(data), data)}]
    coder = fit_search_model(run, dataset.train, weights)
    shared |= {"fit_cpu_s": round(time.process_time() - began, 1), "torch": torch.__version__}
    counts = [active for active in ACTIVE if 2 * active <= run.latent_dim]
    if run.kind != "vsc":
        counts = [int(run.model.partition("-")[2])]
    return [
        shared | {"view": view.name, "asked": active, "metrics": _rounded(view, data)}
        for active in counts
        for view in measure_views(coder, active, data)
    ]


def _do(runs: Sequence[SearchRun], dataset: Dataset, given: argparse.Namespace) -> None:
    """Do the runs that have no results yet and append theirs, whole runs only."""
    left = [run for run in runs if not read_results(given.out, [run], dataset)]
    for number, run in enumerate(left, start=1):
        if given.fit_only:
            fit_search_model(run, dataset.train, given.weights)
        else:
            results = measure(run, dataset, given.weights)
            with given.out.open("a", encoding="utf-8") as file:
                file.write("".join(json.dumps(result) + "\n" for result in results))
        sys.stderr.write(f"{number}/{len(left)}  {run.name}\n")


def _search_data(name: str, dataset: Dataset) -> SearchData:
    labels = dataset.labels()
    if labels is None or dataset.train.spec.input_dim is None:
        raise UsageError(f"--data {name}: expected vectors with labels, which images are not.")
    return search_data((dataset.train.rows, dataset.test.rows), labels)


def _rounded(view: Any, data: SearchData) -> dict[str, float]:
    return {name: round(value, 5) for name, value in metrics_of(view, data).items()}


def _lines(path: Path) -> list[Result]:
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    return [json.loads(line) for line in lines]


def _runs(given: argparse.Namespace, name: str) -> Any:
    return search_runs(
        name,
        given.models,
        seeds=given.seeds,
        latent_dim=given.latents,
        rows_seen=given.rows_seen,
        is_validation=given.validation,
        overrides=tuple(given.overrides),
    )


def _print(
    name: str, given: argparse.Namespace, runs: Sequence[SearchRun], dataset: Dataset
) -> None:
    data = _search_data(name, dataset)
    kind = "centred rows" if data.is_centered else "rows as they are"
    part = "validation" if given.validation else "test"
    print(
        f"\n## {name}, J = {given.latents}, {given.rows_seen:,} rows of training\n\n"
        f"{len(data.references):,} references, {len(data.queries):,} {part} queries;"
        f" true neighbours by the cosine of {kind}.\n"
    )
    print(search_table(read_results(given.out, runs, dataset)))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.quality.search", description="Compare codes as search indexes."
    )
    add = parser.add_argument
    add("--data", nargs="+", required=True, help="NAME=TRAIN,TEST or NAME=PATH: vectors, labels")
    add("--models", type=lambda text: text.split(","), default=list(MODELS), help="with commas")
    add("--latents", type=int, default=1024, help="latents J (default 1024)")
    add("--rows-seen", type=int, default=ROWS_SEEN, help="rows of each training")
    add("--seeds", type=_numbers, default=[0, 1, 2], help="with commas (default 0,1,2)")
    add("--validation", action="store_true", help="choose settings: the test is not touched")
    add(
        "--set",
        dest="overrides",
        action="append",
        default=[],
        help="field=value of the recipe (vsc) or of SaeSettings (topk, csr)",
    )
    add("--out", type=Path, default=Path("search.jsonl"), help="results, appended to")
    add("--weights", type=Path, help="folder to keep fitted weights in, to measure them again")
    add("--fit-only", action="store_true", help="fit and keep weights, and measure nothing")
    add("--charts", type=Path, help="folder to draw search-DATA.png in, from all results")
    return parser


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


if __name__ == "__main__":
    sys.exit(main())
