"""`vsc encode` as its user meets it: killed, interrupted, repeated, shared, on a full disk."""

import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from vsc_serve.codes import read_codes

pytestmark = pytest.mark.slow


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "vsc_serve", "encode", *(str(one) for one in arguments)]


def encode(*arguments: object, **options: object) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(  # type: ignore[call-overload, no-any-return]
        command(*arguments), capture_output=True, text=True, timeout=120, **options
    )


def done(*arguments: object, **options: object) -> "subprocess.CompletedProcess[str]":
    result = encode(*arguments, **options)
    assert result.returncode == 0, result.stderr
    return result


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory, grey_folder: Path) -> Path:
    """The 200 images under 2,000 names, and one broken file."""
    folder = tmp_path_factory.mktemp("many")
    images = sorted(grey_folder.rglob("*.png"))
    for number in range(2000):
        os.link(images[number % len(images)], folder / f"{number:04}.png")
    (folder / "0777a.png").write_bytes(b"")
    return folder


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, many: Path, tiny_bundle: Path) -> Path:
    """The codes of `many`, encoded without a stop."""
    out = tmp_path_factory.mktemp("whole") / "codes.npz"
    done(many, "--out", out, "--model", tiny_bundle)
    return out


def start_and_wait_for_a_shard(out: Path, *arguments: object) -> "subprocess.Popen[str]":
    """Start a run, and return when its second shard is whole."""
    process = subprocess.Popen(
        command(*arguments, "--out", out),
        stderr=subprocess.PIPE,
        text=True,
        # In the background of a shell Ctrl-C is ignored, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    record = out.with_name(f"{out.name}.parts") / "part-00001.json"
    limit = time.monotonic() + 60
    while not record.exists() and process.poll() is None and time.monotonic() < limit:
        time.sleep(0.001)
    assert process.poll() is None, "the run was over before it could be stopped"
    return process


def children(process_id: int) -> list[int]:
    listed = Path(f"/proc/{process_id}/task/{process_id}/children").read_text()
    return [int(one) for one in listed.split()]


def is_gone(process_id: int) -> bool:
    try:
        return "\nState:\tZ" in Path(f"/proc/{process_id}/status").read_text()
    except OSError:
        return True


def test_kill_9_and_again_gives_the_bytes_of_a_run_without_a_stop(
    many: Path, whole: Path, tiny_bundle: Path, tmp_path: Path
) -> None:
    out = tmp_path / "codes.npz"
    options = ["--model", tiny_bundle, "--shard-rows", 50, "--batch-size", 5]
    process = start_and_wait_for_a_shard(out, many, *options)
    workers = children(process.pid)
    process.kill()
    process.communicate()
    assert not out.exists()
    parts = tmp_path / "codes.npz.parts"
    finished = [int(path.stem[5:]) for path in parts.glob("part-*.json")]
    times = {path.name: path.stat().st_mtime_ns for path in parts.glob("part-*.json")}
    plan = json.loads(encode(many, "--out", out, *options, "--dry-run", "--json").stdout)
    assert plan["done"] >= 50 * len(finished) - 1 >= 99  # the broken one is tried again
    assert times == {path.name: path.stat().st_mtime_ns for path in parts.glob("part-*.json")}
    again = json.loads(done(many, "--out", out, *options, "--json").stdout)
    assert again["resumed"] == plan["done"]
    assert out.read_bytes() == whole.read_bytes()
    errors = (tmp_path / "codes.errors.jsonl").read_bytes()
    assert errors == whole.with_name("codes.errors.jsonl").read_bytes()
    assert not parts.exists()
    assert all(is_gone(worker) for worker in workers), "workers outlived the run"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_ends_with_130_and_says_how_to_go_on(
    many: Path, whole: Path, tiny_bundle: Path, tmp_path: Path, number: int
) -> None:
    out = tmp_path / "codes.npz"
    options = ["--model", tiny_bundle, "--shard-rows", 50, "--batch-size", 5]
    process = start_and_wait_for_a_shard(out, many, *options)
    process.send_signal(number)
    _, talk = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in talk
    last = talk.splitlines()[-1]
    assert re.match(r"vsc: interrupted; \d[\d,]* images are done and kept in .*parts", last)
    assert "run the same command again" in last
    assert not out.exists()
    done(many, "--out", out, *options)
    assert out.read_bytes() == whole.read_bytes()


def test_a_full_disk_is_one_clear_line_and_no_corrupt_file(
    many: Path, whole: Path, tiny_bundle: Path, tmp_path: Path
) -> None:
    out = tmp_path / "codes.npz"
    size = whole.stat().st_size // 2

    def small_files() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

    options = ["--model", tiny_bundle, "--shard-rows", 500]
    result = encode(many, "--out", out, *options, preexec_fn=small_files)
    assert result.returncode == 3, result.stderr
    assert re.search(r"^vsc: .*codes\.npz: cannot be written \(File too", result.stderr, re.M)
    assert "Traceback" not in result.stderr
    assert not out.exists()
    assert not list(tmp_path.glob(".*.tmp"))
    done(many, "--out", out, *options)
    assert out.read_bytes() == whole.read_bytes()


def test_other_inputs_or_options_start_afresh_and_say_so(
    many: Path, tiny_bundle: Path, tmp_path: Path
) -> None:
    out = tmp_path / "codes.npz"
    options = ["--model", tiny_bundle, "--shard-rows", 50, "--batch-size", 5]
    process = start_and_wait_for_a_shard(out, many, *options)
    process.kill()
    process.communicate()
    result = done(many, "--out", out, *options, "--tau", "0.4")
    assert re.search(r"^resume +.*parts discarded: another meta, options", result.stderr, re.M)
    assert read_codes(out).meta["tau"] == 0.4


def test_a_list_on_standard_input_is_encoded_and_missing_files_are_listed(
    grey_folder: Path, tiny_bundle: Path, tmp_path: Path
) -> None:
    names = [str(path) for path in sorted(grey_folder.rglob("*.png"))[:5]]
    out = tmp_path / "x.npz"
    lines = "\n".join([*names, str(grey_folder / "nowhere.png")]) + "\n"
    done("-", "--out", out, "--model", tiny_bundle, input=lines)
    assert read_codes(out).ids == names
    assert "nowhere.png" in (tmp_path / "x.errors.jsonl").read_text()


def test_a_dry_run_says_what_would_be_done_and_writes_nothing(
    grey_folder: Path, tiny_bundle: Path, tmp_path: Path
) -> None:
    out = tmp_path / "codes.npz"
    result = done(grey_folder, "--out", out, "--model", tiny_bundle, "--dry-run", "--workers", 2)
    assert "encode 200 images with 2 processes" in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_on_error_fail_and_strict_end_with_3_and_leave_no_codes(
    many: Path, tiny_bundle: Path, tmp_path: Path
) -> None:
    for option in (["--on-error", "fail"], ["--strict"]):
        out = tmp_path / f"{option[0]}.npz"
        result = encode(many, "--out", out, "--model", tiny_bundle, *option)
        assert result.returncode == 3
        assert not out.exists()
    assert "1 of 2001 inputs cannot be read" in result.stderr


def test_the_summary_says_what_was_made_and_where_the_time_went(
    many: Path, tiny_bundle: Path, tmp_path: Path
) -> None:
    out = tmp_path / "codes.npz"
    options = ["--max-active", 2, "--view", "gamma", "--compress", "--workers", 0]
    talk = done(many, "--out", out, "--model", tiny_bundle, *options).stderr
    for pattern in (
        r"^model +.* bars, J=16, tau 0\.5, weights [0-9a-f]{6}, onnxruntime",
        r"^scan +2,001 files: 2,001 images, 0 passed over",
        r"^encode +2,000 images in .*/s, \d+ threads  \(read \d+% \| decode \d+% \| model \d+%\)",
        r"^codes +2,000 x 16, .* active per image, \d+ empty rows, \d+\.\d% of the energy kept",
        r"^features \d+ live, \d+ dead, \d+ always on; \d+\.\d+% of decisions within 1e-4",
        r"^skipped +1 inputs without a row \(1 .*\): .*codes\.errors\.jsonl",
        r"^wrote +.*codes\.npz +\d+ kB",
        r"^next +vsc ",
    ):
        assert re.search(pattern, talk, re.M), (pattern, talk)
    stored = read_codes(out)
    assert np.diff(stored.codes.indptr).max() == 2
    assert (stored.codes.data > 0.5).all()


def test_parquet_comes_out_whole(grey_folder: Path, tiny_bundle: Path, tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    out = tmp_path / "codes.parquet"
    done(grey_folder, "--out", out, "--model", tiny_bundle, "--shard-rows", 60)
    table = parquet.read_table(out)
    assert table.num_rows == 200
    assert [path.name for path in tmp_path.iterdir()] == ["codes.parquet"]
    wrong = encode(grey_folder, "--out", tmp_path / "codes.csv", "--model", tiny_bundle)
    assert wrong.returncode == 2
    assert "must end in .npz or .parquet" in wrong.stderr
