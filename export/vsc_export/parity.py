"""Parity: does the exported encoder give the codes of the model that was trained?

Truth is the checkpoint in float64. Two runtimes never agree to the last bit, and a spike whose
logit lies within noise of the threshold may fall either way; so parity means

    supports    equal wherever |spike logit - threshold| > GUARD_BAND
    values      within VALUE_TOLERANCE on the common support
    flips       inside the band: counted and reported, never hidden
    bytes       of a code the same whatever the batch, its order and the threads (on a CPU)
    entries     of the compacting graph the same bytes as those of the dense codes

A variant of lower precision cannot meet the first two. It is held to its gate instead (see
`fidelity`), and everything else stays as it is. `rules` says what each kind of bundle is held to.
"""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from vsc_export.comparison import (
    VALUE_TOLERANCE,
    Comparison,
    Truth,
    exact_codes,
    exact_means,
    largest,
)
from vsc_export.fidelity import Fidelity, measure_fidelity
from vsc_export.rules import Rule, rule_of
from vsc_export.settings import compare_settings
from vsc_serve.bundle import DECODER, Precision
from vsc_serve.errors import ExportError
from vsc_serve.session import Device, open_session
from vsc_training.model import VSC

Embed = Callable[[NDArray[Any]], NDArray[np.float32]]
"""Rows of the encoder to rows of the model: what a backbone does to images."""

_DECODED_ROWS: Final = 1024
"""Real rows that are decoded."""


@dataclass(frozen=True, kw_only=True)
class Parity:
    """The report: every comparison, and what the model is like near its threshold."""

    tau: float
    precision: Precision
    rule: Rule
    """What the bundle is held to."""
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
        lines = self.rule.failures(self.comparisons, self.fidelity, bytes_equal=self.bytes_equal)
        if not self.decoder_max_error <= VALUE_TOLERANCE:
            lines.append(f"decoder: values differ by up to {self.decoder_max_error:.2g}")
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

    def report(self) -> dict[str, Any]:
        """Return what `parity.json` says."""
        stored = asdict(self)
        rule = stored.pop("rule")
        return stored | {
            "guard_band": self.rule.tolerance.guard_band,
            "value_tolerance": self.rule.tolerance.value,
            "gate": rule["gate"],
            "passed": not self.failures,
            "failures": self.failures,
        }

    def to_json(self) -> str:
        """Return the text of `parity.json`."""
        return json.dumps(self.report(), indent=2, sort_keys=True) + "\n"


def measure_parity(
    model: VSC,
    folder: Path,
    tau: float,
    inputs: dict[str, NDArray[Any]],
    *,
    precision: Precision = "float32",
    rule: Rule | None = None,
    embed: Embed | None = None,
    device: Device = "cpu",
) -> Parity:
    """Compare the graphs in a folder with the model they were exported from.

    Args:
        model: The trained model.
        folder: Holds the graphs; `encoder_csr.onnx` may be missing, as in older bundles.
        tau: Spike threshold.
        inputs: Rows to compare as the encoder takes them, by kind. The first kind are the real
            ones.
        precision: Precision of the graphs' layers.
        rule: What the bundle is held to; None takes that of the precision.
        embed: What a backbone in front of the model does to images; None where there is none.
        device: Device of the engine.

    Returns:
        The report; `failures` says whether it is parity.
    """
    rule = rule or rule_of(precision)
    band = rule.tolerance.guard_band
    rows = np.concatenate(list(inputs.values()))
    taken = embed(rows) if embed else rows
    real_count = len(next(iter(inputs.values())))
    truth = exact_codes(model, taken, tau)
    modality = "image" if embed else model.data.modality
    found = compare_settings(truth, folder, modality, rows, device=device, guard_band=band)
    real, real_code = truth[:real_count], found.code[:real_count]
    decoder_error, squared_errors = _compare_decoder(
        model, folder, device, taken[:real_count], real, real_code
    )
    return Parity(
        tau=tau,
        precision=precision,
        rule=rule,
        rows={kind: len(part) for kind, part in inputs.items()},
        near_threshold_share=float(real.is_near(band).mean()),
        near_threshold=_near_threshold(truth.is_near(band), inputs),
        bytes_equal=found.bytes_equal,
        decoder_max_error=decoder_error,
        fidelity=measure_fidelity(real, real_code, squared_errors),
        comparisons=found.comparisons,
    )


def require_parity(parity: Parity) -> None:
    """Raise ExportError with the first failures when the report is not parity."""
    failures = parity.failures
    if failures:
        raise ExportError(
            f"the exported model does not compute what was trained: {'; '.join(failures[:3])}."
            " Nothing was written."
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


def _near_threshold(is_near: NDArray[np.bool_], inputs: dict[str, NDArray[Any]]) -> dict[str, int]:
    counts, start = {}, 0
    for kind, part in inputs.items():
        counts[kind] = int(is_near[start : start + len(part)].sum())
        start += len(part)
    return counts
