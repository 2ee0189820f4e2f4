"""What a bundle is held to before it is written, by its precision and what is in front of it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from vsc_export.comparison import FLOAT32, Comparison, Tolerance
from vsc_export.fidelity import GATES, Fidelity, Gate
from vsc_serve.bundle import ENCODER, ENCODER_CSR, Precision

HALF: Final = Tolerance(guard_band=2e-2, value=1e-2)
"""Tolerance behind a backbone that computes in float16; docs/backbones.md has the measurements."""


@dataclass(frozen=True, kw_only=True)
class Rule:
    """What comparisons and codes of one bundle must meet. All must be finite, and compact alike."""

    name: str
    """What the rule is for, as its failures say it."""
    tolerance: Tolerance
    is_exact: bool
    """Whether supports outside the guard band must be equal, and values within the tolerance."""
    same_bytes: bool
    """Whether codes must be the same bytes in every setting (on a CPU)."""
    gate: Gate | None
    """What the codes of real rows must keep; None where they must be exact."""

    def failures_of(self, found: Comparison) -> list[str]:
        """Return what one comparison lacks, one line each."""
        lines = []
        is_exact = found.flips_outside_band == 0 and found.max_value_error <= self.tolerance.value
        if self.is_exact and not is_exact:
            lines.append(
                f"{found.where}: {found.flips_outside_band} spikes flipped outside the guard band"
                f" of {self.tolerance.guard_band:g}, values differ by up to"
                f" {found.max_value_error:.2g} (at most {self.tolerance.value:g})"
            )
        if found.not_finite:
            lines.append(f"{found.where}: {found.not_finite} values are NaN or infinite")
        if not found.csr_equal:
            lines.append(f"{found.where}: {ENCODER_CSR} gives other entries than {ENCODER}")
        return lines

    def failures(
        self, comparisons: Sequence[Comparison], fidelity: Fidelity, *, bytes_equal: bool
    ) -> list[str]:
        """Return what a bundle lacks, one line each.

        Args:
            comparisons: All settings.
            fidelity: What the codes of the real rows keep.
            bytes_equal: Whether the codes were the same bytes in every setting.
        """
        lines = [line for found in comparisons for line in self.failures_of(found)]
        if self.gate:
            lines += [f"{self.name}: {line}" for line in self.gate.failures(fidelity)]
        is_on_cpu = all(found.engine.endswith("cpu") for found in comparisons)
        if self.same_bytes and not bytes_equal and is_on_cpu:
            lines.append("codes change with batch size, order of the rows or thread count")
        return lines


def rule_of(precision: Precision) -> Rule:
    """Return the rule of a bundle of a precision: exact for float32, else its gate."""
    gate = GATES.get(precision)
    return Rule(
        name=precision, tolerance=FLOAT32, is_exact=gate is None, same_bytes=True, gate=gate
    )


def rule_behind(precision: Precision, *, has_examples: bool) -> Rule:
    """Return the rule from pixels to codes, behind a backbone.

    Bytes may differ: a transformer's products round otherwise at another batch size. One of float16
    is held to the gate of fp16 as well, on real images: a guard band of 0.02 alone would let many
    spikes flip.

    Args:
        precision: fp16 where the backbone computes in float16.
        has_examples: Whether real images are compared, and not noise alone.
    """
    is_fp16 = precision == "fp16"
    return Rule(
        name="backbone",
        tolerance=HALF if is_fp16 else FLOAT32,
        is_exact=True,
        same_bytes=False,
        gate=GATES["fp16"] if is_fp16 and has_examples else None,
    )
