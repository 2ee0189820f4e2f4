"""Sparse autoencoders for vectors at full strength: TopK and CSR, linear, as they are published.

With x the row, centred and scaled to unit mean square, and W_e, W_d of shape (latents, dimensions):

    a = W_e (x - b) + c,   z_k = the k largest of a, where positive,   x_k = z_k W_d + b

    TopK  |x - x_k|^2 + 1/32 AuxK, with the rows of W_d of length 1 and W_d = W_e at the start
    CSR   |x - x_k|^2 + 1/32 AuxK + 1/8 |x - x_4k|^2 + 0.1 InfoNCE(z_k, T = 0.2), with W_d = W_e

TopK: Gao et al. 2024, "Scaling and evaluating sparse autoencoders", section 2 and appendix A.
CSR: Wen et al. 2025, "Beyond Matryoshka: Revisiting Sparse Coding for Adaptive Representation".
Errors are means over rows and dimensions. `baselines` has TopK with the layers of VSC, for images.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

_DEAD_AFTER_ROWS: Final = 10_000
"""Rows without firing after which a latent counts as dead; the papers see 1,000 times as many."""
_DROP_AT: Final = 0.8
"""Share of the rows after which the learning rate is a tenth, as in the recipes of VSC."""
_EPSILON: Final = 1e-6


CSR: Final[dict[str, Any]] = {"is_tied": True, "wide_weight": 1 / 8, "contrast_weight": 0.1}
"""Settings that make CSR of TopK."""


@dataclass(frozen=True, kw_only=True)
class SaeSettings:
    """Every choice of a sparse autoencoder. The defaults are TopK's."""

    k: int
    """Active latents."""
    latent_dim: int = 1024
    """Latents J."""
    is_tied: bool = False
    """The decoder is the encoder's transpose."""
    wide_weight: float = 0.0
    """Weight of the error with 4 k active latents."""
    auxiliary_weight: float = 1 / 32
    """Weight of the error that dead latents leave of the residual (AuxK)."""
    contrast_weight: float = 0.0
    """Weight of InfoNCE: a code against the other codes of its batch."""
    temperature: float = 0.2
    """Temperature of InfoNCE."""
    learning_rate: float = 1e-3
    """Step size of Adam."""
    batch_size: int = 256
    """Rows of a step."""
    rows_seen: int = 640_000
    """Rows of all steps together."""
    seed: int = 0
    """Seed of weights and order."""

    @property
    def steps(self) -> int:
        """Optimiser steps."""
        return self.rows_seen // self.batch_size


class Chosen(NamedTuple):
    """Codes by their entries: decoding them costs what the entries cost, not what J does."""

    values: Tensor
    """Shape (rows, entries), none negative."""
    latents: Tensor
    """Where the values are, shape (rows, entries)."""

    def dense(self, latent_dim: int) -> Tensor:
        """Return the codes, shape (rows, latents)."""
        empty = self.values.new_zeros(len(self.values), latent_dim)
        return empty.scatter(1, self.latents, self.values)


class SparseAutoencoder(nn.Module):
    """TopK or CSR, as the settings say."""

    def __init__(self, settings: SaeSettings, rows: Tensor) -> None:
        """Start from the seed.

        Args:
            settings: Every choice.
            rows: Training rows, shape (rows, dimensions): centre and scale are theirs.
        """
        super().__init__()
        self.settings = settings
        directions = _random_directions(settings.latent_dim, rows.shape[1], settings.seed)
        self.encoder_weight = nn.Parameter(directions)
        self.encoder_bias = nn.Parameter(torch.zeros(settings.latent_dim))
        self.bias = nn.Parameter(torch.zeros(rows.shape[1]))
        self.own_decoder = None if settings.is_tied else nn.Parameter(directions.clone())
        self.register_buffer("center", rows.mean(0))
        self.register_buffer("scale", (rows - rows.mean(0)).square().mean().sqrt())
        self.register_buffer("silent_rows", torch.zeros(settings.latent_dim))
        self.center: Tensor
        self.scale: Tensor
        self.silent_rows: Tensor

    @property
    def decoder_weight(self) -> Tensor:
        """What a latent stands for, shape (latents, dimensions)."""
        return self.encoder_weight if self.own_decoder is None else self.own_decoder

    def encode(self, rows: Tensor) -> Tensor:
        """Return sparse codes, at most k entries a row, none negative."""
        chosen = choose_largest(self._activations(self._scaled(rows)), self.settings.k)
        return chosen.dense(self.settings.latent_dim)

    def decode(self, codes: Tensor) -> Tensor:
        """Return what codes stand for, in the units of the data."""
        return (codes @ self.decoder_weight + self.bias) * self.scale + self.center

    def loss(self, rows: Tensor) -> Tensor:
        """Return what is minimised, and count how long latents have been silent."""
        settings, scaled = self.settings, self._scaled(rows)
        activations = self._activations(scaled)
        chosen = choose_largest(activations, settings.k)
        residual = scaled - self._decoded(chosen)
        loss = residual.square().mean()
        if settings.wide_weight:
            wide = choose_largest(activations, min(4 * settings.k, settings.latent_dim))
            loss = loss + settings.wide_weight * (scaled - self._decoded(wide)).square().mean()
        if settings.contrast_weight:
            codes = chosen.dense(settings.latent_dim)
            loss = loss + settings.contrast_weight * _contrast(codes, settings.temperature)
        return loss + settings.auxiliary_weight * self._auxiliary(activations, chosen, residual)

    def _scaled(self, rows: Tensor) -> Tensor:
        return (rows - self.center) / self.scale

    def _activations(self, scaled: Tensor) -> Tensor:
        """Return W_e (x - b) + c; in this order b's gradient needs no product of the batch."""
        shift = self.encoder_bias - self.encoder_weight @ self.bias
        return F.linear(scaled, self.encoder_weight, shift)

    def _decoded(self, chosen: Chosen) -> Tensor:
        return _summed(chosen, self.decoder_weight) + self.bias

    def _auxiliary(self, activations: Tensor, chosen: Chosen, residual: Tensor) -> Tensor:
        """Return the share of the residual that the best dead latents do not explain."""
        self.silent_rows += len(activations)
        self.silent_rows[chosen.latents[chosen.values > 0]] = 0.0
        is_dead = self.silent_rows > _DEAD_AFTER_ROWS
        if not is_dead.any():
            return residual.new_zeros(())
        count = min(int(is_dead.sum()), _auxiliary_count(residual.shape[1]))
        revived = choose_largest(activations.masked_fill(~is_dead, -math.inf), count)
        goal = residual.detach()
        left = goal - _summed(revived, self.decoder_weight)
        return left.square().mean() / goal.square().mean()

    @torch.no_grad()
    def project_gradient(self) -> None:
        """Take away what a step would change of the lengths of the decoder's rows."""
        if self.own_decoder is not None and self.own_decoder.grad is not None:
            along = (self.own_decoder.grad * self.own_decoder).sum(1, keepdim=True)
            self.own_decoder.grad -= along * self.own_decoder

    @torch.no_grad()
    def normalize_decoder(self) -> None:
        """Give the decoder's rows length 1, unless they are the encoder's too."""
        if self.own_decoder is not None:
            self.own_decoder.div_(self.own_decoder.norm(dim=1, keepdim=True))


def choose_largest(activations: Tensor, count: int) -> Chosen:
    """Return the largest entries of each row, with 0 in place of those that are negative."""
    values, latents = activations.topk(count, dim=1, sorted=False)
    return Chosen(F.relu(values), latents)


def fit_sae(settings: SaeSettings, rows: NDArray[np.float32]) -> SparseAutoencoder:
    """Fit a sparse autoencoder, on the CPU.

    Args:
        settings: Every choice.
        rows: Training rows, shape (rows, dimensions).
    """
    data = torch.from_numpy(rows)
    model = SparseAutoencoder(settings, data)
    optimizer = torch.optim.Adam(model.parameters(), lr=settings.learning_rate, fused=True)
    for step, numbers in enumerate(_batches(len(data), settings)):
        if step == int(_DROP_AT * settings.steps):
            for group in optimizer.param_groups:
                group["lr"] = 0.1 * settings.learning_rate
        loss = model.loss(data[numbers])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        model.project_gradient()
        optimizer.step()
        model.normalize_decoder()
    return model.eval()


def _batches(row_count: int, settings: SaeSettings) -> Iterator[Tensor]:
    """Yield the row numbers of each step: epochs of whole batches, each in an order of its own."""
    generator = torch.Generator().manual_seed(settings.seed)
    size = min(settings.batch_size, row_count)
    left = settings.steps
    while left > 0:
        order = torch.randperm(row_count, generator=generator)
        batches = order[: row_count // size * size].split(size)[:left]
        yield from batches
        left -= len(batches)


def _summed(chosen: Chosen, weight: Tensor) -> Tensor:
    """Return codes times weights, shape (rows, dimensions)."""
    return F.embedding_bag(chosen.latents, weight, per_sample_weights=chosen.values, mode="sum")


def _contrast(codes: Tensor, temperature: float) -> Tensor:
    unit = F.normalize(codes, dim=1, eps=_EPSILON)
    return F.cross_entropy(unit @ unit.T / temperature, torch.arange(len(codes)))


def _auxiliary_count(dimensions: int) -> int:
    """Return k_aux: a power of two close to half of the dimensions (Gao et al., appendix A.2)."""
    return int(2 ** round(math.log2(max(dimensions / 2, 1))))


def _random_directions(count: int, dimensions: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(count, dimensions, generator=generator), dim=1)
