"""What VSC is compared with: a dense VAE, a TopK sparse autoencoder and PCA.

The VAE and the TopK autoencoder are the layers of `VSC` with another code in the middle, fitted
under the same recipe: likelihood, AdamW, batch, steps, drop of the learning rate, dropout of the
input, weight decay, bfloat16 rule. VSC itself is fitted by `vsc_training.fit`, never here.
"""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Final, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vsc_serve.codes import dense_to_csr
from vsc_serve.decoder import Decoder
from vsc_serve.encoder import Encoder
from vsc_training.config import Recipe
from vsc_training.data import Examples
from vsc_training.dataset import DeviceDataset
from vsc_training.device import uses_bfloat16
from vsc_training.metrics import deterministic_code
from vsc_training.model import VSC
from vsc_training.step import draw_input_mask
from vsc_training.trainer import parameter_groups

AUXILIARY_WEIGHT: Final = 1.0
"""Weight of the loss that revives dead latents (Gao et al. 2024, appendix A.2, where it is 1/32).

The strongest of those tried: at 1/32, 62 of 200 latents live, at 1/4 77, at 1 93, each with fewer
postings to search and a smaller error (training/LOG.md).
"""
DEAD_AFTER_STEPS: Final = 100
"""Steps without firing after which a latent counts as dead; 12,800 images at batch 128."""

_SCALING_ROWS: Final = 2048
_LOG_TWO_PI: Final = math.log(2.0 * math.pi)


class Coder(Protocol):
    """What every compared model can do."""

    def encode(self, rows: Tensor) -> Tensor:
        """Return deterministic codes, shape (rows, latents); 0 where a latent is absent."""
        ...

    def decode(self, codes: Tensor) -> Tensor:
        """Return what the codes stand for, in the units of the data, shape (rows, *shape)."""
        ...


class VscCoder:
    """A fitted VSC at one spike threshold."""

    def __init__(self, model: VSC, tau: float) -> None:
        self.model = model
        self.limit = math.log(tau / (1.0 - tau))

    def encode(self, rows: Tensor) -> Tensor:
        """Return mu where gamma is above tau, else 0."""
        q = self.model.encode(rows)
        return deterministic_code(q.spike_logit, q.mu, self.limit)

    def decode(self, codes: Tensor) -> Tensor:
        """Return the means of the likelihood."""
        return self.model.decode(codes)


class BundleCoder:
    """An exported model, run by onnxruntime: the one that comes with the package."""

    def __init__(self, path: Path) -> None:
        self._encoder = Encoder.open(path, device="cpu", threads=1)
        self._decoder = Decoder.open(path, device="cpu", threads=1)

    def encode(self, rows: Tensor) -> Tensor:
        """Return the codes of images in [0, 1]."""
        pixels = (rows * 255.0).round().to(torch.uint8).numpy()
        return torch.from_numpy(self._encoder.encode(pixels).toarray())

    def decode(self, codes: Tensor) -> Tensor:
        """Return the means of the likelihood."""
        return torch.from_numpy(self._decoder.decode(dense_to_csr(codes.numpy())))


class Pca:
    """The leading principal components, exact: singular value decomposition of the centred rows."""

    def __init__(self, rows: Tensor, count: int) -> None:
        flat = rows.flatten(1)
        self.shape = rows.shape[1:]
        self.mean = flat.mean(0)
        _, _, directions = torch.linalg.svd(flat - self.mean, full_matrices=False)
        self.components: Tensor = directions[:count].T

    def encode(self, rows: Tensor) -> Tensor:
        """Return the coordinates along the components."""
        return (rows.flatten(1) - self.mean) @ self.components

    def decode(self, codes: Tensor) -> Tensor:
        """Return the rows with these coordinates, the nearest that a linear map can come."""
        flat: Tensor = codes @ self.components.T + self.mean
        return flat.reshape(-1, *self.shape)


class Baseline(nn.Module):
    """A model that `fit_baseline` can fit: VSC's layers, of which a subclass uses some.

    Spike head, pseudo-inputs and classifier stay as they were made; no gradient reaches them.
    """

    def __init__(self, layers: VSC) -> None:
        super().__init__()
        self.layers = layers

    def decode(self, codes: Tensor) -> Tensor:
        """Return the means of the likelihood."""
        return self.layers.decode(codes)

    def loss(self, rows: Tensor, input_mask: Tensor | None, generator: torch.Generator) -> Tensor:
        """Return what is minimised, in nats a row.

        Args:
            rows: One batch, shape (rows, *shape).
            input_mask: What the encoder sees of it, as in `VSC.encode`.
            generator: Source of the noise, for models that draw.
        """
        raise NotImplementedError


class DenseVae(Baseline):
    """Gaussian posterior, prior N(0, 1): -log p(x|z) + beta KL(q(z|x) || N(0, 1)).

    Beta 1 is the VAE of Kingma and Welling (2014); above 1, the beta-VAE of Higgins et al. (2017).
    """

    def __init__(self, layers: VSC, beta: float) -> None:
        super().__init__(layers)
        self.beta = beta

    def encode(self, rows: Tensor) -> Tensor:
        """Return the posterior means: dense codes."""
        return self.layers.encode(rows).mu

    def loss(self, rows: Tensor, input_mask: Tensor | None, generator: torch.Generator) -> Tensor:
        """Return the negative bound with the divergence weighed by beta."""
        _, mu, logvar = self.layers.encode(rows, input_mask)
        noise = torch.randn(mu.shape, generator=generator)
        reconstruction = self.layers.nll(mu + noise * torch.exp(0.5 * logvar), rows)
        kl = 0.5 * (mu.square() + logvar.exp() - logvar - 1.0).sum(1)
        return (reconstruction + self.beta * kl).mean()

    def iwae(self, rows: Tensor, samples: int, generator: torch.Generator) -> Tensor:
        """Return the importance-weighted bound of each row (Burda et al. 2016, equation 8).

        Args:
            rows: Examples, shape (rows, *shape).
            samples: Draws per row.
            generator: Source of the noise.

        Returns:
            Nats, shape (rows,).
        """
        _, mu, logvar = self.layers.encode(rows)
        ratios = []
        for _ in range(samples):
            noise = torch.randn(mu.shape, generator=generator)
            z = mu + noise * torch.exp(0.5 * logvar)
            log_prior = -0.5 * (z.square() + _LOG_TWO_PI).sum(1)
            log_posterior = -0.5 * (noise.square() + logvar + _LOG_TWO_PI).sum(1)
            ratios.append(log_prior - log_posterior - self.layers.nll(z, rows))
        return torch.logsumexp(torch.stack(ratios), 0) - math.log(samples)


class TopK(Baseline):
    """The k largest of relu(hidden W + b), with a loss that revives dead latents (AuxK).

    Gao et al. 2024, "Scaling and evaluating sparse autoencoders", section 2.3 and appendix A.2.
    There the decoder is linear and the auxiliary loss is |residual - decode(dead code)|^2, which is
    the error of decode(code + dead code). That form has a meaning for any decoder, so it is the one
    used here, in nats: the dead latents learn what the k chosen ones leave.
    """

    def __init__(self, layers: VSC, k: int) -> None:
        super().__init__(layers)
        self.k = k
        self.register_buffer("silent_steps", torch.zeros(layers.recipe.latent_dim))
        self.silent_steps: Tensor

    def encode(self, rows: Tensor) -> Tensor:
        """Return sparse codes, at most k entries a row, none negative."""
        return keep_largest(F.relu(self.layers.encode(rows).mu), self.k)

    def loss(self, rows: Tensor, input_mask: Tensor | None, generator: torch.Generator) -> Tensor:
        """Return the reconstruction error and, while latents are dead, the auxiliary one."""
        activations = F.relu(self.layers.encode(rows, input_mask).mu)
        codes = keep_largest(activations, self.k)
        reconstruction = self.layers.nll(codes, rows).mean()
        self.silent_steps = torch.where((codes > 0).any(0), 0.0, self.silent_steps + 1.0)
        is_dead = self.silent_steps >= DEAD_AFTER_STEPS
        if not is_dead.any():
            return reconstruction
        auxiliary_count = min(int(is_dead.sum()), activations.shape[1] // 2)
        revived = keep_largest(activations * is_dead, auxiliary_count)
        residual = self.layers.nll(codes.detach() + revived, rows).mean()
        return reconstruction + AUXILIARY_WEIGHT * residual


def keep_largest(activations: Tensor, count: int) -> Tensor:
    """Keep the largest entries of each row and set the others to 0, shape (rows, latents)."""
    values, places = activations.topk(count, dim=1, sorted=False)
    return torch.zeros_like(activations).scatter(1, places, values)


def make_layers(recipe: Recipe, examples: Examples) -> VSC:
    """Return the layers that all models share, with the weights that VSC starts from as well."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        layers = VSC(recipe, examples.spec)
    head = torch.arange(min(_SCALING_ROWS, len(examples.rows)))
    layers.set_scaling(DeviceDataset.of(examples.rows, torch.device("cpu")).take(head))
    return layers


def fit_baseline(model: Baseline, recipe: Recipe, examples: Examples) -> None:
    """Fit a baseline in place, on the CPU: the one loop of all of them.

    Args:
        model: What to fit.
        recipe: Steps, batch, learning rate, dropout of the input, weight decay, precision and the
            seed of order and noise.
        examples: The data; all rows are used.
    """
    device = torch.device("cpu")
    dataset = DeviceDataset.of(examples.rows, device)
    generator = torch.Generator().manual_seed(recipe.seed)
    groups = parameter_groups(model, recipe.weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=recipe.learning_rate, weight_decay=0.0, fused=True)
    bf16 = uses_bfloat16(recipe, device)
    for step, numbers in enumerate(_batches(len(examples.rows), recipe, generator)):
        if step == int(recipe.learning_rate_drop_at * recipe.steps):
            for group in optimizer.param_groups:
                group["lr"] = 0.1 * recipe.learning_rate
        rows, input_mask = dataset.take(numbers), None
        if recipe.input_dropout:
            input_mask = draw_input_mask(rows.shape, recipe.input_dropout, generator)
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = model.loss(rows, input_mask, generator)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()


def _batches(row_count: int, recipe: Recipe, generator: torch.Generator) -> Iterator[Tensor]:
    """Yield the row numbers of each step: epochs of whole batches, each in an order of its own."""
    left = recipe.steps
    while left > 0:
        order = torch.randperm(row_count, generator=generator)
        whole = order[: row_count // recipe.batch_size * recipe.batch_size]
        batches = whole.split(recipe.batch_size)[:left]
        yield from batches
        left -= len(batches)
