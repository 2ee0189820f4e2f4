"""What users of such tools complain about, and cannot here: each complaint at the command line."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vsc_serve import read_codes
from vsc_serve.encoder import Encoder
from vsc_serve.images import read_images, read_pixels
from vsc_serve.preprocess import PixelSpec
from vsc_serve.sources import find_sources
from vsc_training.data import load_examples

ORIENTATION = 0x0112


def encode(bundle: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    words = ["encode", *(str(argument) for argument in arguments), "--model", str(bundle)]
    command = [sys.executable, "-m", "vsc_serve", *words]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def noise(height: int, width: int, *, channels: int = 3) -> Image.Image:
    rng = np.random.default_rng(height + width)
    shape = (height, width, channels)[: 2 if channels == 1 else 3]
    return Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8))


@pytest.fixture
def odd_pictures(tmp_path: Path) -> Path:
    """Pictures that two ways of reading would read differently."""
    folder = tmp_path / "odd"
    folder.mkdir()
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    noise(90, 60).save(folder / "turned.jpg", exif=exif)
    noise(600, 500).save(folder / "large.jpg")
    noise(64, 64).convert("CMYK").save(folder / "ink.jpg")
    noise(33, 47).convert("P").save(folder / "palette.png")
    noise(20, 50, channels=4).save(folder / "clear.png")
    noise(9, 70).save(folder / "animated.gif", save_all=True, append_images=[noise(9, 71)])
    Image.fromarray(np.arange(1024, dtype=np.uint16).reshape(32, 32) * 64).save(folder / "16.png")
    return folder


def test_complaint_training_and_serving_resize_in_different_ways(odd_pictures):
    """One function makes the pixels: for training, the command line, the service, an array."""
    examples = load_examples(odd_pictures, size=16)
    spec = examples.spec.pixel_spec
    assert spec is not None
    served, ids, bad = read_images(find_sources([str(odd_pictures)]), spec)
    assert (ids, bad) == (examples.ids, [])
    np.testing.assert_array_equal(examples.rows, served)
    for name, row in zip(ids, served, strict=True):
        np.testing.assert_array_equal(read_pixels(odd_pictures / name, spec), row)


@pytest.mark.slow
def test_complaint_zero_images_give_an_empty_file_and_no_error(tiny_bundle, tmp_path):
    """Exit 2, one line: what was looked for and what was there instead. Nothing is written."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    (folder / "readme.txt").write_text("pictures are elsewhere")
    done = encode(tiny_bundle, folder, "--out", tmp_path / "codes.npz")
    assert done.returncode == 2
    assert f"{folder}: no image found. Looked for files ending in .apng" in done.stderr
    assert "Passed over: 1 ending .txt" in done.stderr
    assert [path.name for path in tmp_path.glob("codes*")] == []


@pytest.mark.slow
def test_complaint_one_truncated_image_stops_the_run_or_shifts_the_rows(
    grey_folder, tiny_bundle, tmp_path
):
    pictures = sorted(grey_folder.rglob("*.png"))[:12]
    for number, picture in enumerate(pictures):
        content = picture.read_bytes()
        cut = content[: len(content) // 2] if number in (0, 5, 6, 11) else content
        (tmp_path / f"{number:02}.png").write_bytes(cut)
    done = encode(tiny_bundle, tmp_path, "--out", tmp_path / "codes.npz")
    assert done.returncode == 0, done.stderr
    stored = read_codes(tmp_path / "codes.npz")
    assert stored.ids == [f"{number:02}.png" for number in range(12) if number not in (0, 5, 6, 11)]
    expected = Encoder.open(tiny_bundle).encode([tmp_path / name for name in stored.ids])
    np.testing.assert_array_equal(stored.codes.toarray(), expected.toarray())
    lines = (tmp_path / "codes.errors.jsonl").read_text().splitlines()
    assert [json.loads(line)["id"] for line in lines] == ["00.png", "05.png", "06.png", "11.png"]
    assert all("broken image: " in json.loads(line)["reason"] for line in lines)


@pytest.mark.slow
def test_complaint_phone_pictures_and_junk_folders(tiny_bundle, tmp_path):
    """A phone's folder: HEIF is read or named in the list, previews are passed over."""
    pytest.importorskip("pillow_heif").register_heif_opener()
    folder = tmp_path / "DCIM"
    for name in ("IMG_1.HEIC", "IMG_2.jpg", ".thumbnails/1.jpg", "@eaDir/IMG_2.jpg/small.jpg"):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        noise(64, 64).save(path, "HEIF" if name.endswith("HEIC") else "JPEG")
    done = encode(tiny_bundle, folder, "--out", tmp_path / "codes.npz")
    assert done.returncode == 0, done.stderr
    assert read_codes(tmp_path / "codes.npz").ids == ["IMG_1.HEIC", "IMG_2.jpg"]
    assert not (tmp_path / "codes.errors.jsonl").exists()


def test_a_picture_resized_another_way_would_be_seen():
    """The test of one resize above can fail: Pillow's other filters give other pixels."""
    picture = noise(90, 60)
    spec = PixelSpec(height=16, width=16, channels=3, fit="stretch")
    ours = read_pixels(png_bytes(picture), spec)
    other = np.asarray(picture.resize((16, 16), Image.Resampling.NEAREST))
    assert not np.array_equal(ours, other)


def png_bytes(picture: Image.Image) -> bytes:
    from io import BytesIO

    buffer = BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()
