"""Files of every released format version are read for ever."""

import json
from pathlib import Path

import numpy as np
import pytest

from vsc_serve import Decoder, Encoder, read_codes
from vsc_serve.bundle import FORMAT as BUNDLE_FORMAT
from vsc_serve.codes import FORMAT as CODES_FORMAT
from vsc_serve.index.base import open_index
from vsc_serve.index.exact import search_many
from vsc_serve.index.index_file import FORMAT as INDEX_FORMAT

ARCHIVE = Path(__file__).parents[1] / "data" / "archive"


@pytest.mark.parametrize("version", range(1, BUNDLE_FORMAT + 1))
def test_a_bundle_of_every_version_opens_and_gives_its_codes(version: int) -> None:
    folder = ARCHIVE / f"bundle-v{version}"
    images = sorted((ARCHIVE / "images").glob("*.png"))
    codes = Encoder.open(folder, device="cpu").encode(images)
    expected = read_codes(ARCHIVE / f"codes-v{version}.npz").codes
    assert codes.indices.tolist() == expected.indices.tolist()
    np.testing.assert_allclose(codes.data, expected.data, atol=1e-4)
    assert Decoder.open(folder, device="cpu").decode(codes).shape == (len(images), 8, 8, 1)


@pytest.mark.parametrize("version", range(1, CODES_FORMAT + 1))
def test_codes_of_every_version_are_read(version: int) -> None:
    stored = read_codes(ARCHIVE / f"codes-v{version}.npz")
    facts = json.loads((ARCHIVE / f"codes-v{version}.json").read_text(encoding="utf-8"))
    assert stored.ids == facts["ids"]
    assert stored.codes.toarray().tolist() == facts["codes"]
    assert stored.meta == facts["meta"]


@pytest.mark.parametrize("version", range(1, INDEX_FORMAT + 1))
def test_an_index_of_every_version_opens_and_holds_its_codes(version: int) -> None:
    index, stored = open_index(ARCHIVE / f"index-v{version}"), read_codes(ARCHIVE / "codes-v1.npz")
    index.verify()
    assert [index.id_of(row) for row in range(index.count)] == stored.ids
    assert (index.rows[index.numbers()] != stored.codes).nnz == 0
    assert index.meta == stored.meta
    found, expected = index.search(stored.codes), search_many(stored.codes, stored.codes)
    assert found.rows.tolist() == expected.rows.tolist()
