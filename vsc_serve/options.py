"""Encode options: what an active latent is, and what is stored of it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal, get_args

from vsc_serve.codes import threshold_logit
from vsc_serve.errors import UsageError

GUARD_BAND: Final = 1e-4
"""Spike logits this near to the threshold may fall on its other side on another engine."""

QUERY_TAU: Final = 0.1
"""Threshold of queries, where neither the caller nor the model's manifest gives one."""

View = Literal["mean", "gamma", "spike"]

REFITTED: Final = "refitted"
"""What provenance says of codes whose values were refitted, under `values`."""


@dataclass(frozen=True, kw_only=True)
class EncodeOptions:
    """What an active latent is, and what is told of it. Raises UsageError for what cannot be."""

    tau: float | None = None
    """Spike threshold in (0, 1) in place of the model's own."""
    view: View = "mean"
    """The value of an active latent: its slab mean mu, its spike probability gamma, or 1."""
    max_active: int | None = None
    """Keep this many active latents of a row, those with the largest |mu|; None keeps all."""
    uncertainty: bool = False
    """Give gamma and sigma of every entry beside the codes."""
    refit: bool = False
    """Give the values that decode nearest to the data by the bundle's linear map, in place of slab
    means; see `LinearMap.refit`."""

    def __post_init__(self) -> None:
        if self.tau is not None:
            threshold_logit(self.tau)
        if self.view not in get_args(View):
            raise UsageError(f"view must be one of {', '.join(get_args(View))}, not {self.view}")
        if self.max_active is not None and self.max_active < 1:
            raise UsageError(f"max_active must be 1 or more, not {self.max_active}")
        if self.refit and self.view != "mean":
            raise UsageError(
                f"`refit` and `view={self.view}`: give one of them. Refitted values take the place"
                " of slab means."
            )

    @classmethod
    def of_codes(cls, meta: Mapping[str, Any]) -> "EncodeOptions":
        """Return what stored codes were made with, so that a query can be made alike.

        Args:
            meta: Provenance of the codes; what it does not say is as in a plain file.

        Raises:
            UsageError: The codes were changed since: no encoder gives codes that are split by sign;
                or their values are of a kind that this version does not know.
        """
        if meta.get("sign") is not None:
            raise UsageError(
                f"these codes were changed since they were encoded (sign: {meta['sign']}). Give the"
                " file that `vsc encode` wrote."
            )
        if meta.get("values") not in (None, REFITTED):
            raise UsageError(
                f"these codes have values {meta['values']!r}, which this vsc-serve does not know."
                " Upgrade vsc-serve."
            )
        return cls(
            tau=meta.get("tau"),
            view=meta.get("view", "mean"),
            max_active=meta.get("max_active"),
            refit=meta.get("values") == REFITTED,
        )


PLAIN: Final = EncodeOptions()
"""The model's own threshold, slab means, every active latent."""
