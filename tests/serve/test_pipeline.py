"""From files to codes: rows and ids stay together whatever the files are like."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vsc_serve import pipeline
from vsc_serve.encoder import Encoder
from vsc_serve.errors import InputError
from vsc_serve.images import BadImage, find_images
from vsc_serve.pipeline import (
    count_reasons,
    encode_files,
    errors_path,
    require_rows,
    write_bad_images,
)


def test_ten_broken_files_among_a_thousand_shift_no_row(
    fake_encoder: Encoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(0)
    pictures = rng.integers(0, 256, (1000, 8, 8), dtype=np.uint8)
    broken = set(range(7, 1000, 100))
    for number, pixels in enumerate(pictures):
        path = tmp_path / f"{number:04}.png"
        Image.fromarray(pixels).save(path)
        if number in broken:
            path.write_bytes(path.read_bytes()[: 40 if number % 200 else 0])
    monkeypatch.setattr(pipeline, "CHUNK", 64)
    encoded = encode_files(fake_encoder, find_images([tmp_path]), workers=3)
    assert len(encoded.ids) == encoded.codes.shape[0] == 990
    assert {bad.id for bad in encoded.bad} == {f"{number:04}.png" for number in broken}
    numbers = [int(identity.split(".")[0]) for identity in encoded.ids]
    assert numbers == sorted(set(range(1000)) - broken)
    expected = fake_encoder.encode(pictures[numbers][..., None])
    assert encoded.codes.toarray().tobytes() == expected.toarray().tobytes()


def test_the_number_of_workers_and_the_chunk_do_not_change_the_codes(
    fake_encoder: Encoder, picture_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sources = find_images([picture_folder])
    first = encode_files(fake_encoder, sources, workers=1)
    monkeypatch.setattr(pipeline, "CHUNK", 5)
    second = encode_files(fake_encoder, sources, workers=4)
    assert first.ids == second.ids
    assert first.codes.toarray().tobytes() == second.codes.toarray().tobytes()


def test_progress_counts_every_file(fake_encoder: Encoder, picture_folder: Path) -> None:
    (picture_folder / "zz.jpg").write_text("text")
    seen: list[int] = []

    class Report:
        def update(self, done: int, note: str = "") -> None:
            seen.append(done)

    encode_files(fake_encoder, find_images([picture_folder]), report=Report())
    assert seen[-1] == 13


def test_reading_never_runs_far_ahead_of_the_encoder(
    fake_encoder: Encoder, picture_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "CHUNK", 1)
    read: list[str] = []
    real = pipeline.read_images
    monkeypatch.setattr(
        pipeline, "read_images", lambda sources, spec: read.append("x") or real(sources, spec)
    )
    chunks = pipeline._read_ahead(
        find_images([picture_folder]), fake_encoder.manifest.pixel_spec, 1
    )
    next(chunks)
    assert len(read) <= 1 + 1 * 2 + 1
    list(chunks)
    assert len(read) == 12


def test_no_readable_image_at_all_is_an_error_with_the_first_reason(
    fake_encoder: Encoder, tmp_path: Path
) -> None:
    (tmp_path / "a.jpg").write_bytes(b"")
    encoded = encode_files(fake_encoder, find_images([tmp_path]))
    with pytest.raises(
        InputError, match=r"none of 1 image files can be read; the first: a\.jpg: empty"
    ):
        require_rows(encoded)


def test_the_list_of_bad_files_is_written_and_an_old_one_removed(tmp_path: Path) -> None:
    path = errors_path(tmp_path / "codes.npz")
    assert path.name == "codes.errors.jsonl"
    write_bad_images(
        path, [BadImage("ü.jpg", "empty file (0 bytes)"), BadImage("b.jpg", "broken: x")]
    )
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert lines[0] == {"id": "ü.jpg", "reason": "empty file (0 bytes)"}
    write_bad_images(path, [])
    assert not path.exists()


def test_reasons_are_counted_by_their_kind() -> None:
    bad = [
        BadImage("a", "broken image: x"),
        BadImage("b", "broken image: y"),
        BadImage("c", "empty"),
    ]
    assert count_reasons(bad) == [("broken image", 2), ("empty", 1)]
