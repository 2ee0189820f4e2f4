"""Reconstructions are files named by the ids of their rows, or an error that names the id."""

from pathlib import Path

import numpy as np
import pytest

from vsc_serve.analysis.reconstruct import write_reconstructions
from vsc_serve.codes import CodeFile, dense_to_csr
from vsc_serve.decoder import Decoder
from vsc_serve.errors import InputError


@pytest.fixture
def decoder(tiny_bundle: Path) -> Decoder:
    return Decoder.open(tiny_bundle, device="cpu")


def written(decoder: Decoder, out: Path, ids: list[str]) -> list[str]:
    """Draw a row for each id, and return the names of the files."""
    codes = dense_to_csr(np.eye(len(ids), 6, dtype=np.float32))
    assert write_reconstructions(
        decoder, CodeFile(codes, ids, {}), rows=range(len(ids)), out=out
    ) == len(ids)
    return sorted(path.relative_to(out).as_posix() for path in out.rglob("*.png") if path.is_file())


def test_every_row_is_a_file_below_the_folder(decoder, tmp_path):
    ids = ["a.png", "b/c", "/etc/d", "../../e", "f\n\x1b[2J"]
    expected = ["a.png.png", "b/c.png", "e.png", "etc/d.png", "f\n\x1b[2J.png"]
    assert written(decoder, tmp_path / "out", ids) == expected


@pytest.mark.parametrize(
    ("ids", "reason"),
    [
        (["a", "/a"], "id /a: its image would take the place of another row's"),
        (["a", "b", "a"], "id a: its image would take the place of another row's"),
        (["n" * 300], r"n: its image cannot be written \(File name too long"),
        (["a\0b"], r"its image cannot be written \(embedded null byte"),
        (["a", "a.png/b"], "id a.png/b: its image would take the place of another row's"),
    ],
)
def test_a_row_that_cannot_be_a_file_of_its_own_is_named_and_nothing_is_left(
    decoder, tmp_path, ids, reason
):
    with pytest.raises(InputError, match=reason):
        written(decoder, tmp_path / "out", ids)
    assert not (tmp_path / "out").exists()
