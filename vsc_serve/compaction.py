"""From the outputs of an encoder graph to rows of codes: dense outputs, or compacted by the graph.

Two strategies behind one `Encoder`: `DENSE` reads the dense code and its logits and can give all
that `EncodeOptions` asks for; `COMPACT` reads values, indices and row counts, which is less to copy
off a device, and gives plain codes only. A session may compute more rows than it was given (it may
fill a batch up); what belongs to those is dropped here.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from vsc_serve.bundle import ENCODER, ENCODER_CSR
from vsc_serve.codes import (
    CodeRows,
    DecisionStatistics,
    active_positions,
    build_csr,
    csr_at,
)
from vsc_serve.options import GUARD_BAND, EncodeOptions, View

_SMALLEST: Final = np.finfo(np.float32).tiny
_LARGEST_LOGVAR: Final = 170.0
"""Beyond it sigma is no finite float32."""

GraphOutputs = Mapping[str, NDArray[Any]]
"""Outputs of a graph, by name."""


class EncodedBatch(NamedTuple):
    """Codes of a batch, and what the encoder saw of them."""

    rows: CodeRows
    decisions: DecisionStatistics


@dataclass(frozen=True)
class BatchFacts:
    """Facts about a batch that its outputs do not tell."""

    count: int
    """Rows that were given."""
    latent_dim: int
    limit: np.float32
    """Spike logit of the threshold."""


class NotFinite(ValueError):
    """A model gives values that are not finite.

    Args:
        row: First such row of the batch.
    """

    def __init__(self, row: int) -> None:
        super().__init__(f"row {row}")
        self.row = row


class Compaction(Protocol):
    """A strategy: which graph, which of its outputs, and how they become rows."""

    graph: str
    """File of the bundle."""

    def outputs(self, options: EncodeOptions) -> Sequence[str]:
        """Return the names of the outputs that are needed."""

    def compact(
        self, found: GraphOutputs, batch: BatchFacts, options: EncodeOptions
    ) -> EncodedBatch:
        """Return the rows. Raises NotFinite."""


class _Dense:
    graph = ENCODER

    def outputs(self, options: EncodeOptions) -> Sequence[str]:
        return ["code", "spike_logit", *(["logvar"] if options.uncertainty else [])]

    def compact(
        self, found: GraphOutputs, batch: BatchFacts, options: EncodeOptions
    ) -> EncodedBatch:
        found = {name: output[: batch.count] for name, output in found.items()}
        bad = first_bad_row(found)
        if bad is not None:
            raise NotFinite(bad)
        distance = np.abs(found["spike_logit"] - batch.limit)
        return _rows_of_active(found, options, int(np.count_nonzero(distance <= GUARD_BAND)))


class _Compact:
    graph = ENCODER_CSR

    def outputs(self, options: EncodeOptions) -> Sequence[str]:
        return ["values", "indices", "row_counts"]

    def compact(
        self, found: GraphOutputs, batch: BatchFacts, options: EncodeOptions
    ) -> EncodedBatch:
        bounds = np.zeros(batch.count + 1, np.int64)
        np.cumsum(found["row_counts"][: batch.count], out=bounds[1:])
        values = found["values"][: bounds[-1]].astype(np.float32)
        if not np.isfinite(values).all():
            raise NotFinite(int(np.searchsorted(bounds, _first_bad(values), "right")) - 1)
        indices = found["indices"][: bounds[-1]].copy()
        codes = build_csr(values, indices, bounds, batch.latent_dim)
        energy = float(np.square(values, dtype=np.float64).sum())
        return EncodedBatch(
            CodeRows(codes=codes), DecisionStatistics(kept_energy=energy, total_energy=energy)
        )


DENSE: Final[Compaction] = _Dense()
"""On the host, from dense outputs."""
COMPACT: Final[Compaction] = _Compact()
"""In the graph; near-threshold decisions are not counted."""


def is_plain(options: EncodeOptions) -> bool:
    """Tell whether `COMPACT` can give what the options ask for: a threshold, at most."""
    return options == EncodeOptions(tau=options.tau)


def first_bad_row(found: GraphOutputs) -> int | None:
    """Return the first row of which something is not finite, as NaN in a logit hides a latent."""
    is_bad = {"code": ~np.isfinite(found["code"]), "spike_logit": np.isnan(found["spike_logit"])}
    if "logvar" in found:
        is_bad["logvar"] = ~(found["logvar"] <= _LARGEST_LOGVAR)
    rows = [int(np.flatnonzero(bad.any(axis=1))[0]) for bad in is_bad.values() if bad.any()]
    return min(rows, default=None)


def _first_bad(values: NDArray[np.float32]) -> int:
    return int(np.flatnonzero(~np.isfinite(values))[0])


def _rows_of_active(
    found: GraphOutputs, options: EncodeOptions, near_threshold: int
) -> EncodedBatch:
    """Keep of what the graph gives only what belongs to active latents."""
    dense = found["code"]
    active = active_positions(dense)
    total_energy = _energy(dense, active)
    if options.max_active is not None:
        strength = _values(found, active, options.view if options.view == "query" else "mean")
        active = _strongest(active, strength, dense.shape[1], options.max_active)
    gamma, sigma = None, None
    if options.uncertainty:
        gamma = _gamma(found["spike_logit"].ravel()[active]).astype(np.float32)
        sigma = np.exp(found["logvar"].ravel()[active] / 2)
    rows = CodeRows(
        codes=csr_at(active, _values(found, active, options.view), dense.shape),
        gamma=gamma,
        sigma=sigma,
    )
    kept_energy = total_energy if options.max_active is None else _energy(dense, active)
    decisions = DecisionStatistics(len(dense), near_threshold, kept_energy, total_energy)
    return EncodedBatch(rows, decisions)


def _values(found: GraphOutputs, active: NDArray[np.intp], view: View) -> NDArray[np.float32]:
    """Return what is stored of each active latent; never 0, which a code cannot store."""
    mu = found["code"].ravel()[active]
    if view == "spike":
        return np.ones(len(active), np.float32)
    if view == "mean":
        return mu
    gamma = _gamma(found["spike_logit"].ravel()[active])
    if view == "gamma":
        return gamma.astype(np.float32)
    size = (np.sqrt(gamma) * np.abs(mu)).astype(np.float32)
    return np.copysign(np.maximum(size, _SMALLEST), mu)


def _gamma(spike_logit: NDArray[np.float32]) -> NDArray[np.float64]:
    """Return sigmoid(spike_logit), computed in float64; never below the smallest float32."""
    gamma = np.exp(-np.logaddexp(0.0, -spike_logit.astype(np.float64)))
    return np.maximum(gamma, np.float64(_SMALLEST))


def _strongest(
    active: NDArray[np.intp], strength: NDArray[np.float32], latent_dim: int, count: int
) -> NDArray[np.intp]:
    """Keep the positions of the `count` largest |strength| of each row; of equal ones the lower."""
    rows = active // latent_dim
    order = np.lexsort((-np.abs(strength), rows))  # stable, and row by row
    place = np.arange(len(rows)) - np.searchsorted(rows, rows)
    kept: NDArray[np.intp] = active[np.sort(order[place < count])]
    return kept


def _energy(dense: NDArray[np.float32], active: NDArray[np.intp]) -> float:
    mu = dense.ravel()[active].astype(np.float64)
    return float(mu @ mu)
