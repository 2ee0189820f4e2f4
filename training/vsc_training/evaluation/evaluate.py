"""`vsc eval`: read a run and data, compute every metric.

Codes are those that the exported model will serve, mu where the spike logit is above the threshold;
bounds use hard spikes. All rows count for metrics of the codes; neighbours and probe take up to
10,000 references and 5,000 queries, and the importance-weighted bound 1,000 rows, each chosen by
the seed.
"""

import logging
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vsc_serve.codes import LIVE_SHARE, Codes, dense_to_csr, stack_codes, threshold, threshold_logit
from vsc_serve.errors import UsageError
from vsc_training.backbone import Backbone
from vsc_training.checkpoint import load_checkpoint
from vsc_training.dataset import DeviceDataset
from vsc_training.evaluation.bounds import iwae
from vsc_training.evaluation.dataset import (
    Factors,
    NothingToSearch,
    SearchSets,
    choose_rows,
    choose_search_sets,
    load_factors,
    load_labelled,
)
from vsc_training.evaluation.disentanglement import best_alone, dci, factor_correlation, mig, sap
from vsc_training.evaluation.metrics import (
    QUANTILES,
    BoundMetrics,
    CodeMetrics,
    Evaluation,
    FactorMetrics,
    NeighbourMetrics,
    OverlapMetrics,
    TauPoint,
)
from vsc_training.evaluation.probe import linear_probe_accuracy
from vsc_training.evaluation.retrieval import (
    TAUS,
    Array,
    bytes_per_row,
    firing_rates,
    neighbour_labels,
    same_class_share,
    search_cost,
    support,
    vote_accuracy,
)
from vsc_training.evaluation.supports import (
    distinct_supports,
    jaccard_by_class,
    support_entropy_bits,
)
from vsc_training.metrics import measure_health
from vsc_training.model import VSC
from vsc_training.objective import Posterior
from vsc_training.spike import hard_spike

logger = logging.getLogger(__name__)

NEIGHBOURS: Final = 10
BOUND_COUNT: Final = 1_000
"""Most rows of the importance-weighted bound."""
FACTOR_COUNT: Final = 20_000
"""Most rows that are compared with factors."""
_TAU: Final = 0.5
_BATCH: Final = 512


def evaluate_run(
    run: Path,
    data: Path,
    *,
    reference: Path | None = None,
    factors: Path | None = None,
    backbone: Path | None = None,
    iwae_samples: int = 50,
    taus: Sequence[float] = TAUS,
    device: torch.device,
    seed: int = 0,
) -> Evaluation:
    """Compute every metric of a trained model.

    Args:
        run: Folder that `vsc train` wrote.
        data: What to measure: a folder of images (class folders give labels), `.npz` or `.npy`.
        reference: Data that neighbours are searched in and the probe is fitted on, as a rule the
            training data. None splits `data` in two halves by the content of each row: the first
            is the reference of the second.
        factors: `factors.npz` with the true factors of `data`.
        backbone: The ONNX file that embeds images, for a model of embeddings.
        iwae_samples: Draws of the importance-weighted bound.
        taus: Thresholds of the curve.
        device: Where to compute.
        seed: Seed of choices and noise: the same one gives the same metrics.

    Raises:
        UsageError: No checkpoint, no data, or an argument out of range.
        InputError: Data that do not fit the model, or factors of other images.
    """
    limits = [threshold_logit(tau) for tau in taus]
    if iwae_samples < 1:
        raise UsageError(f"iwae_samples must be at least 1, not {iwae_samples}")
    checkpoint = load_checkpoint(run)
    model = checkpoint.build_model().to(device)
    opened = Backbone.open(backbone) if backbone else None
    measured = load_labelled(data, checkpoint.state.data, opened)
    known = load_labelled(reference, checkpoint.state.data, opened) if reference else None
    true = load_factors(factors, measured.examples.ids) if factors else None
    absent = {} if true else {"factor": "no factors.npz was given"}
    dataset = DeviceDataset.of(measured.examples.rows, device)
    every = torch.arange(len(measured))
    noise = torch.Generator(device).manual_seed(seed)
    logger.info("evaluating %s on %d rows", run, len(measured))
    health = measure_health(model, dataset.batches(every, _BATCH), noise)
    bound = _measure_bound(model, dataset, iwae_samples, noise, seed)
    passed = _pass(model, dataset.batches(every, _BATCH), limits, noise)
    overlaps, neighbours, scores = None, None, dict[float, tuple[float, float]]()
    if measured.labels is not None:
        overlaps = _measure_overlaps(passed.codes, measured.labels, seed)
    try:
        sets = choose_search_sets(measured, known, least=NEIGHBOURS, seed=seed)
    except NothingToSearch as reason:
        absent["class"] = str(reason)
    else:
        neighbours, scores = _measure_neighbours(model, sets, taus, device=device, seed=seed)
    return Evaluation(
        name=checkpoint.state.name,
        step=checkpoint.state.step,
        data=str(data),
        reference=str(reference) if reference else f"half of {data}",
        noun="images" if model.data.modality == "image" else "vectors",
        skipped=len(measured.examples.bad),
        seed=seed,
        pseudo_inputs=model.recipe.pseudo_inputs,
        health=health,
        bound=bound,
        codes=_describe_codes(passed),
        overlaps=overlaps,
        neighbours=neighbours,
        factors=_measure_factors(passed.codes, true, seed) if true else None,
        curve=_curve(passed, taus, scores),
        absent=absent,
    )


class _Pass(NamedTuple):
    """Collected outputs of one pass over all rows."""

    codes: Codes
    """Deterministic codes, tau = 0.5."""
    overlap: float
    """Overlap of two drawn supports, mean."""
    nll: float
    """Of the deterministic code, tau = 0.5, mean."""
    firing: NDArray[np.float64]
    """Firing rates at each threshold, shape (thresholds, latents)."""
    squared_errors: NDArray[np.float64]
    """Mean at each threshold."""
    nlls: NDArray[np.float64]
    """Mean at each threshold."""


def _measure_bound(
    model: VSC, dataset: DeviceDataset, samples: int, noise: torch.Generator, seed: int
) -> BoundMetrics:
    rows = choose_rows(np.arange(len(dataset.rows)), BOUND_COUNT, seed)
    bounds = iwae(model, dataset.take(torch.from_numpy(rows)), samples, noise)
    spread = float(bounds.iwae.std(ddof=1)) if len(rows) > 1 else math.nan
    return BoundMetrics(
        images=len(rows),
        samples=samples,
        iwae=float(bounds.iwae.mean()),
        iwae_standard_error=spread / math.sqrt(len(rows)),
        elbo_mixture=float(bounds.elbo.mean()),
    )


@torch.no_grad()
def _pass(
    model: VSC, batches: Iterator[Tensor], limits: Sequence[np.float32], noise: torch.Generator
) -> _Pass:
    """Encode all rows once and decode them at each threshold."""
    codes: list[Codes] = []
    overlap = nll = 0.0
    firing = np.zeros((len(limits), model.recipe.latent_dim))
    losses = np.zeros((len(limits), 2))
    for examples in batches:
        q = model.encode(examples)
        code = torch.where(q.spike_logit > 0, q.mu, 0.0)
        codes.append(dense_to_csr(code.cpu().numpy()))
        overlap += _drawn_overlap(q, noise)
        nll += _sum(model.nll(code, examples))
        for place, limit in enumerate(limits):
            is_on = q.spike_logit > float(limit)
            firing[place] += is_on.sum(0).cpu().numpy()
            losses[place] += _losses(model, torch.where(is_on, q.mu, 0.0), examples)
    stacked = stack_codes(codes, model.recipe.latent_dim)
    count = stacked.shape[0]
    return _Pass(stacked, overlap / count, nll / count, firing / count, *(losses / count).T)


def _losses(model: VSC, code: Tensor, examples: Tensor) -> tuple[float, float]:
    """Return the sums of squared errors and of negative log-likelihoods of a batch."""
    squared = (model.decode(code) - examples).square()
    return _sum(squared.flatten(1).sum(1)), _sum(model.nll(code, examples))


def _sum(values: Tensor) -> float:
    return float(values.double().sum())


def _drawn_overlap(q: Posterior, noise: torch.Generator) -> float:
    """Return the sum over a batch of the Jaccard overlap of two supports drawn from it."""
    first, second = (
        hard_spike(q.spike_logit, torch.rand(q.mu.shape, generator=noise, device=q.mu.device)) > 0
        for _ in range(2)
    )
    both, either = (first & second).sum(1).double(), (first | second).sum(1).double()
    return float(torch.where(either > 0, both / either.clamp_min(1), 1.0).sum())


def _describe_codes(passed: _Pass) -> CodeMetrics:
    codes = passed.codes
    rates = firing_rates(codes)
    live = rates[rates >= LIVE_SHARE]
    return CodeMetrics(
        images=codes.shape[0],
        nll=passed.nll,
        active_quantiles=tuple(np.quantile(np.diff(codes.indptr), QUANTILES).tolist()),
        firing_quantiles=tuple(np.quantile(live, QUANTILES).tolist()) if len(live) else (),
        support_entropy_bits=support_entropy_bits(codes),
        distinct_supports=distinct_supports(codes),
        jaccard_passes=passed.overlap,
        search_cost=search_cost(codes),
        bytes_per_image=bytes_per_row(codes),
        bytes_per_image_16_bit=bytes_per_row(codes, index_bytes=2),
    )


def _measure_overlaps(codes: Codes, labels: NDArray[np.str_], seed: int) -> OverlapMetrics:
    found = jaccard_by_class(codes, labels, seed=seed)
    return OverlapMetrics(classes=len(np.unique(labels)), **found._asdict())


def _measure_neighbours(
    model: VSC, sets: SearchSets, taus: Sequence[float], *, device: torch.device, seed: int
) -> tuple[NeighbourMetrics, dict[float, tuple[float, float]]]:
    """Return the metrics at tau 0.5, and (kNN accuracy, precision) at each threshold."""
    reference = _encode(model, DeviceDataset.of(sets.reference, device))
    queries = _encode(model, DeviceDataset.of(sets.queries, device))
    scores = {
        tau: _neighbour_scores(reference.codes(tau), queries.codes(tau), sets)
        for tau in sorted({_TAU, *taus})
    }
    known, asked = reference.codes(_TAU), queries.codes(_TAU)
    support_knn, support_precision = _neighbour_scores(support(known), support(asked), sets)
    found = NeighbourMetrics(
        references=len(known),
        queries=len(asked),
        copies=sets.copies,
        k=NEIGHBOURS,
        knn=scores[_TAU][0],
        precision=scores[_TAU][1],
        support_knn=support_knn,
        support_precision=support_precision,
        linear_probe=linear_probe_accuracy(
            known, sets.reference_labels, asked, sets.query_labels, seed=seed
        ),
    )
    return found, scores


class _Encoded(NamedTuple):
    """Posteriors of some rows, as far as codes need them."""

    spike_logit: NDArray[np.float32]
    mu: NDArray[np.float32]

    def codes(self, tau: float) -> NDArray[np.float32]:
        """Return the deterministic codes, dense, shape (rows, latents)."""
        return threshold(self.spike_logit, self.mu, tau)


@torch.no_grad()
def _encode(model: VSC, dataset: DeviceDataset) -> _Encoded:
    batches = dataset.batches(torch.arange(len(dataset.rows)), _BATCH)
    parts = [model.encode(examples)[:2] for examples in batches]
    return _Encoded(*(torch.cat(part).cpu().numpy() for part in zip(*parts, strict=True)))


def _neighbour_scores(reference: Array, queries: Array, sets: SearchSets) -> tuple[float, float]:
    """Return kNN accuracy and precision from one search."""
    found = neighbour_labels(
        reference, sets.reference_labels, queries, sets.query_labels, k=NEIGHBOURS
    )
    return vote_accuracy(*found), same_class_share(*found)


def _measure_factors(codes: Codes, factors: Factors, seed: int) -> FactorMetrics:
    rows = choose_rows(np.arange(codes.shape[0]), FACTOR_COUNT, seed)
    dense, values = codes[rows].toarray(), factors.values[rows]
    of_codes = dci(dense, values, seed=seed)
    correlation = factor_correlation(dense, values)
    return FactorMetrics(
        images=len(rows),
        factors=factors.names,
        mig=mig(dense, values),
        sap=sap(dense, values),
        disentanglement=of_codes.disentanglement,
        completeness=of_codes.completeness,
        informativeness=of_codes.informativeness,
        correlation=correlation.strongest,
        correlation_contrast=correlation.contrast,
        strongest=[
            {"factor": name, "latent": int(column.argmax()), "correlation": float(column.max())}
            for name, column in zip(factors.names, correlation.matrix.T, strict=True)
        ],
        attributes=factors.attributes,
        attribute_score=best_alone(dense != 0, factors.presence[rows])
        if factors.attributes
        else math.nan,
    )


def _curve(
    passed: _Pass, taus: Sequence[float], scores: dict[float, tuple[float, float]]
) -> list[TauPoint]:
    return [
        TauPoint(
            tau=tau,
            active=float(passed.firing[place].sum()),
            search_cost=float(np.square(passed.firing[place]).sum()),
            squared_error=float(passed.squared_errors[place]),
            nll=float(passed.nlls[place]),
            knn=scores[tau][0] if scores else None,
            precision=scores[tau][1] if scores else None,
        )
        for place, tau in enumerate(taus)
    ]
