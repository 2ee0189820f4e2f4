"""A source that cannot be reached is no bad image: it is tried again, then the search stops."""

import errno
import os
import shutil
import tarfile
import threading
import zipfile
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest

from vsc_serve.errors import InputError, SourceUnavailable, UsageError
from vsc_serve.sources import (
    FileSource,
    RetryPolicy,
    Source,
    UnreadableSource,
    find_sources,
    folder,
    retry,
)
from vsc_serve.sources.faults import fault_of_file, fault_of_store
from vsc_serve.sources.files import PlaceFile
from vsc_serve.sources.roots import Mounts, find_root
from vsc_serve.sources.stores import fetch
from vsc_serve.sources.url import UrlSource

ONCE = RetryPolicy(patience_s=0)
LOST = (
    *("ESTALE", "EIO", "ENOTCONN", "ETIMEDOUT", "EHOSTDOWN", "EHOSTUNREACH", "ENETDOWN"),
    *("ENETUNREACH", "ECONNRESET", "ECONNREFUSED", "ECONNABORTED", "EREMOTEIO", "ENODEV", "ENXIO"),
)


def waiting(waits: list[float], **policy: Any) -> RetryPolicy:
    """A policy that waits for nothing and notes how long it would have."""
    return RetryPolicy(wait=waits.append, **policy)


def fill(folder: Path, *names: str) -> Path:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode())
    return folder


def failing(number: int, times: int, real: Callable[..., Any]) -> Callable[..., Any]:
    """A system call that fails so many times before it works."""
    left = [times]

    def call(*arguments: Any, **named: Any) -> Any:
        if left[0]:
            left[0] -= 1
            raise OSError(number, os.strerror(number))
        return real(*arguments, **named)

    return call


def read(place: Path | str, policy: RetryPolicy = ONCE) -> bytes:
    return FileSource("x", str(place)).read(policy)


# Files


@pytest.mark.parametrize("name", LOST)
@pytest.mark.parametrize("call", ["open", "read"])
def test_an_error_of_the_disk_the_mount_or_the_network_is_no_fault_of_the_image(
    name, call, tmp_path, monkeypatch
):
    path = fill(tmp_path, "a.png") / "a.png"
    number = getattr(errno, name)
    with monkeypatch.context() as patch:
        patch.setattr(os, call, failing(number, 99, getattr(os, call)))
        with pytest.raises(SourceUnavailable) as caught:
            read(path)
    assert str(caught.value) == (
        f"{path}: cannot be reached now: {os.strerror(number)}. Check the disk, the mount and the"
        " network."
    )
    assert caught.value.kind == "unavailable"
    assert caught.value.exit_code == 3


@pytest.mark.parametrize(
    ("name", "kind"),
    [("ENOENT", "missing"), ("ENOTDIR", "missing"), ("EACCES", "unreadable")],
)
def test_an_error_of_one_file_costs_that_image(name, kind, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "open", failing(getattr(errno, name), 1, os.open))
    with pytest.raises(InputError) as caught:
        read(tmp_path / "a.png")
    assert not isinstance(caught.value, SourceUnavailable)
    assert caught.value.kind == kind


def test_a_read_is_tried_again_with_growing_pauses_until_it_succeeds(tmp_path, monkeypatch):
    path = fill(tmp_path, "a.png") / "a.png"
    monkeypatch.setattr(os, "open", failing(errno.ESTALE, 6, os.open))
    waits: list[float] = []
    policy = waiting(waits, patience_s=100, first_pause_s=1, longest_pause_s=8)
    assert read(path, policy) == b"a.png"
    limits = [1, 2, 4, 8, 8, 8]
    assert all(limit / 2 <= wait <= limit for wait, limit in zip(waits, limits, strict=True))


def test_pauses_differ_so_that_readers_do_not_come_back_together(tmp_path, monkeypatch):
    waits: list[float] = []
    monkeypatch.setattr(os, "open", failing(errno.ESTALE, 99, os.open))
    for _ in range(5):
        with pytest.raises(SourceUnavailable):
            read(tmp_path / "a", waiting(waits, patience_s=1, first_pause_s=0.9))
    assert len(set(waits)) == len(waits) > 4


def test_patience_ends_and_the_message_says_how_often_it_was_tried(tmp_path, monkeypatch):
    waits: list[float] = []
    monkeypatch.setattr(os, "open", failing(errno.EIO, 99, os.open))
    with pytest.raises(SourceUnavailable, match=r"Input/output error \(\d+ tries in \d+ s\)"):
        read(tmp_path / "a", waiting(waits, patience_s=20))
    assert sum(waits) <= 20
    assert len(waits) > 4


def test_the_patience_of_one_image_is_well_below_what_a_worker_may_spend_on_it():
    from vsc_serve.executors.processes import IMAGE_LIMIT_S

    assert retry.PATIENCE_S <= IMAGE_LIMIT_S / 2


def test_an_exhausted_machine_is_no_fault_of_the_image(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "open", failing(errno.EMFILE, 99, os.open))
    waits: list[float] = []
    with pytest.raises(SourceUnavailable, match=r"the machine failed: Too many open.*ulimit -n"):
        read(tmp_path / "a", waiting(waits))
    assert sum(waits) <= retry.LASTING_PATIENCE_S
    assert fault_of_file(MemoryError()).kind == "unavailable"


def test_a_device_that_is_gone_is_told_from_a_socket(tmp_path, monkeypatch):
    import socket

    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "socket.png"))
        with pytest.raises(InputError, match=r"^not a regular file$") as caught:
            read(tmp_path / "socket.png")
    assert caught.value.kind == "not a file"


# A mount that goes away


def test_a_missing_file_below_an_input_that_is_gone_cannot_be_reached(tmp_path):
    found = list(find_sources([str(fill(tmp_path / "mnt", "a.png", "in/b.png"))]))
    shutil.rmtree(tmp_path / "mnt")
    for source in found:
        with pytest.raises(SourceUnavailable, match=r"mnt/, which was there when the run began"):
            source.read(ONCE)


def test_an_empty_folder_in_the_place_of_an_input_is_an_unmounted_disk(tmp_path):
    """What a disk that is unmounted leaves: the folder it was mounted at."""
    found = list(find_sources([str(fill(tmp_path / "mnt", "a.png"))]))
    (tmp_path / "mnt").rename(tmp_path / "elsewhere")
    (tmp_path / "mnt").mkdir()
    with pytest.raises(SourceUnavailable, match=r"is gone or was replaced \(unmounted\?\)"):
        found[0].read(ONCE)


def test_an_input_that_is_empty_because_its_disk_is_gone_is_not_taken_for_empty(tmp_path):
    """Between the look at the input and its listing, the disk is unmounted."""
    tree = folder.LocalTree(str(fill(tmp_path / "mnt", "a.png")), ONCE)
    (tmp_path / "mnt").rename(tmp_path / "elsewhere")
    (tmp_path / "mnt").mkdir()
    with pytest.raises(SourceUnavailable, match=r"is gone or was replaced \(unmounted\?\)"):
        tree.entries("")
    (tmp_path / "empty").mkdir()
    assert folder.LocalTree(str(tmp_path / "empty"), ONCE).entries("") == []


def test_a_missing_file_below_an_input_that_is_there_is_a_bad_row(tmp_path):
    found = list(find_sources([str(fill(tmp_path, "a.png", "in/b.png"))]))
    shutil.rmtree(tmp_path / "in")
    assert found[0].read(ONCE) == b"a.png"
    with pytest.raises(InputError, match="no such file") as caught:
        found[1].read(ONCE)
    assert caught.value.kind == "missing"


def test_an_input_that_comes_back_is_read_on(tmp_path):
    mount = fill(tmp_path / "mnt", "a.png")
    (source,) = find_sources([str(mount)])
    mount.rename(tmp_path / "away")
    policy = RetryPolicy(wait=lambda pause: (tmp_path / "away").rename(mount))
    assert source.read(policy) == b"a.png"


def test_a_mount_inside_an_input_is_watched_too(tmp_path, monkeypatch):
    top = fill(tmp_path / "top", "a.png", "nas/b.png", "nas/in/c.png", "z.png")
    devices = on_devices(monkeypatch, {str(top / "nas"): 77})
    found = {source.id: source for source in find_sources([str(top)])}
    shutil.rmtree(top / "nas")
    devices.clear()
    (top / "nas").mkdir()
    (top / "z.png").unlink()
    for name in ("nas/b.png", "nas/in/c.png"):
        with pytest.raises(SourceUnavailable, match=r"top/nas/, which was there"):
            found[name].read(ONCE)
    with pytest.raises(InputError, match=r"^no such file"):
        found["z.png"].read(ONCE)


def on_devices(monkeypatch: pytest.MonkeyPatch, devices: dict[str, int]) -> dict[str, int]:
    """Make folders lie on other devices, as mounts do."""
    real = os.stat

    def stat(path: Any, **named: Any) -> os.stat_result:
        status = real(path, **named)
        where = os.path.realpath(path) if isinstance(path, str) else ""
        for folder_, device in devices.items():
            if where == folder_ or where.startswith(f"{folder_}/"):
                fields = [*status]
                fields[2] = device
                return os.stat_result(fields)
        return status

    monkeypatch.setattr(os, "stat", stat)
    return devices


def test_files_of_a_list_belong_to_the_mount_that_earlier_ones_lay_on(tmp_path, monkeypatch):
    """A list is read as it goes: what it names later is looked at when the mount is gone."""
    mount = fill(tmp_path / "mnt", "0/a.png", "1/b.png", "c.png")
    devices = on_devices(monkeypatch, {str(mount): 77})
    mounts = Mounts()
    first = mounts.root_of(str(mount / "0/a.png"))
    assert first == find_root(str(mount))
    shutil.rmtree(mount)
    devices.clear()
    mount.mkdir()
    for name in ("1/b.png", "c.png"):
        root = mounts.root_of(str(mount / name))
        assert root is not None
        assert root.is_lost()
    beside = mounts.root_of(str(fill(tmp_path, "here.png") / "here.png"))
    assert beside is not None
    assert not beside.is_lost()


# Folders


@pytest.mark.parametrize("name", ["ESTALE", "EIO", "ETIMEDOUT"])
def test_a_folder_that_cannot_be_reached_stops_the_search(name, tmp_path, monkeypatch):
    fill(tmp_path, "a.png", "in/b.png")
    monkeypatch.setattr(os, "scandir", failing_for("in", getattr(errno, name), os.scandir))
    for given in (str(tmp_path), f"{tmp_path}/*", f"{tmp_path}/**/*.png"):
        found = find_sources([given], retry=ONCE)
        with pytest.raises(SourceUnavailable, match=rf"in/?: cannot be reached now: {text(name)}"):
            list(found)


def text(name: str) -> str:
    return os.strerror(getattr(errno, name))


def failing_for(part: str, number: int, real: Callable[..., Any]) -> Callable[..., Any]:
    def call(path: Any, *arguments: Any, **named: Any) -> Any:
        if Path(path).name == part:
            raise OSError(number, os.strerror(number))
        return real(path, *arguments, **named)

    return call


def test_a_folder_is_listed_again_until_it_can_be(tmp_path, monkeypatch):
    fill(tmp_path, "a.png", "in/b.png")
    monkeypatch.setattr(os, "scandir", failing(errno.ESTALE, 3, os.scandir))
    waits: list[float] = []
    found = find_sources([str(tmp_path)], retry=waiting(waits))
    assert [source.id for source in found] == ["a.png", "in/b.png"]
    assert len(waits) == 3


def test_an_input_that_cannot_be_looked_at_is_not_taken_for_missing(tmp_path, monkeypatch):
    fill(tmp_path, "a.png")
    with monkeypatch.context() as patch:
        patch.setattr(os, "stat", failing(errno.ESTALE, 99, os.stat))
        with pytest.raises(SourceUnavailable, match="Stale file handle"):
            find_sources([str(tmp_path)], retry=ONCE)
    monkeypatch.setattr(os, "stat", failing(errno.EACCES, 99, os.stat))
    with pytest.raises(InputError, match="unreadable: Permission denied") as caught:
        find_sources([str(tmp_path)], retry=ONCE)
    assert not isinstance(caught.value, SourceUnavailable)


def test_a_name_whose_kind_cannot_be_found_out_is_not_passed_over_as_a_file(tmp_path, monkeypatch):
    """A link to a folder on a mount that is lost would be a file without extension."""
    entry = type("Entry", (), {"name": "link", "is_symlink": lambda self: True})()
    entry.is_dir = failing(errno.ESTALE, 1, lambda: True)
    with pytest.raises(OSError, match="Stale"):
        folder._entry(entry)
    entry.is_dir = failing(errno.ELOOP, 1, lambda: True)
    assert not folder._entry(entry).is_folder


def test_a_folder_that_is_gone_with_its_mount_stops_the_search(tmp_path):
    top = fill(tmp_path / "mnt", "a/1.png", "b/2.png")
    found = find_sources([str(top)], retry=ONCE)
    next(found)
    shutil.rmtree(top)
    with pytest.raises(SourceUnavailable, match="is gone or was replaced"):
        list(found)


def test_a_folder_that_is_removed_while_the_search_comes_to_it_is_listed(tmp_path):
    fill(tmp_path, "a/1.png", "b/2.png")
    found = find_sources([str(tmp_path)], retry=ONCE)
    next(found)
    shutil.rmtree(tmp_path / "b")
    (gone,) = found
    assert isinstance(gone, UnreadableSource)
    assert gone.id == "b"


# Archives


def zip_and_tar(folder_: Path) -> list[Path]:
    with zipfile.ZipFile(folder_ / "a.zip", "w") as archive:
        archive.writestr("a.png", b"a")
    with tarfile.open(folder_ / "a.tar", "w") as archive:
        member = tarfile.TarInfo("a.png")
        member.size = 1
        archive.addfile(member, BytesIO(b"a"))
    with tarfile.open(folder_ / "a.tgz", "w:gz") as archive:
        archive.addfile(member, BytesIO(b"a"))
    return [folder_ / "a.zip", folder_ / "a.tar", folder_ / "a.tgz"]


def parquet(folder_: Path) -> Path:
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    pq.write_table(pa.table({"image": [b"a"]}), folder_ / "a.parquet")
    return folder_ / "a.parquet"


@pytest.mark.parametrize("position", range(4))
def test_a_member_of_an_archive_that_cannot_be_reached_is_no_bad_image(
    position, tmp_path, monkeypatch
):
    path = [*zip_and_tar(tmp_path), parquet(tmp_path)][position]
    (source,) = find_sources([str(path)])
    with monkeypatch.context() as patch:
        patch.setattr(os, "open", failing(errno.ESTALE, 99, os.open))
        with pytest.raises(SourceUnavailable, match="Stale file handle"):
            source.read(ONCE)
        with pytest.raises(SourceUnavailable, match="Stale file handle"):
            find_sources([str(path)], retry=ONCE)
    assert source.read(ONCE) == b"a"
    monkeypatch.setattr(os, "read", failing(errno.EIO, 99, os.read))
    with pytest.raises(SourceUnavailable, match="Input/output error"):
        find_sources([str(path)], retry=ONCE)


def test_an_archive_that_was_searched_and_is_gone_cannot_be_reached(tmp_path):
    for path in [*zip_and_tar(tmp_path), parquet(tmp_path)]:
        (source,) = find_sources([str(path)])
        path.unlink()
        with pytest.raises(SourceUnavailable, match="it was there before and is missing now"):
            source.read(ONCE)


def test_an_archive_is_opened_again_where_its_handle_has_become_stale(tmp_path, monkeypatch):
    path = zip_and_tar(tmp_path)[0]
    waits: list[float] = []
    with PlaceFile(str(path), waiting(waits)) as file:
        whole = file.read()
        assert whole == path.read_bytes()
        monkeypatch.setattr(os, "read", failing(errno.ESTALE, 2, os.read))
        file.seek(10)
        assert file.read() == whole[10:]
    assert len(waits) == 2


def test_an_archive_that_is_replaced_while_it_is_read_is_not_read_on(tmp_path, monkeypatch):
    path = zip_and_tar(tmp_path)[0]
    with PlaceFile(str(path), waiting([])) as file:
        file.read(10)
        path.write_bytes(path.read_bytes() + b"more")
        monkeypatch.setattr(os, "read", failing(errno.ESTALE, 1, os.read))
        with pytest.raises(SourceUnavailable, match="was replaced while it was read"):
            file.read(10)


# The web


class Answers(ThreadingHTTPServer):
    """A web server on the loopback device that gives what a test tells it to."""

    daemon_threads = True
    statuses: list[int]
    """Statuses of the next answers; 200 when there is none left."""
    headers: dict[str, str]
    seen: int = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Answer(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Answers

    def do_HEAD(self) -> None:
        self.answer(has_body=False)

    def do_GET(self) -> None:
        self.answer(has_body=True)

    def answer(self, *, has_body: bool) -> None:
        self.server.seen += 1
        if self.path == "/cut.png":
            self.send_response(200)
            self.send_header("Content-Length", "100")
            self.end_headers()
            self.wfile.write(b"too little")
            self.close_connection = True
            return
        if self.path == "/closed.png":
            self.close_connection = True
            return
        if self.path.startswith("/endless"):
            self.endless(has_body=has_body)
            return
        status = self.server.statuses.pop(0) if self.server.statuses else 200
        body = b"image" if status == 200 else b"no"
        self.send_response(status)
        for name, value in self.server.headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if has_body:
            self.wfile.write(body)

    def endless(self, *, has_body: bool) -> None:
        self.send_response(200)
        if not has_body:
            if self.path.endswith(".png"):
                self.send_header("Content-Length", "10")  # a lie
            self.end_headers()
            return
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        block = b"\xff\xd8\xff" + bytes(2**16)
        try:
            for _ in range(2_000):
                self.wfile.write(b"%x\r\n" % len(block) + block + b"\r\n")
                self.server.seen += 1
        except OSError:
            self.close_connection = True

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def web() -> Iterator[Answers]:
    pytest.importorskip("fsspec")
    pytest.importorskip("aiohttp")
    with Answers(("127.0.0.1", 0), Answer) as server:
        server.statuses, server.headers = [], {}
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.mark.parametrize(
    ("status", "name"),
    [
        *((401, "Unauthorized"), (403, "Forbidden"), (408, "Request Timeout")),
        *((425, "Too Early"), (429, "Too Many Requests"), (500, "Internal Server Error")),
        *((502, "Bad Gateway"), (503, "Service Unavailable"), (504, "Gateway Timeout")),
    ],
)
def test_a_store_that_refuses_or_is_busy_is_no_fault_of_the_image(status, name, web):
    web.statuses = [status] * 9
    with pytest.raises(SourceUnavailable) as caught:
        UrlSource("x", f"{web.url}/a.png").read(ONCE)
    assert str(caught.value).startswith(
        f"{web.url}/a.png: cannot be reached now: {status} {name}. "
    )
    web.statuses = [status] * 9
    with pytest.raises(SourceUnavailable, match=f"{status} {name}"):
        find_sources([f"{web.url}/a.png"], retry=ONCE)


@pytest.mark.parametrize(
    ("status", "kind"), [(404, "missing"), (410, "missing"), (400, "unreadable"), (451, None)]
)
def test_an_answer_about_one_object_costs_that_image(status, kind, web):
    web.statuses = [status]
    with pytest.raises(InputError) as caught:
        UrlSource("x", f"{web.url}/a.png").read(ONCE)
    assert not isinstance(caught.value, SourceUnavailable)
    assert caught.value.kind == (kind or "unreadable")
    assert status == 404 or str(caught.value).startswith(f"{status} ")


def test_a_busy_store_is_asked_again_after_the_time_it_names(web):
    web.statuses, web.headers = [429, 503, 429], {"Retry-After": "7"}
    waits: list[float] = []
    assert UrlSource("x", f"{web.url}/a.png").read(waiting(waits)) == b"image"
    assert len(waits) == 3
    assert min(waits) >= 7


def test_a_store_that_asks_for_more_time_than_there_is_is_not_waited_for(web):
    web.statuses, web.headers = [429] * 9, {"Retry-After": "3600"}
    waits: list[float] = []
    with pytest.raises(SourceUnavailable, match=r"429 Too Many Requests; it asks to wait 3,600 s"):
        UrlSource("x", f"{web.url}/a.png").read(waiting(waits))
    assert waits == []


def test_a_date_may_stand_for_the_time_to_wait():
    from datetime import UTC, datetime, timedelta
    from email.utils import format_datetime

    date = format_datetime(datetime.now(UTC) + timedelta(seconds=90), usegmt=True)
    error = type("Busy", (Exception,), {"status": 503, "headers": {"Retry-After": date}})()
    asked = fault_of_store(error).retry_after_s
    assert asked is not None
    assert 60 < asked <= 90
    error.headers = {"retry-after": "soon"}
    assert fault_of_store(error).retry_after_s is None


def test_refused_access_is_not_tried_for_long(web):
    web.statuses = [403] * 99
    waits: list[float] = []
    with pytest.raises(SourceUnavailable, match="403 Forbidden"):
        UrlSource("x", f"{web.url}/a.png").read(waiting(waits))
    assert 0 < sum(waits) <= retry.LASTING_PATIENCE_S


def test_a_connection_that_is_refused_or_breaks_off_is_no_fault_of_the_image(web):
    for name in ("cut.png", "closed.png"):
        with pytest.raises(SourceUnavailable, match=rf"{name}: cannot be reached now: "):
            UrlSource("x", f"{web.url}/{name}").read(ONCE)
    web.server_close()
    with pytest.raises(SourceUnavailable, match="cannot be reached now: "):
        UrlSource("x", f"{web.url}/a.png").read(ONCE)


def test_a_name_that_does_not_resolve_is_no_fault_of_the_image():
    pytest.importorskip("aiohttp")
    with pytest.raises(SourceUnavailable, match=r"the name does not resolve"):
        UrlSource("x", "http://no-such-host.invalid/a.png").read(ONCE)


def test_a_failure_of_tls_is_no_fault_of_the_image(web):
    url = web.url.replace("http:", "https:")
    with pytest.raises(SourceUnavailable, match=r"TLS failed"):
        UrlSource("x", f"{url}/a.png").read(ONCE)


@pytest.mark.timeout(60)
def test_the_limit_of_size_holds_without_a_length_and_with_a_wrong_one(web):
    with pytest.raises(InputError, match=r"^too large: .* over the limit of 1,000,000 bytes") as it:
        fetch(f"{web.url}/endless.png", 1_000_000)
    assert it.value.kind == "too large"
    assert web.seen < 500, "all of it was read"


def test_an_archive_without_a_length_says_what_to_do(web):
    for name in ("endless.zip", "endless.parquet"):
        (source,) = find_sources([f"{web.url}/{name}"])
        with pytest.raises(InputError, match=r"does not say how long it is.* download it first"):
            source.read(ONCE)


# Object stores


@pytest.fixture
def bucket(web: Answers, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """An object store that gives the answers of `web`."""
    s3fs = pytest.importorskip("s3fs")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "testing")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_ENDPOINT_URL", web.url)
    s3fs.S3FileSystem.clear_instance_cache()
    yield "s3://bucket"
    s3fs.S3FileSystem.clear_instance_cache()


@pytest.mark.parametrize(
    ("status", "text"), [(403, "403 Forbidden"), (400, "400 Bad Request"), (500, "500 Internal")]
)
def test_an_object_store_that_refuses_is_no_fault_of_the_image(status, text, bucket, web):
    web.statuses = [status] * 99
    with pytest.raises(SourceUnavailable, match=rf"a\.png: cannot be reached now: {text}"):
        UrlSource("x", f"{bucket}/a.png").read(ONCE)


def test_an_object_that_is_not_there_costs_that_image(bucket, web):
    web.statuses = [404] * 9
    with pytest.raises(InputError, match=r"^404 Not Found") as caught:
        UrlSource("x", f"{bucket}/a.png").read(ONCE)
    assert caught.value.kind == "missing"


def test_an_object_of_a_store_is_read(bucket, web):
    assert UrlSource("x", f"{bucket}/a.png").read(ONCE) == b"image"


def boto_error(status: int, code: str, message: str = "") -> Exception:
    response = {
        "Error": {"Code": code, "Message": message},
        "ResponseMetadata": {"HTTPStatusCode": status, "HTTPHeaders": {"retry-after": "4"}},
    }
    return type("ClientError", (Exception,), {"response": response})("an error occurred")


@pytest.mark.parametrize(
    ("error", "kind", "reason"),
    [
        (
            boto_error(503, "SlowDown", "Wait"),
            "unavailable",
            "503 Service Unavailable (SlowDown: W",
        ),
        (boto_error(400, "ExpiredToken"), "unavailable", "400 Bad Request (ExpiredToken)"),
        (boto_error(400, "400", "Bad Request"), "unavailable", "400 Bad Request"),
        (boto_error(403, "AccessDenied"), "unavailable", "403 Forbidden (AccessDenied)"),
        (boto_error(403, "InvalidObjectState", "in Glacier"), "unreadable", "403 Forbidden (Inval"),
        (boto_error(404, "NoSuchKey"), "missing", "404 Not Found (NoSuchKey)"),
        (boto_error(404, "NoSuchBucket"), "unavailable", "404 Not Found (NoSuchBucket)"),
        (type("NoCredentialsError", (Exception,), {})("none"), "unavailable", "none"),
        (type("ServerError", (Exception,), {"code": "502"})(), "unavailable", "502 Bad Gateway"),
        (type("Odd", (Exception,), {})("it broke"), "unavailable", "it broke"),
        (OSError("Forbidden"), "unavailable", "Forbidden"),
        (TimeoutError(), "unavailable", "timed out"),
        (ConnectionResetError(104, "Connection reset by peer"), "unavailable", "Connection reset"),
        (FileNotFoundError("x"), "missing", "no such file"),
        (IsADirectoryError(21, "Is a directory"), "unreadable", "unreadable: "),
        (ValueError("no such path"), "unreadable", "unreadable: no such path"),
        (PermissionError(13, "Permission denied"), "unreadable", "unreadable: "),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_what_the_errors_of_stores_mean(error, kind, reason):
    fault = fault_of_store(error)
    assert fault.kind == kind
    assert fault.reason.startswith(reason)
    wrapper = FileNotFoundError("x")
    wrapper.__cause__ = error
    assert fault_of_store(wrapper) == fault, "fsspec's web file system calls everything missing"


def test_a_store_that_names_a_time_is_believed():
    assert fault_of_store(boto_error(503, "SlowDown")).retry_after_s == 4


def test_a_kind_of_url_that_needs_a_package_is_no_store_that_is_down(monkeypatch):
    source: Source = UrlSource("x", "nonsense://x")
    with pytest.raises(UsageError, match="nonsense://x"):
        source.read(ONCE)
