"""Pictures in a column of a Parquet file."""

import sys
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import pytest

from vsc_serve.errors import InputError, UsageError
from vsc_serve.sources import Source, find_sources

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

PICTURES = [b"picture %d" % number * (number + 1) for number in range(100)]


def write(path: Path, columns: dict[str, Any], *, row_group_size: int = 40) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path, row_group_size=row_group_size)
    return path


def as_struct(pictures: list[bytes | None]) -> Any:
    """The way Hugging Face datasets store pictures."""
    rows = [{"bytes": picture, "path": "x.png"} for picture in pictures]
    return pa.array(rows, pa.struct([("bytes", pa.binary()), ("path", pa.string())]))


def travelled(source: Source) -> Source:
    """The source after a way to another process."""
    return ForkingPickler.loads(ForkingPickler.dumps(source))


def contents(*inputs: Path | str, **options: object) -> dict[str, bytes]:
    sources = find_sources([str(given) for given in inputs], **options)
    return {source.id: travelled(source).read() for source in sources}


def reason(path: Path) -> str:
    (source,) = find_sources([str(path)])
    with pytest.raises(InputError) as caught:
        source.read()
    return str(caught.value)


@pytest.mark.parametrize(
    "column",
    [
        as_struct(PICTURES),
        pa.array(PICTURES, pa.binary()),
        pa.array(PICTURES, pa.large_binary()),
    ],
    ids=["struct", "binary", "large binary"],
)
def test_the_rows_are_called_by_their_numbers_and_read_in_any_order(column, tmp_path):
    path = write(tmp_path / "a.parquet", {"label": list(range(100)), "image": column})
    expected = {str(number): picture for number, picture in enumerate(PICTURES)}
    assert contents(path) == expected
    sources = list(find_sources([str(path)]))
    for place in (99, 3, 41, 40, 39, 39, 3, 80, 0, 33):
        assert sources[place].read() == PICTURES[place]


@pytest.mark.parametrize("name", ["id", "image_id", "__key__", "key", "file_name", "filename"])
def test_a_column_of_ids_calls_the_rows(name, tmp_path):
    names = [f"größe {number}" for number in range(100)]
    path = write(tmp_path / "a.parquet", {name: names, "image": as_struct(PICTURES)})
    assert contents(path) == dict(zip(names, PICTURES, strict=True))
    path = write(tmp_path / "b.parquet", {name: range(100, 200), "image": as_struct(PICTURES)})
    assert list(contents(path)) == [str(number) for number in range(100, 200)]


def test_ids_that_are_there_twice_are_refused(tmp_path):
    path = write(tmp_path / "a.parquet", {"id": ["a", "b", "a"], "image": PICTURES[:3]})
    with pytest.raises(UsageError, match="two pictures would have the id 'a'"):
        contents(path)
    assert list(contents(path, ids="absolute")) == [f"{path}/{number}" for number in range(3)]


def test_a_folder_of_tables_at_any_depth_is_one_input(tmp_path):
    for number, name in enumerate(["data/train-0.parquet", "data/train-1.parquet", "t.parquet"]):
        write(tmp_path / name, {"image": as_struct(PICTURES[number : number + 1])})
    (tmp_path / "README.md").write_text("a data set")
    assert contents(tmp_path) == {
        "data/train-0.parquet/0": PICTURES[0],
        "data/train-1.parquet/0": PICTURES[1],
        "t.parquet/0": PICTURES[2],
    }
    assert list(contents(tmp_path / "t.parquet", ids="absolute")) == [f"{tmp_path}/t.parquet/0"]


def test_tables_with_ids_of_their_own_keep_them_wherever_they_lie(tmp_path):
    for number in range(2):
        columns = {"id": [f"{number}-a", f"{number}-b"], "image": PICTURES[:2]}
        write(tmp_path / f"{number}.parquet", columns)
    assert list(contents(tmp_path)) == ["0-a", "0-b", "1-a", "1-b"]


def test_two_tables_of_a_folder_that_call_a_row_the_same_are_refused(tmp_path):
    for number in range(2):
        write(tmp_path / f"{number}.parquet", {"id": ["a"], "image": PICTURES[:1]})
    with pytest.raises(UsageError, match=r"the id 'a': .*0\.parquet.* and .*1\.parquet"):
        contents(tmp_path)


def test_of_several_columns_with_bytes_the_one_that_is_named_for_pictures_counts(tmp_path):
    columns = {"thumbnail": [b"t"], "audio": as_struct([b"a"]), "image": as_struct([b"i"])}
    assert contents(write(tmp_path / "a.parquet", columns)) == {"0": b"i"}
    del columns["image"]
    columns["count"] = [1]
    assert reason(write(tmp_path / "b.parquet", columns)) == (
        "no column of pictures: expected one of bytes or of {bytes, path}, or one named image;"
        " found thumbnail binary, audio struct<bytes: binary, path: string>, count int64"
    )


def test_a_row_without_a_picture_is_a_reason(tmp_path):
    null = pa.array([None], pa.struct([("bytes", pa.binary()), ("path", pa.string())]))
    for number, column in enumerate([as_struct([None]), pa.array([None], pa.binary()), null]):
        path = write(tmp_path / f"{number}.parquet", {"image": column})
        assert reason(path) == "no picture in this row (null)"


def test_what_is_no_table_is_listed_by_its_path(tmp_path):
    path = tmp_path / "a.parquet"
    path.write_bytes(b"PAR1 no")
    assert reason(path)
    write(path, {"image": PICTURES})
    sources = list(find_sources([str(path)]))
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(InputError, match="unreadable in its table"):
        sources[5].read()


def test_an_empty_table_holds_no_image(tmp_path):
    with pytest.raises(UsageError, match="no image found"):
        find_sources([str(write(tmp_path / "a.parquet", {"image": pa.array([], pa.binary())}))])


def test_without_pyarrow_the_message_says_how_to_install_it(tmp_path, monkeypatch):
    path = write(tmp_path / "a.parquet", {"image": PICTURES})
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UsageError, match=r"needs pyarrow: pip install 'vsc-serve\[parquet\]'"):
        find_sources([str(path)])
