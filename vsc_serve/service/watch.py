"""What the service has encoded lately, beside the model's own data: for clients and for metrics."""

from threading import Lock
from typing import Any, Final

from vsc_serve.codes import Codes, CodeStatistics
from vsc_serve.domain import (
    DomainComparison,
    are_comparable,
    compare,
    domain_facts,
)
from vsc_serve.encoder import Encoder
from vsc_serve.options import EncodeOptions

RECENT: Final = 1000
"""Rows of a block. The rows compared are those of the block in hand and of the one before."""


class DomainWatch:
    """Compares codes with a model's own data: those of a request, and those of the last requests.

    Args:
        encoder: What makes the codes.
    """

    def __init__(self, encoder: Encoder) -> None:
        self._manifest, self._reference = encoder.manifest, encoder.reference
        self._lock = Lock()
        self._before, self._now = self._none(), self._none()
        self._rows = self._empty = 0

    def note(self, codes: Codes, options: EncodeOptions) -> dict[str, Any]:
        """Add the codes of a request; return what their provenance says of them."""
        found = CodeStatistics.of(codes)
        with self._lock:
            self._rows += found.images
            self._empty += found.empty
            if not are_comparable(options, self._manifest):
                return {}
            self._now.add(found)
            if self._now.images >= RECENT:
                self._before, self._now = self._now, self._none()
        return {} if self._reference is None else domain_facts(compare(self._reference, found))

    def recent(self) -> DomainComparison | None:
        """Compare the last rows; None where too few, or where the bundle has no statistics."""
        if self._reference is None:
            return None
        rows = self._none()
        with self._lock:
            rows.add(self._before)
            rows.add(self._now)
        return compare(self._reference, rows)

    def metrics(self) -> str:
        """Return the metrics in the text format of Prometheus."""
        with self._lock:
            values = [("rows_total", "counter", "Rows encoded", float(self._rows))]
            values.append(("empty_rows_total", "counter", "Rows without a latent", self._empty))
        recent = self.recent()
        if recent is not None:
            is_outside = float(bool(recent.out_of_domain))
            values += [
                ("out_of_domain", "gauge", "1: recent rows are far outside own data", is_outside),
                ("active_per_row", "gauge", "Active latents of recent rows", recent.active),
                ("similarity", "gauge", "Firing rates against own data", recent.similarity),
            ]
        label = f'{{model_digest="{self._manifest.digest}"}}'
        return "".join(
            f"# HELP vsc_{name} {text}.\n# TYPE vsc_{name} {kind}\nvsc_{name}{label} {value:g}\n"
            for name, kind, text, value in values
        )

    def _none(self) -> CodeStatistics:
        return CodeStatistics.none(self._manifest.latent_dim)
