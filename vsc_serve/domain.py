"""Reference statistics of a model's own data, and how far the codes of a run are from them.

A model describes every image with its features, also images that are unlike all it was fitted to.
Their codes show it: another number of active latents, empty codes, other features than usual. A
bundle records what is usual (`statistics.json`, docs/formats.md); a run's own statistics, which
were added up while it ran, are compared with that. docs/encode.md has the measured calibration.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from vsc_serve.bundle import STATISTICS, Bundle, Manifest
from vsc_serve.codes import Codes, CodeStatistics, stack_codes
from vsc_serve.errors import BundleError
from vsc_serve.options import EncodeOptions
from vsc_serve.schema import conform_fields, load_json
from vsc_serve.untrusted import inside, read_plain

FORMAT: Final = 1
MIN_IMAGES: Final = 20
"""Fewer images than this are not compared: they say too little."""

_ACTIVE: Final = 1.25
"""Standard deviations that the mean active count may be off."""
_EMPTY: Final = 0.1
"""Share of empty codes that may be there beyond that of the model's own data."""
_SIMILARITY: Final = 0.7
"""Similarity of firing rates below which features are used otherwise."""
_ERRORS: Final = 3.0
"""Standard errors by which a mean of few images may be off by chance."""
_MAX_BYTES: Final = 2**26
_DIGITS: Final = 5


@dataclass(frozen=True, kw_only=True)
class GroupStatistics:
    """Statistics of some of a model's own rows."""

    of: str
    """Which rows: `held out`, `training` or `calibration`."""
    images: int
    active: float
    """Active latents per image, mean."""
    active_sd: float
    """Their standard deviation."""
    empty_share: float
    """Share of images without an active latent."""
    near_share: float
    """Share of decisions in the guard band around the threshold."""
    squared_error: float
    """Squared error per image of what is decoded from the codes, in the units of the data."""


@dataclass(frozen=True, kw_only=True)
class ReferenceStatistics:
    """Contents of `statistics.json`: what codes of a model's own data look like."""

    tau: float
    """Threshold that they were measured at."""
    groups: list[GroupStatistics]
    """One or more sets of rows; what lies between two of them is usual too."""
    firing_rates: list[float]
    """Share of the images in which each latent is on."""
    format: int = FORMAT

    def __post_init__(self) -> None:
        numbers = [self.tau, *self.firing_rates]
        for group in self.groups:
            numbers += [value for value in asdict(group).values() if not isinstance(value, str)]
        if not self.groups or not all(map(math.isfinite, numbers)) or min(numbers) < 0:
            raise ValueError("statistics must be there, finite and not negative")
        if max(self.firing_rates, default=0.0) > 1 or any(one.images < 1 for one in self.groups):
            raise ValueError("firing_rates are at most 1, and of one image or more")

    def expected_live(self, images: int) -> float:
        """Return how many latents are on at least once in so many images of the model's own."""
        return float((1.0 - (1.0 - np.array(self.firing_rates)) ** images).sum())

    def __str__(self) -> str:
        return "; ".join(
            f"{one.images} {one.of}: {one.active:.1f} active (sd {one.active_sd:.1f}),"
            f" {one.empty_share:.1%} empty, squared error {one.squared_error:.4g}"
            for one in self.groups
        )

    def to_json(self) -> str:
        """Return the text of the file."""
        return json.dumps(asdict(self), sort_keys=True) + "\n"


@dataclass(frozen=True, kw_only=True)
class DomainComparison:
    """How the codes of a run differ from those of the model's own data."""

    images: int
    """Images of the run."""
    active: float
    """Active latents per image."""
    own_active: tuple[float, float]
    """The same of the model's own data, lowest and highest group."""
    empty_share: float
    own_empty_share: float
    live: int
    """Latents that are on at least once."""
    expected_live: float
    """The same of as many images of the model's own data."""
    similarity: float
    """Cosine of the firing rates, freed from what chance takes from few images: 1 as own data."""
    out_of_domain: list[str]
    """What is far outside: some of `active`, `empty` and `features`."""

    def to_json(self) -> dict[str, Any]:
        """Return it for programs."""
        return {
            name: round(value, _DIGITS) if isinstance(value, float) else value
            for name, value in asdict(self).items()
        }

    def __str__(self) -> str:
        low, high = (f"{value:.1f}" for value in self.own_active)
        own = low if low == high else f"{low} to {high}"
        return (
            f"{self.active:.1f} active per image (own data: {own}), {self.empty_share:.1%} empty"
            f" codes ({self.own_empty_share:.1%}), {self.live} latents in use"
            f" ({self.expected_live:.0f}), firing rates alike to {self.similarity:.2f} (1)"
        )


def are_comparable(options: EncodeOptions, manifest: Manifest) -> bool:
    """Tell whether codes of these options are what reference statistics were measured on."""
    is_whole = options.view == "mean" and options.max_active is None and not options.refit
    return is_whole and options.thresholds(manifest).tau == manifest.tau


def compare(reference: ReferenceStatistics, run: CodeStatistics) -> DomainComparison | None:
    """Compare the codes of a run with those of the model's own data; None of too few images."""
    if run.images < MIN_IMAGES:
        return None
    groups, error = reference.groups, _ERRORS / math.sqrt(run.images)
    empty, own_empty = run.empty / run.images, max(group.empty_share for group in groups)
    similarity = _similarity(reference, run)
    found = {
        "active": _shift(run.active, groups) > _ACTIVE + error,
        "empty": empty > own_empty + _EMPTY + error * math.sqrt(empty * (1 - empty)),
        "features": similarity < _SIMILARITY - error / 8,
    }
    return DomainComparison(
        images=run.images,
        active=run.active,
        own_active=(min(group.active for group in groups), max(group.active for group in groups)),
        empty_share=empty,
        own_empty_share=own_empty,
        live=int((run.firing > 0).sum()),
        expected_live=reference.expected_live(run.images),
        similarity=similarity,
        out_of_domain=[name for name, is_outside in found.items() if is_outside],
    )


def domain_facts(found: DomainComparison | None) -> dict[str, Any]:
    """Return what the provenance of codes says: nothing unless they are far outside."""
    return {"out_of_domain": found.out_of_domain} if found and found.out_of_domain else {}


def _shift(active: float, groups: Sequence[GroupStatistics]) -> float:
    """Return how far a mean is from those of all groups, in standard deviations; 0 between them."""
    low, high = (pick(groups, key=lambda group: group.active) for pick in (min, max))
    if low.active <= active <= high.active:
        return 0.0
    nearest = low if active < low.active else high
    return abs(active - nearest.active) / max(nearest.active_sd, 1e-9)


def _similarity(reference: ReferenceStatistics, run: CodeStatistics) -> float:
    """Return the cosine of firing rates.

    Rates of few images are longer vectors than those of many, by their variance f (1 - f) / (n - 1)
    a latent, which is taken away from the squares.
    """
    own, rates = np.array(reference.firing_rates), run.firing / run.images
    own_images = sum(group.images for group in reference.groups)
    length = math.sqrt(_square(own, own_images) * _square(rates, run.images))
    return min(float(own @ rates) / length, 1.0) if length > 0 else 0.0


def _square(rates: NDArray[np.float64], images: int) -> float:
    return float((rates**2 - rates * (1 - rates) / max(images - 1, 1)).sum())


@dataclass(frozen=True)
class OwnCodes:
    """Codes of some of a model's own rows, and what else was measured of them."""

    of: str
    codes: Codes
    near_share: float
    squared_error: float


def reference_of(groups: Sequence[OwnCodes], tau: float) -> ReferenceStatistics:
    """Return the reference statistics of one or more sets of rows, each of one row or more."""
    codes = stack_codes([group.codes for group in groups], groups[0].codes.shape[1])
    statistics = CodeStatistics.of(codes)
    return ReferenceStatistics(
        tau=tau,
        groups=[_group(group) for group in groups],
        firing_rates=_rounded(statistics.firing / statistics.images),
    )


def _group(own: OwnCodes) -> GroupStatistics:
    active = np.diff(own.codes.indptr)
    measured = [active.mean(), active.std(), (active == 0).mean(), own.near_share]
    names = ("active", "active_sd", "empty_share", "near_share", "squared_error")
    numbers = _rounded(np.array([*measured, own.squared_error]))
    return GroupStatistics(of=own.of, images=len(active), **dict(zip(names, numbers, strict=True)))


def _rounded(values: NDArray[np.float64]) -> list[float]:
    return [float(f"{value:.{_DIGITS}g}") for value in values.tolist()]


def read_reference(bundle: Bundle) -> ReferenceStatistics | None:
    """Read the reference statistics of a bundle, which may be a stranger's; None where it has none.

    Raises:
        BundleError: They are damaged, or not of this model.
    """
    if STATISTICS not in bundle.manifest.files:
        return None
    path = bundle.path / STATISTICS
    try:
        stored = load_json(read_plain(inside(bundle.path, STATISTICS), _MAX_BYTES))
        if stored.get("format") != FORMAT:
            return None  # of a newer version: codes are made all the same
        found = conform_fields(stored, ReferenceStatistics, ignore=True)
        if len(found.firing_rates) != bundle.manifest.latent_dim:
            raise ValueError(f"{len(found.firing_rates)} firing rates, not one for each latent")
    except (OSError, ValueError, AttributeError) as error:
        raise BundleError(f"{path}: damaged ({error}). Export again.") from error
    return found
