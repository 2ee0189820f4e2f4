"""Images behind URLs: in memory, and in an object store on the loopback device."""

import sys
import tarfile
from collections.abc import Iterator
from io import BytesIO
from multiprocessing.reduction import ForkingPickler

import pytest

from vsc_serve.errors import InputError, UsageError
from vsc_serve.sources import Source, find, find_sources
from vsc_serve.sources.url import UrlSource

fsspec = pytest.importorskip("fsspec")


def travelled(source: Source) -> Source:
    """The source after a way to another process."""
    return ForkingPickler.loads(ForkingPickler.dumps(source))


def contents(*inputs: str, **options: object) -> dict[str, bytes]:
    sources = find_sources(inputs, **options)
    return {source.id: travelled(source).read() for source in sources}


def tar_of(**members: bytes) -> bytes:
    buffer = BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, content in members.items():
            member = tarfile.TarInfo(f"{name}.png")
            member.size = len(content)
            archive.addfile(member, BytesIO(content))
    return buffer.getvalue()


FILES = {
    "p/a.jpg": b"a",
    "p/in/b.png": b"b",
    "p/in.png": b"in",
    "p/.hidden/c.png": b"c",
    "p/@eaDir/d.png": b"d",
    "p/notes.txt": b"text",
    "shards/0.tar": tar_of(x=b"x" * 2_000, y=b"y"),
}


@pytest.fixture
def memory() -> Iterator[str]:
    """A file system in memory with `FILES`; its URL."""
    system = fsspec.filesystem("memory")
    for name, content in FILES.items():
        system.pipe(f"/bucket/{name}", content)
    yield "memory://bucket"
    system.rm("/bucket", recursive=True)


@pytest.fixture(scope="module")
def store() -> Iterator[str]:
    """A bucket with `FILES` in an emulated object store; its URL."""
    server_module = pytest.importorskip("moto.server")
    pytest.importorskip("s3fs")
    import boto3

    with pytest.MonkeyPatch.context() as patch:
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            patch.setenv(name, "testing")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        server = server_module.ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
        server.start()
        host, port = server.get_host_and_port()
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        client = boto3.client("s3")
        client.create_bucket(Bucket="bucket")
        for name, content in FILES.items():
            client.put_object(Bucket="bucket", Key=name, Body=content)
        client.put_object(Bucket="bucket", Key="p/empty/", Body=b"")  # a folder, as consoles make
        client.put_object(Bucket="bucket", Key="p/zero.png", Body=b"")
        yield "s3://bucket"
        server.stop()


def test_a_folder_behind_a_url_is_searched_like_any_folder(memory):
    assert contents(f"{memory}/p") == {"a.jpg": b"a", "in.png": b"in", "in/b.png": b"b"}
    assert list(contents(f"{memory}/p/")) == ["a.jpg", "in.png", "in/b.png"]
    assert contents(f"{memory}/p", exclude=["in"]) == {"a.jpg": b"a", "in.png": b"in"}
    absolute = list(contents(f"{memory}/p", ids="absolute"))
    assert absolute[0] == f"{memory}/p/a.jpg"
    assert list(contents(f"{memory}/p/in", f"{memory}/p/a.jpg")) == [
        *(f"{memory}/p/in/b.png", f"{memory}/p/a.jpg")
    ]


def test_a_file_and_a_pattern_behind_a_url_are_read(memory):
    assert contents(f"{memory}/p/a.jpg") == {f"{memory}/p/a.jpg": b"a"}
    assert contents(f"{memory}/p/**/*.png") == {
        f"{memory}/p/in.png": b"in",
        f"{memory}/p/in/b.png": b"b",
    }


def test_an_archive_behind_a_url_is_read_in_place(memory):
    expected = {"x.png": b"x" * 2_000, "y.png": b"y"}
    assert contents(f"{memory}/shards/0.tar") == expected
    assert contents(f"{memory}/shards") == {f"0.tar/{name}": expected[name] for name in expected}


def test_a_url_where_nothing_is_is_refused_before_anything_is_read(memory):
    for url in (f"{memory}/gone", f"{memory}/gone/*.png", f"{memory}/p/*.gif"):
        with pytest.raises(UsageError, match=r"^memory://bucket/.*(no |there is no)"):
            find_sources([url])


def test_an_object_that_is_gone_or_too_large_is_a_reason(memory):
    with pytest.raises(InputError, match=r"^no such file$"):
        UrlSource("x", f"{memory}/gone.png", 3).read()
    with pytest.raises(InputError, match=r"^too large: 2,000,000,000 bytes"):
        UrlSource("x", f"{memory}/p/a.jpg", 2_000_000_000).read()


def test_an_unknown_kind_of_url_and_one_that_needs_a_package_say_so(monkeypatch):
    with pytest.raises(UsageError, match=r"^nonsense://x: .*Check the URL"):
        find_sources(["nonsense://x"])
    monkeypatch.setitem(sys.modules, "fsspec", None)
    with pytest.raises(UsageError, match=r"^s3://bucket/x: .*pip install 'vsc-serve\[urls\]'"):
        find_sources(["s3://bucket/x"])


def test_a_question_mark_in_a_web_address_is_no_pattern(monkeypatch):
    url = "https://example.invalid/a.jpg?size=large"
    monkeypatch.setattr(find, "is_folder", lambda place, retry: False)
    monkeypatch.setattr(find, "is_there", lambda place, retry: True)
    (source,) = find_sources([url])
    assert source == UrlSource(url, url)
    monkeypatch.setattr(find, "is_there", lambda place, retry: False)
    with pytest.raises(UsageError, match="no such file or folder"):
        find_sources([url])


@pytest.mark.slow
def test_an_object_store_is_searched_and_read(store):
    assert contents(f"{store}/p") == {
        "a.jpg": b"a",
        "in.png": b"in",
        "in/b.png": b"b",
        "zero.png": b"",
    }
    assert contents(f"{store}/p/*.jpg") == {f"{store}/p/a.jpg": b"a"}
    assert contents(f"{store}/p/in/b.png", ids="name") == {"b.png": b"b"}
    assert contents(f"{store}/shards/*.tar", ids="name") == {"x.png": b"x" * 2_000, "y.png": b"y"}


@pytest.mark.slow
def test_a_bucket_that_is_not_there_is_refused_by_name(store):
    with pytest.raises((UsageError, InputError), match=r"^s3://no-such-bucket-here/p: "):
        find_sources(["s3://no-such-bucket-here/p"])
