"""The linear map of a bundle: a linear decoder as it is, or fitted to what another one draws."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from vsc_export import linear_map as module
from vsc_export.linear_map import decoder_map, make_linear_map
from vsc_export.write import export_bundle
from vsc_serve.bundle import LINEAR_MAP, open_bundle
from vsc_serve.decoder import Decoder
from vsc_serve.encoder import Encoder
from vsc_serve.linear_map import read_linear_map
from vsc_training.checkpoint import load_samples
from vsc_training.config import load_recipe
from vsc_training.model import VSC, DataSpec

MakeModel = Callable[..., VSC]


def with_linear_decoder(model: VSC) -> VSC:
    """Give a model one layer for a decoder, and a scale and center that are not 1 and 0."""
    torch.manual_seed(1)
    layer = nn.Linear(model.recipe.latent_dim, int(np.prod(model.data.shape)))
    model.decoder = nn.Sequential(layer, nn.Unflatten(1, model.data.shape))
    if model.data.modality == "vector":
        model.scale.fill_(3.0)
        model.center.copy_(torch.arange(10.0))
    return model


def sparse_codes(rows: int, latents: int) -> np.ndarray:
    rng = np.random.default_rng(0)
    is_on = rng.random((rows, latents)) < 0.2
    return np.where(is_on, rng.normal(size=is_on.shape), 0).astype(np.float32)


def test_a_linear_decoder_of_vectors_is_the_map(random_model: MakeModel) -> None:
    model = with_linear_decoder(random_model(vectors=True))
    found, codes = decoder_map(model), sparse_codes(40, 24)
    assert found is not None
    with torch.no_grad():
        drawn = model.decode(torch.from_numpy(codes)).numpy()
    np.testing.assert_allclose(
        codes @ found.weights + found.bias + found.center, drawn, rtol=1e-4, atol=1e-4
    )
    same = make_linear_map(model, codes)
    assert same is not None
    np.testing.assert_array_equal(same.weights, found.weights)


def test_a_decoder_with_hidden_layers_or_a_sigmoid_is_no_linear_map(
    random_model: MakeModel,
) -> None:
    deep = VSC(load_recipe("sparse", ["decoder=mlp"]), DataSpec(input_dim=10))
    assert decoder_map(deep) is None
    assert decoder_map(with_linear_decoder(random_model())) is None


def test_the_decoder_of_vectors_that_a_recipe_chooses_by_itself_is_the_map() -> None:
    model = VSC(load_recipe("sparse", []), DataSpec(input_dim=10))
    found = decoder_map(model)
    assert found is not None
    np.testing.assert_array_equal(found.weights, model.decoder[0].weight.detach().T)


def test_a_fitted_map_of_a_linear_decoder_is_that_decoder(random_model: MakeModel) -> None:
    model = with_linear_decoder(random_model(vectors=True))
    exact, fitted = decoder_map(model), module._fitted_map(model, sparse_codes(300, 24))
    assert exact is not None
    np.testing.assert_allclose(fitted.weights, exact.weights, atol=0.05 * exact.weights.std())
    np.testing.assert_allclose(fitted.bias, exact.bias, atol=0.02)


def test_the_map_of_images_draws_nearly_what_the_decoder_draws(
    tiny_run: Path, tiny_bundle: Path
) -> None:
    rows = load_samples(tiny_run)
    codes = Encoder.open(tiny_bundle, device="cpu").encode(rows)
    drawn = Decoder.open(tiny_bundle, device="cpu").decode(codes).reshape(len(rows), -1)
    found = read_linear_map(open_bundle(tiny_bundle))
    linear = codes @ found.weights + found.bias + found.center
    spread = np.square(drawn - drawn.mean(0)).sum()
    assert np.square(linear - drawn).sum() < 0.25 * spread
    refitted = found.refit(codes, rows.reshape(len(rows), -1) / np.float32(255))
    data = rows.reshape(len(rows), -1) / 255.0
    left = [
        np.square(one @ found.weights + found.bias + found.center - data).sum()
        for one in (refitted, codes)
    ]
    assert left[0] < 0.9 * left[1]


def test_latents_that_are_never_active_have_no_weights(random_model: MakeModel) -> None:
    codes = sparse_codes(300, 24)
    codes[:, 5] = 0
    found = make_linear_map(random_model(), codes)
    assert found is not None
    assert not found.weights[5].any()
    assert np.isfinite(make_linear_map(random_model(), np.zeros((9, 24), np.float32)).weights).all()


@pytest.mark.slow
@pytest.mark.usefixtures("cached_exports")
def test_a_map_that_would_be_most_of_the_bundle_is_left_out(
    tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "LARGEST_BYTES", 16 * 64 * 4 - 1)
    done = export_bundle(tiny_run, tmp_path / "out")
    assert LINEAR_MAP not in done.manifest.files
    assert done.search[0].second_stage is None
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| tau | tau of queries | search cost | neighbour recall@10 |\n" in card
    assert "There is no linear map: it would be most of the bundle." in card


def test_the_map_changes_no_digest_of_the_codes(tiny_bundle: Path) -> None:
    manifest = open_bundle(tiny_bundle).manifest
    assert LINEAR_MAP in manifest.files
    files = {name: sha for name, sha in manifest.files.items() if name != LINEAR_MAP}
    assert type(manifest)(**vars(manifest) | {"files": files}).digest == manifest.digest
