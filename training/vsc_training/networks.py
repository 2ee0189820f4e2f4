"""The layers between pixels and hidden units, both ways: multilayer perceptron or convolutions.

Every network takes and gives images as (images, height, width, channels); how it lays them out
inside is its own business. The heads, an encoder's last layers, are the caller's (see `model`);
`head_input` gives what they see.
"""

from itertools import pairwise
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vsc_serve.errors import UsageError
from vsc_training.config import EncoderKind


def mlp_encoder(shape: tuple[int, ...], hidden: int, layers: int) -> nn.Sequential:
    """Map (images, *shape) to (images, hidden) through `layers` hidden layers.

    With none, to (images, values): what came in, flat.
    """
    sizes = [prod(shape)] + [hidden] * layers
    return nn.Sequential(nn.Flatten(), *_relu_layers(sizes))


def mlp_decoder(latent_dim: int, hidden: int, layers: int, shape: tuple[int, ...]) -> nn.Sequential:
    """Map (images, latents) to (images, *shape), the mirror of `mlp_encoder`.

    With no hidden layer it is linear: its weights are a dictionary, a column for each latent.
    """
    sizes = [latent_dim] + [hidden] * layers
    return nn.Sequential(
        *_relu_layers(sizes), nn.Linear(sizes[-1], prod(shape)), nn.Unflatten(1, shape)
    )


def head_input(hidden: Tensor, rows: Tensor, kind: EncoderKind) -> Tensor:
    """Return what the heads see: hidden units (mlp), the input (linear) or both in a row (skip).

    Args:
        hidden: What the encoder's layers gave, shape (rows, hidden).
        rows: What they were given, shape (rows, *shape). Where the types differ, the wider one
            is taken.
        kind: The encoder.
    """
    if kind == "mlp":
        return hidden
    flat = rows.flatten(1)
    return flat if kind == "linear" else torch.cat([hidden, flat], dim=1)


def head_width(kind: EncoderKind, hidden: int, shape: tuple[int, ...]) -> int:
    """Return the columns of `head_input`."""
    return {"mlp": hidden, "linear": prod(shape), "skip": hidden + prod(shape)}[kind]


def encode_both(
    encoder: nn.Sequential, given: Tensor, learned: Tensor, kind: EncoderKind = "mlp"
) -> Tensor:
    """Return what the heads see of the examples and of the pseudo-inputs, one below the other.

    As `head_input` of `torch.cat([given, learned])`, but an mlp's first and largest layer takes
    both in one product.

    Args:
        encoder: What `mlp_encoder` or `conv_encoder` made.
        given: Examples, which need no gradient, shape (images, *shape).
        learned: Pseudo-inputs, which do, shape (pseudo-inputs, *shape).
        kind: The encoder.
    """
    hidden = _hidden_of_both(encoder, given, learned)
    return hidden if kind == "mlp" else head_input(hidden, torch.cat([given, learned]), kind)


def _hidden_of_both(encoder: nn.Sequential, given: Tensor, learned: Tensor) -> Tensor:
    _, *layers = encoder
    if not layers or not isinstance(first := layers[0], nn.Linear):
        return torch.cat([encoder(given), encoder(learned)])
    flat = given.flatten(1), learned.flatten(1)
    hidden: Tensor = _PartlyGivenLinear.apply(*flat, first.weight, first.bias)
    for layer in layers[1:]:
        hidden = layer(hidden)
    return hidden


class _PartlyGivenLinear(torch.autograd.Function):
    """A linear layer over given and learned rows, without the gradient of the given ones.

    Autograd takes the gradient of all rows of a product or of none.
    """

    @staticmethod
    def forward(ctx: Any, given: Tensor, learned: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        device = weight.device.type
        is_autocast = torch.is_autocast_enabled(device)
        dtype = torch.get_autocast_dtype(device) if is_autocast else weight.dtype
        rows, weight = torch.cat([given.to(dtype), learned.to(dtype)]), weight.to(dtype)
        ctx.given_count, ctx.types = len(given), (learned.dtype, bias.dtype)
        ctx.save_for_backward(rows, weight)
        return F.linear(rows, weight, bias.to(dtype))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor, Tensor, Tensor]:
        rows, weight = ctx.saved_tensors
        input_type, weight_type = ctx.types
        of_learned = (gradient[ctx.given_count :] @ weight).to(input_type)
        of_weight = (gradient.T @ rows).to(weight_type)
        return None, of_learned, of_weight, gradient.sum(0).to(weight_type)


def _relu_layers(sizes: list[int]) -> list[nn.Module]:
    layers: list[nn.Module] = []
    for before, after in pairwise(sizes):
        layers += [nn.Linear(before, after), nn.ReLU()]
    return layers


class ChannelsFirst(nn.Module):
    """(images, height, width, channels) to (images, channels, height, width)."""

    def forward(self, images: Tensor) -> Tensor:
        """Move the channels."""
        return images.permute(0, 3, 1, 2)


class ChannelsLast(nn.Module):
    """(images, channels, height, width) to (images, height, width, channels)."""

    def forward(self, images: Tensor) -> Tensor:
        """Move the channels."""
        return images.permute(0, 2, 3, 1)


def conv_encoder(shape: tuple[int, int, int], width: int, hidden: int) -> nn.Sequential:
    """Map (images, *shape) to (images, hidden): halve until a side is at most 4 pixels."""
    widths, grid = _conv_plan(shape, width)
    layers: list[nn.Module] = [ChannelsFirst()]
    for before, after in zip([shape[2], *widths[:-1]], widths, strict=True):
        layers += [nn.Conv2d(before, after, 4, 2, 1), nn.ReLU()]
    flat = widths[-1] * prod(grid)
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(flat, hidden), nn.ReLU())


def conv_decoder(
    latent_dim: int, width: int, hidden: int, shape: tuple[int, int, int]
) -> nn.Sequential:
    """Map (images, latents) to (images, *shape), the mirror of `conv_encoder`."""
    widths, grid = _conv_plan(shape, width)
    layers: list[nn.Module] = [
        nn.Linear(latent_dim, hidden),
        nn.ReLU(),
        nn.Linear(hidden, widths[-1] * prod(grid)),
        nn.ReLU(),
        nn.Unflatten(1, (widths[-1], *grid)),
    ]
    backwards = [*widths[::-1], shape[2]]
    for before, after in pairwise(backwards):
        layers += [nn.ConvTranspose2d(before, after, 4, 2, 1), nn.ReLU()]
    return nn.Sequential(*layers[:-1], ChannelsLast())


def _conv_plan(shape: tuple[int, int, int], width: int) -> tuple[list[int], tuple[int, int]]:
    """Return the channels after each convolution, and the height and width that remain."""
    height, columns = shape[:2]
    widths: list[int] = []
    while min(height, columns) > 4:
        if height % 2 or columns % 2:
            raise UsageError(
                f"a convolutional network cannot halve {shape[1]}x{shape[0]} down to 4: use a"
                " size such as 32 or"
                " 64 (`size`), or `recipe.network=mlp`"
            )
        height, columns = height // 2, columns // 2
        widths.append(width * 2 ** len(widths))
    if not widths:
        raise UsageError(
            f"a convolutional network needs sides over 4 pixels, not {shape[1]}x{shape[0]}:"
            " use `recipe.network=mlp`"
        )
    return widths, (height, columns)
