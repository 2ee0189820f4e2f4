"""The command line as its user types it: results, exit codes, and errors in one line."""

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import scipy.sparse
from PIL import Image

from vsc_serve import read_codes, write_codes
from vsc_serve.encoder import Encoder
from vsc_serve.images import PixelSpec, read_pixels


def vsc(*arguments: object, cwd: Path | None = None, env: dict[str, str] | None = None) -> "Result":
    command = [sys.executable, "-m", "vsc_serve", *(str(argument) for argument in arguments)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=env, check=False)
    return Result(done.returncode, done.stdout, done.stderr)


class Result:
    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err


def assert_fails(result: Result, code: int, *patterns: str) -> None:
    """The exit code, one line, no traceback, and what the line says."""
    assert result.code == code, result.err
    lines = [line for line in result.err.splitlines() if line.startswith("vsc: ")]
    assert len(lines) == 1, result.err
    assert "Traceback" not in result.err
    for pattern in patterns:
        assert re.search(pattern, lines[0]), lines[0]


@pytest.fixture(scope="module")
def codes_file(
    tmp_path_factory: pytest.TempPathFactory, grey_folder: Path, tiny_bundle: Path
) -> Path:
    out = tmp_path_factory.mktemp("codes") / "codes.npz"
    result = vsc("encode", grey_folder, "--out", out, "--model", tiny_bundle)
    assert result.code == 0, result.err
    return out


def test_encode_writes_what_the_encoder_gives_and_plain_scipy_reads_it(
    codes_file: Path, grey_folder: Path, tiny_bundle: Path
) -> None:
    matrix = scipy.sparse.load_npz(codes_file)
    stored = read_codes(codes_file)
    paths = [grey_folder / identity for identity in stored.ids]
    expected = Encoder.open(tiny_bundle, device="cpu").encode(paths)
    assert matrix.toarray().tobytes() == expected.toarray().tobytes()
    assert stored.ids == sorted(path.relative_to(grey_folder).as_posix() for path in paths)
    assert stored.meta["model"] == "bars"
    assert stored.meta["tau"] == 0.5


def test_encode_twice_gives_the_same_bytes(
    codes_file: Path, grey_folder: Path, tiny_bundle: Path, tmp_path: Path
) -> None:
    again = tmp_path / "other name.npz"
    assert vsc("encode", grey_folder, "--out", again, "--model", tiny_bundle).code == 0
    assert again.read_bytes() == codes_file.read_bytes()


def test_encode_talks_on_stderr_and_prints_json_when_asked(
    grey_folder: Path, tiny_bundle: Path, tmp_path: Path
) -> None:
    plain = vsc("encode", grey_folder, "--out", tmp_path / "a.npz", "--model", tiny_bundle)
    assert plain.out == ""
    for word in ("model", "encode", "codes", "wrote", "next"):
        assert re.search(rf"^{word} ", plain.err, re.M), plain.err
    result = vsc(
        "encode", grey_folder, "--out", tmp_path / "b.npz", "--model", tiny_bundle, "--json"
    )
    figures = json.loads(result.out)
    assert figures["images"] == 200
    assert figures["errors"] == 0
    assert figures["active"] == pytest.approx(read_codes(tmp_path / "b.npz").codes.nnz / 200)


def test_encode_goes_past_broken_files_lists_them_and_counts_them(
    grey_folder: Path, tiny_bundle: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "images"
    shutil.copytree(grey_folder, folder)
    (folder / "level" / "text.jpg").write_text("hello, I am text")
    Image.new("RGB", (64, 64), "red").save(tmp_path / "whole.jpg")
    (folder / "cut.jpg").write_bytes((tmp_path / "whole.jpg").read_bytes()[:400])
    (folder / "gone.png").symlink_to(tmp_path / "nowhere.png")
    out = tmp_path / "codes.npz"
    result = vsc("encode", folder, "--out", out, "--model", tiny_bundle)
    assert result.code == 0, result.err
    assert "skipped  3 inputs without a row" in result.err
    lines = [
        json.loads(line) for line in (tmp_path / "codes.errors.jsonl").read_text().splitlines()
    ]
    assert {line["id"] for line in lines} == {"level/text.jpg", "cut.jpg", "gone.png"}
    assert read_codes(out).codes.shape[0] == 200
    strict = tmp_path / "strict.npz"
    assert_fails(
        vsc("encode", folder, "--out", strict, "--model", tiny_bundle, "--strict"),
        3,
        "3 of 203 inputs cannot be read",
    )
    assert not strict.exists()


@pytest.mark.parametrize(
    ("make", "code", "pattern"),
    [
        (lambda folder: None, 2, "no image found. Looked for files ending in"),
        (lambda folder: (folder / "notes.txt").write_text("x"), 2, "no image found"),
        (lambda folder: (folder / "a.jpg").write_text("x"), 3, "a.jpg: not an image"),
        (lambda folder: folder.rmdir(), 2, "no such file or folder"),
    ],
    ids=["empty folder", "no images", "only broken", "missing"],
)
def test_encode_without_usable_input_says_what_was_looked_for(
    tmp_path: Path, tiny_bundle: Path, make: object, code: int, pattern: str
) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    make(folder)  # type: ignore[operator]
    out = tmp_path / "codes.npz"
    assert_fails(vsc("encode", folder, "--out", out, "--model", tiny_bundle), code, pattern)
    assert not out.exists()


def test_an_out_that_exists_is_kept_unless_forced(
    grey_folder: Path, tiny_bundle: Path, tmp_path: Path
) -> None:
    out = tmp_path / "codes.npz"
    out.write_text("precious")
    result = vsc("encode", grey_folder, "--out", out, "--model", tiny_bundle)
    assert_fails(result, 2, "exists already.*--force")
    result = vsc("encode", grey_folder, "--out", out, "--model", tiny_bundle, "--force")
    assert_fails(result, 2, "not a file of codes.*nothing was deleted")
    assert out.read_text() == "precious"
    out.unlink()
    assert vsc("encode", grey_folder, "--out", out, "--model", tiny_bundle).code == 0
    assert vsc("encode", grey_folder, "--out", out, "--model", tiny_bundle, "--force").code == 0
    assert read_codes(out).codes.shape[0] == 200


def test_a_missing_model_and_a_changed_byte_end_with_4(
    grey_folder: Path, tiny_bundle: Path, tmp_path: Path
) -> None:
    out = tmp_path / "codes.npz"
    missing = vsc("encode", grey_folder, "--out", out, "--model", tmp_path / "none")
    assert_fails(missing, 4, "no model bundle there")
    copy = tmp_path / "model"
    shutil.copytree(tiny_bundle, copy)
    content = bytearray((copy / "weights.bin").read_bytes())
    content[100] ^= 1
    (copy / "weights.bin").write_bytes(content)
    changed = vsc("encode", grey_folder, "--out", out, "--model", copy)
    assert_fails(changed, 4, "weights.bin: changed since it was exported")
    assert not out.exists()


def test_the_model_is_found_in_the_environment_and_in_the_folder(
    grey_folder: Path, tiny_bundle: Path, tmp_path: Path
) -> None:
    import os

    named = dict(os.environ) | {"VSC_MODEL": str(tiny_bundle)}
    first = vsc("encode", grey_folder, "--out", tmp_path / "a.npz", cwd=tmp_path, env=named)
    assert first.code == 0
    assert str(tiny_bundle) in first.err
    shutil.copytree(tiny_bundle, tmp_path / "model")
    second = vsc("encode", grey_folder, "--out", tmp_path / "b.npz", cwd=tmp_path)
    assert second.code == 0
    assert re.search(r"^model +model ", second.err, re.M)


def test_without_a_model_the_built_in_one_is_used_and_named(
    grey_folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "codes.npz"
    result = vsc("encode", grey_folder, "--out", out, cwd=tmp_path)
    assert result.code == 0, result.err
    assert re.search(r"^model .*photos32", result.err, re.M)
    stored = read_codes(out)
    assert stored.meta["model"] == "photos32"
    assert stored.codes.shape == (200, 256)


def test_cuda_that_is_not_there_ends_with_5(
    grey_folder: Path, tiny_bundle: Path, tmp_path: Path
) -> None:
    from vsc_serve.session import cuda_is_there

    if cuda_is_there():
        pytest.skip("this machine has CUDA")
    out = tmp_path / "codes.npz"
    result = vsc("encode", grey_folder, "--out", out, "--model", tiny_bundle, "--device", "cuda")
    assert_fails(result, 5, "--device cuda")
    assert not out.exists()


def test_wrong_arguments_end_with_2(tiny_bundle: Path, grey_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "x"
    assert_fails(vsc("encode"), 2, "Missing argument")
    assert_fails(vsc("wash"), 2, "No such command")
    assert_fails(vsc("encode", grey_folder, "--out", out, "--taw", "1"), 2, "No such option")
    bad_tau = vsc("encode", grey_folder, "--out", out, "--model", tiny_bundle, "--tau", "7")
    assert_fails(bad_tau, 2, "tau must be above 0 and below 1")
    bad_device = vsc("encode", grey_folder, "--out", out, "--model", tiny_bundle, "--device", "tpu")
    assert_fails(bad_device, 2, "'--device': .*'tpu' is not one of 'auto', 'cpu', 'cuda'")
    unknown = vsc("train", grey_folder, "--out", out, "--set", "latents=3")
    assert_fails(unknown, 2, "no field 'latents'. Did you mean latent_dim")
    half = vsc("train", grey_folder, "--out", out, "--set", "alpha")
    assert_fails(half, 2, "--set alpha: expected key=value")
    absent = vsc("train", grey_folder, "--out", out, "--backbone", tmp_path / "no.onnx")
    assert_fails(absent, 2, "--backbone .*no.onnx: no such file")
    none = vsc("train", grey_folder, "--out", out, "--set", "batch_size=4000", "--threads", 1)
    assert_fails(none, 2, r"fewer than a batch of 4000: add examples, or --set batch_size=\d+")
    assert not out.exists()


def test_search_finds_the_image_itself_first_and_explains(
    codes_file: Path, grey_folder: Path, tiny_bundle: Path
) -> None:
    image = grey_folder / "upright" / "000.png"
    command = ["search", codes_file, "--like", image, "--model", tiny_bundle, "--top", 3]
    wide = vsc(*command)
    assert re.match(r"query    wide: sqrt\(gamma\) mu where gamma > 0.1 \(rows: mu where", wide.err)
    result = vsc(*command, "--explain", "--query", "symmetric")
    assert result.code == 0, result.err
    assert result.err == "query    symmetric: as the rows were made, tau 0.5\n"
    first, *rest = result.out.splitlines()
    assert re.fullmatch(r" 1\.0000  upright/000\.png", first)
    assert any("feature" in line for line in rest)
    as_json = vsc(
        "search",
        codes_file,
        "--like",
        "upright/000.png",
        "--with-query",
        "--explain",
        "--json",
        "--top",
        2,
    )
    hits = json.loads(as_json.out)["hits"]
    assert hits[0]["id"] == "upright/000.png"
    assert sum(part["score"] for part in hits[1]["shared"]) == pytest.approx(hits[1]["score"])


@pytest.mark.parametrize("out", ["my codes.npz", "shards", "codes.parquet"])
@pytest.mark.parametrize("is_named", [True, False])
def test_the_next_command_works_as_it_is_printed(
    out: str, is_named: bool, tiny_bundle: Path, tmp_path: Path
) -> None:
    if out.endswith(".parquet"):
        pytest.importorskip("pyarrow")
    images = tmp_path / "the images"
    images.mkdir()
    for name, size in (("-a b'.png", 20), ("c\n.png", 30)):
        Image.fromarray(np.tile(np.arange(size, dtype=np.uint8) * 7, (size, 1))).save(images / name)
    model = shutil.copytree(tiny_bundle, tmp_path / ("it's mine" if is_named else "model"))
    given = ["--model", model.name] if is_named else []
    encoded = vsc("encode", images.name, "--out", out, *given, cwd=tmp_path)
    assert encoded.code == 0, encoded.err
    (line,) = re.findall(r"^next +(.*)$", encoded.err, re.M)
    program, *arguments = shlex.split(line)
    prefix = {"vsc": [sys.executable, "-m", "vsc_serve"], "python": [sys.executable]}[program]
    done = subprocess.run([*prefix, *arguments], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    # The query is the first image, and is left out of its own hits.
    assert r"c\n.png" in done.stdout or out.endswith(".parquet")
    assert done.stdout


@pytest.mark.parametrize("workers", [0, 1])
def test_what_pillow_warns_of_an_image_it_reads_is_not_printed(
    workers: int, tiny_bundle: Path, tmp_path: Path
) -> None:
    images = tmp_path / "images"
    images.mkdir()
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(images / "a.tif")
    content = bytearray((images / "a.tif").read_bytes())
    start = int.from_bytes(content[4:8], "little") + 2
    for place in range(
        start, start + 12 * int.from_bytes(content[start - 2 : start], "little"), 12
    ):
        if int.from_bytes(content[place : place + 2], "little") == 278:  # rows of a strip
            content[place + 4 : place + 8] = (2000).to_bytes(4, "little")
    (images / "a.tif").write_bytes(content)
    with pytest.warns(UserWarning, match="Tag data larger than file"):
        read_pixels(bytes(content), PixelSpec(height=8, width=8, channels=1))
    command = ["encode", images, "--out", tmp_path / "c.npz", "--model", tiny_bundle]
    result = vsc(*command, "--workers", workers)
    assert result.code == 0, result.err
    assert "Warning" not in result.err


def test_a_query_whose_code_is_empty_says_so(codes_file: Path, tmp_path: Path) -> None:
    stored = read_codes(codes_file)
    empty = scipy.sparse.csr_array((1, stored.codes.shape[1]), dtype=np.float32)
    both = scipy.sparse.vstack([empty, stored.codes[:5]], format="csr")
    path = tmp_path / "codes.npz"
    write_codes(path, both, ["blank", *stored.ids[:5]], stored.meta)
    found = vsc("search", path, "--like", "blank", "--explain")
    assert found.code == 0
    assert found.out == ""
    assert re.search(r"^query +the code of blank is empty: no latent is active", found.err, re.M)
    as_json = json.loads(vsc("search", path, "--like", "blank", "--json").out)
    facts = {"like": "blank", "metric": "cosine", "query": "symmetric", "rerank": "none"}
    assert as_json == facts | {"query_active": 0, "hits": []}
    full = json.loads(vsc("search", path, "--like", stored.ids[0], "--json", "--with-query").out)
    assert full["query_active"] == stored.codes[[0]].nnz
    assert full["hits"]


def test_search_mostly_finds_images_of_the_same_kind(codes_file: Path) -> None:
    stored = read_codes(codes_file)
    right = 0
    for identity in stored.ids[:20] + stored.ids[-20:]:
        result = vsc_search_in_process(codes_file, identity)
        right += sum(hit.split("/")[0] == identity.split("/")[0] for hit in result[1:6])
    assert right / (40 * 5) > 0.8


def vsc_search_in_process(codes_file: Path, identity: str) -> list[str]:
    from vsc_serve.index.exact import search

    stored = read_codes(codes_file)
    row = stored.ids.index(identity)
    return [stored.ids[hit.row] for hit in search(stored.codes, stored.codes[[row]], top=6)]


def test_codes_of_another_model_are_refused(
    codes_file: Path, tiny_run: Path, tmp_path: Path, grey_folder: Path
) -> None:
    other = tmp_path / "other"
    assert vsc("export", tiny_run, "--out", other, "--tau", "0.3", "--name", "other").code == 0
    result = vsc(
        "search", codes_file, "--like", grey_folder / "level" / "001.png", "--model", other
    )
    assert_fails(result, 2, "Codes of two models cannot be compared")


def test_decode_writes_reconstructions_and_a_sheet(
    codes_file: Path, grey_folder: Path, tiny_bundle: Path, tmp_path: Path
) -> None:
    arguments = ["decode", codes_file, "--model", tiny_bundle, "--rows", "0:5"]
    result = vsc(
        *arguments,
        "--out",
        tmp_path / "drawn",
        "--sheet",
        tmp_path / "s.png",
        "--images",
        grey_folder,
    )
    assert result.code == 0, result.err
    drawn = sorted((tmp_path / "drawn").rglob("*.png"))
    ids = read_codes(codes_file).ids[:5]
    assert [path.relative_to(tmp_path / "drawn").as_posix() for path in drawn] == [
        f"{i}.png" for i in ids
    ]
    original = np.asarray(Image.open(grey_folder / ids[0]), np.float64)
    assert np.abs(np.asarray(Image.open(drawn[0]), np.float64) - original).mean() < 40
    with Image.open(tmp_path / "s.png") as sheet:
        assert sheet.size[0] > 300
    assert_fails(vsc("decode", codes_file, "--model", tiny_bundle), 2, "nothing to do")
    assert_fails(vsc(*arguments, "--out", tmp_path / "drawn"), 2, "exists already")
    bad_rows = vsc(
        "decode", codes_file, "--model", tiny_bundle, "--rows", "900:", "--out", tmp_path / "z"
    )
    assert_fails(bad_rows, 2, "no such rows; there are 200")


@pytest.mark.slow
def test_embeddings_go_the_same_way_as_images(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    centers = 4 * rng.normal(size=(5, 12))
    kinds = rng.integers(0, 5, 400)
    vectors = (centers[kinds] + 0.3 * rng.normal(size=(400, 12))).astype(np.float32)
    np.save(tmp_path / "embeddings.npy", vectors)
    fields = ["latent_dim=24", "hidden=32", "pseudo_inputs=8", "batch_size=32", "steps=800"]
    sets = [
        part
        for field in [*fields, "alpha=0.2", "beta=0.1", "learning_rate=0.005"]
        for part in ("--set", field)
    ]
    trained = vsc("train", "embeddings.npy", "--out", "run", *sets, "--threads", 1, cwd=tmp_path)
    assert trained.code == 0, trained.err
    assert vsc("export", "run", "--out", "model", cwd=tmp_path).code == 0
    encoded = vsc("encode", "embeddings.npy", "--out", "codes.npz", cwd=tmp_path)
    assert encoded.code == 0, encoded.err
    stored = read_codes(tmp_path / "codes.npz")
    assert stored.ids == [str(number) for number in range(400)]
    row = int(np.diff(stored.codes.indptr).argmax())
    found = vsc(
        "search", "codes.npz", "--like", row, "--top", 10, "--json", "--with-query", cwd=tmp_path
    )
    hits = [int(hit["id"]) for hit in json.loads(found.out)["hits"]]
    assert hits[0] == row
    assert (kinds[hits] == kinds[row]).mean() > 0.8
    np.savez(tmp_path / "named.npz", vectors=vectors[:3], ids=["a", "b", "ü"])
    assert vsc("encode", "named.npz", "--out", "named-codes.npz", cwd=tmp_path).code == 0
    assert read_codes(tmp_path / "named-codes.npz").ids == ["a", "b", "ü"]
    np.save(tmp_path / "wide.npy", vectors[:, :5])
    wrong = vsc("encode", "wide.npy", "--out", "x.npz", cwd=tmp_path)
    assert_fails(wrong, 3, r"takes float32 of shape \(rows, 12\)")
    both = vsc("encode", "wide.npy", "embeddings.npy", "--out", "x.npz", cwd=tmp_path)
    assert_fails(both, 3, "encode them one after the other")
    assert not (tmp_path / "x.npz").exists()


def test_info_knows_runs_bundles_and_codes(
    codes_file: Path, tiny_run: Path, tiny_bundle: Path, tmp_path: Path
) -> None:
    kinds = {tiny_run: "training run", tiny_bundle: "model bundle", codes_file: "sparse codes"}
    for path, kind in kinds.items():
        assert kind in vsc("info", path).out
        assert kind in json.loads(vsc("info", path, "--json").out)["kind"]
    assert_fails(vsc("info", tmp_path), 2, "neither a run")
    (tmp_path / "x.npz").write_text("x")
    assert_fails(vsc("info", tmp_path / "x.npz"), 3, "not a readable npz")


def test_doctor_says_what_is_installed() -> None:
    result = vsc("doctor", "--json")
    findings = {finding["name"]: finding for finding in json.loads(result.out)}
    assert findings["vsc-serve"]["mark"] == "ok"
    assert findings["engine"]["mark"] == "ok"
    assert {"cuda", "train", "export", "serve", "heif", "urls"} <= set(findings)
    assert findings["built-in model"]["text"].startswith("photos32, J=256; own data: 10000 held")


def test_train_then_export_then_encode_as_typed(grey_folder: Path, tmp_path: Path) -> None:
    fields = ["latent_dim=16", "hidden=64", "pseudo_inputs=4", "batch_size=32", "steps=300"]
    sets = [part for field in [*fields, "learning_rate=0.005"] for part in ("--set", field)]
    trained = vsc(
        "train", grey_folder, "--out", "run", "--active", "3.2", *sets, "--threads", 1, cwd=tmp_path
    )
    assert trained.code == 0, trained.err
    assert re.search(r"^model +VSC mlp, J=16", trained.err, re.M)
    assert "asked    3.2 active per image" in trained.err
    assert_fails(vsc("train", grey_folder, "--out", "run", cwd=tmp_path), 2, "exists already")
    exported = vsc("export", "run", "--out", "model", cwd=tmp_path)
    assert exported.code == 0, exported.err
    assert "0 spikes flipped outside the band" in exported.err
    assert_fails(vsc("export", "run", "--out", "model", cwd=tmp_path), 2, "exists already")
    assert vsc("encode", grey_folder, "--out", "codes.npz", cwd=tmp_path).code == 0


def test_version_and_help_end_with_0() -> None:
    assert vsc("--version").out.startswith("vsc-serve ")
    for command in (
        "encode",
        "decode",
        "search",
        "info",
        "serve",
        "doctor",
        "train",
        "export",
        "demo",
    ):
        result = vsc(command, "--help")
        assert result.code == 0
        assert len(result.out.splitlines()) <= 40
