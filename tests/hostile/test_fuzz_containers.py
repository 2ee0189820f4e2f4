"""Damaged archives, tables and arrays give images, rows or reasons: nothing but our own errors.

`VSC_FUZZ_ROUNDS=100` makes 20,000 damaged files of each kind, the ordinary ones first.
"""

import gzip
import io
import os
import resource
import tarfile
import zipfile
from collections import Counter, OrderedDict
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest

from vsc_serve.errors import InputError, UsageError
from vsc_serve.sources import RetryPolicy, find_sources, open_arrays, open_files

ROUNDS: Final = int(os.environ.get("VSC_FUZZ_ROUNDS", "1"))
FILES_A_ROUND: Final = 200
MOST_SOURCES: Final = 1_000
"""A damaged count must not make sources without end."""
MOST_MEMORY_MB: Final = 600
MOST_MEMORY_OF_ARROW_MB: Final = 4_500
"""Arrow allocates what the header of a page claims: up to 2 GiB."""
ONCE: Final = RetryPolicy(patience_s=0)
NUMBERS: Final = (0, 1, 0x7F, 0xFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF)
IMAGES: Final = {"a.png": b"one" * 40, "in/größe.jpg": b"two" * 9, "c.gif": bytes(range(256)) * 3}


def tar_of(kind: int) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=kind) as archive:
        for name, content in (IMAGES | {"n" * 150 + ".png": b"long"}).items():
            member = tarfile.TarInfo(name)
            member.size, member.mtime = len(content), 1.5 if kind == tarfile.PAX_FORMAT else 1
            archive.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def zip_of(method: int) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        for name, content in IMAGES.items():
            archive.writestr(zipfile.ZipInfo(name), content, method)
    return buffer.getvalue()


def zstd_of(content: bytes) -> bytes:
    return bytes(pytest.importorskip("backports.zstd").compress(content))


def npz_of(save: Callable[..., None]) -> bytes:
    buffer = io.BytesIO()
    images = (np.arange(6 * 8 * 8 * 3) % 251).astype(np.uint8).reshape(6, 8, 8, 3)
    save(buffer, images=images, ids=np.array(list("abcdef")), labels=np.array(list("xyxyxy")))
    return buffer.getvalue()


def npy_of(array: Any) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def table_of(compression: str, *, lists: bool = False) -> bytes:
    pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    cells: list[Any] = [{"bytes": content, "path": name} for name, content in IMAGES.items()]
    columns = {
        "id": pa.array(list("abc")).dictionary_encode(),
        "image": [[cell, cell] for cell in cells] if lists else cells,
        "label": [1, 2, 3],
    }
    buffer = io.BytesIO()
    parquet.write_table(pa.table(columns), buffer, compression=compression, row_group_size=2)
    return buffer.getvalue()


KINDS: Final[dict[str, Callable[[], bytes]]] = {
    "pax.tar": lambda: tar_of(tarfile.PAX_FORMAT),
    "gnu.tar": lambda: tar_of(tarfile.GNU_FORMAT),
    "a.tar.gz": lambda: gzip.compress(tar_of(tarfile.GNU_FORMAT), mtime=0),
    "a.tar.zst": lambda: zstd_of(tar_of(tarfile.GNU_FORMAT)),
    "stored.zip": lambda: zip_of(zipfile.ZIP_STORED),
    "deflated.zip": lambda: zip_of(zipfile.ZIP_DEFLATED),
    "bzip2.zip": lambda: zip_of(zipfile.ZIP_BZIP2),
    "stored.npz": lambda: npz_of(np.savez),
    "deflated.npz": lambda: npz_of(np.savez_compressed),
    "vectors.npy": lambda: npy_of(np.ones((7, 5), np.float16)),
    "columns.npy": lambda: npy_of(np.asfortranarray(np.ones((7, 5), ">f8"))),
    "snappy.parquet": lambda: table_of("snappy"),
    "plain.parquet": lambda: table_of("none"),
    "zstd.parquet": lambda: table_of("zstd"),
    "lists.parquet": lambda: table_of("snappy", lists=True),
}


def damage(content: bytes, rng: np.random.Generator) -> bytes:
    """Change one byte; or change, cut, repeat and move several."""
    changed = bytearray(content)
    if rng.integers(2):
        changed[rng.integers(len(changed))] ^= int(rng.integers(1, 256))
        return bytes(changed)
    for _ in range(rng.integers(1, 5)):
        place, length = int(rng.integers(len(changed))), int(rng.integers(1, 9))
        how = rng.integers(6)
        if how == 0:
            changed[place : place + 1] = bytes([rng.integers(256)])
        elif how == 1:
            changed[place : place + 4] = int(rng.choice(NUMBERS)).to_bytes(4, "little")
        elif how == 2:
            del changed[place : place + length]
        elif how == 3:
            changed[place:place] = changed[place : place + 8 * length]
        elif how == 4:
            changed[place : place + length] = rng.bytes(length)
        else:
            del changed[place:]
        changed = changed or bytearray(1)
    return bytes(changed)


def read_all(path: Path) -> Counter[str]:
    """Read all there is, and count what became of it. Whatever is not ours leaves."""
    outcome: Counter[str] = Counter()
    try:
        if path.suffix in (".npy", ".npz"):
            read_rows(path, outcome)
        else:
            read_sources(path, outcome)
    except (InputError, UsageError):
        outcome["refused"] += 1
    return outcome


def read_rows(path: Path, outcome: Counter[str]) -> None:
    arrays = open_arrays(path, retry=ONCE)
    try:
        for source in islice(arrays.sources(), MOST_SOURCES):
            outcome["read"] += len(arrays.read(source.row, 1))
    finally:
        arrays.close()


def read_sources(path: Path, outcome: Counter[str]) -> None:
    for number, source in enumerate(find_sources([path], retry=ONCE)):
        assert number < MOST_SOURCES
        try:
            source.read(ONCE)
            outcome["read"] += 1
        except InputError:
            outcome["refused"] += 1


def peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


@pytest.mark.timeout(60 * ROUNDS + 60)
@pytest.mark.filterwarnings("ignore::UserWarning")  # numpy's, about headers as Python 2 wrote them
@pytest.mark.parametrize("kind", KINDS)
def test_damaged_files_give_images_rows_or_reasons_and_nothing_else(kind, tmp_path):
    content = KINDS[kind]()
    path = tmp_path / kind
    path.write_bytes(content)
    assert read_all(path)["refused"] == 0
    assert read_all(path)["read"] >= 3
    before = peak_mb()
    total: Counter[str] = Counter()
    for seed in range(FILES_A_ROUND * ROUNDS):
        path.write_bytes(damage(content, np.random.default_rng([seed, len(content)])))
        open_files._open.handles = OrderedDict()  # the file of that name is another one
        total += read_all(path)
    assert total["refused"] > FILES_A_ROUND * ROUNDS / 20
    limit = MOST_MEMORY_OF_ARROW_MB if path.suffix == ".parquet" else MOST_MEMORY_MB
    assert peak_mb() - before < limit
