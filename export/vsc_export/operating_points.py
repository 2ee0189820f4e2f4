"""Operating points: choose tau for an active count, and measure what each setting costs and keeps.

A model is trained once; the threshold then moves along the trade-off curve between size and
quality. Compare points at equal search cost, not at equal active count: a query meets the rows that
share a latent.
"""

from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from vsc_export.fidelity import neighbour_recall
from vsc_serve.codes import threshold, threshold_logit
from vsc_serve.errors import UsageError
from vsc_serve.session import Session
from vsc_training.evaluation.retrieval import TAUS, knn_accuracy, search_cost
from vsc_training.model import VSC

_ROWS_AT_MOST: Final = 2000
_BATCH_SIZE: Final = 256
_KNN: Final = 10
_DIGITS: Final = 6
"""Significant digits of a calibrated tau."""
_MISS_AT_MOST: Final = 0.02
"""How far, relatively, the active count may be from what was asked for."""


class Rows(NamedTuple):
    """Rows that operating points are measured on."""

    rows: NDArray[Any]
    """As the encoder graph takes them, shape (rows, *shape)."""
    labels: NDArray[np.str_] | None
    """Class of each, if known."""
    source: str
    """Where they come from, for the model card."""

    def thinned(self) -> "Rows":
        """Return at most two thousand of them, evenly spread."""
        chosen = np.linspace(0, len(self.rows) - 1, min(len(self.rows), _ROWS_AT_MOST))
        places = chosen.astype(np.intp)
        labels = None if self.labels is None else self.labels[places]
        return Rows(self.rows[places], labels, self.source)


@dataclass(frozen=True, kw_only=True)
class TauPoint:
    """What one setting of tau costs and keeps."""

    tau: float
    active: float
    """Active latents per row."""
    search_cost: float
    """Postings a query is expected to touch per row of an index: sum_j f_j^2."""
    neighbour_recall: float
    """Share of the ten nearest rows in the data itself (cosine, centred) that the codes keep."""
    knn: float | None
    """Share of rows whose class is that of most of their ten nearest; None without labels."""
    squared_error: float
    """Squared error per row of what is decoded from the codes."""


def parse_goal(text: str) -> float:
    """Read `active=8`. Raises UsageError for anything else."""
    name, _, value = text.partition("=")
    try:
        goal = float(value)
    except ValueError:
        goal = float("nan")
    if name.strip() != "active" or not 0 < goal < float("inf"):
        raise UsageError(f"`calibrate_tau` {text}: give active=NUMBER, such as active=8.")
    return goal


def calibrate_tau(spike_logit: NDArray[Any], active: float) -> float:
    """Return the tau at which rows have the asked number of active latents, on average.

    Args:
        spike_logit: Spike logits of real rows, shape (rows, latents).
        active: Active latents per row that are asked for.

    Raises:
        UsageError: No tau gives that count on these rows.
    """
    rows, latents = spike_logit.shape
    wanted = round(active * rows)
    falling = np.sort(spike_logit, axis=None)[::-1].astype(np.float64)
    most = np.count_nonzero(falling > falling[-1]) / rows
    if 0 < wanted < rows * latents:
        limit = (falling[wanted - 1] + falling[wanted]) / 2
        tau = float(f"{1 / (1 + np.exp(-limit)):.{_DIGITS}g}")
        found = np.count_nonzero(spike_logit > threshold_logit(tau)) / rows
        if abs(found - active) <= max(_MISS_AT_MOST * active, 0.5 / rows):
            return tau
    raise UsageError(
        f"`calibrate_tau` active={active:g}: no tau gives that on {rows} rows of {latents} latents;"
        f" they reach from {1 / rows:.2g} to {most:.4g} active latents. Ask for a number between."
    )


def measure_trade_off(
    model: VSC, encoder: Session, decoder: Session, measured: Rows, own_tau: float
) -> list[TauPoint]:
    """Measure codes of the exported graphs at each of `TAUS`, and at the bundle's own tau.

    Args:
        model: Says what a row is.
        encoder: The bundle's encoder.
        decoder: The bundle's decoder.
        measured: Real rows.
        own_tau: Tau of the bundle.

    Returns:
        One point for each tau, in rising order.
    """
    logit, mu = posterior(model, encoder, measured.rows)
    return [
        _measure_point(model, decoder, measured, tau, threshold(logit, mu, tau))
        for tau in sorted({*TAUS, own_tau})
    ]


def _measure_point(
    model: VSC,
    decoder: Session,
    measured: Rows,
    tau: float,
    code: NDArray[np.float32],
) -> TauPoint:
    data = measured.rows.reshape(len(code), -1).astype(np.float64)
    return TauPoint(
        tau=tau,
        active=float((code != 0).sum(1).mean()),
        search_cost=search_cost(code),
        neighbour_recall=neighbour_recall(data - data.mean(0), code),
        knn=_knn(code, measured.labels),
        squared_error=squared_error(model, decoder, measured.rows, code),
    )


def posterior(
    model: VSC, encoder: Session, rows: NDArray[Any]
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Return spike logits and slab means, shape (rows, latents)."""
    starts = range(0, len(rows), _BATCH_SIZE)
    parts = [
        encoder.run(["spike_logit", "mu"], {model.data.modality: rows[i : i + _BATCH_SIZE]})
        for i in starts
    ]
    return np.concatenate([part[0] for part in parts]), np.concatenate([part[1] for part in parts])


def _knn(code: NDArray[np.float32], labels: NDArray[np.str_] | None) -> float | None:
    """Classify every second row by the others."""
    if labels is None or len(code) // 2 < _KNN:
        return None
    return knn_accuracy(code[::2], labels[::2], code[1::2], labels[1::2], k=_KNN)


def squared_error(
    model: VSC, decoder: Session, rows: NDArray[Any], code: NDArray[np.float32]
) -> float:
    """Return the squared error per row of what is decoded from codes."""
    total, scale = 0.0, 255.0 if model.data.modality == "image" else 1.0
    for start in range(0, len(rows), _BATCH_SIZE):
        (drawn,) = decoder.run(["mean"], {"code": code[start : start + _BATCH_SIZE]})
        total += float(np.square(drawn - rows[start : start + _BATCH_SIZE] / scale).sum())
    return total / len(rows)
