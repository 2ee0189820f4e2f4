"""Parity: does the exported encoder give the codes of the model that was trained?

Truth is the checkpoint in float64. Two runtimes never agree to the last bit, and a spike whose
logit lies within noise of the threshold may fall either way; so parity means

    supports    equal wherever |spike logit - threshold| > GUARD_BAND
    values      within VALUE_TOLERANCE on the common support
    flips       inside the band: counted and reported, never hidden
    bytes       of a code the same whatever the batch, its order and the threads (on a CPU)
    entries     of the compacting graph the same bytes as those of the dense codes

A variant of lower precision cannot meet the first two. It is held to its gate instead (see
`fidelity`), and everything else stays as it is.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from vsc_export.compaction import CSR_OUTPUTS
from vsc_export.comparison import (
    GUARD_BAND,
    Comparison,
    Setting,
    Truth,
    compare,
    exact_codes,
    exact_means,
    largest,
)
from vsc_export.fidelity import GATES, Fidelity, measure_fidelity
from vsc_export.parity_inputs import parity_inputs
from vsc_serve.bundle import DECODER, ENCODER, ENCODER_CSR, Precision, open_bundle
from vsc_serve.codes import dense_to_csr
from vsc_serve.errors import CheckFailed, ExportError, InputError
from vsc_serve.images import PixelSpec
from vsc_serve.session import Device, Session, open_session
from vsc_training.checkpoint import load_checkpoint, load_samples
from vsc_training.evaluation.dataset import load_labelled
from vsc_training.model import VSC

VALUE_TOLERANCE: Final = 1e-4
"""Largest difference of a code's value, and of a decoded pixel or a vector's scaled dimension."""
BATCH_SIZES: Final = (1, 7, 64, 256)
THREAD_COUNTS: Final = (1, 2)

_DECODED_ROWS: Final = 1024
"""Real rows that are decoded."""


@dataclass(frozen=True, kw_only=True)
class Parity:
    """The report: every comparison, and what the model is like near its threshold."""

    tau: float
    precision: Precision
    rows: dict[str, int]
    """Rows compared, by kind; the first kind are the real ones."""
    near_threshold_share: float
    """Share of the real rows' spike logits in the guard band, where another engine may differ."""
    near_threshold: dict[str, int]
    """Spike logits in the guard band, by kind of row."""
    bytes_equal: bool
    """Whether the codes were the same bytes at every batch size, thread count and order."""
    decoder_max_error: float
    """Largest difference of a decoded value, in [0, 1] or in units of a vector's scale."""
    fidelity: Fidelity
    """What the codes of the real rows keep."""
    comparisons: list[Comparison]

    @property
    def failures(self) -> list[str]:
        """What is not parity, one line each."""
        lines = [line for comparison in self.comparisons for line in self._failures_of(comparison)]
        if self.precision in GATES:
            found = GATES[self.precision].failures(self.fidelity)
            lines += [f"{self.precision}: {line}" for line in found]
        if not self.decoder_max_error <= VALUE_TOLERANCE:
            lines.append(f"decoder: values differ by up to {self.decoder_max_error:.2g}")
        if not self.bytes_equal and all(c.engine.endswith("cpu") for c in self.comparisons):
            lines.append("codes change with batch size, order of the rows or thread count")
        return lines

    @property
    def flips_inside_band(self) -> int:
        """Most flips that any comparison has inside the guard band."""
        return max(comparison.flips_inside_band for comparison in self.comparisons)

    @property
    def flips_outside_band(self) -> int:
        """Most flips that any comparison has outside the guard band."""
        return max(comparison.flips_outside_band for comparison in self.comparisons)

    @property
    def max_value_error(self) -> float:
        """Largest difference of a value in any comparison."""
        return max(comparison.max_value_error for comparison in self.comparisons)

    def to_json(self) -> str:
        """Return the text of `parity.json`."""
        gate = GATES.get(self.precision)
        stored = asdict(self) | {
            "guard_band": GUARD_BAND,
            "value_tolerance": VALUE_TOLERANCE,
            "gate": asdict(gate) if gate else None,
            "passed": not self.failures,
            "failures": self.failures,
        }
        return json.dumps(stored, indent=2, sort_keys=True) + "\n"

    def _failures_of(self, found: Comparison) -> list[str]:
        order = ", other order" if found.is_permuted else ""
        where = f"batch {found.batch_size}, {found.threads} threads{order} on {found.engine}: "
        lines = []
        is_exact = found.flips_outside_band == 0 and found.max_value_error <= VALUE_TOLERANCE
        if self.precision not in GATES and not is_exact:
            lines.append(
                f"{where}{found.flips_outside_band} spikes flipped outside the guard band of"
                f" {GUARD_BAND:g}, values differ by up to {found.max_value_error:.2g}"
            )
        if found.not_finite:
            lines.append(f"{where}{found.not_finite} values are NaN or infinite")
        if not found.csr_equal:
            lines.append(f"{where}{ENCODER_CSR} gives other entries than {ENCODER}")
        return lines


def measure_parity(
    model: VSC,
    folder: Path,
    tau: float,
    inputs: dict[str, NDArray[Any]],
    *,
    precision: Precision = "float32",
    device: Device = "cpu",
) -> Parity:
    """Compare the graphs in a folder with the model they were exported from.

    Args:
        model: The trained model.
        folder: Holds the graphs; `encoder_csr.onnx` may be missing, as in older bundles.
        tau: Spike threshold.
        inputs: Rows to compare, by kind. The first kind are the real ones.
        precision: Precision of the graphs' layers: which rule they are held to.
        device: Device of the engine.

    Returns:
        The report; `failures` says whether it is parity.
    """
    rows = np.concatenate(list(inputs.values()))
    real_count = len(next(iter(inputs.values())))
    truth = exact_codes(model, rows, tau)
    comparisons, digests, real_code = [], set(), np.empty((0, 0), np.float32)
    for setting, code, logit, csr_equal in _run_settings(model, folder, rows, device):
        comparisons.append(compare(truth, code, logit, setting, csr_equal=csr_equal))
        digests.add(hashlib.sha256(code.tobytes()).hexdigest())
        real_code = code[:real_count]
    real = truth[:real_count]
    decoder_error, squared_errors = _compare_decoder(
        model, folder, device, rows[:real_count], real, real_code
    )
    return Parity(
        tau=tau,
        precision=precision,
        rows={kind: len(part) for kind, part in inputs.items()},
        near_threshold_share=float(real.is_near.mean()),
        near_threshold=_near_threshold(truth, inputs),
        bytes_equal=len(digests) == 1,
        decoder_max_error=decoder_error,
        fidelity=measure_fidelity(real, real_code, squared_errors),
        comparisons=comparisons,
    )


def verify_bundle(
    path: Path, run: Path, data: Path | None, *, row_count: int, device: Device = "cpu"
) -> Parity:
    """Compare a bundle with its run.

    Args:
        path: The bundle.
        run: The run it was exported from.
        data: Real rows to compare on; None takes the examples that the run kept.
        row_count: Real rows at most, evenly spread over the data.
        device: Device of the engine.

    Raises:
        BundleError: The bundle is damaged.
        InputError: The bundle is not of this run, or the data cannot be used.
    """
    manifest = open_bundle(path).manifest
    model = load_checkpoint(run).build_model()
    found = (manifest.latent_dim, manifest.pixel_spec, manifest.input_dim)
    expected = (model.recipe.latent_dim, model.data.pixel_spec, model.data.input_dim)
    if found != expected:
        raise InputError(
            f"{path}: {_describe(*found)}, but {run} has {_describe(*expected)}."
            " Give the run that the bundle was exported from."
        )
    rows = load_samples(run) if data is None else load_labelled(data, model.data).examples.rows
    chosen = np.linspace(0, len(rows) - 1, min(len(rows), row_count)).astype(np.intp)
    inputs = parity_inputs(model, rows[chosen], manifest.tau, np.random.default_rng(0))
    return measure_parity(
        model, path, manifest.tau, inputs, precision=manifest.precision, device=device
    )


def require_parity(parity: Parity) -> None:
    """Raise ExportError with the first failures when the report is not parity."""
    failures = parity.failures
    if failures:
        raise ExportError(
            f"the exported model does not compute what was trained: {'; '.join(failures[:3])}."
            " Nothing was written."
        )


def require_verified(parity: Parity, path: Path) -> None:
    """Raise CheckFailed with the first failures when a bundle is not what was trained."""
    failures = parity.failures
    if failures:
        raise CheckFailed(
            f"{path}: does not compute what was trained: {'; '.join(failures[:3])}."
            " Export again, and check that the run is the one that was exported."
        )


def run_encoder(
    session: Session, modality: str, rows: NDArray[Any], batch_size: int
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Return dense codes and spike logits of all rows, batch by batch, at the graph's own tau."""
    code, spike_logit = _run(session, ("code", "spike_logit"), modality, rows, batch_size)
    return code, spike_logit


def run_csr_encoder(
    session: Session, modality: str, rows: NDArray[Any], batch_size: int
) -> tuple[NDArray[Any], ...]:
    """Return values, indices and row counts of all rows, batch by batch."""
    return _run(session, CSR_OUTPUTS, modality, rows, batch_size)


def _run(
    session: Session, outputs: Sequence[str], modality: str, rows: NDArray[Any], batch_size: int
) -> tuple[NDArray[Any], ...]:
    parts = [
        session.run(outputs, {modality: rows[start : start + batch_size]})
        for start in range(0, len(rows), batch_size)
    ]
    return tuple(np.concatenate([part[i] for part in parts]) for i in range(len(outputs)))


def _run_settings(
    model: VSC, folder: Path, rows: NDArray[Any], device: Device
) -> Iterator[tuple[Setting, NDArray[np.float32], NDArray[np.float32], bool]]:
    """Run both encoders in every setting; give codes and logits in the order of the rows."""
    modality = model.data.modality
    shuffled = np.random.default_rng(0).permutation(len(rows))
    for threads in THREAD_COUNTS if device == "cpu" else (0,):
        dense = open_session(folder / ENCODER, device=device, threads=threads)
        has_csr = (folder / ENCODER_CSR).is_file()
        csr = (
            open_session(folder / ENCODER_CSR, device=device, threads=threads) if has_csr else None
        )
        plans = [(size, False) for size in BATCH_SIZES] + [(BATCH_SIZES[-1], True)]
        for size, is_permuted in plans:
            given = rows[shuffled] if is_permuted else rows
            code, logit = run_encoder(dense, modality, given, size)
            equal = csr is None or _is_same_csr(code, run_csr_encoder(csr, modality, given, size))
            if is_permuted:
                code, logit = code[np.argsort(shuffled)], logit[np.argsort(shuffled)]
            setting = Setting(
                engine=dense.engine, batch_size=size, threads=threads, is_permuted=is_permuted
            )
            yield setting, code, logit, equal


def _is_same_csr(code: NDArray[np.float32], parts: tuple[NDArray[Any], ...]) -> bool:
    """Tell whether compacted outputs are the entries of the dense codes, to the byte."""
    values, indices, row_counts = parts
    expected = dense_to_csr(code)
    return (
        values.tobytes() == expected.data.tobytes()
        and np.array_equal(indices, expected.indices)
        and np.array_equal(row_counts, np.diff(expected.indptr))
    )


def _compare_decoder(
    model: VSC,
    folder: Path,
    device: Device,
    rows: NDArray[Any],
    truth: Truth,
    code: NDArray[np.float32],
) -> tuple[float, tuple[float, float]]:
    """Return the decoder's largest error, and the squared errors of truth and engine per row."""
    chosen = np.linspace(0, len(rows) - 1, min(len(rows), _DECODED_ROWS)).astype(np.intp)
    session = open_session(folder / DECODER, device=device)
    expected = exact_means(model, truth.code[chosen])
    drawn, redrawn = (
        session.run(["mean"], {"code": part[chosen].astype(np.float32)})[0]
        for part in (truth.code, code)
    )
    is_image = model.data.modality == "image"
    wanted = rows[chosen] / 255.0 if is_image else rows[chosen]
    scale = 1.0 if is_image else float(model.scale)
    errors = [float(np.square(part - wanted).sum() / len(wanted)) for part in (expected, redrawn)]
    return largest(np.abs(drawn - expected)) / scale, (errors[0], errors[1])


def _describe(latent_dim: int, spec: PixelSpec | None, input_dim: int | None) -> str:
    return f"{latent_dim} latents of {spec or f'vectors of {input_dim}'}"


def _near_threshold(truth: Truth, inputs: dict[str, NDArray[Any]]) -> dict[str, int]:
    counts, start = {}, 0
    for kind, part in inputs.items():
        counts[kind] = int(truth[start : start + len(part)].is_near.sum())
        start += len(part)
    return counts
