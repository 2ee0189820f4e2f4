"""The encoders of a folder, run in every setting that parity is measured in.

One generator of settings and one comparison for every bundle: of images, of vectors, behind a
backbone, and in every precision.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from vsc_export.compaction import CSR_OUTPUTS
from vsc_export.comparison import Comparison, Setting, Truth, compare
from vsc_serve.bundle import ENCODER, ENCODER_CSR
from vsc_serve.codes import dense_to_csr
from vsc_serve.options import GUARD_BAND
from vsc_serve.session import Device, Session, open_session

BATCH_SIZES: Final = (1, 7, 64, 256)
THREAD_COUNTS: Final = (1, 2)


class Found(NamedTuple):
    """Results of one setting, in the order of the rows."""

    setting: Setting
    code: NDArray[np.float32]
    """Dense codes, shape (rows, latents)."""
    spike_logit: NDArray[np.float32]
    """Shape (rows, latents)."""
    csr_equal: bool
    """Whether the compacting graph gave the entries of the dense codes, to the byte."""


@dataclass(frozen=True)
class Compared:
    """Comparisons of all settings with what the trained model says."""

    comparisons: list[Comparison]
    bytes_equal: bool
    """Whether the codes were the same bytes in every setting."""
    code: NDArray[np.float32]
    """Codes of the last setting, shape (rows, latents)."""


def compare_settings(
    truth: Truth,
    folder: Path,
    modality: str,
    rows: NDArray[Any],
    *,
    device: Device = "cpu",
    guard_band: float = GUARD_BAND,
) -> Compared:
    """Run the encoders of a folder in every setting, and compare each with the trained model.

    Args:
        truth: What the model says in float64 about the rows.
        folder: Holds the graphs; `encoder_csr.onnx` may be missing, as in older bundles.
        modality: Name of the encoder's input.
        rows: Rows as the encoder takes them, at least one.
        device: Device of the engine.
        guard_band: Distance of a logit from the threshold up to which rounding may decide.
    """
    comparisons, digests = [], set()
    code = np.empty((0, 0), np.float32)
    for found in run_settings(folder, modality, rows, device):
        setting, code, logit, csr_equal = found
        comparisons.append(
            compare(truth, code, logit, setting, csr_equal=csr_equal, guard_band=guard_band)
        )
        digests.add(hashlib.sha256(code.tobytes()).hexdigest())
    return Compared(comparisons, len(digests) == 1, code)


def run_settings(
    folder: Path, modality: str, rows: NDArray[Any], device: Device = "cpu"
) -> Iterator[Found]:
    """Run both encoders of a folder at every batch size and thread count, and in another order."""
    shuffled = np.random.default_rng(0).permutation(len(rows))
    plans = [(size, False) for size in BATCH_SIZES] + [(BATCH_SIZES[-1], True)]
    for threads in THREAD_COUNTS if device == "cpu" else (0,):
        dense = open_session(folder / ENCODER, device=device, threads=threads)
        csr = _open_csr(folder, device, threads)
        for size, is_permuted in plans:
            given = rows[shuffled] if is_permuted else rows
            code, logit = run_encoder(dense, modality, given, size)
            equal = csr is None or is_same_csr(code, run_csr_encoder(csr, modality, given, size))
            if is_permuted:
                back = np.argsort(shuffled)
                code, logit = code[back], logit[back]
            setting = Setting(
                engine=dense.engine, batch_size=size, threads=threads, is_permuted=is_permuted
            )
            yield Found(setting, code, logit, equal)


def _open_csr(folder: Path, device: Device, threads: int) -> Session | None:
    path = folder / ENCODER_CSR
    return open_session(path, device=device, threads=threads) if path.is_file() else None


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


def is_same_csr(code: NDArray[np.float32], parts: Sequence[NDArray[Any]]) -> bool:
    """Tell whether compacted outputs are the entries of the dense codes, to the byte.

    Args:
        code: Dense codes, shape (rows, latents).
        parts: What the compacting graph gave for the same rows: values, indices, row counts.
    """
    values, indices, row_counts = parts
    expected = dense_to_csr(code)
    return (
        values.tobytes() == expected.data.tobytes()
        and np.array_equal(indices, expected.indices)
        and np.array_equal(row_counts, np.diff(expected.indptr))
    )


def _run(
    session: Session, outputs: Sequence[str], modality: str, rows: NDArray[Any], batch_size: int
) -> tuple[NDArray[Any], ...]:
    parts = [
        session.run(outputs, {modality: rows[start : start + batch_size]})
        for start in range(0, len(rows), batch_size)
    ]
    return tuple(np.concatenate([part[i] for part in parts]) for i in range(len(outputs)))
