"""Training on a real GPU: it never waits in a step, and a resumed run has the same weights."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch

from vsc_serve.images import PixelSpec
from vsc_training import dataset
from vsc_training.checkpoint import Checkpoint
from vsc_training.config import Recipe, load_recipe
from vsc_training.data import Examples
from vsc_training.model import DataSpec
from vsc_training.trainer import Trainer

pytestmark = pytest.mark.gpu

WARM_STEPS = 6
"""Steps in which kernels are chosen and graphs recorded."""


def recipe_for(*overrides: str) -> Recipe:
    fields = ["latent_dim=64", "hidden=256", "pseudo_inputs=16", "batch_size=64", "alpha=0.2"]
    return load_recipe("sparse", [*fields, "steps=100", "on_collapse=warn", *overrides])


def examples_of(channels: int, side: int = 16, count: int = 8000) -> Examples:
    shape = (count, side, side, channels)
    rows = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    spec = DataSpec(pixel_spec=PixelSpec(height=side, width=side, channels=channels))
    return Examples(rows, [str(number) for number in range(count)], spec)


def vectors() -> Examples:
    rows = np.random.default_rng(0).normal(size=(8000, 96)).astype(np.float32)
    return Examples(rows, [str(number) for number in range(8000)], DataSpec(input_dim=96))


@pytest.fixture
def cuda() -> torch.device:
    return torch.device("cuda")


@pytest.fixture
def no_waiting() -> Iterator[None]:
    """Make every operation that waits for the GPU an error, once it is asked for."""
    yield
    torch.cuda.set_sync_debug_mode("default")


def checkpoint_of(trainer: Trainer) -> Checkpoint:
    return trainer.checkpoint(examples_of(1), "model", "", trainer.check())


@pytest.mark.usefixtures("no_waiting")
@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")  # torch's compiler, of itself
@pytest.mark.filterwarnings("ignore::UserWarning:torch")  # its hints about matrix products
@pytest.mark.parametrize("is_compiled", [False, True])
@pytest.mark.parametrize("kind", ["mlp", "conv", "vectors"])
def test_a_step_does_not_wait_for_the_gpu(
    cuda: torch.device, kind: str, *, is_compiled: bool
) -> None:
    examples = vectors() if kind == "vectors" else examples_of(3 if kind == "conv" else 1)
    trainer = Trainer(recipe_for("input_dropout=0.1"), examples, cuda, is_compiled=is_compiled)
    for _ in range(WARM_STEPS):
        trainer.advance()
    torch.cuda.set_sync_debug_mode("error")
    for _ in range(20):
        trainer.advance()


@pytest.mark.parametrize("channels", [1, 3])
def test_a_resumed_run_has_the_weights_of_one_that_was_not_interrupted(
    cuda: torch.device, channels: int
) -> None:
    examples, recipe = examples_of(channels), recipe_for()
    whole, first = (Trainer(recipe, examples, cuda) for _ in range(2))
    for _ in range(10):
        first.advance()
    saved = checkpoint_of(first)
    stored = {name: tensor.cpu().clone() for name, tensor in saved.weights.items()}
    moments = {name: tensor.cpu().clone() for name, tensor in saved.optimizer.items()}
    second = Trainer(recipe, examples, cuda)
    second.restore(Checkpoint(saved.state, stored, moments, saved.random))
    for _ in range(10):
        second.advance()
    for _ in range(20):
        whole.advance()
    expected, found = whole.model.state_dict(), second.model.state_dict()
    assert all(torch.equal(expected[name], found[name]) for name in expected)


@pytest.mark.parametrize("kind", ["images", "vectors"])
def test_rows_that_do_not_fit_give_the_weights_of_rows_that_do(
    cuda: torch.device, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    examples, recipe = vectors() if kind == "vectors" else examples_of(1), recipe_for()
    held = Trainer(recipe, examples, cuda)
    monkeypatch.setattr(dataset, "free_bytes", lambda device: 0)
    copied = Trainer(recipe, examples, cuda)
    assert isinstance(held.dataset.rows, torch.Tensor)
    assert isinstance(copied.dataset.rows, np.ndarray)
    for _ in range(150):  # over the end of an epoch
        held.advance()
        copied.advance()
    expected, found = held.model.state_dict(), copied.model.state_dict()
    assert all(torch.equal(expected[name], found[name]) for name in expected)


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")  # torch's compiler, of itself
@pytest.mark.filterwarnings("ignore::UserWarning:torch")  # its hints about matrix products
def test_a_compiled_step_computes_what_the_plain_one_does(cuda: torch.device) -> None:
    """Before, within and after the warm-up; compiled once."""
    from torch._dynamo.utils import counters

    recipe = recipe_for("precision=float32", "steps=20", "spike=relaxed", "weight_decay=0.1")
    plain = Trainer(recipe, examples_of(1), cuda)
    compiled = Trainer(recipe, examples_of(1), cuda, is_compiled=True)
    counters.clear()
    kept = []
    for _ in range(recipe.steps):
        # From the same weights: over many steps roundings grow into another run.
        compiled.model.load_state_dict(plain.model.state_dict())
        expected, found = plain.advance(), compiled.advance()
        assert found.loss.item() == pytest.approx(expected.loss.item(), rel=1e-3)
        kept.append((found.loss, found.loss.item()))
    assert counters["stats"]["unique_graphs"] == 1
    assert all(loss.item() == value for loss, value in kept), "written over by a later step"
