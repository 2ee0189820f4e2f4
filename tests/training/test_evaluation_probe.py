"""The linear probe against scipy's minimiser, and on data that lines can and cannot part."""

import numpy as np
import pytest
import scipy.optimize
import scipy.sparse
import scipy.special
import torch
from numpy.typing import NDArray

from vsc_serve.errors import UsageError
from vsc_training.evaluation.probe import linear_probe_accuracy

Rows = NDArray[np.float32]


def blobs(count: int, spread: float, seed: int) -> tuple[Rows, NDArray[np.int64]]:
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 3, count)
    centres = np.array([[0, 0, 4], [4, 0, 0], [0, 4, 0]])
    return (centres[labels] + spread * rng.normal(size=(count, 3))).astype(np.float32), labels


def test_classes_that_lines_part_are_told_apart() -> None:
    rows, labels = blobs(300, 0.3, 0)
    assert linear_probe_accuracy(rows[:200], labels[:200], rows[200:], labels[200:]) == 1.0


def test_labels_that_have_nothing_to_do_with_the_codes_are_guessed() -> None:
    rng = np.random.default_rng(1)
    rows, labels = rng.normal(size=(3000, 4)), rng.integers(0, 4, 3000)
    found = linear_probe_accuracy(rows[:1500], labels[:1500], rows[1500:], labels[1500:])
    assert found == pytest.approx(0.25, abs=0.05)


def test_what_no_line_can_tell_is_not_told() -> None:
    rng = np.random.default_rng(2)
    rows = rng.choice([-1.0, 1.0], size=(2000, 2)) + 0.1 * rng.normal(size=(2000, 2))
    labels = rows[:, 0] * rows[:, 1] > 0
    found = linear_probe_accuracy(rows[:1000], labels[:1000], rows[1000:], labels[1000:])
    assert found < 0.85


def test_the_fit_is_the_minimum_that_scipy_finds() -> None:
    rows, labels = blobs(400, 2.5, 3)
    train, test = rows[:300].astype(np.float64), rows[300:].astype(np.float64)
    scale = train.std(ddof=1) + 1e-8

    def loss(flat: NDArray[np.float64]) -> float:
        weights, bias = flat[:9].reshape(3, 3), flat[9:]
        scores = train / scale @ weights.T + bias
        chosen = scores[np.arange(300), labels[:300]]
        entropy = (scipy.special.logsumexp(scores, axis=1) - chosen).mean()
        return float(entropy + 1e-5 * (weights**2).sum())

    best = scipy.optimize.minimize(loss, np.zeros(12)).x
    predicted = (test / scale @ best[:9].reshape(3, 3).T + best[9:]).argmax(1)
    expected = (predicted == labels[300:]).mean()
    found = linear_probe_accuracy(rows[:300], labels[:300], rows[300:], labels[300:])
    assert 0.5 < expected < 0.99
    assert found == pytest.approx(expected, abs=0.011)


def test_the_scale_of_the_codes_the_layout_and_the_seed_hardly_matter() -> None:
    rows, labels = blobs(400, 2.5, 4)
    sets = (labels[:300], rows[300:], labels[300:])
    found = linear_probe_accuracy(rows[:300], *sets)
    larger = linear_probe_accuracy(rows[:300] * 1000, sets[0], sets[1] * 1000, sets[2])
    sparse = scipy.sparse.csr_array(rows)
    assert larger == pytest.approx(found, abs=0.011)
    assert linear_probe_accuracy(sparse[:300], sets[0], sparse[300:], sets[2]) == found
    assert linear_probe_accuracy(rows[:300], *sets, seed=9) == pytest.approx(found, abs=0.011)


def test_texts_are_classes_and_an_unknown_class_is_always_wrong() -> None:
    rows, labels = blobs(200, 0.3, 5)
    names = np.array(["a", "b", "c"])[labels]
    asked = names[100:].copy()
    asked[:50] = "new"
    assert linear_probe_accuracy(rows[:100], names[:100], rows[100:], asked) == 0.5


def test_the_probe_leaves_torchs_own_noise_alone() -> None:
    rows, labels = blobs(60, 0.3, 6)
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    linear_probe_accuracy(rows, labels, rows, labels)
    assert torch.equal(torch.rand(1), expected)


def test_labels_that_do_not_fit_and_a_single_class_are_errors() -> None:
    rows, labels = blobs(10, 0.3, 7)
    with pytest.raises(UsageError, match="9 labels for 10 training codes and 10 for 10 test codes"):
        linear_probe_accuracy(rows, labels[:9], rows, labels)
    with pytest.raises(UsageError, match="two classes or more; found one"):
        linear_probe_accuracy(rows, np.zeros(10), rows, labels)
