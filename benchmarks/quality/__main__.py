"""Fit and measure all models on all data sets, and print one table for each.

From the repository's root:

    python -m benchmarks.quality --data mnist=TRAIN,TEST smiley --seeds 3 --out results.jsonl

README.md in the folder above says where the data is to be had. A run whose results are in the file
is not done again, so a killed benchmark goes on where it was, and a second call prints the tables.
"""

import argparse
import json
import multiprocessing
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

from benchmarks.quality.data import read_sources
from benchmarks.quality.metrics import Result, fit_and_measure
from benchmarks.quality.runs import BUILTIN, MODELS, Run, claim_runs, comparison_runs, recipe_digest
from benchmarks.quality.tables import claim_table, comparison_table, trade_off_table
from vsc_serve.errors import UsageError, VscError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; return the exit code."""
    try:
        given = _parser().parse_args(arguments)
        sources = read_sources(given.data)
        runs = {name: list(_runs(given, name)) for name in sources}
        work = [(run, sources[name]) for name in sources for run in runs[name]]
        _do(work, given.out, given.weights, given.workers)
    except VscError as error:
        sys.stderr.write(f"{error}\n")
        return error.exit_code
    stored = read_results(given.out)
    for name in sources:
        wanted = [result for run in runs[name] for result in stored.get(run, [])]
        print(f"\n## {name}, {given.steps} steps\n")
        _print_tables(wanted, is_claim=given.claim)
    return 0


def read_results(path: Path) -> dict[Run, list[Result]]:
    """Read the results file: the results of each run that is done, with the recipe of today."""
    found: dict[Run, list[Result]] = {}
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    for line in lines:
        result = json.loads(line)
        fields = {name: result[name] for name in Run.__dataclass_fields__ if name in result}
        run = Run(**fields | {"overrides": tuple(fields.get("overrides", ()))})
        if result["recipe"] == recipe_digest(run):
            found.setdefault(run, []).append(result)
    return found


def _runs(given: argparse.Namespace, data: str) -> Iterator[Run]:
    if given.claim:
        return claim_runs(data, seeds=given.seeds, steps=given.steps)
    return comparison_runs(
        data,
        given.models,
        seeds=given.seeds,
        steps=given.steps,
        rows=given.rows,
        overrides=given.overrides,
    )


def _do(work: Sequence[tuple[Run, str]], out: Path, weights: Path | None, workers: int) -> None:
    """Do the runs that have no results yet and append theirs, whole runs only."""
    done = read_results(out)
    left = [(run, source) for run, source in work if run not in done]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        futures = {pool.submit(fit_and_measure, run, source, weights): run for run, source in left}
        for number, future in enumerate(as_completed(futures), start=1):
            lines = [json.dumps(result) + "\n" for result in future.result()]
            with out.open("a", encoding="utf-8") as file:
                file.write("".join(lines))
            sys.stderr.write(f"{number}/{len(left)}  {futures[future].name}\n")


def _print_tables(results: Sequence[Result], *, is_claim: bool) -> None:
    if is_claim:
        print(claim_table(results))
        return
    print(comparison_table(results))
    print("\nThe trade-off: one VSC over tau, one TopK for each k.\n")
    print(trade_off_table(results))


def _models(text: str) -> list[str]:
    names = text.split(",")
    unknown = [name for name in names if name not in (*MODELS, BUILTIN)]
    if unknown:
        raise UsageError(
            f"--models: no model {unknown[0]}; there are {', '.join((*MODELS, BUILTIN))}"
        )
    return names


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.quality", description="Compare VSC codes with other codes."
    )
    add = parser.add_argument
    add("--data", nargs="+", required=True, help="NAME=TRAIN,TEST, NAME=PATH, or smiley")
    add("--models", type=_models, default=list(MODELS), help="some of the models, with commas")
    add("--seeds", type=int, default=3, help="seeds 0, 1, ... (default 3)")
    add("--steps", type=int, default=5000, help="optimiser steps (default 5000)")
    add("--rows", choices=("drawn", "first"), default="drawn", help="rows that are measured")
    add(
        "--set",
        dest="overrides",
        action="append",
        default=[],
        help="field=value of the sparse recipe, as in `vsc train`; for vsc, topk and vae",
    )
    add("--claim", action="store_true", help="bound and disentanglement over the latents J")
    add("--out", type=Path, default=Path("results.jsonl"), help="results, appended to")
    add("--weights", type=Path, help="folder to keep fitted weights in, to measure them again")
    add("--workers", type=int, default=1, help="processes, one thread each (default 1)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
