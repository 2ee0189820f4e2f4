"""Codes of an engine against float64 torch: which spikes differ, and how far values are off."""

import copy
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray

from vsc_export.graphs import DecoderGraph, EncoderGraph
from vsc_serve.codes import threshold_logit
from vsc_serve.options import GUARD_BAND
from vsc_training.model import VSC

VALUE_TOLERANCE: Final = 1e-4
"""Largest difference of a code's value, and of a decoded pixel or a vector's scaled dimension."""

_CHUNK_ROWS: Final = 512


@dataclass(frozen=True, kw_only=True)
class Tolerance:
    """How far an engine may be from the trained model before its codes are other codes."""

    guard_band: float
    """Distance of a spike logit from the threshold up to which rounding may decide."""
    value: float
    """Largest difference of a value that is active on both sides."""


FLOAT32: Final = Tolerance(guard_band=GUARD_BAND, value=VALUE_TOLERANCE)
"""Tolerance of a program that computes in float32 from end to end."""


@dataclass(frozen=True)
class Truth:
    """What the trained model says in float64."""

    spike_logit: NDArray[np.float64]
    """Shape (rows, latents)."""
    mu: NDArray[np.float64]
    """Shape (rows, latents)."""
    limit: float
    """Threshold on the logit: the float32 that the graph holds."""

    @property
    def is_on(self) -> NDArray[np.bool_]:
        """What is active. A mean that is 0 in float32 is no entry of a code."""
        is_on: NDArray[np.bool_] = (self.spike_logit > self.limit) & (
            self.mu.astype(np.float32) != 0
        )
        return is_on

    def is_near(self, band: float = GUARD_BAND) -> NDArray[np.bool_]:
        """Return which spikes lie within a band around the threshold, where rounding may decide."""
        is_near: NDArray[np.bool_] = np.abs(self.spike_logit - self.limit) <= band
        return is_near

    @property
    def code(self) -> NDArray[np.float64]:
        """Codes, shape (rows, latents)."""
        return np.where(self.is_on, self.mu, 0.0)

    def __getitem__(self, rows: slice | NDArray[np.intp]) -> "Truth":
        return Truth(self.spike_logit[rows], self.mu[rows], self.limit)


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One engine, batch size, thread count and order of the rows against float64 torch."""

    engine: str
    """What computed."""
    batch_size: int
    """Rows per call."""
    threads: int
    """Threads inside an operator; 0 is the engine's choice."""
    is_permuted: bool
    """Whether the rows came in another order."""
    decisions: int
    """Spikes decided: rows times latents."""
    flips_outside_band: int
    """Spikes that differ although their logit is not near the threshold."""
    flips_inside_band: int
    """Spikes that differ and are near the threshold."""
    max_logit_error: float
    """Largest difference of a spike logit."""
    max_value_error: float
    """Largest difference of a value that is active on both sides."""
    not_finite: int
    """Values and logits that are NaN or infinite. Must be 0."""
    csr_equal: bool
    """Whether the compacting graph gave the entries of the dense codes, to the byte."""

    @property
    def where(self) -> str:
        """The setting, for people: `batch 7, 2 threads on onnxruntime 1.32.0 cpu`."""
        order = ", other order" if self.is_permuted else ""
        return f"batch {self.batch_size}, {self.threads} threads{order} on {self.engine}"

    def __str__(self) -> str:
        return (
            f"{self.where}: {self.flips_outside_band} of {self.decisions} spikes flipped outside"
            f" the band, {self.flips_inside_band} inside; logits within"
            f" {self.max_logit_error:.1e}, values within {self.max_value_error:.1e}"
        )


@dataclass(frozen=True, kw_only=True)
class Setting:
    """How an engine was asked."""

    engine: str
    batch_size: int
    threads: int
    is_permuted: bool = False


def exact_codes(model: VSC, rows: NDArray[Any], tau: float) -> Truth:
    """Return what the model says about the rows in float64.

    Args:
        model: The trained model.
        rows: Rows as the encoder graph takes them.
        tau: Spike threshold in (0, 1).
    """
    exact = exact_encoder(model)
    limit = float(threshold_logit(tau))
    parts = []
    with torch.no_grad():
        for chunk in _chunks(rows):
            _, logit, mu, _ = exact(torch.from_numpy(chunk), torch.tensor(limit).double())
            parts.append((logit.numpy(), mu.numpy()))
    return Truth(
        np.concatenate([logit for logit, _ in parts]),
        np.concatenate([mu for _, mu in parts]),
        limit,
    )


def exact_means(model: VSC, code: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return what the model's decoder draws in float64, shape (rows, *shape)."""
    decoder = DecoderGraph(copy.deepcopy(model).double()).eval()
    with torch.no_grad():
        return np.concatenate([decoder(torch.from_numpy(part)).numpy() for part in _chunks(code)])


def exact_encoder(model: VSC) -> EncoderGraph:
    """Return the encoder in float64."""
    return EncoderGraph(copy.deepcopy(model).double()).eval()


def compare(
    truth: Truth,
    code: NDArray[np.float32],
    spike_logit: NDArray[np.float32],
    setting: Setting,
    *,
    csr_equal: bool,
    guard_band: float = GUARD_BAND,
) -> Comparison:
    """Compare spikes and values. NaN in a result is an infinite difference.

    Args:
        truth: What the model says in float64.
        code: Dense codes of the engine, shape (rows, latents).
        spike_logit: Its spike logits, shape (rows, latents).
        setting: How it was asked.
        csr_equal: Whether the compacting graph gave the same entries.
        guard_band: Distance of a logit from the threshold up to which rounding may decide.
    """
    is_on, was_on = code != 0, truth.is_on
    flipped = is_on != was_on
    is_near = truth.is_near(guard_band)
    return Comparison(
        engine=setting.engine,
        batch_size=setting.batch_size,
        threads=setting.threads,
        is_permuted=setting.is_permuted,
        decisions=flipped.size,
        flips_outside_band=int((flipped & ~is_near).sum()),
        flips_inside_band=int((flipped & is_near).sum()),
        max_logit_error=largest(np.abs(spike_logit - truth.spike_logit)),
        max_value_error=largest(np.abs(code - truth.mu)[is_on & was_on]),
        not_finite=int((~np.isfinite(code)).sum() + (~np.isfinite(spike_logit)).sum()),
        csr_equal=csr_equal,
    )


def largest(differences: NDArray[np.floating[Any]]) -> float:
    """Return the largest difference; NaN counts as infinite, no difference as 0."""
    if not differences.size:
        return 0.0
    return float(np.nan_to_num(differences, nan=np.inf).max())


def _chunks(rows: NDArray[Any]) -> list[NDArray[Any]]:
    """Cut rows into chunks; no rows are one empty chunk."""
    return [rows[start : start + _CHUNK_ROWS] for start in range(0, max(len(rows), 1), _CHUNK_ROWS)]
