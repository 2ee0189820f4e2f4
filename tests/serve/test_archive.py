"""Files of every released format version are read for ever."""

import json
from pathlib import Path

import numpy as np
import pytest

from vsc_serve import Decoder, Encoder, read_codes
from vsc_serve.bundle import FORMAT as BUNDLE_FORMAT
from vsc_serve.codes import FORMAT as CODES_FORMAT

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
