"""What users of such tools complain about, and cannot here: each complaint at the command line."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vsc_serve import read_codes
from vsc_serve.encoder import Encoder
from vsc_serve.images import PixelSpec, read_images, read_pixels
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
def odd_images(tmp_path: Path) -> Path:
    """Images that two ways of reading would read differently."""
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


def test_complaint_training_and_serving_resize_in_different_ways(odd_images):
    """One function makes the pixels: for training, the command line, the service, an array."""
    examples = load_examples(odd_images, size=16)
    spec = examples.spec.pixel_spec
    assert spec is not None
    served, ids, bad = read_images(find_sources([str(odd_images)]), spec)
    assert (ids, bad) == (examples.ids, [])
    np.testing.assert_array_equal(examples.rows, served)
    for name, row in zip(ids, served, strict=True):
        np.testing.assert_array_equal(read_pixels(odd_images / name, spec), row)


@pytest.mark.slow
def test_complaint_zero_images_give_an_empty_file_and_no_error(tiny_bundle, tmp_path):
    """Exit 2, one line: what was looked for and what was there instead. Nothing is written."""
    folder = tmp_path / "images"
    folder.mkdir()
    (folder / "readme.txt").write_text("images are elsewhere")
    done = encode(tiny_bundle, folder, "--out", tmp_path / "codes.npz")
    assert done.returncode == 2
    assert f"{folder}: no image found. Looked for files ending in .apng" in done.stderr
    assert "Passed over: 1 with extension .txt" in done.stderr
    assert [path.name for path in tmp_path.glob("codes*")] == []


@pytest.mark.slow
def test_complaint_one_truncated_image_stops_the_run_or_shifts_the_rows(
    grey_folder, tiny_bundle, tmp_path
):
    images = sorted(grey_folder.rglob("*.png"))[:12]
    for number, image in enumerate(images):
        content = image.read_bytes()
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
def test_complaint_rows_are_shifted_against_their_files(grey_folder, tiny_bundle, tmp_path):
    """Among empty, cut, mislabelled and unusual files, every row is the code of its own file."""
    images = sorted(grey_folder.rglob("*.png"))[:30]
    folder = tmp_path / "images"
    for number, image in enumerate(images):
        path = folder / f"{number % 3}" / f"Bild {29 - number:02} é.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(image.read_bytes())
    for number, content in enumerate((b"", b"no image", images[0].read_bytes()[:60])):
        (folder / f"{number}" / f"Bild 0{number} broken.png").write_bytes(content)
        (folder / f"{number}.jpg").write_bytes(content)
    done = encode(tiny_bundle, folder, "--out", tmp_path / "codes.npz", "--batch-size", "4")
    assert done.returncode == 0, done.stderr
    stored = read_codes(tmp_path / "codes.npz")
    assert len(stored.ids) == stored.codes.shape[0] == 30
    encoder = Encoder.open(tiny_bundle)
    alone = [encoder.encode([folder / name]).toarray()[0] for name in stored.ids]
    np.testing.assert_array_equal(stored.codes.toarray(), alone)
    assert len(np.unique(alone, axis=0)) > 5, "codes that are all alike would hide a shift"


@pytest.mark.slow
def test_complaint_a_new_image_means_that_everything_is_done_again(
    grey_folder, tiny_bundle, tmp_path
):
    folder = tmp_path / "images"
    folder.mkdir()
    images = sorted(grey_folder.rglob("*.png"))[:40]
    for image in images[:38]:
        (folder / image.name).write_bytes(image.read_bytes())
    update = (folder, "--out", tmp_path / "codes.npz", "--update", "--json")
    assert json.loads(encode(tiny_bundle, *update).stdout)["fresh"] == 38
    (folder / images[0].name).unlink()
    for image in images[38:]:
        (folder / image.name).write_bytes(image.read_bytes())
    again = json.loads(encode(tiny_bundle, *update).stdout)
    assert (again["images"], again["fresh"]) == (39, 2)
    whole = encode(tiny_bundle, folder, "--out", tmp_path / "whole.npz", "--update")
    assert whole.returncode == 0, whole.stderr
    assert (tmp_path / "codes.npz").read_bytes() == (tmp_path / "whole.npz").read_bytes()


@pytest.mark.slow
def test_complaint_an_interrupt_leaves_a_broken_file(grey_folder, tiny_bundle, tmp_path):
    """Whenever Ctrl-C comes, the old file stays whole and the next run gives the right one."""
    folder = tmp_path / "images"
    folder.mkdir()
    images = sorted(grey_folder.rglob("*.png"))
    for number in range(3000):
        os.link(images[number % len(images)], folder / f"{number:04}.png")
    out = tmp_path / "codes.npz"
    assert encode(tiny_bundle, folder, "--out", out).returncode == 0
    expected = out.read_bytes()
    ended = [interrupt(tiny_bundle, folder, out, after) for after in (0.0, 0.1, 0.3, 0.6)]
    assert set(ended) <= {0, 130, -signal.SIGINT}, "the last: while Python itself ends"
    assert 130 in ended, "no run was interrupted: the test says nothing"
    assert out.read_bytes() == expected
    assert encode(tiny_bundle, folder, "--out", out, "--force").returncode == 0
    assert out.read_bytes() == expected


def interrupt(bundle: Path, folder: Path, out: Path, after: float) -> int:
    """Press Ctrl-C some seconds after the first shard is begun, and return the exit code."""
    words = ["encode", str(folder), "--out", str(out), "--model", str(bundle), "--force"]
    process = subprocess.Popen(
        [sys.executable, "-m", "vsc_serve", *words],
        stderr=subprocess.DEVNULL,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    while process.poll() is None and len(list(out.parent.glob("codes*"))) < 2:
        time.sleep(0.01)
    time.sleep(after)
    process.send_signal(signal.SIGINT)
    return process.wait(60)


@pytest.mark.slow
def test_complaint_memory_grows_with_the_number_of_images(grey_folder, tiny_bundle, tmp_path):
    """A run over ten times the images, in shards of one size, needs no more memory."""
    images = sorted(grey_folder.rglob("*.png"))
    peaks = []
    for count in (3000, 30_000):
        folder = tmp_path / str(count)
        for number in range(count):
            path = folder / f"{number // 1000:02}" / f"{number:05}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            os.link(images[number % len(images)], path)
        peaks.append(peak_mib(tiny_bundle, folder, tmp_path / f"codes{count}.npz"))
    assert peaks[1] < 1.1 * peaks[0]


def peak_mib(bundle: Path, folder: Path, out: Path) -> float:
    """Encode in one process and return its largest memory."""
    words = ["encode", str(folder), "--out", str(out), "--model", str(bundle)]
    words += ["--workers", "0", "--shard-rows", "1000"]
    process = subprocess.Popen(
        [sys.executable, "-m", "vsc_serve", *words], stderr=subprocess.DEVNULL
    )
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0
    return usage.ru_maxrss / 1024


@pytest.mark.slow
def test_complaint_phone_images_and_junk_folders(tiny_bundle, tmp_path):
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


def test_an_image_resized_another_way_would_be_seen():
    """The test of one resize above can fail: Pillow's other filters give other pixels."""
    image = noise(90, 60)
    spec = PixelSpec(height=16, width=16, channels=3, fit="stretch")
    ours = read_pixels(png_bytes(image), spec)
    other = np.asarray(image.resize((16, 16), Image.Resampling.NEAREST))
    assert not np.array_equal(ours, other)


def png_bytes(image: Image.Image) -> bytes:
    from io import BytesIO

    buffer = BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()
