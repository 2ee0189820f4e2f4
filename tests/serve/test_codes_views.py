"""What commands make of codes with other values, other members, or in shards."""

import json
from pathlib import Path

import numpy as np
import pytest

from vsc_serve.analysis.describe import describe
from vsc_serve.cli.decode import decode
from vsc_serve.cli.search import search
from vsc_serve.codes import read_codes, write_codes
from vsc_serve.convert import Options, plan, write_file
from vsc_serve.encoder import Encoder
from vsc_serve.errors import UsageError
from vsc_serve.options import EncodeOptions

ARCHIVE = Path(__file__).parents[1] / "data" / "archive"
BUNDLE = ARCHIVE / "bundle-v1"
IMAGES = sorted((ARCHIVE / "images").glob("*.png"))
IDS = [path.name for path in IMAGES]


def encoded(path: Path, **options) -> Path:
    encoder = Encoder.open(BUNDLE, device="cpu")
    chosen = EncodeOptions(**options)
    rows = encoder.encode_rows(encoder.read(IMAGES), chosen)
    meta = encoder.provenance(chosen)
    write_codes(path, rows.codes, IDS, meta, gamma=rows.gamma, sigma=rows.sigma)
    return path


def in_shards(path: Path, folder: Path) -> Path:
    whole = read_codes(path)
    folder.mkdir()
    for number, rows in enumerate((slice(0, 4), slice(4, 6))):
        write_codes(folder / f"{number}.npz", whole.codes[rows], whole.ids[rows], whole.meta)
    shards = [{"file": "0.npz", "rows": 4}, {"file": "1.npz", "rows": 2}]
    (folder / "manifest.json").write_text(json.dumps({"format": 1, "shards": shards}))
    return folder


@pytest.mark.parametrize(
    "options", [{}, {"view": "gamma"}, {"view": "spike"}, {"max_active": 2}, {"tau": 0.3}]
)
def test_an_image_is_found_again_whatever_its_code_holds(tmp_path, options, capsys):
    codes = encoded(tmp_path / "codes.npz", **options)
    for path in (codes, in_shards(codes, tmp_path / "shards")):
        arguments = {"top": 6, "metric": "cosine", "explain": False, "device": "cpu"}
        search(
            path, like=[str(IMAGES[3])], query="symmetric", model=BUNDLE, as_json=True, **arguments
        )
        hits = json.loads(capsys.readouterr().out)["hits"]
        by_id = {hit["id"]: hit["score"] for hit in hits}
        assert by_id[IDS[3]] == pytest.approx(1.0)
        assert max(by_id.values()) == pytest.approx(1.0)


@pytest.mark.parametrize("view", ["gamma", "spike"])
def test_values_that_are_no_means_are_not_drawn(tmp_path, view):
    codes = encoded(tmp_path / "codes.npz", view=view)
    with pytest.raises(UsageError, match=f"hold the view {view}, which no decoder draws"):
        decode(codes, out=tmp_path / "out", model=BUNDLE, device="cpu")
    write_file(plan([encoded(codes)], to="npz", options=Options(sign="split")), codes)
    with pytest.raises(UsageError, match="changed since they were encoded"):
        decode(codes, out=tmp_path / "out", model=BUNDLE, device="cpu")
    assert not (tmp_path / "out").exists()


def test_shards_are_drawn_like_a_file(tmp_path):
    codes = encoded(tmp_path / "codes.npz", uncertainty=True)
    for path in (codes, in_shards(codes, tmp_path / "shards")):
        decode(path, out=tmp_path / f"{path.name}.out", model=BUNDLE, device="cpu")
        drawn = sorted((tmp_path / f"{path.name}.out").rglob("*.png"))
        assert [found.name for found in drawn] == [f"{name}.png" for name in IDS]


def test_info_says_what_a_file_holds_beside_codes(tmp_path):
    path = encoded(tmp_path / "codes.npz", uncertainty=True, max_active=2)
    facts = describe(path)
    assert facts["kind"] == "sparse codes, format 1"
    assert facts["also holds"] == "gamma, sigma"
    assert facts["max_active"] == 2
    assert facts["bytes"] == path.stat().st_size
    assert "also holds" not in describe(encoded(path))


def test_info_knows_a_folder_of_shards_from_a_bundle(tmp_path):
    path = encoded(tmp_path / "codes.npz")
    folder = in_shards(path, tmp_path / "shards")
    facts, whole = describe(folder), describe(path)
    assert facts.pop("kind") == "sparse codes, format 1, in 2 shards"
    assert facts.pop("bytes") == sum(shard.stat().st_size for shard in folder.glob("*.npz"))
    assert facts == {name: whole[name] for name in facts}
    assert describe(BUNDLE)["kind"].startswith("model bundle")
    with pytest.raises(UsageError, match=r"neither a run .* nor a bundle or shards"):
        describe(tmp_path)


def test_uncertainty_is_stored_beside_the_entries_it_belongs_to(tmp_path):
    found = read_codes(encoded(tmp_path / "codes.npz", uncertainty=True))
    gammas = read_codes(encoded(tmp_path / "gamma.npz", view="gamma")).codes
    assert found.gamma is not None
    np.testing.assert_array_equal(found.gamma, gammas.data)
