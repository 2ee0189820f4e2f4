"""Settings of the recipe `search` on images with labels: neighbours by stored threshold and query.

From the repository's root:

    python -m benchmarks.quality.recipes --data fashion=TRAIN,TEST --recipe search --seeds 0,1,2

10,000 training rows are searched, and up to 5,000 test rows asked. With `--validation` the model is
fitted to five sixths of the training rows and asked about others of them, so that settings can be
chosen without a look at the test. Results are appended to a file, a line each.
"""

import argparse
import json
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from benchmarks.quality.data import load_dataset, read_sources
from vsc_serve.codes import ALWAYS_ON_SHARE, LIVE_SHARE
from vsc_serve.errors import VscError
from vsc_training.config import Recipe, load_recipe
from vsc_training.data import Examples
from vsc_training.dataset import DeviceDataset
from vsc_training.evaluation import bounds, retrieval
from vsc_training.model import VSC
from vsc_training.trainer import Trainer

TAUS: Final = (0.5, 0.4, 0.3, 0.25, 0.2)
"""Thresholds of the stored rows."""
QUERY_TAU: Final = 0.1
"""Threshold of the wider query."""

_REFERENCES: Final = 10_000
_QUERIES: Final = 5_000
_BOUND_ROWS: Final = 500
_BATCH: Final = 1_000

Codes = NDArray[np.float32]
Metrics = dict[str, float]


def main(arguments: Sequence[str] | None = None) -> int:
    """Fit, measure and print; return the exit code."""
    try:
        given = _parser().parse_args(arguments)
        torch.set_num_threads(1)
        for name, source in read_sources(given.data).items():
            dataset = load_dataset(source)
            train, test = dataset.train, dataset.test
            if given.validation:
                train, test = _split(train)
            lines = [
                line
                for seed in given.seeds
                for line in _measured(train, test, _recipe(given, seed), given.out)
            ]
            print(f"\n## {name}, {given.recipe} {' '.join(given.overrides)}\n\n{_table(lines)}")
    except VscError as error:
        sys.stderr.write(f"{error}\n")
        return error.exit_code
    return 0


def measure(model: VSC, train: Examples, test: Examples) -> Iterator[tuple[str, Metrics]]:
    """Yield every view of a model: a threshold of the stored rows, and a kind of query."""
    known, asked = (_take(train, _REFERENCES), _take(test, _QUERIES))
    with torch.no_grad():
        stored, queries = _posterior(model, known[0]), _posterior(model, asked[0])
        bound = bounds.iwae(model, asked[0][:_BOUND_ROWS], 50, torch.Generator().manual_seed(1))
    wide = np.where(queries[0] > QUERY_TAU, np.sqrt(queries[0]) * queries[1], 0).astype(np.float32)
    for tau in TAUS:
        reference = np.where(stored[0] > tau, stored[1], 0).astype(np.float32)
        rates = retrieval.firing_rates(reference)
        shared = {
            "active": float(rates.sum()),
            "bytes": retrieval.bytes_per_row(reference),
            "live": float((rates >= LIVE_SHARE).sum()),
            "always_on": float((rates > ALWAYS_ON_SHARE).sum()),
            "iwae": float(bound.iwae.mean()),
        }
        plain = np.where(queries[0] > tau, queries[1], 0).astype(np.float32)
        for kind, query in (("symmetric", plain), ("wide", wide)):
            found = retrieval.neighbour_labels(reference, known[1], query, asked[1])
            yield (
                f"tau {tau:g} {kind}",
                shared
                | {
                    "knn": retrieval.vote_accuracy(*found),
                    "precision_10": retrieval.same_class_share(*found),
                    "search_cost": float(rates @ retrieval.firing_rates(query)),
                },
            )


def _measured(train: Examples, test: Examples, recipe: Recipe, out: Path) -> list[dict[str, Any]]:
    began = time.process_time()
    trainer = Trainer(recipe, train, torch.device("cpu"))
    while trainer.step < trainer.recipe.steps:
        trainer.advance()
    seconds = round(time.process_time() - began)
    views = measure(trainer.model.eval(), train, test)
    lines = [{"view": view, "seed": recipe.seed, "cpu_s": seconds} | found for view, found in views]
    with out.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(vars(recipe) | line) + "\n" for line in lines)
    return lines


def _recipe(given: argparse.Namespace, seed: int) -> Recipe:
    own = ["validation_share=0.0", "on_collapse=warn", f"seed={seed}", *given.overrides]
    return load_recipe(given.recipe, own)


def _split(examples: Examples) -> tuple[Examples, Examples]:
    order = np.random.default_rng(1).permutation(len(examples.rows))
    count = len(order) // 6
    return _pick(examples, order[count:]), _pick(examples, order[:count])


def _pick(examples: Examples, numbers: NDArray[np.intp]) -> Examples:
    assert examples.labels is not None
    rows, labels = np.ascontiguousarray(examples.rows[numbers]), examples.labels[numbers]
    return Examples(rows, [examples.ids[row] for row in numbers], examples.spec, labels)


def _take(examples: Examples, count: int) -> tuple[Tensor, NDArray[np.int64]]:
    assert examples.labels is not None
    chosen = np.random.default_rng(0).permutation(len(examples.rows))[:_REFERENCES][:count]
    rows = DeviceDataset.of(examples.rows, torch.device("cpu")).take(torch.from_numpy(chosen))
    return rows, examples.labels[chosen]


def _posterior(model: VSC, rows: Tensor) -> tuple[Codes, Codes]:
    """Return gamma and mu."""
    found = [model.encode(part) for part in rows.split(_BATCH)]
    gamma = torch.cat([torch.sigmoid(q.spike_logit) for q in found]).numpy()
    return gamma, torch.cat([q.mu for q in found]).numpy()


def _table(lines: Sequence[dict[str, Any]]) -> str:
    columns = ("knn", "precision_10", "search_cost", "bytes", "active", "live", "always_on", "iwae")
    digits = (4, 4, 2, 0, 1, 0, 0, 1)
    text = [f"| view | seeds | {' | '.join(columns)} |", "|---|---|" + "---|" * len(columns)]
    for view in dict.fromkeys(line["view"] for line in lines):
        group = [line for line in lines if line["view"] == view]
        cells = [
            f"{fmean(line[column] for line in group):.{count}f}"
            for column, count in zip(columns, digits, strict=True)
        ]
        text.append(f"| {view} | {len(group)} | {' | '.join(cells)} |")
    return "\n".join(text)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.quality.recipes", description="Measure a recipe for search."
    )
    add = parser.add_argument
    add("--data", nargs="+", required=True, help="NAME=TRAIN,TEST or NAME=PATH, with labels")
    add("--recipe", default="search", help="name or TOML file (default search)")
    add("--set", dest="overrides", action="append", default=[], help="field=value of the recipe")
    add("--seeds", type=lambda text: [int(part) for part in text.split(",")], default=[0])
    add("--validation", action="store_true", help="choose settings: the test is not touched")
    add("--out", type=Path, default=Path("recipes.jsonl"), help="results, appended to")
    return parser


if __name__ == "__main__":
    sys.exit(main())
