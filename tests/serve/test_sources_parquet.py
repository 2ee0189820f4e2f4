"""Images in a column of a Parquet file."""

import sys
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import pytest

from vsc_serve.errors import InputError, SourceUnavailable, UsageError
from vsc_serve.sources import RetryPolicy, Source, find_sources

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

IMAGES = [b"image %d" % number * (number + 1) for number in range(100)]


def write(path: Path, columns: dict[str, Any], *, row_group_size: int = 40) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path, row_group_size=row_group_size)
    return path


def as_struct(images: list[bytes | None]) -> Any:
    """The way Hugging Face datasets store images."""
    rows = [{"bytes": image, "path": image and "x.png"} for image in images]
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
        as_struct(IMAGES),
        pa.array(IMAGES, pa.binary()),
        pa.array(IMAGES, pa.large_binary()),
    ],
    ids=["struct", "binary", "large binary"],
)
def test_the_rows_are_called_by_their_numbers_and_read_in_any_order(column, tmp_path):
    path = write(tmp_path / "a.parquet", {"label": list(range(100)), "image": column})
    expected = {str(number): image for number, image in enumerate(IMAGES)}
    assert contents(path) == expected
    sources = list(find_sources([str(path)]))
    for place in (99, 3, 41, 40, 39, 39, 3, 80, 0, 33):
        assert sources[place].read() == IMAGES[place]


@pytest.mark.parametrize("name", ["id", "image_id", "__key__", "key", "file_name", "filename"])
def test_a_column_of_ids_calls_the_rows(name, tmp_path):
    names = [f"größe {number}" for number in range(100)]
    path = write(tmp_path / "a.parquet", {name: names, "image": as_struct(IMAGES)})
    assert contents(path) == dict(zip(names, IMAGES, strict=True))
    path = write(tmp_path / "b.parquet", {name: range(100, 200), "image": as_struct(IMAGES)})
    assert list(contents(path)) == [str(number) for number in range(100, 200)]


def test_ids_that_are_there_twice_are_refused(tmp_path):
    path = write(tmp_path / "a.parquet", {"id": ["a", "b", "a"], "image": IMAGES[:3]})
    with pytest.raises(
        UsageError,
        match=r"two images would have the id 'a': row 0 of .*a\.parquet and row 2 of .*a\.parquet",
    ):
        contents(path)
    assert list(contents(path, ids="absolute")) == [f"{path}/{number}" for number in range(3)]


def test_a_folder_of_tables_at_any_depth_is_one_input(tmp_path):
    for number, name in enumerate(["data/train-0.parquet", "data/train-1.parquet", "t.parquet"]):
        write(tmp_path / name, {"image": as_struct(IMAGES[number : number + 1])})
    (tmp_path / "README.md").write_text("a data set")
    assert contents(tmp_path) == {
        "data/train-0.parquet/0": IMAGES[0],
        "data/train-1.parquet/0": IMAGES[1],
        "t.parquet/0": IMAGES[2],
    }
    assert list(contents(tmp_path / "t.parquet", ids="absolute")) == [f"{tmp_path}/t.parquet/0"]


def test_tables_with_ids_of_their_own_keep_them_wherever_they_lie(tmp_path):
    for number in range(2):
        columns = {"id": [f"{number}-a", f"{number}-b"], "image": IMAGES[:2]}
        write(tmp_path / f"{number}.parquet", columns)
    assert list(contents(tmp_path)) == ["0-a", "0-b", "1-a", "1-b"]


def test_two_tables_of_a_folder_that_call_a_row_the_same_are_refused(tmp_path):
    for number in range(2):
        write(tmp_path / f"{number}.parquet", {"id": ["a"], "image": IMAGES[:1]})
    with pytest.raises(UsageError, match=r"the id 'a': .*0\.parquet.* and .*1\.parquet"):
        contents(tmp_path)


def test_of_several_columns_with_bytes_the_one_that_is_named_for_images_counts(tmp_path):
    columns = {"thumbnail": [b"t"], "audio": as_struct([b"a"]), "image": as_struct([b"i"])}
    assert contents(write(tmp_path / "a.parquet", columns)) == {"0": b"i"}
    del columns["image"]
    columns["count"] = [1]
    assert reason(write(tmp_path / "b.parquet", columns)) == (
        "no column of images: expected one of bytes or of {bytes, path}, or one named image;"
        " found thumbnail binary, audio struct<bytes: binary, path: string>, count int64"
    )


def test_a_row_without_an_image_is_a_reason(tmp_path):
    null = pa.array([None], pa.struct([("bytes", pa.binary()), ("path", pa.string())]))
    for number, column in enumerate([as_struct([None]), pa.array([None], pa.binary()), null]):
        path = write(tmp_path / f"{number}.parquet", {"image": column})
        assert reason(path) == "no image in this row (null)"


def test_what_is_no_table_is_listed_by_its_path(tmp_path):
    path = tmp_path / "a.parquet"
    path.write_bytes(b"PAR1 no")
    assert reason(path)
    write(path, {"image": IMAGES})
    sources = list(find_sources([str(path)]))
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(InputError, match=r"was replaced|unreadable in its table"):
        sources[5].read()


def test_an_empty_table_holds_no_image(tmp_path):
    with pytest.raises(UsageError, match="no image found"):
        find_sources([str(write(tmp_path / "a.parquet", {"image": pa.array([], pa.binary())}))])


def test_without_pyarrow_the_message_says_how_to_install_it(tmp_path, monkeypatch):
    path = write(tmp_path / "a.parquet", {"image": IMAGES})
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UsageError, match=r"needs pyarrow: pip install 'vsc-serve\[parquet\]'"):
        find_sources([str(path)])


# Columns of other kinds

SAME_LENGTH = [b"%03d" % number for number in range(100)]
AS_NUMBERS = [list(image) for image in IMAGES]


@pytest.mark.parametrize(
    ("column", "expected"),
    [
        (pa.array(IMAGES, pa.binary()).dictionary_encode(), IMAGES),
        (pa.array(IMAGES, pa.binary_view()), IMAGES),
        (pa.array(SAME_LENGTH, pa.binary(3)), SAME_LENGTH),
        (pa.array(AS_NUMBERS, pa.list_(pa.uint8())), IMAGES),
        (pa.array(AS_NUMBERS, pa.large_list(pa.uint8())), IMAGES),
        (pa.array([list(one) for one in SAME_LENGTH], pa.list_(pa.uint8(), 3)), SAME_LENGTH),
        (
            pa.array(
                [{"bytes": list(one), "path": None} for one in IMAGES],
                pa.struct([("bytes", pa.list_(pa.uint8())), ("path", pa.large_string())]),
            ),
            IMAGES,
        ),
    ],
    ids=["dictionary", "view", "fixed", "list", "large list", "fixed list", "struct of list"],
)
@pytest.mark.parametrize("name", ["image", "photo"])
def test_images_are_read_from_columns_of_every_kind_of_bytes(name, column, expected, tmp_path):
    path = write(tmp_path / "a.parquet", {"label": list(range(100)), name: column})
    assert list(contents(path).values()) == expected
    sources = list(find_sources([str(path)]))
    for place in (99, 3, 41, 40, 39):
        assert sources[place].read() == expected[place]


def test_a_column_of_digests_is_not_taken_for_images_beside_one_that_is(tmp_path):
    columns = {
        "sha256": pa.array(SAME_LENGTH, pa.binary(3)),
        "embedding": pa.array(AS_NUMBERS, pa.list_(pa.uint8())),
        "key": pa.array(SAME_LENGTH, pa.binary()),
        "photo": pa.array(IMAGES, pa.binary()),
    }
    path = write(tmp_path / "a.parquet", columns)
    assert contents(path) == {f"{number:03}": one for number, one in enumerate(IMAGES)}


@pytest.mark.parametrize(
    "kind",
    [
        pa.list_(pa.struct([("bytes", pa.binary()), ("path", pa.string())])),
        pa.large_list(pa.struct([("bytes", pa.binary())])),
        pa.list_(pa.binary()),
        pa.list_(pa.list_(pa.uint8())),
    ],
    ids=["structs", "structs of bytes", "bytes", "numbers"],
)
def test_every_image_in_a_list_is_one_and_its_place_ends_the_id(kind, tmp_path):
    """Hugging Face's `Sequence(Image())`."""
    value = {True: lambda one: {"bytes": one}, False: lambda one: one}
    as_cell = value[pa.types.is_struct(kind.value_type)]
    if pa.types.is_list(kind.value_type):
        as_cell = list
    rows = [[b"a", b"b"], None, [b"c"], [], [b"d", b"e", b"f"]]
    column = pa.array([row and [as_cell(one) for one in row] for row in rows], kind)
    path = write(tmp_path / "a.parquet", {"id": list("vwxyz"), "images": column}, row_group_size=2)
    sources = list(find_sources([str(path)]))
    assert [source.id for source in sources] == ["v/0", "v/1", "w", "x/0", "y", "z/0", "z/1", "z/2"]
    for place in (1, 4):
        sources_without = sources[place + 1 if place == 1 else place]
        with pytest.raises(InputError, match=r"^no image in this row \(an empty list\)$") as it:
            sources_without.read()
        assert it.value.kind == "empty"
    given = [travelled(sources[place]).read() for place in (7, 6, 5, 3, 1, 0)]
    assert given == [b"f", b"e", b"d", b"c", b"b", b"a"]
    assert [source.id for source in find_sources([str(path)], exclude=["v", "z/*"])] == [
        *("w", "x/0", "y")
    ]


def test_bytes_with_a_null_between_them_are_a_reason(tmp_path):
    path = write(tmp_path / "a.parquet", {"image": pa.array([[1, None]], pa.list_(pa.uint8()))})
    assert reason(path) == "a list of bytes with nulls in it"


# A path in place of bytes


def paths_only(folder: Path, *paths: str) -> list[Source]:
    """The way Hugging Face datasets store images whose files stay where they are."""
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    column = pa.array([{"bytes": None, "path": path} for path in paths], kind)
    return list(find_sources([str(write(folder / "a.parquet", {"image": column}))]))


def test_a_path_without_bytes_is_a_file_below_the_folder_of_the_table(tmp_path, monkeypatch):
    folder = tmp_path / "set"
    (folder / "in").mkdir(parents=True)
    (folder / "in" / "a.jpg").write_bytes(b"a")
    whole = str(folder / "in" / "a.jpg")
    for source in paths_only(folder, "in/a.jpg", "./in/../in/a.jpg", whole):
        assert travelled(source).read() == b"a"
    monkeypatch.chdir(folder)
    (source,) = find_sources(["a.parquet"], exclude=["1", "2"])
    assert source.read() == b"a"


def test_a_path_that_leads_elsewhere_is_a_reason(tmp_path):
    folder = tmp_path / "set"
    folder.mkdir()
    (tmp_path / "secret.jpg").write_bytes(b"secret")
    (folder / "link.jpg").symlink_to(tmp_path / "secret.jpg")
    places = ["../secret.jpg", "/etc/passwd", "link.jpg", "a\0b", str(tmp_path / "secret.jpg")]
    for place, source in zip(places, paths_only(folder, *places), strict=True):
        with pytest.raises(InputError) as caught:
            source.read()
        assert str(caught.value) == (
            f"no bytes in this row, and {place}: does not lie below the folder of its table"
        )


def test_a_path_to_no_file_is_a_reason(tmp_path):
    (tmp_path / "folder.jpg").mkdir()
    gone, folder = paths_only(tmp_path, "gone.jpg", "folder.jpg")
    with pytest.raises(InputError, match=r"^no bytes in this row, and gone\.jpg: no such f") as it:
        gone.read()
    assert it.value.kind == "missing"
    with pytest.raises(InputError, match=r"folder\.jpg: not a regular file$"):
        folder.read()


def test_a_path_beside_a_table_whose_folder_is_gone_cannot_be_reached(tmp_path):
    (tmp_path / "set").mkdir()
    for name in ("a.jpg", "b.jpg"):
        (tmp_path / "set" / name).write_bytes(b"a")
    first, second = paths_only(tmp_path / "set", "a.jpg", "b.jpg")
    assert first.read() == b"a"
    (tmp_path / "set").rename(tmp_path / "away")
    with pytest.raises(SourceUnavailable, match="set, which was there when the run began, is gone"):
        second.read(RetryPolicy(patience_s=0))


def test_a_path_beside_a_table_behind_a_url_is_read_there_and_nowhere_else():
    fsspec = pytest.importorskip("fsspec")
    from io import BytesIO

    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    paths = ["in/a.jpg", "../b.jpg", "memory://bucket/b.jpg"]
    column = pa.array([{"bytes": None, "path": path} for path in paths], kind)
    buffer = BytesIO()
    pq.write_table(pa.table({"image": column}), buffer)
    system = fsspec.filesystem("memory")
    system.pipe("/bucket/set/a.parquet", buffer.getvalue())
    system.pipe("/bucket/set/in/a.jpg", b"a")
    system.pipe("/bucket/b.jpg", b"b")
    first, *others = find_sources(["memory://bucket/set/a.parquet"])
    assert first.read() == b"a"
    for source in others:
        with pytest.raises(InputError, match="does not lie below the folder of its table"):
            source.read()
    system.rm("/bucket", recursive=True)


# Ids


@pytest.mark.parametrize(
    ("column", "expected"),
    [
        (pa.array(["a", "b", "é"]).dictionary_encode(), ["a", "b", "é"]),
        (pa.array([7, 8, 9]).dictionary_encode(), ["7", "8", "9"]),
        (pa.array(["a", "b", "c"], pa.string_view()), ["a", "b", "c"]),
        (pa.array(["a", "b", "c"], pa.large_string()), ["a", "b", "c"]),
        (pa.array([b"a", "é".encode(), b"\xff"]), ["a", "é", "0xff"]),
        (pa.array([b"a", b"b", b"c"], pa.binary_view()), ["a", "b", "c"]),
        (pa.array([b"\xff\1", b"ab", b"cd"], pa.binary(2)), ["0xff01", "ab", "cd"]),
        (pa.array([1.0, 2.0, 2.5]), ["1", "2", "2.5"]),
        (pa.array([1, 2**63, 3], pa.uint64()), ["1", str(2**63), "3"]),
    ],
    ids=str,
)
def test_ids_of_every_kind_are_text(column, expected, tmp_path):
    path = write(tmp_path / "a.parquet", {"id": column, "image": IMAGES[:3]}, row_group_size=2)
    assert list(contents(path)) == expected
    assert list(contents(path).values()) == IMAGES[:3]


def test_ids_that_are_universally_unique_keep_their_usual_form(tmp_path):
    import uuid

    ids = [uuid.UUID(int=number) for number in range(3)]
    column = pa.array([one.bytes for one in ids], pa.uuid())
    path = write(tmp_path / "a.parquet", {"id": column, "image": IMAGES[:3]})
    assert list(contents(path)) == [str(one) for one in ids]


@pytest.mark.parametrize(
    "column",
    [
        pa.array(["a", None, "b", None, ""]),
        pa.array(["a", None, "b", None, ""]).dictionary_encode(),
        pa.array([b"a", None, b"b", None, b""]),
    ],
    ids=["text", "categories", "bytes"],
)
def test_an_id_that_is_null_or_empty_gives_way_to_the_table_and_the_number(column, tmp_path):
    path = write(tmp_path / "in" / "t.parquet", {"id": column, "image": IMAGES[:5]})
    for options in ({}, {"ids": "name"}):
        assert list(contents(path, **options)) == [
            *("a", "t.parquet/1", "b", "t.parquet/3", "t.parquet/4")
        ]
    assert list(contents(tmp_path))[1] == "in/t.parquet/1"
    assert list(contents(path).values()) == IMAGES[:5]


def test_ids_of_all_nulls_and_of_numbers_with_nulls_lose_no_image(tmp_path):
    for column in (pa.nulls(3, pa.string()), pa.nulls(3, pa.int64())):
        path = write(tmp_path / "t.parquet", {"id": column, "image": IMAGES[:3]})
        assert list(contents(path)) == [f"t.parquet/{number}" for number in range(3)]
    path = write(tmp_path / "t.parquet", {"id": pa.array([5, None]), "image": IMAGES[:2]})
    assert list(contents(path)) == ["5", "t.parquet/1"]
    path = write(tmp_path / "t.parquet", {"id": pa.array([5.0, None]), "image": IMAGES[:2]})
    assert list(contents(path)) == ["5", "t.parquet/1"]
    path = write(tmp_path / "t.parquet", {"id": pa.array([5.0, float("nan")]), "image": [b"a"] * 2})
    assert list(contents(path)) == ["5", "t.parquet/1"]


def test_an_id_of_300_letters_is_an_id(tmp_path):
    path = write(tmp_path / "a.parquet", {"key": ["k" * 300, "b"], "image": IMAGES[:2]})
    assert list(contents(path)) == ["k" * 300, "b"]
    with pytest.raises(UsageError, match=r"^k{300}: no such file or folder"):
        find_sources(["k" * 300])


# Tables about images, and counts


def test_the_tables_that_img2dataset_leaves_beside_its_archives_are_passed_over(tmp_path):
    import tarfile
    from io import BytesIO

    for shard in range(2):
        with tarfile.open(tmp_path / f"{shard:05}.tar", "w") as archive:
            for name in ("a.jpg", "a.json", "a.txt"):
                member = tarfile.TarInfo(f"{shard}{name}")
                member.size = 1
                archive.addfile(member, BytesIO(b"x"))
        columns = {"url": ["http://x/y.jpg"], "key": [f"{shard}a"], "sha256": ["0"]}
        write(tmp_path / f"{shard:05}.parquet", columns)
        (tmp_path / f"{shard:05}_stats.json").write_text("{}")
    expected = {"00000.tar/0a.jpg": b"x", "00001.tar/1a.jpg": b"x"}
    for given in (str(tmp_path), f"{tmp_path}/*"):
        passed: dict[str, str] = {}
        found = contents(given, ids="relative", on_skip=passed.__setitem__)
        assert [name.removeprefix(f"{tmp_path}/") for name in found] == list(expected)
        tables = {name for name, why in passed.items() if why == "without a column of images"}
        assert {Path(name).name for name in tables} == {"00000.parquet", "00001.parquet"}
        assert not any(why == "with extension .tar" for why in passed.values())
    assert reason(tmp_path / "00000.parquet").startswith("no column of images: ")
    with pytest.raises(UsageError, match="Passed over: 2 without a column of images"):
        find_sources([f"{tmp_path}/*.parquet"])


@pytest.mark.parametrize("groups", [[5], [4, 3], [-1, 7]])
def test_a_table_that_counts_other_rows_than_its_groups_is_refused(groups):
    from vsc_serve.sources import parquet

    class Metadata:
        num_row_groups = len(groups)
        num_rows = 6

        def row_group(self, group: int) -> Any:
            return type("Group", (), {"num_rows": groups[group]})

    with pytest.raises(InputError, match=f"it counts 6 rows, its row groups {sum(groups)}"):
        parquet._check_counts(Metadata())


def test_more_ids_than_rows_are_no_quiet_end(tmp_path, monkeypatch):
    from vsc_serve.sources import parquet

    path = write(tmp_path / "a.parquet", {"id": list("abc"), "image": IMAGES[:3]})
    real = parquet.read_ids
    monkeypatch.setattr(parquet, "read_ids", lambda column: real(column)[:2])
    *found, rest = find_sources([str(path)])
    assert [source.id for source in found] == ["a", "b"]
    with pytest.raises(InputError, match=r"broken table, the rest is lost: 2 ids for 3 rows"):
        rest.read()
