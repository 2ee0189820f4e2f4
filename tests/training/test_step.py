"""One step: its noise, what the encoder is input_mask, its precision, and its compiled form."""

import shutil

import numpy as np
import pytest
import torch

from vsc_serve.errors import UsageError
from vsc_serve.images import PixelSpec
from vsc_training.config import Recipe, load_recipe
from vsc_training.data import Examples
from vsc_training.distributed import Group
from vsc_training.model import DataSpec
from vsc_training.step import draw_input_mask, draw_noise, objective_terms
from vsc_training.trainer import Trainer

CPU = torch.device("cpu")


FIXED = ["regularisation=none"]  # a few examples, seen often


def small_recipe(*overrides: str) -> Recipe:
    fields = ["latent_dim=16", "hidden=32", "pseudo_inputs=4", "batch_size=32", "alpha=0.2"]
    return load_recipe("sparse", [*fields, "steps=60", "on_collapse=warn", *FIXED, *overrides])


def noise_examples() -> Examples:
    rows = np.random.default_rng(0).integers(0, 256, (64, 8, 8, 1), dtype=np.uint8)
    spec = DataSpec(pixel_spec=PixelSpec(height=8, width=8, channels=1))
    return Examples(rows, [str(number) for number in range(64)], spec)


@pytest.mark.parametrize(("asked", "share"), [(0.1, 26 / 256), (0.5, 0.5), (0.001, 1 / 256)])
def test_what_is_hidden_has_its_share_and_leaves_the_mean(asked: float, share: float) -> None:
    input_mask = draw_input_mask(
        torch.Size((100, 9, 11, 3)), asked, torch.Generator().manual_seed(0)
    )
    assert input_mask.shape == (100, 9, 11, 3)
    assert (input_mask == 0).float().mean().item() == pytest.approx(share, abs=0.006)
    assert input_mask.unique().tolist() == pytest.approx([0.0, 1 / (1 - share)])
    rows = input_mask.reshape(100, -1)
    assert (rows == 0).any(1).float().mean() > 0.6, "every example has its own"
    assert (rows == 0).any(0).float().mean() > 0.09, "every value may be hidden"


def test_only_the_encoder_misses_what_is_hidden() -> None:
    """Classifier and likelihood see all; and what is hidden has no part in the posterior."""
    trainer = Trainer(small_recipe("precision=float32"), noise_examples(), CPU)
    examples = trainer.dataset.take(torch.arange(32))
    generator = torch.Generator().manual_seed(0)
    whole = draw_noise(trainer.recipe, examples.shape, 30, generator)
    assert whole.input_mask is None
    input_mask = torch.ones_like(examples)
    input_mask[:, :4] = 0.0
    plain = objective_terms(trainer.model, examples, whole, bf16=False)
    masked = objective_terms(
        trainer.model, examples, whole._replace(input_mask=input_mask), bf16=False
    )
    assert torch.equal(plain.weights, masked.weights)
    assert not torch.equal(plain.spike_logit, masked.spike_logit)
    blanked = trainer.model.encode(examples * input_mask)
    torch.testing.assert_close(masked.spike_logit, blanked.spike_logit)
    hidden_all = whole._replace(input_mask=torch.zeros_like(examples))
    on_white = objective_terms(trainer.model, examples, hidden_all, bf16=False)
    on_black = objective_terms(trainer.model, 1.0 - examples, hidden_all, bf16=False)
    assert torch.equal(on_white.spike_logit, on_black.spike_logit)
    assert on_white.reconstruction != on_black.reconstruction, "the likelihood is of the whole"


def test_hiding_nothing_draws_what_it_always_drew() -> None:
    """A recipe without dropout trains to the same weights as before there was any."""
    recipe = small_recipe()
    generator, alone = (torch.Generator().manual_seed(3) for _ in range(2))
    draw = draw_noise(recipe, torch.Size((32, 8, 8, 1)), 0, generator)
    assert torch.equal(draw.uniform, torch.rand(32, 16, generator=alone))
    assert torch.equal(draw.noise, torch.randn(32, 16, generator=alone))
    assert torch.equal(generator.get_state(), alone.get_state())


def test_a_run_hides_what_its_recipe_says_and_its_checks_hide_nothing() -> None:
    """From the same weights: training differs by the dropout, measuring does not."""
    plain, masked = (
        Trainer(small_recipe(f"input_dropout={share}"), noise_examples(), CPU)
        for share in (0.0, 0.3)
    )
    assert plain.check() == masked.check()
    first, second = plain.advance(), masked.advance()
    assert torch.equal(first.weights, second.weights)
    assert not torch.equal(first.spike_logit, second.spike_logit)


def test_bfloat16_products_leave_spike_logits_and_bound_in_float32() -> None:
    recipe = small_recipe("precision=bfloat16")
    trainer = Trainer(recipe, noise_examples(), CPU)
    assert trainer.bf16
    examples = trainer.dataset.take(torch.arange(32))
    generator = torch.Generator().manual_seed(0)
    draw = draw_noise(recipe, examples.shape, 30, generator)
    half = objective_terms(trainer.model, examples, draw, bf16=True)
    full = objective_terms(trainer.model, examples, draw, bf16=False)
    assert half.loss.dtype == torch.float32
    assert half.loss.item() == pytest.approx(full.loss.item(), rel=0.02)
    with torch.autocast("cpu", torch.bfloat16):
        posterior = trainer.model.encode(examples)
    assert all(part.dtype == torch.float32 for part in posterior)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")  # torch's compiler, of itself
@pytest.mark.skipif(not shutil.which("g++"), reason="needs a C++ compiler")
def test_a_compiled_step_computes_what_the_plain_one_does() -> None:
    """Before, within and after the warm-up, with a spike whose slope changes at every step."""
    from torch._dynamo.utils import counters

    fields = ["precision=float32", "steps=12", "learning_rate=0.01", "spike=relaxed"]
    recipe = small_recipe(*fields, "input_dropout=0.2", "weight_decay=0.1")
    examples = noise_examples()
    plain = Trainer(recipe, examples, CPU)
    compiled = Trainer(recipe, examples, CPU, is_compiled=True)
    counters.clear()
    losses = []
    for _ in range(recipe.steps):
        expected, found = plain.advance(), compiled.advance()
        assert found.loss.item() == pytest.approx(expected.loss.item(), rel=1e-4)
        losses.append(found.loss.item())
    assert counters["stats"]["unique_graphs"] == 1, "not compiled, or more than once"
    assert max(losses) - min(losses) > 0.01 * max(losses), "nothing was learned: gradients are off"


def test_a_compiled_step_without_a_compiler_says_what_is_missing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PATH", "")
    recipe = small_recipe()
    examples = noise_examples()
    with pytest.raises(UsageError, match=r"`is_compiled` needs a C\+\+ compiler"):
        Trainer(recipe, examples, CPU, is_compiled=True)
    with pytest.raises(UsageError, match="leave it away, or do without torchrun"):
        Trainer(recipe, examples, CPU, Group(0, 2), is_compiled=True)
