"""Shards: whole or not there, and only for the run they belong to."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vsc_serve.codes import CodeFile, Codes, dense_to_csr, join_codes, read_codes, write_codes
from vsc_serve.errors import InputError, UsageError
from vsc_serve.pipeline.shards import Fingerprint, RejectedSource, ShardRecord, ShardStore

META = {"model": "m", "model_digest": "0", "tau": 0.5, "view": "mean"}


def rows(count: int, seed: int = 0) -> Codes:
    rng = np.random.default_rng(seed)
    dense = np.where(rng.random((count, 7)) < 0.3, rng.normal(size=(count, 7)), 0.0)
    return dense_to_csr(dense.astype(np.float32))


def write(parts: ShardStore, number: int, count: int) -> ShardRecord:
    ids = [f"{number}/{row}" for row in range(count)]
    facts: dict[str, Any] = {"sources": count + 1, "fingerprint": "f", "statistics": {}}
    rejected = [RejectedSource(count, f"{number}/x", "broken: y", "broken")]
    return parts.write(number, CodeFile(rows(count, number), ids, META), rejected=rejected, **facts)


@pytest.fixture
def parts(tmp_path: Path) -> Iterator[ShardStore]:
    found = ShardStore(tmp_path / "codes.npz")
    with found.locked():
        found.begin({"model": "m", "shard_rows": 5})
        yield found


def test_parts_lie_beside_the_output(parts: ShardStore, tmp_path: Path) -> None:
    assert parts.folder == tmp_path / "codes.npz.parts"
    assert parts.folder.is_dir()


def test_a_shard_is_there_when_its_record_is(parts: ShardStore) -> None:
    assert parts.record(0) is None
    record = write(parts, 0, 3)
    assert parts.record(0) == record
    assert (record.rows, record.sources) == (3, 4)
    assert record.rejected == [RejectedSource(3, "0/x", "broken: y", "broken")]
    (parts.folder / "part-00000.npz").unlink()
    assert parts.record(0) is None


def test_a_shard_without_a_record_does_not_count(parts: ShardStore) -> None:
    write(parts, 0, 3)
    (parts.folder / "part-00000.json").unlink()
    assert parts.record(0) is None


@pytest.mark.parametrize("content", ["", "{", "[]", "\udcff"])
def test_a_damaged_record_does_not_count(parts: ShardStore, content: str) -> None:
    write(parts, 0, 3)
    path = parts.folder / "part-00000.json"
    path.write_bytes(content.encode("utf-8", "surrogateescape"))
    assert parts.record(0) is None


def test_a_shard_that_cannot_be_written_leaves_neither_file_nor_record(
    parts: ShardStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(parts, 0, 3)

    def full(*arguments: object, **named: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("vsc_serve.atomic.os.fsync", full)
    with pytest.raises(InputError, match=r"part-00000\.npz: cannot be written \(No space left"):
        write(parts, 0, 3)
    assert parts.record(0) is None
    assert not list(parts.folder.glob("*.tmp"))


def test_the_same_run_finds_its_shards_and_another_one_discards_them(parts: ShardStore) -> None:
    write(parts, 0, 3)
    assert parts.begin({"model": "m", "shard_rows": 5}) == []
    assert parts.record(0) is not None
    assert parts.begin({"model": "other", "shard_rows": 5}) == ["model"]
    assert parts.record(0) is None
    assert parts.begin({"model": "m", "shard_rows": 5}) == []


def test_two_runs_cannot_write_the_same_output_at_once(tmp_path: Path) -> None:
    parts, other = ShardStore(tmp_path / "p"), ShardStore(tmp_path / "p")
    with parts.locked(), pytest.raises(UsageError, match="another run is writing there"):
        other.locked().__enter__()
    with other.locked():
        other.begin({"model": "m", "shard_rows": 5})
        assert other.folder.is_dir()
    assert not other.folder.exists()


def test_joined_shards_are_the_bytes_of_one_file(parts: ShardStore, tmp_path: Path) -> None:
    counts = (3, 0, 5)
    for number, count in enumerate(counts):
        write(parts, number, count)
    join_codes(parts.paths(3), tmp_path / "joined.npz", META)
    whole = np.concatenate([rows(count, n).toarray() for n, count in enumerate(counts)])
    ids = [f"{number}/{row}" for number, count in enumerate(counts) for row in range(count)]
    write_codes(tmp_path / "whole.npz", dense_to_csr(whole), ids, META)
    assert (tmp_path / "joined.npz").read_bytes() == (tmp_path / "whole.npz").read_bytes()


def test_kept_shards_are_a_folder_that_reads_as_one(tmp_path: Path) -> None:
    out = tmp_path / "codes"
    parts = ShardStore(out)
    parts.begin({"model": "m", "shard_rows": 5})
    records = [write(parts, number, count) for number, count in enumerate((3, 4))]
    parts.keep(records)
    assert not parts.folder.exists()
    assert {path.name for path in out.iterdir()} == {
        "manifest.json",
        "part-00000.npz",
        "part-00001.npz",
    }
    assert read_codes(out).codes.shape == (7, 7)
    listed = json.loads((out / "manifest.json").read_text())["shards"]
    assert [shard["rows"] for shard in listed] == [3, 4]


def test_a_fingerprint_sees_names_sizes_times_and_order() -> None:
    def of(ids: list[str], stamps: list[str]) -> str:
        digest = Fingerprint()
        digest.add(ids, stamps)
        return digest.value()

    base = of(["a", "b"], ["1 1", "2 2"])
    assert base == of(["a", "b"], ["1 1", "2 2"])
    others = [
        of(["b", "a"], ["1 1", "2 2"]),
        of(["a", "c"], ["1 1", "2 2"]),
        of(["a", "b"], ["1 1", "2 3"]),
        of(["a"], ["1 1"]),
        of(["a\udcff", "b"], ["1 1", "2 2"]),
    ]
    assert len({base, *others}) == 6
