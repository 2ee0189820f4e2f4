"""The model: encoder, decoder, pseudo-inputs and classifier; nothing about how they are fitted."""

from dataclasses import dataclass
from math import prod
from typing import Final, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vsc_serve.errors import UsageError
from vsc_serve.images import PixelSpec
from vsc_training.backbone import BackboneSpec
from vsc_training.config import DecoderKind, EncoderKind, Recipe
from vsc_training.networks import (
    conv_decoder,
    conv_encoder,
    encode_both,
    head_input,
    head_width,
    mlp_decoder,
    mlp_encoder,
)
from vsc_training.objective import Posterior, bernoulli_nll, gaussian_nll, sharpen

SPIKE_LOGIT_LIMIT: Final = 12.0
LOGVAR_RANGE: Final = (-10.0, 5.0)
_LIKELIHOOD_LOGVAR_RANGE: Final = (-8.0, 4.0)
"""A variance that may go to 0 makes a density unbounded; the authors' code floors it as well."""
_MLP_SIDE_LIMIT: Final = 32
"""Grey images up to this side get an mlp unless the recipe says otherwise."""


@dataclass(frozen=True, kw_only=True)
class DataSpec:
    """Shape of the data: images of one shape, or vectors of one length."""

    pixel_spec: PixelSpec | None = None
    """How an image becomes pixels. None for vectors."""
    input_dim: int | None = None
    """Length of a vector. None for images."""
    backbone: BackboneSpec | None = None
    """What made the vectors out of images, where training did that itself."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one example."""
        return self.pixel_spec.shape if self.pixel_spec else (self.input_dim or 0,)

    @property
    def modality(self) -> Literal["image", "vector"]:
        """What an example is."""
        return "image" if self.pixel_spec else "vector"


class VSC(nn.Module):
    """Variational Sparse Coding (Tonolini, Jensen, Murray-Smith, UAI 2019).

        q(z|x)  = prod_j gamma_j N(mu_j, sigma_j^2) + (1 - gamma_j) delta_0      encode
        p(z|x)  = sum_u w_u q(z|x_u),  w = classifier(x)                         prior, weights
        p(x|z)  = Bernoulli or Gaussian, means from the decoder                  decode, nll

    Examples are (images, height, width, channels) in [0, 1], or (vectors, dimensions) as they came;
    vectors are centred and scaled inside (`set_scaling`).
    """

    def __init__(self, recipe: Recipe, data: DataSpec) -> None:
        super().__init__()
        self.recipe = recipe
        self.data = data
        self.network = choose_network(recipe, data)
        self.encoder_kind = choose_encoder(recipe, data)
        self.is_gaussian = recipe.likelihood == "gaussian" or (
            recipe.likelihood == "auto" and data.modality == "vector"
        )
        shape, is_linear = data.shape, choose_decoder(recipe, data) == "linear"
        if self.network == "mlp" or is_linear:
            layers = 0 if is_linear else recipe.layers
            self.decoder = mlp_decoder(recipe.latent_dim, recipe.hidden, layers, shape)
        if self.network == "mlp":
            layers = 0 if self.encoder_kind == "linear" else recipe.layers
            self.encoder = mlp_encoder(shape, recipe.hidden, layers)
        else:
            image_shape = (shape[0], shape[1], shape[2])
            self.encoder = conv_encoder(image_shape, recipe.width, recipe.hidden)
            if not is_linear:
                width, hidden = recipe.width, recipe.hidden
                self.decoder = conv_decoder(recipe.latent_dim, width, hidden, image_shape)
        seen = head_width(self.encoder_kind, recipe.hidden, shape)
        self.spike_head = nn.Linear(seen, recipe.latent_dim)
        self.slab_head = nn.Linear(seen, 2 * recipe.latent_dim)
        self.pseudo_logits = nn.Parameter(torch.zeros(recipe.pseudo_inputs, *shape))
        self.classifier = nn.Linear(prod(shape), recipe.pseudo_inputs)
        self.likelihood_logvar = nn.Parameter(torch.zeros(shape)) if self.is_gaussian else None
        self.register_buffer("center", torch.zeros(shape if data.modality == "vector" else ()))
        self.register_buffer("scale", torch.ones(()))
        self.center: Tensor
        self.scale: Tensor

    def encode(self, examples: Tensor, input_mask: Tensor | None = None) -> Posterior:
        """Return the posterior of each example, in float32.

        Args:
            examples: Shape (images, *shape).
            input_mask: Factors of the scaled examples, same shape: 0 where training hides a value.
        """
        return self._encode_scaled(self._seen(examples, input_mask))

    def prior(self) -> Posterior:
        """Return the posteriors of the pseudo-inputs, spike probabilities sharpened."""
        return sharpen(
            self._encode_scaled(self._scaled_pseudo_inputs()), self.recipe.prior_sharpness
        )

    def encode_with_prior(
        self, examples: Tensor, input_mask: Tensor | None = None
    ) -> tuple[Posterior, Posterior]:
        """Return `encode(...)` and `prior()`, with one pass for both where it pays."""
        parts = self._seen(examples, input_mask), self._scaled_pseudo_inputs()
        both = self._heads(encode_both(self.encoder, *parts, self.encoder_kind))
        q, prior = zip(*(part.tensor_split((len(examples),)) for part in both), strict=True)
        return Posterior(*q), sharpen(Posterior(*prior), self.recipe.prior_sharpness)

    def weights(self, examples: Tensor) -> Tensor:
        """Return the classifier's weights, shape (images, pseudo-inputs); rows sum to 1."""
        scores = self.classifier(self._scaled(examples).flatten(1)).float()
        if self.recipe.classifier == "softmax":
            return torch.softmax(scores, dim=1)
        weights = torch.sigmoid(scores)
        return weights / weights.sum(1, keepdim=True)

    def decode(self, z: Tensor) -> Tensor:
        """Return the means of the likelihood, in the units of the data, shape (images, *shape)."""
        raw: Tensor = self.decoder(z).float()
        if self.data.modality == "vector":
            return raw * self.scale + self.center
        return torch.sigmoid(raw)

    def nll(self, z: Tensor, examples: Tensor) -> Tensor:
        """Return the negative log-likelihood of the examples in nats, shape (images,).

        Vectors are measured in the scaled units the model works in.
        """
        raw = self.decoder(z).float()
        if self.likelihood_logvar is None:
            return bernoulli_nll(raw, examples)
        mean = raw if self.data.modality == "vector" else torch.sigmoid(raw)
        logvar = self.likelihood_logvar.clamp(*_LIKELIHOOD_LOGVAR_RANGE)
        return gaussian_nll(mean, logvar, self._scaled(examples))

    @property
    def pseudo_inputs(self) -> Tensor:
        """The pseudo-inputs in the units of the data, shape (pseudo-inputs, *shape)."""
        if self.data.modality == "vector":
            return self.pseudo_logits * self.scale + self.center
        return torch.sigmoid(self.pseudo_logits)

    @torch.no_grad()
    def set_scaling(self, examples: Tensor) -> None:
        """Centre vectors on their mean and scale them to unit mean square. Images stay as they are.

        One scale for all dimensions keeps the angles between embeddings.
        """
        if self.data.modality == "image":
            return
        self.center.copy_(examples.mean(0))
        std = (examples - self.center).square().mean().sqrt()
        self.scale.copy_(std if std > 0 else torch.ones_like(std))

    @torch.no_grad()
    def start_pseudo_inputs(self, examples: Tensor) -> None:
        """Set the pseudo-inputs to examples, shape (pseudo-inputs, *shape)."""
        if self.data.modality == "vector":
            self.pseudo_logits.copy_(self._scaled(examples))
        else:
            self.pseudo_logits.copy_(torch.logit(examples.clamp(0.02, 0.98)))

    @torch.no_grad()
    def start_spikes(self, share: float) -> None:
        """Set the biases of the spike logits so that about this share of the latents is on."""
        self.spike_head.bias.fill_(float(torch.logit(torch.tensor(share, dtype=torch.float64))))

    def _encode_scaled(self, scaled: Tensor) -> Posterior:
        return self._heads(head_input(self.encoder(scaled), scaled, self.encoder_kind))

    def _heads(self, seen: Tensor) -> Posterior:
        """Return what the heads say of `head_input`, shape (rows, latents), in float32."""
        mu, logvar = self.slab_head(seen).float().chunk(2, dim=1)
        with torch.autocast(seen.device.type, enabled=False):
            # bfloat16 logits would flip one spike in 500 against the float32 model that is
            # exported.
            spike_logit = self.spike_head(seen.float())
        # hardtanh is clamp with a cheaper gradient.
        return Posterior(
            F.hardtanh(spike_logit, -SPIKE_LOGIT_LIMIT, SPIKE_LOGIT_LIMIT),
            mu,
            F.hardtanh(logvar, *LOGVAR_RANGE),
        )

    def _seen(self, examples: Tensor, input_mask: Tensor | None) -> Tensor:
        scaled = self._scaled(examples)
        return scaled if input_mask is None else scaled * input_mask

    def _scaled(self, examples: Tensor) -> Tensor:
        return (examples - self.center) / self.scale if self.data.modality == "vector" else examples

    def _scaled_pseudo_inputs(self) -> Tensor:
        if self.data.modality == "vector":
            return self.pseudo_logits
        return torch.sigmoid(self.pseudo_logits)


def choose_network(recipe: Recipe, data: DataSpec) -> Literal["mlp", "conv"]:
    """Return the recipe's network; `auto` is mlp for vectors and small grey images, else conv.

    Raises:
        UsageError: Convolutions were asked for, and the data are vectors.
    """
    if recipe.network == "conv" and data.modality == "vector":
        raise UsageError("network=conv is for images, and the data are vectors: network=mlp")
    if recipe.network != "auto":
        return recipe.network
    spec = data.pixel_spec
    is_small_grey = (
        spec is not None and spec.channels == 1 and spec.height * spec.width <= _MLP_SIDE_LIMIT**2
    )
    return "mlp" if spec is None or is_small_grey else "conv"


def choose_encoder(recipe: Recipe, data: DataSpec) -> EncoderKind:
    """Return the recipe's encoder; `auto` is skip for vectors, mlp for images.

    The layers of a convolutional network count as an mlp's: its heads see hidden units.

    Raises:
        UsageError: The network has convolutions, and the encoder is for an mlp.
    """
    if recipe.encoder not in ("auto", "mlp") and choose_network(recipe, data) == "conv":
        raise UsageError(
            f"encoder={recipe.encoder} is for network=mlp, and this network has convolutions:"
            " use `recipe.network=mlp`, or leave encoder as it is"
        )
    if recipe.encoder != "auto":
        return recipe.encoder
    return "skip" if data.modality == "vector" else "mlp"


def choose_decoder(recipe: Recipe, data: DataSpec) -> DecoderKind:
    """Return the recipe's decoder; `auto` is linear for vectors, mlp for images.

    A linear one goes with any encoder; `mlp` is the mirror of the encoder's layers.
    """
    if recipe.decoder != "auto":
        return recipe.decoder
    return "linear" if data.modality == "vector" else "mlp"
