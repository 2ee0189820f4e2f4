"""The models of the search comparison: what is fitted, and how rows and queries become codes."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Final, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.quality.runs import digest_of, fit_vsc, keep, restore
from benchmarks.quality.sae import CSR, SaeSettings, SparseAutoencoder, fit_sae
from vsc_serve.codes import Codes, dense_to_csr
from vsc_serve.errors import UsageError
from vsc_serve.linear_map import LinearMap
from vsc_training.config import Recipe, load_recipe
from vsc_training.data import Examples
from vsc_training.model import VSC, DataSpec, choose_decoder, choose_encoder

MODELS: Final = ("topk-16", "topk-32", "csr-16", "csr-32", "vsc-search", "vsc-sparse", "dense")
"""Models of the comparison. VSC's threshold is set after the training, k of the others before."""
ROWS_SEEN: Final = 640_000
"""Rows of a training: the 5,000 steps of 128 of VSC's recipes."""
QUERY_TAU: Final = 0.1
"""Spike threshold of VSC's wider queries."""

_BATCH: Final = 1_000
_MAP_ROWS: Final = 8_192
"""Codes that `make_linear_map` regresses on, where the decoder is not linear."""


@dataclass(frozen=True, kw_only=True)
class SearchRun:
    """One model to fit."""

    data: str
    """Name of the data set."""
    model: str
    """One of MODELS; topk and csr with any number."""
    seed: int
    """Seed of weights, order and noise."""
    latent_dim: int
    """Latents J."""
    rows_seen: int
    """Rows of the training."""
    is_validation: bool = False
    """Fitted to nine tenths of the training rows and asked about the others."""
    overrides: tuple[str, ...] = ()
    """Fields of the recipe or of `SaeSettings` that are set otherwise, `key=value`."""

    @property
    def name(self) -> str:
        """A name for files and messages."""
        changed = "".join(f"-{override}" for override in self.overrides)
        part = "-validation" if self.is_validation else ""
        size = f"J{self.latent_dim}-{self.rows_seen}"
        return f"{self.data}-{self.model}-{size}{changed}{part}-{self.seed}"

    @property
    def kind(self) -> str:
        """The model without its number or recipe."""
        return self.model.partition("-")[0]


class SearchCoder(Protocol):
    """What every model of the comparison can do with rows, shape (rows, dimensions)."""

    def stored(self, rows: NDArray[np.float32], active: float) -> Codes:
        """Return the codes that are stored, with so many active latents a row on average."""
        ...

    def wide_queries(self, rows: NDArray[np.float32]) -> "Codes | None":
        """Return queries that keep more than stored rows do; None for a model without them."""
        ...

    def capped(self, rows: NDArray[np.float32], active: int) -> "Codes | None":
        """Return the codes with at most so many active latents in each row; None as above."""
        ...

    def linear_map(self) -> LinearMap:
        """Return the map from codes to rows."""
        ...


class SaeCoder:
    """A fitted sparse autoencoder: k active latents, whatever is asked for."""

    def __init__(self, model: SparseAutoencoder) -> None:
        self._model = model

    def stored(self, rows: NDArray[np.float32], active: float) -> Codes:
        """Return the codes."""
        with torch.inference_mode():
            parts = [self._model.encode(part).numpy() for part in _batches(rows)]
        return dense_to_csr(np.concatenate(parts))

    def wide_queries(self, rows: NDArray[np.float32]) -> "Codes | None":
        """Return None: every query has k active latents."""
        return None

    def capped(self, rows: NDArray[np.float32], active: int) -> "Codes | None":
        """Return None: every row has k active latents."""
        return None

    def linear_map(self) -> LinearMap:
        """Return the decoder in the units of the data."""
        model = self._model
        weights = (model.decoder_weight * model.scale).detach().numpy()
        bias = (model.bias * model.scale + model.center).detach().numpy()
        return LinearMap(weights, bias, np.zeros_like(bias))


class VscCoder:
    """A fitted VSC. The threshold of an active count is chosen on the training rows."""

    def __init__(self, model: VSC, training_rows: NDArray[np.float32]) -> None:
        self._model = model
        self._logits = self._posterior(training_rows[:_MAP_ROWS])[0]
        self._training_rows = training_rows[:_MAP_ROWS]

    def limit(self, active: float) -> float:
        """Return the spike logit above which so many latents a row are active on average."""
        return float(np.quantile(self._logits, 1.0 - active / self._logits.shape[1]))

    def stored(self, rows: NDArray[np.float32], active: float) -> Codes:
        """Return mu where the spike logit is above the limit of this active count."""
        logits, mu = self._posterior(rows)
        return dense_to_csr(np.where(logits > self.limit(active), mu, np.float32(0)))

    def wide_queries(self, rows: NDArray[np.float32]) -> "Codes | None":
        """Return sqrt(gamma) mu where gamma is above QUERY_TAU: `vsc encode --as query`."""
        logits, mu = self._posterior(rows)
        gamma = 1.0 / (1.0 + np.exp(-logits.astype(np.float64)))
        values = (np.sqrt(gamma) * mu).astype(np.float32)
        is_on = logits > math.log(QUERY_TAU / (1.0 - QUERY_TAU))
        return dense_to_csr(np.where(is_on, values, np.float32(0)))

    def capped(self, rows: NDArray[np.float32], active: int) -> "Codes | None":
        """Return mu of the largest |mu| where gamma is above QUERY_TAU.

        `vsc encode --tau 0.1 --max-active ACTIVE` makes the same.
        """
        logits, mu = self._posterior(rows)
        size = np.where(logits > math.log(QUERY_TAU / (1.0 - QUERY_TAU)), np.abs(mu), 0)
        least = np.partition(size, -active, axis=1)[:, -active, None]
        return dense_to_csr(np.where((size >= least) & (size > 0), mu, np.float32(0)))

    def linear_map(self) -> LinearMap:
        """Return the map that an export of this model would have."""
        from vsc_export.linear_map import decoder_map, make_linear_map

        own = decoder_map(self._model)
        if own is not None:
            return own
        logits, mu = self._posterior(self._training_rows)
        found = make_linear_map(self._model, np.where(logits > 0, mu, np.float32(0)))
        assert found is not None  # these models are far smaller than the largest map
        return found

    def _posterior(
        self, rows: NDArray[np.float32]
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        with torch.inference_mode():
            parts = [self._model.encode(part) for part in _batches(rows)]
        logits = np.concatenate([part.spike_logit.numpy() for part in parts])
        return logits, np.concatenate([part.mu.numpy() for part in parts])


def search_runs(
    data: str, models: Sequence[str], *, seeds: Sequence[int], **fields_of_all: Any
) -> Iterator[SearchRun]:
    """Yield the runs on one data set, all models of a seed before the next."""
    for seed in seeds:
        for model in models:
            if model != "dense" or seed == seeds[0]:
                yield SearchRun(data=data, model=model, seed=seed, **fields_of_all)


def settings_of(run: SearchRun, data: DataSpec) -> SaeSettings | Recipe | None:
    """Return what a run is fitted with; None for dense vectors, which need no fit.

    Raises:
        UsageError: No such model, or no such field.
    """
    kind, _, number = run.model.partition("-")
    if kind == "dense":
        return None
    if kind == "vsc":
        return _recipe_of(run, number, data)
    if kind not in ("topk", "csr") or not number.isdecimal():
        raise UsageError(f"--models {run.model}: expected some of {', '.join(MODELS)}")
    own: dict[str, Any] = {"k": int(number), "seed": run.seed}
    own |= {"latent_dim": run.latent_dim, "rows_seen": run.rows_seen}
    own |= dict(_parsed(text) for text in run.overrides)
    return SaeSettings(**CSR | own) if kind == "csr" else SaeSettings(**own)


def digest(run: SearchRun, data: DataSpec) -> str:
    """Return a digest of all choices: what others gave is not this run's result."""
    settings = settings_of(run, data)
    return digest_of("" if settings is None else str(asdict(settings)))


def fit_search_model(run: SearchRun, examples: Examples, weights: Path | None) -> SearchCoder:
    """Fit a model, or read its weights where they were kept.

    Args:
        run: Which model; not `dense`.
        examples: Training rows, vectors.
        weights: Folder for fitted weights; None keeps none.
    """
    settings = settings_of(run, examples.spec)
    name = f"{run.name}-{digest(run, examples.spec)}.safetensors"
    kept = weights / name if weights else None
    if isinstance(settings, SaeSettings):
        model = SparseAutoencoder(settings, torch.from_numpy(examples.rows))
        if not restore(model, kept):
            model = fit_sae(settings, examples.rows)
            keep(model, kept)
        return SaeCoder(model.eval())
    assert settings is not None
    return VscCoder(fit_vsc(settings, examples, kept), examples.rows)


def _recipe_of(run: SearchRun, name: str, data: DataSpec) -> Recipe:
    recipe = load_recipe(name)
    own = [f"latent_dim={run.latent_dim}", f"steps={run.rows_seen // recipe.batch_size}"]
    own += [f"seed={run.seed}", "validation_share=0.0", "on_collapse=warn", *run.overrides]
    recipe = load_recipe(name, own, active=ASKED_ACTIVE)
    # As training will choose; the digest of a run must not depend on when that happens.
    encoder, decoder = choose_encoder(recipe, data), choose_decoder(recipe, data)
    return replace(recipe, encoder=encoder, decoder=decoder)


ASKED_ACTIVE: Final = 16.0
"""Active latents that VSC is asked for, at every J."""


def _parsed(text: str) -> tuple[str, int | float]:
    name, _, value = text.partition("=")
    known = [field.name for field in fields(SaeSettings)]
    if name not in known:
        raise UsageError(f"--set {text}: no field {name!r}; there are {', '.join(known)}")
    return name, int(value) if value.isdecimal() else float(value)


def _batches(rows: NDArray[np.float32]) -> Sequence[torch.Tensor]:
    parts: Sequence[torch.Tensor] = torch.from_numpy(rows).split(_BATCH)
    return parts
