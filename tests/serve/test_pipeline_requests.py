"""Whole jobs without a command line: updates, shares, folders, arrays."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from vsc_serve.codes import CodeFile, CodeRows, dense_to_csr, join_codes, read_codes
from vsc_serve.console import Progress
from vsc_serve.encoder import Encoder
from vsc_serve.errors import InputError, Interrupted, UsageError
from vsc_serve.executors import ArrayExecutor, ExecutorOptions
from vsc_serve.executors.digests import DigestTable, save_digests
from vsc_serve.options import PLAIN, EncodeOptions
from vsc_serve.pipeline import Job, Outcome, batches, encode_to_file, plan
from vsc_serve.pipeline.shards import ShardStore
from vsc_serve.pipeline.update import PreviousCodes
from vsc_serve.sources import open_arrays


class Silence:
    def update(self, done: int, note: str = "") -> None:
        pass

    def expect(self, total: int) -> None:
        pass


def show(unit: str) -> AbstractContextManager[Progress]:
    return nullcontext(Silence())


@pytest.fixture
def images(images: Path) -> Path:
    """Forty grey 4x4 images, one of them broken."""
    (images / "09.png").write_bytes(b"")
    return images


class Runs:
    """Encodes a folder, in threads."""

    def __init__(self, bundle: Path, images: Path) -> None:
        self.bundle, self.images = bundle, images
        self.said: list[str] = []

    def job(self, out: Path, **fields: Any) -> Job:
        given = {"inputs": [str(self.images)], "shard_rows": 15} | fields
        how = ExecutorOptions(device="cpu", workers=0)
        return Job(out=out, model=self.bundle, executor=how, **given)

    def __call__(self, out: Path, **fields: Any) -> Outcome:
        self.said.clear()
        outcome, _, _ = encode_to_file(
            self.job(out, **fields),
            say=lambda label, text: self.said.append(f"{label}: {text}"),
            show=show,
        )
        return outcome


@pytest.fixture
def run(tiny_bundle: Path, images: Path) -> Runs:
    return Runs(tiny_bundle, images)


def change(folder: Path) -> None:
    """Remove, rename, change and add an image."""
    (folder / "03.png").unlink()
    (folder / "07.png").rename(folder / "moved.png")
    Image.fromarray(np.full((4, 4), 77, np.uint8)).save(folder / "11.png")
    Image.fromarray(np.full((4, 4), 78, np.uint8)).save(folder / "20a.png")


@pytest.mark.parametrize("name", ["codes.npz", "codes"])
def test_update_encodes_only_new_and_changed_files_and_drops_what_is_gone(
    run: Runs, tmp_path: Path, name: str
) -> None:
    out, fresh = tmp_path / name, tmp_path / f"fresh-{name}"
    options = {"is_update": True}
    first = run(out, **options)
    assert (first.statistics.images, first.statistics.fresh) == (39, 39)
    assert run.said[-1].endswith("is not there yet")
    second = run(out, **options)
    assert (second.statistics.images, second.statistics.fresh, second.rejected) == (39, 0, 1)
    change(run.images)
    third = run(out, **options)
    assert (third.statistics.images, third.statistics.fresh) == (39, 2)
    run(fresh, **options)
    if out.is_dir():
        for path in fresh.iterdir():
            assert (out / path.name).read_bytes() == path.read_bytes(), path.name
    else:
        assert out.read_bytes() == fresh.read_bytes()
    plain = tmp_path / "plain.npz"
    run(plain)
    assert (read_codes(plain).codes != read_codes(out).codes).nnz == 0


def test_old_and_fresh_rows_come_in_their_order_with_what_belongs_to_them() -> None:
    dense = np.random.default_rng(0).normal(size=(9, 5)).astype(np.float32)
    dense[np.random.default_rng(1).random(dense.shape) < 0.6] = 0.0

    def rows(chosen: list[int]) -> CodeRows:
        codes = dense_to_csr(dense[chosen])
        return CodeRows(codes=codes, gamma=codes.data * 2, sigma=codes.data * 3)

    old_rows, fresh = [0, 1, 2, 3, 4], [5, 6, 7, 8]
    stored = rows(old_rows)
    old = PreviousCodes(CodeFile(stored.codes, [], {}, stored.gamma, stored.sigma, []))
    merged = old.merge(rows(fresh), [4, -1, -1, 0, 0, -1, 2, -1])
    expected = dense[[4, 5, 6, 0, 0, 7, 2, 8]]
    np.testing.assert_array_equal(merged.codes.toarray(), expected)
    np.testing.assert_array_equal(merged.gamma, expected[expected != 0] * 2)
    np.testing.assert_array_equal(merged.sigma, expected[expected != 0] * 3)


def test_a_digest_is_found_among_others_that_begin_alike(tmp_path: Path) -> None:
    digests = ["00" * 8 + f"{number:02x}" * 24 for number in range(9)] + ["ff" * 32]
    save_digests(tmp_path / "known.npy", digests)
    known = DigestTable.load(tmp_path / "known.npy")
    assert [known.row_of(bytes.fromhex(digest)) for digest in digests] == list(range(10))
    assert known.row_of(b"\x00" * 31 + b"\x01") == -1
    assert known.row_of(b"\x77" * 32) == -1


def test_update_encodes_everything_when_the_old_codes_cannot_serve(
    run: Runs, tmp_path: Path
) -> None:
    out = tmp_path / "codes.npz"
    run(out)
    outcome = run(out, is_update=True)
    assert outcome.statistics.fresh == 39
    assert "was made without `is_update`" in run.said[-1]
    outcome = run(out, is_update=True, options=EncodeOptions(tau=0.3))
    assert outcome.statistics.fresh == 39
    assert "has another tau: 0.5" in run.said[-1]


def test_shares_of_several_machines_joined_are_the_whole(run: Runs, tmp_path: Path) -> None:
    whole = tmp_path / "whole.npz"
    run(whole)
    outs = [tmp_path / f"{number}.npz" for number in (1, 2, 3)]
    for number, out in enumerate(outs, 1):
        run(out, share=(number, 3))
    assert [len(read_codes(out).ids) for out in outs] == [12, 13, 14]
    join_codes(outs, tmp_path / "all.npz", read_codes(whole).meta)
    assert (tmp_path / "all.npz").read_bytes() == whole.read_bytes()
    with pytest.raises(UsageError, match="`share=1/99`: 40 inputs leave nothing for this share"):
        run(tmp_path / "none.npz", share=(1, 99))


def test_a_folder_as_output_keeps_the_shards(run: Runs, tmp_path: Path) -> None:
    out, whole = tmp_path / "codes", tmp_path / "whole.npz"
    run(out)
    run(whole)
    names = ["errors.jsonl", "manifest.json", *(f"part-0000{number}.npz" for number in range(3))]
    assert sorted(path.name for path in out.iterdir()) == names
    stored, expected = read_codes(out), read_codes(whole)
    assert stored.ids == expected.ids
    assert stored.codes.toarray().tobytes() == expected.codes.toarray().tobytes()


def test_the_size_of_shards_does_not_change_the_bytes(run: Runs, tmp_path: Path) -> None:
    for rows in (7, 1000):
        run(tmp_path / f"{rows}.npz", shard_rows=rows, batch_size=3)
    files = {(tmp_path / f"{rows}.npz").read_bytes() for rows in (7, 1000)}
    assert len(files) == 1


def test_an_array_goes_the_same_way_as_its_images(run: Runs, tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (37, 4, 4), np.uint8)
    np.save(tmp_path / "images.npy", pixels)
    run(tmp_path / "codes.npz", inputs=[str(tmp_path / "images.npy")], shard_rows=10)
    stored = read_codes(tmp_path / "codes.npz")
    assert stored.ids == [str(number) for number in range(37)]
    expected = Encoder.open(run.bundle, device="cpu").encode(pixels[..., None])
    assert stored.codes.toarray().tobytes() == expected.toarray().tobytes()


@pytest.fixture
def images_npy(tmp_path: Path) -> Path:
    pixels = np.random.default_rng(0).integers(0, 256, (37, 4, 4), np.uint8)
    np.save(tmp_path / "images.npy", pixels)
    return tmp_path / "images.npy"


def test_shares_of_an_array_joined_are_the_whole(
    run: Runs, images_npy: Path, tmp_path: Path
) -> None:
    whole = tmp_path / "whole.npz"
    run(whole, inputs=[str(images_npy)])
    outs = [tmp_path / f"{number}.npz" for number in (1, 2, 3)]
    for number, out in enumerate(outs, 1):
        run(out, inputs=[str(images_npy)], share=(number, 3))
    join_codes(outs, tmp_path / "all.npz", read_codes(whole).meta)
    assert (tmp_path / "all.npz").read_bytes() == whole.read_bytes()


def test_an_array_resumes_at_the_row_where_it_stopped(
    run: Runs, images_npy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, out = tmp_path / "whole.npz", tmp_path / "codes.npz"
    fields: dict[str, Any] = {"inputs": [str(images_npy)], "shard_rows": 10, "batch_size": 5}
    run(whole, **fields)
    real, left = Encoder.encode_counted, 7 + 1  # the probe of the bundle is the first

    def stop_late(self: Encoder, rows: Any, options: EncodeOptions) -> Any:
        nonlocal left
        left -= 1
        if not left:
            raise KeyboardInterrupt
        return real(self, rows, options)

    monkeypatch.setattr(Encoder, "encode_counted", stop_late)
    with pytest.raises(Interrupted, match="20 images are done"):
        run(out, **fields)
    monkeypatch.undo()
    assert run(out, **fields).resumed == 20
    assert out.read_bytes() == whole.read_bytes()


@pytest.mark.parametrize("kind", [np.float16, np.float32, np.float64])
def test_a_vector_that_is_not_finite_costs_its_row_and_no_other(
    vector_encoder: Encoder, tmp_path: Path, kind: type
) -> None:
    vectors = np.random.default_rng(0).normal(size=(50, 64)).astype(kind)
    vectors[[3, 20, 49], [0, 5, 63]] = [np.nan, np.inf, -np.inf]
    np.save(tmp_path / "vectors.npy", vectors)
    arrays = open_arrays([str(tmp_path / "vectors.npy")])
    with ArrayExecutor(vector_encoder, arrays, PLAIN) as executor:
        found = list(batches(executor, arrays.sources(), 16))
    rejected = [one for batch in found for one in batch.rejected]
    reason = "holds values that are not finite (NaN or infinity)"
    assert rejected == [(name, reason) for name in ("3", "20", "49")]
    ids = [int(name) for batch in found for name in batch.ids]
    assert ids == [number for number in range(50) if number not in (3, 20, 49)]
    codes = np.concatenate([batch.rows.codes.toarray() for batch in found])
    expected = vector_encoder.encode(vectors[ids].astype(np.float32))
    np.testing.assert_array_equal(codes, expected.toarray())


def test_a_number_that_float32_cannot_hold_is_not_finite(
    vector_encoder: Encoder, tmp_path: Path
) -> None:
    vectors = np.zeros((2, 64))
    vectors[1, 7] = 1e200
    np.savez(tmp_path / "vectors.npz", vectors=vectors, ids=["a", "b"])
    arrays = open_arrays([str(tmp_path / "vectors.npz")])
    (batch,) = batches(ArrayExecutor(vector_encoder, arrays, PLAIN), arrays.sources(), None)
    assert [name for name, _ in batch.rejected] == ["b"]


def test_a_folder_of_arrays_is_encoded_as_one(run: Runs, images_npy: Path, tmp_path: Path) -> None:
    pixels = np.load(images_npy)
    folder = tmp_path / "arrays"
    folder.mkdir()
    for name, rows in (("a", pixels[:10]), ("b", pixels[10:])):
        np.save(folder / f"{name}.npy", rows)
    run(tmp_path / "whole.npz", inputs=[str(images_npy)])
    run(tmp_path / "parts.npz", inputs=[str(folder)], shard_rows=7, batch_size=4)
    whole, parts = (read_codes(tmp_path / f"{name}.npz") for name in ("whole", "parts"))
    assert parts.codes.toarray().tobytes() == whole.codes.toarray().tobytes()
    assert parts.ids == [f"a.npy/{row}" for row in range(10)] + [
        f"b.npy/{row}" for row in range(27)
    ]


def test_another_run_that_finished_first_is_not_overwritten(
    run: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "codes.npz"
    real = ShardStore.locked

    @contextmanager
    def locked(self: ShardStore) -> Iterator[None]:
        out.write_bytes(b"the other run's")  # between the first check and the lock
        with real(self):
            yield

    monkeypatch.setattr(ShardStore, "locked", locked)
    with pytest.raises(UsageError, match="exists already"):
        run(out)
    assert out.read_bytes() == b"the other run's"


def test_an_input_is_never_the_output(run: Runs, tmp_path: Path) -> None:
    before = sorted(path.name for path in run.images.iterdir())
    for out in (run.images, run.bundle):
        with pytest.raises(UsageError, match=r"holds the input|not a folder of codes"):
            run(out, force=True)
    assert sorted(path.name for path in run.images.iterdir()) == before


def test_a_neighbour_that_is_no_list_of_ours_is_kept(run: Runs, tmp_path: Path) -> None:
    (tmp_path / "codes.errors.jsonl").write_text("my own notes")
    with pytest.raises(UsageError, match=r"codes\.errors\.jsonl: not a list of inputs"):
        run(tmp_path / "codes.npz")
    assert (tmp_path / "codes.errors.jsonl").read_text() == "my own notes"
    (tmp_path / "codes.errors.jsonl").unlink()
    (tmp_path / "codes.npz.parts").mkdir()
    (tmp_path / "codes.npz.parts" / "part-00000.npz").write_text("mine")
    with pytest.raises(UsageError, match="is not the shards of an unfinished run"):
        run(tmp_path / "codes.npz")
    assert (tmp_path / "codes.npz.parts" / "part-00000.npz").read_text() == "mine"


def test_nothing_stays_of_a_run_without_a_row_but_the_reasons(run: Runs, tmp_path: Path) -> None:
    empty = tmp_path / "broken"
    empty.mkdir()
    (empty / "a.png").write_bytes(b"")
    out = tmp_path / "out" / "codes.npz"
    with pytest.raises(InputError, match=r"No codes were written. All reasons are in .*errors"):
        run(out, inputs=[str(empty)])
    assert [path.name for path in out.parent.iterdir()] == ["codes.errors.jsonl"]


def test_an_output_of_unknown_kind_is_refused(run: Runs, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"must end in \.npz or \.parquet, or be a folder"):
        run.job(tmp_path / "codes.csv")
    with pytest.raises(UsageError, match="`is_update` works on"):
        run.job(tmp_path / "codes.parquet", is_update=True)


def test_a_plan_counts_and_writes_nothing(run: Runs, tmp_path: Path) -> None:
    (run.images / "notes.txt").write_text("x")
    out = tmp_path / "codes.npz"
    scan, finished, _ = plan(run.job(out))
    assert (scan.sources, sum(scan.skipped.values()), finished) == (40, 1, 0)
    assert not out.exists()
    assert not (tmp_path / "codes.npz.parts").exists()


def test_strict_writes_the_list_and_no_codes(run: Runs, tmp_path: Path) -> None:
    out = tmp_path / "codes.npz"
    with pytest.raises(InputError, match="`is_strict`: 1 of 40 inputs cannot be read"):
        run(out, is_strict=True)
    assert not out.exists()
    assert "09.png" in (tmp_path / "codes.errors.jsonl").read_text()


def test_zero_images_is_an_error_that_says_what_was_looked_for(run: Runs, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "a.txt").write_text("x")
    with pytest.raises(UsageError, match=r"no image found.*\.jpeg"):
        run(tmp_path / "codes.npz", inputs=[str(empty)])
    assert not (tmp_path / "codes.npz.parts").exists()
