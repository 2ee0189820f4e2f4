"""Partners of examples for the neighbour term: near ones of the same data, or views of themselves.

Experimental: see docs/model.md, "Neighbours".
"""

from collections.abc import Sequence
from math import prod
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor

from vsc_training.dataset import DeviceDataset
from vsc_training.objective import Posterior

NEIGHBOURS: Final = 10
"""Nearest examples of which one is drawn."""

_REFERENCES: Final = 50_000
"""Examples, chosen by chance, among which neighbours are searched, at most."""
_REFERENCE_BYTES: Final = 2**28
"""Bytes of a block of them as float32: 50,000 photographs at once would be many gigabytes."""
_QUERY_BLOCK: Final = 512
_LARGEST_SHIFT: Final = 0.1
"""Share of a side by which a view is moved, at most."""
_LARGEST_CROP: Final = 0.2
"""Share of a side that the crop of a view leaves out, at most."""
_COLOUR_CHANGE: Final = 0.3
"""Relative change of brightness, contrast and each channel, at most."""


@torch.no_grad()
def nearest_examples(dataset: DeviceDataset, numbers: Tensor, seed: int) -> Tensor:
    """Return the nearest examples of each one, by the cosine, exactly.

    Vectors are centred on their mean; images are compared as they are. Of more than 50,000
    examples, the neighbours are those among 50,000 of them.

    Args:
        dataset: The examples.
        numbers: Those of the training.
        seed: Seed of the choice among many.

    Returns:
        Row numbers, shape (rows of the data set, NEIGHBOURS), int32; 0 for rows that are not of the
        training.
    """
    generator = torch.Generator().manual_seed(seed)
    known = numbers[torch.randperm(len(numbers), generator=generator)[:_REFERENCES]]
    count = min(NEIGHBOURS, len(known) - 1)
    values = prod(dataset.rows.shape[1:])
    references = known.split(max(1, _REFERENCE_BYTES // (4 * values)))
    middle = _middle(dataset, references)
    cosines = torch.full((len(dataset.rows), count), -torch.inf)
    found = torch.zeros(len(dataset.rows), count, dtype=torch.int32)
    for block in references:
        directions = F.normalize(_flat(dataset, block) - middle).T
        for asked in numbers.split(_QUERY_BLOCK):
            products = F.normalize(_flat(dataset, asked) - middle) @ directions
            # An example is its own nearest; its copies are left in, which are as near as can be.
            is_itself = (asked[:, None] == block).to(products.device)
            near = products.masked_fill_(is_itself, -torch.inf).topk(min(count, len(block)))
            names = block[near.indices.cpu()].to(torch.int32)
            both = torch.cat([cosines[asked], near.values.cpu()], dim=1)
            cosines[asked], places = both.topk(count)
            found[asked] = torch.cat([found[asked], names], dim=1).gather(1, places)
    return found


def _middle(dataset: DeviceDataset, references: Sequence[Tensor]) -> Tensor:
    """Return what is taken off every row: the mean of vectors, 0 for images."""
    first = _flat(dataset, references[0][:1])[0]
    if dataset.rows.ndim > 2:
        return torch.zeros_like(first)
    sums = [_flat(dataset, block).double().sum(0) for block in references]
    mean = torch.stack(sums).sum(0) / sum(map(len, references))
    return mean.to(first.dtype)


def draw_neighbours(found: Tensor, numbers: Tensor, generator: torch.Generator) -> Tensor:
    """Draw a neighbour of each example; return their row numbers.

    Args:
        found: As `nearest_examples` returns it.
        numbers: Examples of a batch.
        generator: Source of the choice.
    """
    shape, device = (len(numbers), 1), generator.device
    choice = torch.randint(found.shape[1], shape, generator=generator, device=device)
    chosen: Tensor = found[numbers].gather(1, choice.to(numbers.device))[:, 0].long()
    return chosen


def draw_views(images: Tensor, generator: torch.Generator) -> Tensor:
    """Return a random view of each image: moved, cropped; in colour also flipped and recoloured.

    Args:
        images: Values in [0, 1], shape (images, height, width, channels).
        generator: Source of the choices; its device is where the images lie.
    """
    count, device = len(images), images.device

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        drawn = torch.rand(count, *shape, generator=generator, device=device)
        return low + (high - low) * drawn

    scale = uniform(1.0 - _LARGEST_CROP, 1.0)
    moved = uniform(-2.0 * _LARGEST_SHIFT, 2.0 * _LARGEST_SHIFT, 2)  # a side is 2 long
    is_colour = images.shape[3] == 3
    mirror = torch.sign(uniform(-1.0, 1.0)) if is_colour else torch.ones(count, device=device)
    affine = torch.zeros(count, 2, 3, device=device)
    affine[:, 0, 0], affine[:, 1, 1], affine[:, :, 2] = scale * mirror, scale, moved
    planes = images.permute(0, 3, 1, 2)
    grid = F.affine_grid(affine, list(planes.shape), align_corners=False)
    edge = "border" if is_colour else "zeros"
    views = F.grid_sample(planes, grid, padding_mode=edge, align_corners=False)
    if is_colour:
        middle = views.mean((2, 3), keepdim=True)
        contrast = uniform(1.0 - _COLOUR_CHANGE, 1.0 + _COLOUR_CHANGE, 1, 1, 1)
        gain = uniform(1.0 - _COLOUR_CHANGE, 1.0 + _COLOUR_CHANGE, 3, 1, 1)
        views = ((views - middle) * contrast + middle) * gain
    return views.clamp(0.0, 1.0).permute(0, 2, 3, 1)


def info_nce(one: Posterior, other: Posterior, temperature: float) -> Tensor:
    """Return InfoNCE between codes of examples and of their partners, in nats, a scalar.

    The cosines of sqrt(gamma) mu, the soft code that a query is; each example must tell its partner
    from those of the batch, and the partner it (van den Oord et al. 2018, equation 4, both ways).
    Hard codes collapse under it (training/LOG.md).

    Args:
        one: Posteriors of the examples.
        other: Posteriors of their partners, in the same order.
        temperature: The cosines are divided by it.
    """
    cosines = _soft_code(one) @ _soft_code(other).T / temperature
    truth = torch.arange(len(cosines), device=cosines.device)
    return 0.5 * (F.cross_entropy(cosines, truth) + F.cross_entropy(cosines.T, truth))


def _soft_code(q: Posterior) -> Tensor:
    return F.normalize(torch.exp(0.5 * F.logsigmoid(q.spike_logit)) * q.mu, eps=1e-6)


def _flat(dataset: DeviceDataset, numbers: Tensor) -> Tensor:
    return dataset.take(numbers).flatten(1)
