"""Runs with other encoders and decoders than an mlp export as all do: codes, variants, checks."""

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray

from vsc_export.comparison import exact_codes
from vsc_export.options import ExportOptions
from vsc_export.precision import encoder_in, parse_precision
from vsc_export.verify import require_verified, verify_bundle
from vsc_export.write import export_bundle
from vsc_serve.bundle import ENCODER_TOPK, Precision, open_bundle
from vsc_serve.codes import threshold
from vsc_serve.decoder import Decoder
from vsc_serve.encoder import Encoder
from vsc_serve.session import open_session
from vsc_training.checkpoint import load_checkpoint, load_samples
from vsc_training.config import load_recipe
from vsc_training.data import Examples
from vsc_training.fit import fit
from vsc_training.model import VSC, DataSpec

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("cached_exports")]

Rows = NDArray[np.float32]


def mixtures(count: int, seed: int = 0) -> Rows:
    """Return vectors of twelve numbers, each the sum of a few of twelve directions."""
    rng = np.random.default_rng(seed)
    directions, _ = np.linalg.qr(np.random.default_rng(5).normal(size=(12, 12)))
    chosen = rng.random((count, 12)) < 0.2
    return (chosen @ directions + 0.02 * rng.normal(size=(count, 12))).astype(np.float32)


@pytest.fixture(scope="module", params=["linear", "skip"])
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on vectors with this encoder and a linear decoder."""
    folder = tmp_path_factory.mktemp("runs") / request.param
    fields = ["latent_dim=16", "hidden=24", "pseudo_inputs=4", "batch_size=32", "alpha=0.2"]
    fields += [f"encoder={request.param}", "steps=400", "learning_rate=0.01", "beta=0.03"]
    rows = mixtures(400)
    examples = Examples(rows, [str(number) for number in range(400)], DataSpec(input_dim=12))
    fit(load_recipe("sparse", fields), examples, folder, device=torch.device("cpu"))
    return folder


@pytest.fixture
def model(run: Path) -> VSC:
    return load_checkpoint(run).build_model()


def test_the_bundle_computes_what_was_trained(run: Path, model: VSC, tmp_path: Path) -> None:
    """Codes, compacted codes, fixed places and decoder; `vsc verify` says so as well."""
    bundle = tmp_path / "model"
    export_bundle(run, bundle, ExportOptions(top_k=4))
    require_verified(verify_bundle(bundle, run, None, row_count=100), bundle)
    rows = mixtures(50, seed=1)
    with torch.no_grad():
        q = model.encode(torch.from_numpy(rows))
        expected = threshold(q.spike_logit.numpy(), q.mu.numpy(), 0.5)
        mean = model.decode(torch.from_numpy(expected)).numpy()
    codes = Encoder.open(bundle, device="cpu").encode(rows)
    np.testing.assert_allclose(codes.toarray(), expected, atol=1e-5)
    assert codes.nnz > 50
    np.testing.assert_allclose(Decoder.open(bundle, device="cpu").decode(codes), mean, atol=1e-5)
    (counts,) = open_session(bundle / ENCODER_TOPK).run(["count"], {"vector": rows})
    assert counts.ravel().tolist() == np.count_nonzero(expected, axis=1).tolist()
    assert open_bundle(bundle).manifest.input_dim == 12


@pytest.mark.parametrize("name", ["fp16", "int8"])
def test_a_variant_keeps_the_spike_head_and_the_input_it_sees_in_float32(
    run: Path, model: VSC, name: str
) -> None:
    precision: Precision = parse_precision(name)
    encoder = encoder_in(precision, model, 0.5, 20, load_samples(run))
    types = {part.name: part.data_type for part in encoder.graph.initializer if len(part.dims) == 2}
    assert types.pop("model.spike_head.weight") == onnx.TensorProto.FLOAT
    assert onnx.TensorProto.FLOAT not in types.values()
    makers = {output: node for node in encoder.graph.node for output in node.output}
    (head,) = [node for node in encoder.graph.node if "model.spike_head.weight" in node.input]
    (seen,) = [part for part in head.input if "weight" not in part and "bias" not in part]
    assert makers[seen].op_type in ("Concat", "Div")  # both in a row, or the scaled input
    parts = makers[seen].input if makers[seen].op_type == "Concat" else [seen]
    assert makers[parts[-1]].op_type == "Div"


@pytest.mark.parametrize("name", ["fp16", "int8"])
def test_a_variant_has_nearly_the_codes_of_the_model(run: Path, model: VSC, name: str) -> None:
    rows = mixtures(200, seed=1)
    encoder = encoder_in(parse_precision(name), model, 0.5, 20, load_samples(run))
    session = onnxruntime.InferenceSession(encoder.SerializeToString())
    (found,) = session.run(["spike_logit"], {"vector": rows})
    truth = exact_codes(model, rows, 0.5).spike_logit
    assert ((found > 0) != (truth > 0)).mean() < 0.01
