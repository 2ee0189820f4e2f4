"""Shards: whole or not there, and only for the run they belong to."""

import json
import resource
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vsc_serve.codes import CodeFile, Codes, dense_to_csr, join_codes, read_codes, write_codes
from vsc_serve.errors import InputError, UsageError
from vsc_serve.executors.digests import save_digests
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


def leave(place: Path, **files: str) -> None:
    """Write files into a folder, as a run that was killed there would have."""
    place.mkdir()
    for name, content in files.items():
        (place / name.replace("_", ".")).write_text(content)


def test_a_run_that_was_killed_before_its_first_file_has_a_name_is_no_foreign_folder(
    tmp_path: Path,
) -> None:
    store = ShardStore(tmp_path / "codes")
    store.folder.mkdir()
    (store.folder / ".run.json.0123456789ab.tmp").write_text("{")
    with store.locked():
        store.begin({"model": "m", "shard_rows": 5})
        write(store, 0, 3)
    assert store.record(0) is not None


def test_shards_that_were_about_to_become_the_output_are_taken_back(tmp_path: Path) -> None:
    store = ShardStore(tmp_path / "codes")
    with store.locked():
        store.begin({"model": "m", "shard_rows": 5})
        record = write(store, 0, 3)
    store.folder.rename(tmp_path / ".codes.0123456789ab.tmp")
    with store.locked():
        assert store.record(0) == record
    assert [path.name for path in tmp_path.iterdir()] == ["codes.parts"]


def test_an_output_that_was_set_aside_by_a_killed_run_is_put_back(tmp_path: Path) -> None:
    leave(tmp_path / ".codes.0123456789ab.old", manifest_json="{}")
    with ShardStore(tmp_path / "codes").locked():
        assert (tmp_path / "codes" / "manifest.json").is_file()
    leave(tmp_path / ".codes.0123456789ab.old", manifest_json="{}")
    with ShardStore(tmp_path / "codes").locked():
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["codes"]


def test_what_killed_runs_have_left_beside_an_output_is_removed_and_nothing_else(
    tmp_path: Path,
) -> None:
    other = [".other.npz.0123456789ab.tmp", ".codes.npz.0123.tmp", ".codes.npz.0123456789ab.bak"]
    ours = [".codes.npz.0123456789ab.tmp", ".codes.errors.jsonl.0123456789ab.tmp"]
    for name in (*ours, *other):
        (tmp_path / name).write_bytes(b"half")
    leave(tmp_path / ".codes.npz.parts.0123456789ab.tmp", part_npz="")
    with ShardStore(tmp_path / "codes.npz", tmp_path / "codes.errors.jsonl").locked():
        pass
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(other)


def test_digests_that_do_not_fit_on_the_disk_are_an_error(tmp_path: Path) -> None:
    digests = [f"{number:064x}" for number in range(100)]
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    earlier = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (500, before[1]))
        with pytest.raises(InputError, match=r"digests\.npy: cannot be written \(File too large"):
            save_digests(tmp_path / "digests.npy", digests)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, earlier)
    assert list(tmp_path.iterdir()) == []
