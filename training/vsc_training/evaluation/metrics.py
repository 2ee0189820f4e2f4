"""Metrics of an evaluation, as JSON for programs and as a table for people.

Every metric stands beside the number of rows it was computed from; docs/metrics.md defines it.
"""

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any, Final, NamedTuple

from vsc_training.metrics import Health

FORMAT: Final = 1
"""Version of the JSON."""
QUANTILES: Final = (0.0, 0.1, 0.5, 0.9, 1.0)
"""Quantiles that are reported of counts and rates."""
_DIGITS: Final = 6


@dataclass(frozen=True, kw_only=True)
class BoundMetrics:
    """Bounds with the mixture prior, by importance sampling; nats per image."""

    images: int
    """Images measured."""
    samples: int
    """Draws K per image."""
    iwae: float
    """Logarithm of the mean weight of K draws."""
    iwae_standard_error: float
    """Of the mean over the images; NaN for one image."""
    elbo_mixture: float
    """The same with one draw: never above `iwae`, never below `elbo` but for noise."""


@dataclass(frozen=True, kw_only=True)
class CodeMetrics:
    """Metrics of the deterministic codes at tau = 0.5, beyond those of `Health`."""

    images: int
    """Images measured."""
    nll: float
    """Negative log-likelihood of the image given its code, nats per image."""
    active_quantiles: tuple[float, ...]
    """Active latents per image at `QUANTILES`."""
    firing_quantiles: tuple[float, ...]
    """Firing rates of the live latents at `QUANTILES`; empty when none is live."""
    support_entropy_bits: float
    """Upper bound on the entropy of the support."""
    distinct_supports: int
    """Different supports among the images."""
    jaccard_passes: float
    """Overlap of two supports that are drawn for one image."""
    search_cost: float
    """Postings a query touches per stored row."""
    bytes_per_image: float
    """Values (float32) and indices (int32)."""
    bytes_per_image_16_bit: float
    """Values (float32) and indices of 16 bits."""


@dataclass(frozen=True, kw_only=True)
class OverlapMetrics:
    """Overlap (Jaccard) of the supports of two images."""

    classes: int
    """Classes of the images."""
    same: float
    """Of one class; NaN when no class has two images."""
    same_pairs: int
    """Pairs behind it."""
    other: float
    """Of two classes; NaN when there is one class only."""
    other_pairs: int
    """Pairs behind it."""


@dataclass(frozen=True, kw_only=True)
class NeighbourMetrics:
    """Neighbours and probe: codes at tau = 0.5 against classes."""

    references: int
    """Codes that are searched, and on which the probe is fitted."""
    queries: int
    """Codes that are looked for, and on which the probe is judged."""
    copies: int
    """References left out because a query has the same content."""
    k: int
    """Neighbours."""
    knn: float
    """Accuracy of the vote of k neighbours."""
    precision: float
    """Share of the k neighbours with the class of the query."""
    support_knn: float
    """The same vote, with the support in place of the code."""
    support_precision: float
    """The same share, with the support in place of the code."""
    linear_probe: float
    """Accuracy of a logistic regression."""


@dataclass(frozen=True, kw_only=True)
class FactorMetrics:
    """Codes against the true factors of the images."""

    images: int
    """Images measured."""
    factors: list[str]
    """Names of the factors; each is measured where it has an effect."""
    mig: float
    """Mutual information gap."""
    sap: float
    """Separated attribute predictability."""
    disentanglement: float
    """DCI: does a latent tell of one factor only."""
    completeness: float
    """DCI: does one latent suffice for a factor."""
    informativeness: float
    """DCI: variance of the factors that a lasso predicts."""
    correlation: float
    """Mean over the factors of the largest |correlation of sizes| with a latent."""
    correlation_contrast: float
    """The same less that latent's mean correlation with the other factors."""
    strongest: list[dict[str, Any]]
    """Of each factor: the latent that goes with it most, and how much."""
    attributes: list[str]
    """What is there or not."""
    attribute_score: float
    """How well the support of one latent tells an attribute, in [0, 1]; NaN without attributes."""


@dataclass(frozen=True, kw_only=True)
class TauPoint:
    """Metrics of the codes at one spike threshold."""

    tau: float
    """The threshold."""
    active: float
    """Active latents per image."""
    search_cost: float
    """Postings a query touches per stored row."""
    squared_error: float
    """Squared error per image of the reconstruction."""
    nll: float
    """Negative log-likelihood of the image given its code, nats per image."""
    knn: float | None = None
    """Accuracy of the vote of k neighbours; None without classes."""
    precision: float | None = None
    """Share of the k neighbours with the class of the query; None without classes."""


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Every metric of a run on one set of data."""

    name: str
    """Name of the model."""
    step: int
    """Optimiser steps it was trained for."""
    data: str
    """What it was measured on."""
    reference: str
    """Where the references of neighbours and probe come from."""
    noun: str
    """What a row is: images or vectors."""
    skipped: int
    """Files of the data that could not be read."""
    seed: int
    """Seed of samples and noise."""
    pseudo_inputs: int
    """Pseudo-inputs U of the model."""
    health: Health
    """Bounds of one sample, sparsity, error."""
    bound: BoundMetrics
    """Bounds of many samples."""
    codes: CodeMetrics
    """More of the codes at tau = 0.5."""
    overlaps: OverlapMetrics | None
    """Overlaps within and between classes."""
    neighbours: NeighbourMetrics | None
    """Neighbours and probe."""
    factors: FactorMetrics | None
    """Figures that need factors."""
    curve: list[TauPoint]
    """Figures over tau."""
    absent: dict[str, str] = field(default_factory=dict)
    """Which part is None, and why."""

    def to_json(self) -> dict[str, Any]:
        """Return all metrics as a JSON object; what cannot be computed is null."""
        tidy: dict[str, Any] = _tidy({"format": FORMAT, "quantiles": QUANTILES} | asdict(self))
        return tidy

    def table(self) -> str:
        """Return all metrics as text: name, value, unit, and how many rows it was computed from."""
        skipped = f", {self.skipped} files unreadable" if self.skipped else ""
        lines = [
            f"{self.name}, step {self.step:,}, on {self.data}: {self.health.images:,} {self.noun}"
            f"{skipped}; seed {self.seed}"
        ]
        for title, rows in self._sections():
            lines += ["", title, *_aligned(list(rows))]
        lines += ["", *self._curve_lines()]
        lines += [f"no {part} metrics: {reason}" for part, reason in self.absent.items()]
        return "\n".join(lines)

    def _sections(self) -> Iterator[tuple[str, Iterator["_Row"]]]:
        yield "bounds on ln p(x), hard spikes", self._bound_rows()
        yield "deterministic codes, tau 0.5", self._code_rows()
        if self.overlaps:
            title = f"supports of two {self.noun}, {self.overlaps.classes} classes"
            yield title, self._overlap_rows(self.overlaps)
        if self.neighbours:
            title = f"neighbours and probe, references: {self.reference}"
            yield title, self._neighbour_rows(self.neighbours)
        if self.factors:
            yield "true factors", self._factor_rows(self.factors)

    def _bound_rows(self) -> Iterator["_Row"]:
        health, bound = self.health, self.bound
        every, some = f"{health.images:,} {self.noun}", f"{bound.images:,} {self.noun}"
        unit = f"nats per {self.noun[:-1]}"
        yield _Row("elbo_paper", f"{health.elbo_paper:.1f}", unit, every)
        yield _Row("elbo", f"{health.elbo:.1f}", unit, every)
        yield _Row("  reconstruction, sampled", f"{health.reconstruction:.1f}", unit, every)
        yield _Row("  KL to the prior", f"{health.kl:.1f}", unit, every)
        yield _Row("elbo, mixture prior", f"{bound.elbo_mixture:.1f}", unit, some)
        error = f"{unit} (± {bound.iwae_standard_error:.1f})"
        yield _Row(f"IWAE-{bound.samples}", f"{bound.iwae:.1f}", error, some)
        used = f"{health.pseudo_used} of {self.pseudo_inputs}"
        yield _Row("pseudo-inputs in use", used, "", every)

    def _code_rows(self) -> Iterator["_Row"]:
        health, codes = self.health, self.codes
        row, every = self.noun[:-1], f"{health.images:,} {self.noun}"
        dead = health.latents - health.live
        low_to_high = "at 0, 10, 50, 90, 100 %"
        yield _Row("active", f"{health.active:.1f}", f"latents per {row}", every)
        yield _Row("active, quantiles", _list(codes.active_quantiles, "g"), low_to_high, every)
        yield _Row("empty", f"{100 * health.empty_share:.2f} %", f"of the {self.noun}", every)
        counts = f"{health.live} / {dead} / {health.always_on}"
        yield _Row("live / dead / always on", counts, f"of {health.latents} latents", every)
        if codes.firing_quantiles:
            rates = _list(codes.firing_quantiles, ".3f")
            yield _Row("firing rate, live latents", rates, low_to_high, every)
        yield _Row("squared error", f"{health.squared_error:.2f}", f"per {row}", every)
        yield _Row("nll", f"{codes.nll:.1f}", f"nats per {row}", every)
        yield _Row("support entropy, at most", f"{codes.support_entropy_bits:.1f}", "bits", every)
        yield _Row("distinct supports", f"{codes.distinct_supports:,}", "", every)
        yield _Row("Jaccard, two draws", f"{codes.jaccard_passes:.3f}", f"same {row}", every)
        yield _Row("search cost", f"{codes.search_cost:.2f}", "postings per row", every)
        sizes = f"{codes.bytes_per_image:.0f} ({codes.bytes_per_image_16_bit:.0f})"
        yield _Row(f"bytes per {row}", sizes, "float32 + int32 (16-bit) indices", every)

    def _overlap_rows(self, found: OverlapMetrics) -> Iterator["_Row"]:
        same, other = f"{found.same_pairs:,} pairs", f"{found.other_pairs:,} pairs"
        yield _Row("Jaccard, same class", f"{found.same:.3f}", "", same)
        yield _Row("Jaccard, other class", f"{found.other:.3f}", "", other)

    def _neighbour_rows(self, found: NeighbourMetrics) -> Iterator["_Row"]:
        sets = f"{found.queries:,} queries, {found.references:,} references"
        if found.copies:
            sets += f" ({found.copies:,} copies of queries left out)"
        k = found.k
        yield _Row(f"kNN accuracy, k {k}", f"{found.knn:.3f}", "cosine", sets)
        yield _Row(f"precision@{k}", f"{found.precision:.3f}", "cosine", sets)
        yield _Row("kNN accuracy, support", f"{found.support_knn:.3f}", "cosine", sets)
        yield _Row(f"precision@{k}, support", f"{found.support_precision:.3f}", "cosine", sets)
        yield _Row("linear probe", f"{found.linear_probe:.3f}", "accuracy", sets)

    def _factor_rows(self, found: FactorMetrics) -> Iterator["_Row"]:
        basis = f"{found.images:,} {self.noun}, {len(found.factors)} factors"
        yield _Row("MIG", f"{found.mig:.3f}", "", basis)
        yield _Row("SAP", f"{found.sap:.3f}", "", basis)
        yield _Row("DCI disentanglement", f"{found.disentanglement:.3f}", "", basis)
        yield _Row("DCI completeness", f"{found.completeness:.3f}", "", basis)
        yield _Row("DCI informativeness", f"{found.informativeness:.3f}", "", basis)
        yield _Row("factor correlation", f"{found.correlation:.3f}", "", basis)
        yield _Row("  contrast", f"{found.correlation_contrast:.3f}", "", basis)
        if found.attributes:
            basis = f"{found.images:,} {self.noun}, {len(found.attributes)} attributes"
            yield _Row("attribute by one latent", f"{found.attribute_score:.3f}", "", basis)

    def _curve_lines(self) -> list[str]:
        """Return the metrics over tau, one threshold a line; absent columns are left out."""
        basis = f"{self.health.images:,} {self.noun}"
        head = ["tau", "active", "search cost", "squared error", "nll"]
        lines = [[f"{p.tau:g}", f"{p.active:.1f}", f"{p.search_cost:.2f}"] for p in self.curve]
        for line, point in zip(lines, self.curve, strict=True):
            line += [f"{point.squared_error:.2f}", f"{point.nll:.1f}"]
        if found := self.neighbours:
            basis += f"; neighbours: {found.queries:,} queries, {found.references:,} references"
            head += ["kNN", f"precision@{found.k}"]
            for line, point in zip(lines, self.curve, strict=True):
                line += [f"{point.knn:.3f}", f"{point.precision:.3f}"]
        widths = [max(len(text) for text in column) for column in zip(head, *lines, strict=True)]
        shown = [
            "  " + "  ".join(text.rjust(width) for text, width in zip(line, widths, strict=True))
            for line in [head, *lines]
        ]
        return [f"over tau ({basis})", *shown]


class _Row(NamedTuple):
    """One line of the table."""

    name: str
    value: str
    unit: str
    basis: str
    """How many rows the value was computed from."""


def _aligned(rows: list[_Row]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    return [
        f"  {row.name:<{widths[0]}}  {row.value:>{widths[1]}}  {row.unit:<{widths[2]}}  {row.basis}"
        for row in rows
    ]


def _list(values: tuple[float, ...], form: str) -> str:
    return " ".join(format(value, form) for value in values)


def _tidy(value: Any) -> Any:
    """Round floats to what they are worth, and make those that are no number null."""
    if isinstance(value, dict):
        return {key: _tidy(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_tidy(inner) for inner in value]
    if isinstance(value, float):
        return round(value, _DIGITS) if math.isfinite(value) else None
    return value
