"""What is measured of a fitted model, on the same rows for every model.

10,000 training rows are the references of the neighbours and fit the probe; 5,000 test rows are the
queries; error and sparsity are means over 10,000 test rows, the bound over the first 1,000 of them.
"""

import time
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from benchmarks.quality.baselines import Coder, DenseVae, VscCoder
from benchmarks.quality.data import Dataset, load_dataset
from benchmarks.quality.runs import Rows, Run, fit_run, recipe_digest
from vsc_serve.codes import ALWAYS_ON_SHARE, LIVE_SHARE
from vsc_training.data import Examples
from vsc_training.dataset import DeviceDataset
from vsc_training.evaluation import bounds, disentanglement, probe, retrieval

MEASURED_ROWS: Final = 10_000
QUERIES: Final = 5_000
BOUND_ROWS: Final = 1_000
BOUND_SAMPLES: Final = 50

_BATCH: Final = 1_000
_BOUND_SEED: Final = 1234
_VARYING_VARIANCE: Final = 0.01
"""Variance of a code above which a latent of a dense model is in use (Burda et al. 2016, 5.2)."""

_DENSE: Final = 0.99
"""Share of entries that are on from which a code has no support to speak of."""

Codes = NDArray[np.float32]
Metrics = dict[str, float]
Result = dict[str, Any]
"""A run, a view of it, and its metrics."""


def measure(coder: Coder, dataset: Dataset, rows: Rows = "drawn") -> Metrics:
    """Return every figure that the data set allows.

    Labels give neighbours and probe, factors give disentanglement, a likelihood gives the bound.

    Args:
        coder: The fitted model.
        dataset: The data set.
        rows: Which of its rows.
    """
    known, asked = (choose_rows(part, rows) for part in (dataset.train, dataset.test))
    reference_rows = DeviceDataset.of(dataset.train.rows[known], torch.device("cpu"))
    test_rows = DeviceDataset.of(dataset.test.rows[asked], torch.device("cpu"))
    with torch.no_grad():
        reference = _encode(coder, reference_rows)
        test, squared_error = _encode_and_decode(coder, test_rows)
    metrics = {"squared_error": squared_error} | sparsity_metrics(test)
    metrics |= _bound(coder, test_rows.take(torch.arange(min(BOUND_ROWS, len(test)))))
    labels = dataset.labels()
    if labels is not None:
        queries, query_labels = test[:QUERIES], labels[1][asked][:QUERIES]
        metrics |= neighbour_metrics(reference, labels[0][known], queries, query_labels)
    if dataset.test_factors is not None:
        metrics |= factor_metrics(test, dataset.test_factors[asked])
    return metrics


def choose_rows(examples: Examples, rows: Rows = "drawn") -> NDArray[np.int64]:
    """Return the numbers of up to 10,000 rows, the same in every call.

    Drawn by chance unless the first are asked for: folders of images come in the order of their
    classes.
    """
    if rows == "first":
        return np.arange(min(MEASURED_ROWS, len(examples.rows)))
    return np.random.default_rng(0).permutation(len(examples.rows))[:MEASURED_ROWS]


def fit_and_measure(run: Run, source: str, weights: Path | None) -> list[Result]:
    """Fit one model and measure each view of it, on one thread: the work of one process.

    Args:
        run: What to fit.
        source: Where the data is (see `data.load_dataset`).
        weights: Folder for fitted weights, or None.
    """
    torch.set_num_threads(1)
    dataset = load_dataset(source)
    began = time.process_time()
    views = fit_run(run, dataset.train, weights)
    fit_cpu_s = round(time.process_time() - began, 1)
    return [
        asdict(run)
        | {"recipe": recipe_digest(run), "view": view, "fit_cpu_s": fit_cpu_s}
        | {"torch": torch.__version__}
        | {
            "metrics": {
                name: round(value, 5) for name, value in measure(coder, dataset, run.rows).items()
            }
        }
        for view, coder in views.items()
    ]


def sparsity_metrics(codes: Codes) -> Metrics:
    """Return what is on, and what storing and searching it costs.

    `varying` counts latents whose value varies, for dense codes, in which every latent is "live".
    """
    firing = retrieval.firing_rates(codes)
    dense_bytes = retrieval.BYTES_PER_VALUE * codes.shape[1]
    return {
        "active": float(firing.sum()),
        "empty_share": float((~codes.any(axis=1)).mean()),
        "live": float((firing >= LIVE_SHARE).sum()),
        "always_on": float((firing > ALWAYS_ON_SHARE).sum()),
        "varying": float((codes.var(axis=0) > _VARYING_VARIANCE).sum()),
        "search_cost": retrieval.search_cost(codes),
        "bytes": min(retrieval.bytes_per_row(codes), dense_bytes),
    }


def neighbour_metrics(
    reference: Codes,
    reference_labels: NDArray[np.int64],
    queries: Codes,
    query_labels: NDArray[np.int64],
) -> Metrics:
    """Return the accuracy of neighbours by code and by support alone, and of a linear probe."""
    both = (reference_labels, queries, query_labels)
    neighbours, truth = retrieval.neighbour_labels(reference, *both)
    metrics = {
        "knn": retrieval.vote_accuracy(neighbours, truth),
        "precision_10": retrieval.same_class_share(neighbours, truth),
        "linear_probe": probe.linear_probe_accuracy(reference, *both),
    }
    if (reference != 0).mean() < _DENSE:
        metrics["knn_support"] = retrieval.knn_accuracy(
            reference != 0, reference_labels, queries != 0, query_labels
        )
    return metrics


def factor_metrics(codes: Codes, factors: NDArray[np.float32]) -> Metrics:
    """Return how well single latents stand for single factors."""
    dci = disentanglement.dci(codes, factors)
    return {
        "mig": disentanglement.mig(codes, factors),
        "sap": disentanglement.sap(codes, factors),
        "dci_disentanglement": dci.disentanglement,
        "dci_completeness": dci.completeness,
        "dci_informativeness": dci.informativeness,
        "correlation": disentanglement.factor_correlation(codes, factors).strongest,
    }


def _bound(coder: Coder, rows: Tensor) -> Metrics:
    generator = torch.Generator().manual_seed(_BOUND_SEED)
    if isinstance(coder, VscCoder):
        bound = bounds.iwae(coder.model, rows, BOUND_SAMPLES, generator)
        return {"iwae": float(bound.iwae.mean()), "elbo": float(bound.elbo.mean())}
    if isinstance(coder, DenseVae):
        with torch.no_grad():
            return {"iwae": float(coder.iwae(rows, BOUND_SAMPLES, generator).mean())}
    return {}


def _encode(coder: Coder, dataset: DeviceDataset) -> Codes:
    batches = dataset.batches(torch.arange(len(dataset.rows)), _BATCH)
    return np.concatenate([coder.encode(rows).numpy() for rows in batches])


def _encode_and_decode(coder: Coder, dataset: DeviceDataset) -> tuple[Codes, float]:
    """Return codes, and the squared error a row of what they decode to."""
    codes, error = [], 0.0
    for rows in dataset.batches(torch.arange(len(dataset.rows)), _BATCH):
        code = coder.encode(rows)
        error += float((coder.decode(code) - rows).square().sum())
        codes.append(code.numpy())
    return np.concatenate(codes), error / len(dataset.rows)
