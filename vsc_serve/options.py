"""Encode options: what an active latent is, and what is stored of it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal, NamedTuple, get_args

from vsc_serve.codes import threshold_logit
from vsc_serve.errors import UsageError
from vsc_serve.manifest import Manifest

GUARD_BAND: Final = 1e-4
"""Spike logits this near to the threshold may fall on its other side on another engine."""

QUERY_TAU: Final = 0.1
"""Threshold of queries, where neither the caller nor the model's manifest gives one."""

View = Literal["mean", "gamma", "spike", "query"]
SIGNED_VIEWS: Final[tuple[View, ...]] = ("mean", "query")
"""Views whose values may be negative."""


class Thresholds(NamedTuple):
    """Spike thresholds of an encoding."""

    tau: float
    """A latent is active whose gamma is above it."""
    stored_tau: float | None = None
    """The same of the rows that queries are for; None where rows are encoded, not queries."""


@dataclass(frozen=True, kw_only=True)
class EncodeOptions:
    """What an active latent is, and what is told of it. Raises UsageError for what cannot be."""

    tau: float | None = None
    """Spike threshold in (0, 1) in place of the model's own."""
    view: View = "mean"
    """The value of an active latent: its slab mean mu, its spike probability gamma, 1, or for a
    query sqrt(gamma) mu."""
    max_active: int | None = None
    """Keep this many active latents of a row, those with the largest |mu|, for a query with the
    largest value; None keeps all."""
    uncertainty: bool = False
    """Give gamma and sigma of every entry beside the codes."""
    stored_tau: float | None = None
    """Threshold of the stored rows that queries are for, in place of the model's own."""

    def __post_init__(self) -> None:
        for tau in (self.tau, self.stored_tau):
            if tau is not None:
                threshold_logit(tau)
        if self.view not in get_args(View):
            raise UsageError(f"view must be one of {', '.join(get_args(View))}, not {self.view}")
        if self.max_active is not None and self.max_active < 1:
            raise UsageError(f"max_active must be 1 or more, not {self.max_active}")
        if self.stored_tau is not None and self.view != "query":
            raise UsageError('`stored_tau` is for queries: give `view="query"` too')
        if self.tau is not None and self.stored_tau is not None:
            check_order(self.tau, self.stored_tau)

    @classmethod
    def of_codes(cls, meta: Mapping[str, Any]) -> "EncodeOptions":
        """Return what stored codes were made with, so that a query can be made alike.

        Args:
            meta: Provenance of the codes; what it does not say is as in a plain file.

        Raises:
            UsageError: The codes were changed since: no encoder gives codes that are split by sign.
        """
        if meta.get("sign") is not None:
            raise UsageError(
                f"these codes were changed since they were encoded (sign: {meta['sign']}). Give the"
                " file that `vsc encode` wrote."
            )
        return cls(
            tau=meta.get("tau"),
            view=meta.get("view", "mean"),
            max_active=meta.get("max_active"),
            stored_tau=meta.get("stored_tau"),
        )

    @classmethod
    def for_query(
        cls, rows: Mapping[str, Any] | Manifest, tau_q: float | None = None
    ) -> "EncodeOptions":
        """Return how queries are made that keep more latents than the stored rows they are for.

        The value of latent j is `sqrt(gamma_j) mu_j where gamma_j > tau_q`.

        Args:
            rows: Provenance of the rows; or the manifest of a model, for rows of its own threshold.
            tau_q: Threshold of the queries; by default what the model's manifest says, else 0.1.

        Raises:
            UsageError: `tau_q` is above the threshold of the rows.
        """
        stored_tau = rows.tau if isinstance(rows, Manifest) else rows.get("tau")
        return cls(view="query", tau=tau_q, stored_tau=stored_tau)

    def thresholds(self, manifest: Manifest) -> Thresholds:
        """Return the thresholds to apply: the options' own, else those of a model.

        Raises:
            UsageError: A query would keep less than the rows it is for.
        """
        if self.view != "query":
            return Thresholds(manifest.tau if self.tau is None else self.tau)
        default = QUERY_TAU if manifest.query_tau is None else manifest.query_tau
        tau = default if self.tau is None else self.tau
        stored_tau = manifest.tau if self.stored_tau is None else self.stored_tau
        check_order(tau, stored_tau)
        return Thresholds(tau, stored_tau)


def check_order(tau_q: float, stored_tau: float) -> None:
    """Raise UsageError where queries would keep less than the rows they are for."""
    if tau_q > stored_tau:
        raise UsageError(
            f"thresholds out of order: queries keep gamma above {tau_q:g}, the rows they are for"
            f" gamma above {stored_tau:g}. A query keeps at least what a row keeps: encode queries"
            f" with a `tau` of at most {stored_tau:g}."
        )


PLAIN: Final = EncodeOptions()
"""The model's own threshold, slab means, every active latent."""
