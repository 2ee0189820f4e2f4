"""What an export is asked for; the command line and Python fill in the same fields."""

from dataclasses import dataclass
from pathlib import Path
from typing import Final

from vsc_export.budget import Budget
from vsc_serve.bundle import Precision
from vsc_serve.codes import threshold_logit
from vsc_training.onnx_graph import OPSET


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """Options of an export. Raises UsageError for a tau that is no threshold."""

    tau: float = 0.5
    """Spike threshold that becomes the model's own; callers may still override it."""
    active: float | None = None
    """Active latents per row: tau is chosen so that calibration rows have as many."""
    budget: Budget | None = None
    """What a row or a search may take: tau, and the tau of queries, are chosen for it."""
    calibration: Path | None = None
    """Data for tau, int8 and the model card; None takes the examples that the run kept."""
    precision: Precision = "float32"
    """Of the encoder's layers; the spike head is float32 in all of them."""
    opset: int = OPSET
    """ONNX operator set; behind a backbone of a newer one, that one."""
    top_k: int | None = None
    """Entries a row of an encoder with fixed shapes, written as well when given."""
    name: str | None = None
    """Name of the model; None takes the run's."""
    about: str = ""
    """What its maker says of the model, Markdown for the top of the model card."""
    allow_collapsed: bool = False
    """Export a model whose metrics say that it has collapsed."""

    def __post_init__(self) -> None:
        threshold_logit(self.tau)


DEFAULT: Final = ExportOptions()
