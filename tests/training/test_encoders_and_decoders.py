"""Encoders and decoders of the recipe: what the heads see, which the data get, and what is kept."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, safe_open, save_file
from torch import nn

from vsc_serve.errors import UsageError
from vsc_serve.images import PixelSpec
from vsc_training import memory
from vsc_training.checkpoint import CHECKPOINT, RECIPE, load_checkpoint
from vsc_training.config import Recipe, load_recipe
from vsc_training.data import Examples
from vsc_training.fit import fit
from vsc_training.model import VSC, DataSpec, choose_decoder, choose_encoder
from vsc_training.resolve import resolve
from vsc_training.trainer import Trainer, parameter_groups

CPU = torch.device("cpu")
VECTORS = DataSpec(input_dim=6)
GREY = DataSpec(pixel_spec=PixelSpec(height=4, width=4, channels=1))
COLOUR = DataSpec(pixel_spec=PixelSpec(height=8, width=8, channels=3))
KINDS = [
    (encoder, decoder) for encoder in ("mlp", "linear", "skip") for decoder in ("mlp", "linear")
]


def recipe_of(*overrides: str) -> Recipe:
    fields = ["latent_dim=16", "hidden=12", "pseudo_inputs=4", "batch_size=32", "alpha=0.2"]
    return load_recipe("sparse", [*fields, "steps=40", "on_collapse=warn", *overrides])


def model_of(data: DataSpec, *overrides: str) -> VSC:
    torch.manual_seed(0)
    return VSC(recipe_of(*overrides), data)


@pytest.fixture
def vectors() -> Examples:
    rows = np.random.default_rng(0).normal(size=(80, 6)).astype(np.float32)
    return Examples(rows, [str(number) for number in range(80)], VECTORS)


@pytest.mark.parametrize(("data", "shape"), [(VECTORS, (6,)), (GREY, (4, 4, 1))])
def test_the_heads_see_hidden_units_the_input_or_both(
    data: DataSpec, shape: tuple[int, ...]
) -> None:
    rows = torch.rand(5, *shape)
    flat = rows.flatten(1)
    mlp, linear, skip = (model_of(data, f"encoder={kind}") for kind in ("mlp", "linear", "skip"))
    torch.testing.assert_close(linear.encode(rows).mu, linear.slab_head(flat)[:, :16])
    torch.testing.assert_close(mlp.encode(rows).mu, mlp.slab_head(mlp.encoder(rows))[:, :16])
    seen = torch.cat([skip.encoder(rows), flat], dim=1)
    assert (skip.encoder(rows) >= 0).all()
    torch.testing.assert_close(skip.encode(rows).spike_logit, skip.spike_head(seen))
    torch.testing.assert_close(skip.encode(rows).mu, skip.slab_head(seen)[:, :16])


def test_a_linear_decoder_is_one_matrix_from_latents_to_data() -> None:
    model = model_of(VECTORS, "decoder=linear")
    (layer,) = [part for part in model.decoder.modules() if isinstance(part, nn.Linear)]
    assert layer.weight.shape == (6, 16)
    model.center.fill_(3.0)
    model.scale.fill_(2.0)
    z = torch.randn(3, 16)
    expected = (z @ layer.weight.T + layer.bias) * 2.0 + 3.0
    torch.testing.assert_close(model.decode(z), expected)
    assert model_of(GREY, "decoder=linear").decode(z).shape == (3, 4, 4, 1)


def test_vectors_get_what_wins_there_and_images_an_mlp() -> None:
    recipe = recipe_of()
    assert (choose_encoder(recipe, VECTORS), choose_decoder(recipe, VECTORS)) == ("skip", "linear")
    for images in (GREY, COLOUR):
        assert (choose_encoder(recipe, images), choose_decoder(recipe, images)) == ("mlp", "mlp")
    asked = recipe_of("encoder=linear", "decoder=mlp")
    assert (choose_encoder(asked, VECTORS), choose_decoder(asked, VECTORS)) == ("linear", "mlp")


@pytest.mark.parametrize("field", ["encoder=linear", "encoder=skip"])
def test_convolutions_refuse_what_is_for_an_mlp(field: str) -> None:
    with pytest.raises(UsageError, match=rf"{field} is for network=mlp, and this network has conv"):
        VSC(recipe_of(field, "network=conv"), COLOUR)
    VSC(recipe_of(field, "network=mlp"), COLOUR)


@pytest.mark.parametrize(("encoder", "decoder"), KINDS)
@pytest.mark.parametrize("data", [VECTORS, GREY], ids=["vectors", "images"])
def test_every_encoder_and_decoder_trains(data: DataSpec, encoder: str, decoder: str) -> None:
    rows: Any = np.random.default_rng(0).normal(size=(64, *data.shape)).astype(np.float32)
    if data.modality == "image":
        rows = (rows > 0).astype(np.uint8) * 255
    recipe = recipe_of(f"encoder={encoder}", f"decoder={decoder}", "input_dropout=0.2")
    trainer = Trainer(recipe, Examples(rows, [str(i) for i in range(64)], data), CPU)
    assert trainer.model.spike_head.bias.unique().tolist() == [0.0]  # half of the latents are on
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    assert torch.isfinite(trainer.advance().loss)
    after = trainer.model.state_dict()
    assert [name for name in before if torch.equal(before[name], after[name])] == [
        "center",
        "scale",
    ]


@pytest.mark.parametrize("encoder", ["mlp", "linear", "skip"])
def test_one_pass_for_examples_and_prior_has_the_values_and_gradients_of_two(encoder: str) -> None:
    model = model_of(VECTORS, f"encoder={encoder}", "layers=2")
    model.pseudo_logits.data.normal_()
    rows = torch.randn(5, 6)
    fitted = [model.pseudo_logits, *model.encoder.parameters(), *model.spike_head.parameters()]

    def squares(parts: tuple[Any, Any]) -> torch.Tensor:
        return sum(
            (part.double().square().sum() for pair in parts for part in pair), torch.zeros(())
        )

    together = torch.autograd.grad(squares(model.encode_with_prior(rows)), fitted)
    apart = torch.autograd.grad(squares((model.encode(rows), model.prior())), fitted)
    for found, right in zip(together, apart, strict=True):
        torch.testing.assert_close(found, right)


@pytest.mark.parametrize("encoder", ["linear", "skip"])
def test_in_bfloat16_the_spike_head_sees_the_input_in_float32(encoder: str) -> None:
    model = model_of(VECTORS, f"encoder={encoder}")
    model.spike_head.weight.data[:, :-6].zero_()  # the input alone decides
    rows = torch.randn(5, 6)
    exact = model.encode(rows).spike_logit
    with torch.autocast("cpu", torch.bfloat16):
        both, _ = model.encode_with_prior(rows)
        assert torch.equal(model.encode(rows).spike_logit, exact)
        assert torch.equal(both.spike_logit, exact)


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")  # torch's compiler, of itself
@pytest.mark.skipif(not shutil.which("g++"), reason="needs a C++ compiler")
@pytest.mark.slow
def test_a_compiled_step_of_a_skip_encoder_computes_what_the_plain_one_does(
    vectors: Examples,
) -> None:
    recipe = recipe_of("precision=float32")
    plain = Trainer(recipe, vectors, CPU)
    compiled = Trainer(recipe, vectors, CPU, is_compiled=True)
    for _ in range(2):
        expected, found = plain.advance(), compiled.advance()
        torch.testing.assert_close(found.loss, expected.loss, rtol=1e-4, atol=1e-4)


def test_all_layers_decay_whatever_the_encoder_and_the_decoder() -> None:
    model = model_of(VECTORS, "encoder=skip", "decoder=linear")
    decaying = {id(weight) for weight in parameter_groups(model, 0.1)[0]["params"]}
    layers = [part for part in model.modules() if isinstance(part, nn.Linear)]
    assert decaying == {id(layer.weight) for layer in layers}


def test_the_memory_that_is_asked_for_follows_the_encoder() -> None:
    def needed(*overrides: str) -> int:
        return memory.model_bytes(recipe_of("hidden=4000", *overrides), VECTORS, CPU)

    ways = ("encoder=mlp", "decoder=mlp"), ("encoder=mlp", "decoder=linear")
    both, into = (needed(*way) for way in ways)
    skip, none = (needed(f"encoder={kind}", "decoder=linear") for kind in ("skip", "linear"))
    assert none < into < skip < both


def test_a_run_keeps_what_was_chosen(vectors: Examples, tmp_path: Path) -> None:
    fit(recipe_of(), vectors, tmp_path, device=CPU)
    stored = load_checkpoint(tmp_path).state.recipe
    assert (stored.encoder, stored.decoder) == ("skip", "linear")
    assert load_recipe(str(tmp_path / RECIPE)) == stored


def test_what_a_recipe_asks_for_is_never_replaced(vectors: Examples) -> None:
    recipe = recipe_of("encoder=mlp", "decoder=mlp", "regularisation=none")
    assert resolve(recipe, vectors) == recipe


@pytest.fixture
def old_run(vectors: Examples, tmp_path: Path) -> Path:
    """A run of a release that knew neither field."""
    run = tmp_path / "old"
    fit(recipe_of("encoder=mlp", "decoder=mlp"), vectors, run, device=CPU)
    forget(run)
    return run


def forget(run: Path) -> None:
    """Remove the fields from everything that a run has written."""
    path = run / CHECKPOINT
    with safe_open(path, framework="pt") as stored:
        state = json.loads(stored.metadata()["vsc_state"])
    for field in ("encoder", "decoder", "regularisation"):
        del state["recipe"][field]
    save_file(load_file(path), path, metadata={"vsc_state": json.dumps(state)})
    lines = (run / RECIPE).read_text().splitlines(keepends=True)
    kept = [line for line in lines if not line.startswith(("encoder", "decoder"))]
    (run / RECIPE).write_text("".join(kept))


def test_a_run_of_an_earlier_release_loads_as_it_was_trained(old_run: Path) -> None:
    checkpoint = load_checkpoint(old_run)
    assert (checkpoint.state.recipe.encoder, checkpoint.state.recipe.decoder) == ("mlp", "mlp")
    model = checkpoint.build_model()
    assert model.spike_head.in_features == 12
    assert torch.equal(model.spike_head.weight, checkpoint.weights["spike_head.weight"])


Read = Callable[[Path], Recipe]


@pytest.mark.parametrize(
    "read",
    [lambda run: load_recipe(str(run / RECIPE)), lambda run: recipe_of()],
    ids=["own", "new"],
)
def test_a_run_of_an_earlier_release_goes_on_as_it_began(
    old_run: Path, vectors: Examples, tmp_path: Path, read: Read
) -> None:
    """With the recipe in its folder, which says nothing of the fields, or with a new one."""
    longer = replace(read(old_run), steps=60)
    fit(longer, vectors, old_run, device=CPU, resume=True)
    assert load_checkpoint(old_run).state.step == 60
    assert load_recipe(str(old_run / RECIPE)).encoder == "mlp"


def test_a_run_does_not_go_on_with_another_decoder(old_run: Path, vectors: Examples) -> None:
    with pytest.raises(UsageError, match=r"another recipe \(differs in decoder\)"):
        fit(recipe_of("decoder=linear"), vectors, old_run, device=CPU, resume=True)
