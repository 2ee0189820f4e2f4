"""A linear probe: how much of the classes a straight line through the codes can tell."""

from typing import Final

import numpy as np
import scipy.sparse
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from vsc_serve.errors import UsageError
from vsc_training.evaluation.retrieval import Array, Labels

_PENALTY: Final = 1e-5
"""Weight of the squared weights (not of the biases)."""
_ITERATIONS: Final = 150
_HISTORY: Final = 10


def linear_probe_accuracy(
    train: Array, train_labels: Labels, test: Array, test_labels: Labels, *, seed: int = 0
) -> float:
    """Fit a multinomial logistic regression to codes and return its accuracy on other codes.

    Codes are divided by the standard deviation of all training values together, so that the scale
    of a model's latents does not matter and their proportions stay. Mean cross-entropy plus 1e-5
    times the squared weights, float32, at most 150 iterations of L-BFGS with strong Wolfe line
    search. A class that the training codes lack is always wrong.

    Args:
        train: Codes to fit, shape (codes, latents).
        train_labels: Their classes.
        test: Codes to judge, shape (codes, latents).
        test_labels: Their classes.
        seed: Seed of the first weights. The problem is convex: it hardly matters.

    Returns:
        The share of test codes whose class has the highest score, in [0, 1].

    Raises:
        UsageError: Labels do not fit the rows, or the training codes are of one class.
    """
    known, asked = np.asarray(train_labels), np.asarray(test_labels)
    if (len(known), len(asked)) != (train.shape[0], test.shape[0]) or len(asked) == 0:
        raise UsageError(
            f"{len(known)} labels for {train.shape[0]} training codes and {len(asked)} for"
            f" {test.shape[0]} test codes. Give one label per code, and some of each."
        )
    classes, numbers = np.unique(known, return_inverse=True)
    if len(classes) < 2:
        raise UsageError("a probe needs training codes of two classes or more; found one")
    fitted, judged = _tensor(train), _tensor(test)
    scale = fitted.std() + 1e-8
    layer = _fit(fitted / scale, torch.from_numpy(numbers), len(classes), seed)
    with torch.no_grad():
        chosen = layer(judged / scale).argmax(1).numpy()
    return float((classes[chosen] == asked).mean())


def _fit(codes: Tensor, numbers: Tensor, class_count: int, seed: int) -> nn.Linear:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layer = nn.Linear(codes.shape[1], class_count)
    optimizer = torch.optim.LBFGS(
        layer.parameters(),
        max_iter=_ITERATIONS,
        history_size=_HISTORY,
        line_search_fn="strong_wolfe",
    )

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = F.cross_entropy(layer(codes), numbers) + _PENALTY * layer.weight.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    return layer


def _tensor(codes: Array) -> Tensor:
    dense = codes.toarray() if scipy.sparse.issparse(codes) else codes
    rows: NDArray[np.float32] = np.ascontiguousarray(dense, np.float32)
    return torch.from_numpy(rows)
