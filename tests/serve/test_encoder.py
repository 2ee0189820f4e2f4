"""The one path from pixels to codes."""

import dataclasses
import io
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image

from vsc_serve import Decoder, Encoder, __version__
from vsc_serve.bundle import ENCODER, MANIFEST, sha256
from vsc_serve.codes import dense_to_csr, threshold_logit
from vsc_serve.encoder import BATCH_SIZE
from vsc_serve.errors import BundleError, InputError, UsageError
from vsc_serve.options import PLAIN, QUERY_TAU, EncodeOptions


class FailsOnWhite:
    """A Session that gives a value of choice for white images and zeros for others."""

    engine = "broken"

    def __init__(self, value):
        self.value = value
        self.feeds = []

    def run(self, outputs, feeds):
        self.feeds.append(feeds)
        code = np.zeros((len(feeds["image"]), 16), np.float32)
        code[(feeds["image"] == 255).all(axis=(1, 2, 3)), 5] = self.value
        return [code] * len(outputs)


class WithLogvar:
    """A Session that gives a log-variance, a third of the spike logit, beside another's outputs."""

    engine = "fake"

    def __init__(self, session):
        self.session = session
        self.asked = []

    def run(self, outputs, feeds):
        self.asked.append(list(outputs))
        (spike_logit,) = self.session.run(["spike_logit"], feeds)
        given = {"logvar": spike_logit / 3, "spike_logit": spike_logit}
        return [
            given[name] if name in given else self.session.run([name], feeds)[0] for name in outputs
        ]


class Gives:
    """A Session that gives these arrays whatever it is fed."""

    engine = "fixed"

    def __init__(self, **arrays):
        self.arrays = {name: np.array(rows, np.float32) for name, rows in arrays.items()}

    def run(self, outputs, feeds):
        return [self.arrays[name] for name in outputs]


def pixels(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, 8, 8, 1), dtype=np.uint8)


def png(rows: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(rows[..., 0]).save(buffer, "PNG")
    return buffer.getvalue()


def opened(content: bytes) -> Image.Image:
    return Image.open(io.BytesIO(content))


def same(found, expected) -> bool:
    return found.shape == expected.shape and (found != expected).nnz == 0


@pytest.fixture
def vector_encoder(fake_encoder, fake_session):
    manifest = dataclasses.replace(
        fake_encoder.manifest, modality="vector", pixel_spec=None, input_dim=64
    )
    return Encoder(fake_session, manifest)


@given(
    rows=hnp.arrays(np.uint8, st.tuples(st.integers(0, 9), st.just(8), st.just(8), st.just(1))),
    seed=st.integers(0, 99),
)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_a_code_depends_on_its_image_and_on_nothing_else_in_the_batch(fake_encoder, rows, seed):
    codes = fake_encoder.encode(rows)
    assert codes.shape == (len(rows), 16)
    order = np.random.default_rng(seed).permutation(len(rows))
    assert same(fake_encoder.encode(rows[order]), codes[order])
    for row in range(len(rows)):
        assert same(fake_encoder.encode(rows[row : row + 1]), codes[[row]])


@pytest.mark.parametrize("count", [0, 1, BATCH_SIZE - 1, BATCH_SIZE, BATCH_SIZE + 1])
def test_rows_on_both_sides_of_a_batchs_end_are_encoded_alike(fake_encoder, count):
    rows = pixels(BATCH_SIZE + 1)
    assert same(fake_encoder.encode(rows[:count]), fake_encoder.encode(rows)[:count])


def test_codes_are_sparse_sorted_and_of_the_promised_types(fake_encoder):
    codes = fake_encoder.encode(pixels(40))
    assert 0 < codes.nnz < 40 * 16
    assert codes.dtype == np.float32
    assert codes.indices.dtype == np.int32
    assert codes.has_canonical_format
    assert codes.data.all()


def test_paths_bytes_and_images_give_the_code_of_their_pixels(fake_encoder, tmp_path):
    rows = pixels(4)
    path = tmp_path / "größer.png"
    path.write_bytes(png(rows[1]))
    images = [
        str(path),
        path,
        png(rows[1]),
        opened(png(rows[1])),
        Image.fromarray(rows[1, ..., 0]),
    ]
    expected = fake_encoder.encode(rows[[1] * len(images)])
    assert same(fake_encoder.encode(images), expected)
    assert fake_encoder.encode([]).shape == (0, 16)


def test_a_single_image_is_refused_with_the_right_call(fake_encoder, tmp_path):
    path = tmp_path / "a.png"
    content = png(pixels(1)[0])
    for single in (path, str(path), content, opened(content)):
        with pytest.raises(InputError, match=r"a list of images.*pass \[image\]"):
            fake_encoder.encode(single)


@pytest.mark.parametrize(
    "rows",
    [
        pytest.param(np.zeros((2, 8, 9, 1), np.uint8), id="width"),
        pytest.param(np.zeros((2, 8, 8, 3), np.uint8), id="channels"),
        pytest.param(np.zeros((2, 8, 8), np.uint8), id="no channel axis"),
        pytest.param(np.zeros((8, 8, 1), np.uint8), id="one image"),
        pytest.param(np.zeros((2, 8, 8, 1), np.float32), id="float"),
        pytest.param(np.zeros((), np.uint8), id="no axis"),
    ],
)
def test_pixels_of_another_shape_or_type_are_refused_with_both(fake_encoder, rows):
    with pytest.raises(InputError) as caught:
        fake_encoder.encode(rows)
    assert str(caught.value) == (
        f"model fake takes uint8 of shape (rows, 8, 8, 1), not {rows.dtype} of shape {rows.shape}"
    )


def test_an_image_that_cannot_be_read_is_named(fake_encoder, tmp_path):
    good = png(pixels(1)[0])
    (tmp_path / "bad.png").write_bytes(good[:60])
    with pytest.raises(InputError, match=r"bad.png: broken image"):
        fake_encoder.encode([good, tmp_path / "bad.png"])
    with pytest.raises(InputError, match=r"gone.png: no such file"):
        fake_encoder.encode([good, str(tmp_path / "gone.png")])
    with pytest.raises(InputError, match="row 1: empty file"):
        fake_encoder.encode([good, b""])
    with pytest.raises(InputError, match="row 1: broken image"):
        fake_encoder.encode([good, opened(good[:60])])
    with pytest.raises(InputError, match=r"row 1: a ndarray is no image.*all pixels as one"):
        fake_encoder.encode([good, pixels(1)[0]])


@pytest.mark.parametrize("tau", [0.0, 1.0, -1.0, float("nan")])
def test_a_tau_out_of_range_is_refused(fake_encoder, tau):
    with pytest.raises(UsageError, match="tau must be above 0 and below 1"):
        fake_encoder.encode(pixels(1), tau=tau)


def test_tau_replaces_the_models_own_and_is_recorded(fake_encoder):
    rows = pixels(30)
    default = fake_encoder.encode(rows)
    assert same(fake_encoder.encode(rows, tau=0.5), default)
    strict, loose = fake_encoder.encode(rows, tau=0.9), fake_encoder.encode(rows, tau=0.1)
    assert strict.nnz < default.nnz < loose.nnz
    assert fake_encoder.provenance()["tau"] == 0.5
    assert fake_encoder.provenance(tau=0.9)["tau"] == 0.9


def test_the_graph_is_fed_the_threshold_as_a_float32_logit(fake_encoder):
    session = FailsOnWhite(0)
    Encoder(session, fake_encoder.manifest).encode(pixels(1), tau=0.7)
    (feeds,) = session.feeds
    assert feeds.keys() == {"image", "tau_logit"}
    assert feeds["tau_logit"].dtype == np.float32
    assert feeds["tau_logit"].shape == ()
    assert feeds["tau_logit"] == threshold_logit(0.7)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_model_that_gives_no_number_is_an_error_that_names_the_row(fake_encoder, value):
    broken = Encoder(FailsOnWhite(value), fake_encoder.manifest)
    rows = np.zeros((BATCH_SIZE + 9, 8, 8, 1), np.uint8)
    assert broken.encode(rows).nnz == 0
    for bad in (BATCH_SIZE + 4, 2):
        rows[bad] = 255
        with pytest.raises(
            InputError, match=f"^row {bad}: model fake gives values that are not fi"
        ):
            broken.encode(rows)


def test_a_model_of_vectors_takes_float32_rows_and_nothing_else(vector_encoder):
    rows = np.random.default_rng(0).normal(size=(5, 64)).astype(np.float32)
    assert vector_encoder.encode(rows).shape == (5, 16)
    with pytest.raises(InputError, match=r"takes float32 of shape \(rows, 64\), not float64 of"):
        vector_encoder.encode(rows.astype(np.float64))
    with pytest.raises(InputError, match="encodes vectors of length 64, not images"):
        vector_encoder.encode(["a.png"])
    rows[3, 7] = np.nan
    with pytest.raises(InputError, match="row 3 holds values that are not finite"):
        vector_encoder.encode(rows)


# Options


@pytest.fixture
def archived_encoder():
    return Encoder.open(Path(__file__).parents[1] / "data/archive/bundle-v1", device="cpu")


@pytest.fixture
def full_session(fake_session):
    return WithLogvar(fake_session)


@pytest.fixture
def full_encoder(fake_encoder, full_session):
    return Encoder(full_session, fake_encoder.manifest)


def graph_outputs(session, rows, *names):
    feeds = {"image": rows, "tau_logit": np.array(threshold_logit(0.5))}
    return [found.astype(np.float64) for found in session.run(names, feeds)]


@pytest.mark.parametrize("count", [1, BATCH_SIZE + 3])
def test_the_views_give_mu_gamma_or_one_for_the_same_latents(full_encoder, full_session, count):
    rows = pixels(count)
    code, spike_logit = graph_outputs(full_session, rows, "code", "spike_logit")
    gamma = 1 / (1 + np.exp(-spike_logit))
    for view, values in (("mean", code), ("gamma", gamma), ("spike", np.ones_like(code))):
        found = full_encoder.encode_rows(rows, EncodeOptions(view=view))
        np.testing.assert_allclose(found.codes.toarray(), np.where(code != 0, values, 0), rtol=1e-6)
        assert found.codes.dtype == np.float32
        assert found.gamma is None
        assert found.sigma is None
    assert same(full_encoder.encode_rows(rows, PLAIN).codes, full_encoder.encode(rows))


@given(
    hnp.arrays(np.float32, (3, 16), elements=st.floats(-4, 4, width=32)),
    st.floats(0.01, 0.5),
)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_a_query_holds_mu_times_the_root_of_gamma_above_its_own_threshold(
    fake_encoder, logit, tau_q
):
    class Graph:
        engine = "fake"

        def run(self, outputs, feeds):
            mu = np.where(logit > 0, 3 - logit, np.float32(-1.5) + logit)
            code = np.where(logit > feeds["tau_logit"], mu, np.float32(0))
            return [{"code": code, "spike_logit": logit}[name] for name in outputs]

    options = EncodeOptions.for_query(fake_encoder.manifest, tau_q)
    found = Encoder(Graph(), fake_encoder.manifest).encode_rows(pixels(3), options).codes
    gamma = 1 / (1 + np.exp(-logit.astype(np.float64)))
    mu = np.where(logit > 0, 3 - logit, np.float32(-1.5) + logit)
    expected = np.where(logit > threshold_logit(tau_q), np.sqrt(gamma) * mu, 0)
    np.testing.assert_allclose(found.toarray(), expected, rtol=1e-6)
    assert found.has_canonical_format
    assert found.data.all()


def test_a_query_value_is_never_zero(fake_encoder):
    tiny = np.full((1, 16), -np.finfo(np.float32).smallest_subnormal, np.float32)
    options = EncodeOptions(view="query", tau=1e-6)
    session = Gives(code=tiny, spike_logit=np.full((1, 16), -13, np.float32))
    found = Encoder(session, fake_encoder.manifest).encode_rows(pixels(1), options).codes
    assert found.nnz == 16
    assert (found.data < 0).all()


def test_a_query_cut_to_its_strongest_latents_keeps_the_largest_values(fake_encoder):
    code = np.array([[4.0, -3.0, 2.0, 0.0]], np.float32)
    logit = np.array([[-2.0, 5.0, 5.0, -9.0]], np.float32)  # gamma 0.12, 0.99, 0.99
    manifest = dataclasses.replace(fake_encoder.manifest, latent_dim=4)
    encoder = Encoder(Gives(code=code, spike_logit=logit), manifest)
    found = encoder.encode_rows(pixels(1), EncodeOptions(view="query", max_active=2)).codes
    assert found.indices.tolist() == [1, 2]


def test_a_query_takes_its_threshold_from_the_caller_the_model_or_the_default(fake_encoder):
    told = dataclasses.replace(fake_encoder.manifest, query_tau=0.3)
    facts = [
        (EncodeOptions(view="query"), fake_encoder.manifest, (QUERY_TAU, 0.5)),
        (EncodeOptions(view="query"), told, (0.3, 0.5)),
        (EncodeOptions.for_query(told, 0.2), told, (0.2, 0.5)),
        (EncodeOptions.for_query({"tau": 0.7}), told, (0.3, 0.7)),
        (EncodeOptions(tau=0.4), told, (0.4, None)),
        (PLAIN, told, (0.5, None)),
    ]
    for options, manifest, expected in facts:
        assert options.thresholds(manifest) == expected
        meta = Encoder(Gives(), manifest).provenance(options)
        assert (meta["tau"], meta.get("stored_tau")) == expected
    with pytest.raises(UsageError, match=r"thresholds out of order: queries keep gamma above 0\.3"):
        EncodeOptions.for_query({"tau": 0.2}).thresholds(told)
    with pytest.raises(UsageError, match="thresholds out of order"):
        Encoder(Gives(), told).encode_rows(pixels(1), EncodeOptions(view="query", tau=0.6))


@pytest.mark.parametrize("query_tau", [0.0, 0.51, float("nan")])
def test_a_manifest_whose_query_threshold_cannot_be_is_refused(fake_encoder, query_tau):
    with pytest.raises(ValueError, match="query_tau must be above 0 and at most tau"):
        dataclasses.replace(fake_encoder.manifest, query_tau=query_tau)


@pytest.mark.parametrize("options", [{}, {"view": "spike"}, {"max_active": 2}, {"tau": 0.3}])
def test_uncertainty_goes_with_the_entries(full_encoder, full_session, options):
    rows = pixels(40)
    found = full_encoder.encode_rows(rows, EncodeOptions(uncertainty=True, **options))
    spike_logit, logvar = graph_outputs(full_session, rows, "spike_logit", "logvar")
    places = found.codes.nonzero()
    assert len(places[0]) == found.codes.nnz > 40
    np.testing.assert_allclose(found.gamma, 1 / (1 + np.exp(-spike_logit[places])), rtol=1e-6)
    np.testing.assert_allclose(found.sigma, np.sqrt(np.exp(logvar[places])), rtol=1e-6)
    assert found.gamma.dtype == found.sigma.dtype == np.float32


def test_the_graph_computes_the_variance_only_when_it_is_asked_for(full_encoder, full_session):
    full_encoder.encode(pixels(1))
    full_encoder.encode_rows(pixels(1), EncodeOptions(view="gamma", max_active=3))
    full_encoder.encode_rows(pixels(1), EncodeOptions(uncertainty=True))
    plain = ["code", "spike_logit"]
    assert full_session.asked == [plain, plain, [*plain, "logvar"]]


@given(
    hnp.arrays(np.float32, st.tuples(st.integers(1, 5), st.just(16)), elements=st.integers(-3, 3)),
    st.integers(1, 17),
)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_max_active_keeps_the_largest_and_of_equal_ones_the_lower(fake_encoder, dense, count):
    encoder = Encoder(Gives(code=dense, spike_logit=dense), fake_encoder.manifest)
    found, seen = encoder.encode_counted(pixels(len(dense)), EncodeOptions(max_active=count))
    expected = np.zeros_like(dense)
    for row, mu in enumerate(dense):
        kept = sorted(range(16), key=lambda latent: (-abs(mu[latent]), latent))[:count]
        expected[row, kept] = mu[kept]
    np.testing.assert_array_equal(found.codes.toarray(), expected)
    assert found.codes.has_canonical_format
    assert seen.kept_energy == (expected**2).sum()
    assert seen.total_energy == (dense**2).sum()


def test_the_views_of_the_strongest_latents_are_of_the_largest_means(full_encoder):
    rows = pixels(9)
    strongest = full_encoder.encode_rows(rows, EncodeOptions(max_active=3)).codes
    for view in ("gamma", "spike"):
        found = full_encoder.encode_rows(rows, EncodeOptions(max_active=3, view=view)).codes
        assert found.indices.tolist() == strongest.indices.tolist()


def test_logits_near_the_threshold_are_counted_on_both_sides(fake_encoder):
    limit = threshold_logit(0.7)
    near = limit + np.array([[0, 0.9e-4, -0.9e-4, 1.2e-4], [-1.2e-4, 5, -5, -0.5e-4]])
    encoder = Encoder(
        Gives(code=np.zeros((2, 4)), spike_logit=near),
        dataclasses.replace(fake_encoder.manifest, latent_dim=4),
    )
    for tau, count in ((0.7, 4), (0.2, 0)):
        seen = encoder.encode_counted(pixels(2), EncodeOptions(tau=tau)).decisions
        assert (seen.judged, seen.near_threshold) == (2, count)


def test_counts_are_added_up_over_batches(full_encoder):
    rows = pixels(2 * BATCH_SIZE + 5)
    codes, whole = full_encoder.encode_counted(rows)
    starts = range(0, 520, 60)
    parts = [full_encoder.encode_counted(rows[start : start + 60]).decisions for start in starts]
    assert whole.total_energy == pytest.approx(sum(part.total_energy for part in parts))
    assert (
        whole.kept_energy
        == whole.total_energy
        == pytest.approx((codes.codes.data.astype(np.float64) ** 2).sum())
    )
    assert whole.near_threshold == sum(part.near_threshold for part in parts)


def test_no_rows_have_no_uncertainty_either(full_encoder):
    found = full_encoder.encode_rows(pixels(0), EncodeOptions(uncertainty=True))
    assert found.codes.shape == (0, 16)
    assert len(found.gamma) == len(found.sigma) == 0
    assert full_encoder.encode_rows(pixels(0)).gamma is None


def test_a_gamma_too_small_for_a_float_is_stored_all_the_same(fake_encoder):
    encoder = Encoder(Gives(code=[[3.0]], spike_logit=[[-2000.0]]), fake_encoder.manifest)
    found = encoder.encode_rows(pixels(1), EncodeOptions(view="gamma")).codes
    assert found.indices.tolist() == [0]
    assert 0 < found.data[0] < 1e-37


@pytest.mark.parametrize(
    ("name", "value"),
    [("spike_logit", np.nan), ("logvar", np.nan), ("logvar", np.inf), ("logvar", 400.0)],
)
def test_logits_and_variances_that_are_no_numbers_are_refused(fake_encoder, name, value):
    arrays = {key: np.zeros((3, 4), np.float32) for key in ("code", "spike_logit", "logvar")}
    arrays[name][1, 2] = value
    manifest = dataclasses.replace(fake_encoder.manifest, latent_dim=4)
    with pytest.raises(InputError, match=r"^row 1: model fake gives values that are not finite"):
        Encoder(Gives(**arrays), manifest).encode_rows(pixels(3), EncodeOptions(uncertainty=True))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tau": 1.0}, "tau must be above 0 and below 1, not 1.0"),
        ({"view": "mode"}, "view must be one of mean, gamma, spike, query, not mode"),
        ({"stored_tau": 0.5}, '`stored_tau` is for queries: give `view="query"` too'),
        ({"view": "query", "stored_tau": 0.0}, "tau must be above 0 and below 1, not 0.0"),
        (
            {"view": "query", "tau": 0.6, "stored_tau": 0.5},
            "thresholds out of order: queries keep gamma above 0.6, the rows they are for gamma"
            " above 0.5. A query keeps at least what a row keeps: encode queries with a `tau` of at"
            " most 0.5.",
        ),
        ({"max_active": 0}, "max_active must be 1 or more, not 0"),
    ],
)
def test_options_that_cannot_be_are_refused_when_they_are_made(options, message):
    with pytest.raises(UsageError, match=message):
        EncodeOptions(**options)


def test_provenance_says_what_the_codes_were_made_with(fake_encoder):
    options = EncodeOptions(tau=0.7, view="gamma", max_active=9)
    found = fake_encoder.provenance(options)
    assert (found["tau"], found["view"], found["max_active"]) == (0.7, "gamma", 9)
    assert "max_active" not in fake_encoder.provenance()


def test_a_query_is_made_with_the_options_of_the_codes(full_encoder):
    options = EncodeOptions(tau=0.7, view="gamma", max_active=2)
    meta = json.loads(json.dumps(full_encoder.provenance(options)))
    assert EncodeOptions.of_codes(meta) == options
    assert EncodeOptions.of_codes({}) == PLAIN
    query = EncodeOptions(view="query", tau=0.2, stored_tau=0.7)
    assert EncodeOptions.of_codes(full_encoder.provenance(query)) == query
    with pytest.raises(UsageError, match=r"changed since they were encoded \(sign: split\)"):
        EncodeOptions.of_codes(meta | {"sign": "split"})


def test_a_real_graph_gives_its_uncertainty(archived_encoder):
    rows = np.random.default_rng(0).integers(0, 256, (20, 8, 8, 1), dtype=np.uint8)
    found = archived_encoder.encode_rows(rows, EncodeOptions(uncertainty=True))
    assert same(found.codes, archived_encoder.encode(rows))
    assert (found.gamma > 0.5).all()
    assert (found.sigma > 0).all()


# Bundles


def test_an_opened_bundle_encodes_each_image_alike_in_any_batch(tiny_bundle):
    encoder = Encoder.open(str(tiny_bundle), device="cpu")
    rows = np.random.default_rng(5).integers(0, 256, (300, 4, 4, 1), dtype=np.uint8)
    codes = encoder.encode(rows)
    assert 0 < codes.nnz < 300 * 6
    assert same(encoder.encode(rows[::-1]), codes[::-1])
    assert same(encoder.encode(rows[17:18]), codes[[17]])
    assert encoder.provenance() == {
        "model": "tiny",
        "model_digest": encoder.manifest.digest,
        "tau": 0.5,
        "view": "mean",
        "engine": encoder.engine,
        "vsc_serve": __version__,
    }


def edit_probe(bundle, **changes):
    stored = json.loads((bundle / MANIFEST).read_text(encoding="utf-8"))
    stored["probes"][0] |= changes
    (bundle / MANIFEST).write_text(json.dumps(stored), encoding="utf-8")
    return stored["probes"][0]


@pytest.mark.parametrize("error", [0.9e-4, -0.9e-4])
def test_a_probe_may_differ_by_float_noise(tiny_bundle, error):
    probe = edit_probe(tiny_bundle)
    edit_probe(tiny_bundle, values=[value + error for value in probe["values"]])
    Encoder.open(tiny_bundle, device="cpu")


def test_a_bundle_that_gives_other_codes_than_at_export_does_not_open(tiny_bundle):
    probe = edit_probe(tiny_bundle)
    assert len(probe["values"]) >= 2
    other_values = [probe["values"][0] + 1.5e-4, *probe["values"][1:]]
    is_off = min(set(range(6)) - set(probe["indices"]))
    for changes in (
        {"values": other_values},
        {"indices": probe["indices"][1:], "values": probe["values"][1:]},
        {"indices": sorted([*probe["indices"][:-1], is_off])},
    ):
        edit_probe(tiny_bundle, **probe | changes)
        with pytest.raises(BundleError, match=r"probe.png: gives another code than at export"):
            Encoder.open(tiny_bundle, device="cpu")


def test_a_pillow_that_decodes_differently_is_found_before_any_code(tiny_bundle):
    edit_probe(tiny_bundle, pixels_sha256="0" * 64)
    with pytest.raises(BundleError, match=r"probe.png: this machine's Pillow .* other pixels than"):
        Encoder.open(tiny_bundle, device="cpu")


def test_a_damaged_bundle_does_not_open(tiny_bundle):
    (tiny_bundle / ENCODER).write_bytes(b"no graph")
    with pytest.raises(BundleError, match="changed since it was exported"):
        Encoder.open(tiny_bundle, device="cpu")
    stored = json.loads((tiny_bundle / MANIFEST).read_text(encoding="utf-8"))
    stored["files"][ENCODER] = sha256(tiny_bundle / ENCODER)
    (tiny_bundle / MANIFEST).write_text(json.dumps(stored), encoding="utf-8")
    with pytest.raises(BundleError, match=r"encoder.onnx: unreadable \(no ONNX graph"):
        Encoder.open(tiny_bundle, device="cpu")


# Decoding


@pytest.mark.parametrize("count", [0, 1, BATCH_SIZE + 1])
def test_codes_are_decoded_row_by_row(tiny_bundle, count):
    decoder = Decoder.open(tiny_bundle, device="cpu")
    dense = np.random.default_rng(0).normal(size=(BATCH_SIZE + 1, 6)).astype(np.float32)
    means = decoder.decode(dense_to_csr(dense[:count]))
    assert means.shape == (count, 4, 4, 1)
    assert means.dtype == np.float32
    if count:
        assert 0 <= means.min() < means.max() <= 1
        np.testing.assert_array_equal(
            means[-1:], decoder.decode(dense_to_csr(dense[count - 1 :][:1]))
        )


def test_codes_that_were_computed_with_are_decoded_too(tiny_bundle):
    decoder = Decoder.open(tiny_bundle, device="cpu")
    codes = dense_to_csr(np.ones((1, 6), np.float32))
    np.testing.assert_array_equal(decoder.decode(codes.astype(np.float64)), decoder.decode(codes))


def test_codes_of_another_model_are_refused_with_both_sizes(tiny_bundle):
    decoder = Decoder.open(tiny_bundle, device="cpu")
    with pytest.raises(InputError, match=r"codes have 7 latents, but model tiny has 6. Decode wi"):
        decoder.decode(dense_to_csr(np.ones((1, 7), np.float32)))
