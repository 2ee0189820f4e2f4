"""Parity: does the exported encoder give the codes of the model that was trained?

Truth is the checkpoint in float64. Two runtimes never agree to the last bit, and a spike whose
logit lies within noise of the threshold may fall either way; so parity means

    supports    equal wherever |spike logit - threshold| > GUARD_BAND
    values      within VALUE_TOLERANCE on the common support
    flips       inside the band: counted and reported, never hidden
"""

import copy
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray

from vsc_export.graphs import DecoderGraph, EncoderGraph
from vsc_serve.bundle import DECODER, ENCODER
from vsc_serve.codes import threshold_logit
from vsc_serve.errors import ExportError
from vsc_serve.session import Session, open_session
from vsc_training.model import VSC

GUARD_BAND: Final = 1e-4
"""Distance of a spike logit from the threshold below which float noise may decide."""
VALUE_TOLERANCE: Final = 1e-4
"""Largest difference of a code's value, and of a decoded pixel."""
BATCH_SIZES: Final = (1, 7, 64, 256)
THREAD_COUNTS: Final = (1, 2)


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One engine, batch size and thread count against float64 torch."""

    engine: str
    """What computed."""
    batch_size: int
    """Rows per call."""
    threads: int
    """Threads inside an operator."""
    decisions: int
    """Spikes decided: rows times latents."""
    flips_outside_band: int
    """Spikes that differ although their logit is not near the threshold. Must be 0."""
    flips_inside_band: int
    """Spikes that differ and are near the threshold."""
    max_logit_error: float
    """Largest difference of a spike logit."""
    max_value_error: float
    """Largest difference of a value that is active on both sides."""

    @property
    def passed(self) -> bool:
        """Tell whether this is parity."""
        return self.flips_outside_band == 0 and self.max_value_error <= VALUE_TOLERANCE


@dataclass(frozen=True, kw_only=True)
class Parity:
    """The report: every comparison, and what the model is like near its threshold."""

    tau: float
    rows: dict[str, int]
    """Rows compared, by kind."""
    near_threshold_share: float
    """Share of spike logits within the guard band: another engine may decide them differently."""
    active_truth: float
    """Active latents per row in float64."""
    bytes_equal: bool
    """Whether the codes were the same bytes at every batch size and thread count."""
    decoder_max_error: float
    """Largest difference of a decoded value."""
    comparisons: list[Comparison]

    @property
    def failures(self) -> list[str]:
        """What is not parity, one line each."""
        lines = [
            f"batch {c.batch_size}, {c.threads} threads on {c.engine}: {c.flips_outside_band}"
            " spikes flipped"
            f" outside the guard band of {GUARD_BAND:g}, values differ by up to"
            f" {c.max_value_error:.2g}"
            for c in self.comparisons
            if not c.passed
        ]
        if not self.decoder_max_error <= VALUE_TOLERANCE:
            lines.append(f"decoder: values differ by up to {self.decoder_max_error:.2g}")
        if not self.bytes_equal:
            lines.append("codes change with batch size or thread count")
        return lines

    def to_json(self) -> str:
        """Return the text of `parity.json`."""
        stored = asdict(self) | {
            "guard_band": GUARD_BAND,
            "value_tolerance": VALUE_TOLERANCE,
            "passed": not self.failures,
            "failures": self.failures,
        }
        return json.dumps(stored, indent=2, sort_keys=True) + "\n"


def measure_parity(model: VSC, folder: Path, tau: float, inputs: dict[str, NDArray[Any]]) -> Parity:
    """Compare the graphs in a folder with the model they were exported from.

    Args:
        model: The trained model.
        folder: Holds the encoder and decoder graphs.
        tau: Spike threshold.
        inputs: Rows to compare, by kind (`examples`, `noise`, ...).

    Returns:
        The report; `failures` says whether it is parity.
    """
    rows = np.concatenate(list(inputs.values()))
    limit = threshold_logit(tau)
    exact = copy.deepcopy(model).double().eval()
    with torch.no_grad():
        exact_limit = torch.tensor(float(limit), dtype=torch.float64)
        code, logit, mu, _ = EncoderGraph(exact)(torch.from_numpy(rows), exact_limit)
        drawn = DecoderGraph(exact)(code).numpy()
    truth = (logit.numpy(), mu.numpy())
    sessions = [
        (threads, open_session(folder / ENCODER, device="cpu", threads=threads))
        for threads in THREAD_COUNTS
    ]
    results = [
        (size, threads, session.engine, run_encoder(session, model.data.modality, rows, size))
        for threads, session in sessions
        for size in BATCH_SIZES
    ]
    decoder = open_session(folder / DECODER, device="cpu")
    (decoded,) = decoder.run(["mean"], {"code": code.numpy().astype(np.float32)})
    first = results[0][3][0].tobytes()
    return Parity(
        tau=tau,
        rows={kind: len(part) for kind, part in inputs.items()},
        near_threshold_share=float((np.abs(truth[0] - limit) <= GUARD_BAND).mean()),
        active_truth=float((truth[0] > limit).sum(1).mean()),
        bytes_equal=all(result[0].tobytes() == first for *_, result in results),
        decoder_max_error=float(np.abs(decoded - drawn).max()),
        comparisons=[
            _compare(truth, result, float(limit), size, threads, engine)
            for size, threads, engine, result in results
        ],
    )


def require_parity(parity: Parity) -> None:
    """Raise ExportError with the first failures when the report is not parity."""
    failures = parity.failures
    if failures:
        raise ExportError(
            f"the exported model does not compute what was trained: {'; '.join(failures[:3])}."
            " Nothing was written."
        )


def run_encoder(
    session: Session, modality: str, rows: NDArray[Any], batch_size: int
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Return dense codes and spike logits of all rows, batch by batch, at the graph's own tau."""
    parts = [
        session.run(["code", "spike_logit"], {modality: rows[start : start + batch_size]})
        for start in range(0, len(rows), batch_size)
    ]
    return np.concatenate([part[0] for part in parts]), np.concatenate([part[1] for part in parts])


def _compare(
    truth: tuple[NDArray[np.float64], NDArray[np.float64]],
    result: tuple[NDArray[np.float32], NDArray[np.float32]],
    limit: float,
    batch_size: int,
    threads: int,
    engine: str,
) -> Comparison:
    """Compare spikes and values. NaN in a result counts as an infinite difference."""
    true_logit, true_mu = truth
    code, logit = result
    is_on, was_on = code != 0, (true_logit > limit) & (true_mu.astype(np.float32) != 0)
    flipped = is_on != was_on
    is_near = np.abs(true_logit - limit) <= GUARD_BAND
    differences = np.abs(code - true_mu)[is_on & was_on]
    return Comparison(
        engine=engine,
        batch_size=batch_size,
        threads=threads,
        decisions=flipped.size,
        flips_outside_band=int((flipped & ~is_near).sum()),
        flips_inside_band=int((flipped & is_near).sum()),
        max_logit_error=_largest(np.abs(logit - true_logit)),
        max_value_error=_largest(differences),
    )


def _largest(differences: NDArray[np.float64]) -> float:
    if not differences.size:
        return 0.0
    return float(np.nan_to_num(differences, nan=np.inf).max())


def parity_inputs(
    model: VSC, examples: NDArray[Any], rng: np.random.Generator
) -> dict[str, NDArray[Any]]:
    """Return the rows parity is measured on: real ones, noise, and constants.

    Args:
        model: Says what a row is.
        examples: Real rows.
        rng: Source of the noise.
    """
    shape = model.data.shape
    if model.data.modality == "image":
        noise: NDArray[Any] = rng.integers(0, 256, (64, *shape), dtype=np.uint8)
        levels: Sequence[float] = (0, 1, 127, 128, 254, 255)
        constants: NDArray[Any] = np.stack([np.full(shape, level, np.uint8) for level in levels])
    else:
        deviation = examples.std() if len(examples) else 1.0
        noise = rng.normal(scale=deviation, size=(64, *shape)).astype(np.float32)
        constants = np.stack([np.full(shape, level, np.float32) for level in (0.0, 1.0, -1.0)])
    return {"examples": examples, "noise": noise, "constants": constants}
