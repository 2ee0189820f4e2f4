"""Only plain files inside the folder are opened, and JSON has the types that it must have."""

import os
import socket
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest

from vsc_serve.schema import conform, conform_fields, load_json
from vsc_serve.untrusted import inside, open_plain, read_plain


@pytest.mark.parametrize("kind", ["device", "pipe", "folder", "socket", "link to a pipe"])
@pytest.mark.timeout(20)
def test_what_is_no_regular_file_is_refused_and_never_waited_for(tmp_path, kind):
    path = tmp_path / "it"
    if kind == "device":
        path = Path(os.devnull)
    elif kind == "folder":
        path.mkdir()
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(os.fsencode(path))
    else:
        os.mkfifo(tmp_path / "pipe")
        path.symlink_to("pipe")
    with pytest.raises(ValueError, match="not a regular file"):
        open_plain(path)


def test_a_file_is_read_up_to_its_limit(tmp_path):
    (tmp_path / "a").write_bytes(b"12345")
    assert read_plain(tmp_path / "a", 5) == b"12345"
    with pytest.raises(ValueError, match="larger than 4 bytes"):
        read_plain(tmp_path / "a", 4)
    with pytest.raises(FileNotFoundError):
        read_plain(tmp_path / "b", 4)


@pytest.mark.parametrize(
    "name",
    [
        *("", ".", "..", "../a", "a/../../b", "/etc/passwd", "a//b", "a/", "./a", "a\\b", "C:a"),
        *("a\0b", "a\nb", "\x1b[2J", "a" * 1001, "\udcff"),
    ],
)
def test_a_name_that_is_none_or_leads_out_is_refused(tmp_path, name):
    with pytest.raises(ValueError, match="not a relative name of a file"):
        inside(tmp_path, name)


def test_a_link_may_stay_inside_and_not_lead_out(tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "a").write_bytes(b"1")
    (tmp_path / "secret").write_bytes(b"2")
    (folder / "in").symlink_to("a")
    (folder / "out").symlink_to("../secret")
    (folder / "absolute").symlink_to(tmp_path / "secret")
    (folder / "up").symlink_to("..")
    assert read_plain(inside(folder, "in"), 9) == b"1"
    for name in ("out", "absolute", "up/secret"):
        with pytest.raises(ValueError, match="leads out of the folder"):
            inside(folder, name)
    (tmp_path / "link").symlink_to(folder)  # how the folder itself is reached is its owner's affair
    assert inside(tmp_path / "link", "a") == tmp_path / "link" / "a"


def hub_cache(root: Path) -> Path:
    """A snapshot of a Hugging Face cache with one file, a link into `blobs`."""
    snapshot = root / "models--a--b" / "snapshots" / "rev"
    snapshot.mkdir(parents=True)
    blobs = root / "models--a--b" / "blobs"
    blobs.mkdir()
    (blobs / "123").write_bytes(b"1")
    (snapshot / "a").symlink_to("../../blobs/123")
    return snapshot


def test_the_links_of_a_hub_cache_are_followed(tmp_path):
    snapshot = hub_cache(tmp_path)
    assert read_plain(inside(snapshot, "a"), 9) == b"1"
    (snapshot / "model").mkdir()
    (snapshot / "model" / "a").symlink_to("../../../blobs/123")
    assert read_plain(inside(snapshot / "model", "a"), 9) == b"1"


def test_the_links_of_a_hub_cache_lead_nowhere_else(tmp_path):
    snapshot = hub_cache(tmp_path)
    (tmp_path / "secret").write_bytes(b"2")
    (snapshot / "b").symlink_to(tmp_path / "secret")
    (snapshot.parents[1] / "blobs" / "456").symlink_to(tmp_path / "secret")
    (snapshot / "c").symlink_to("../../blobs/456")
    for name in ("b", "c"):
        with pytest.raises(ValueError, match="leads out of the folder"):
            inside(snapshot, name)
    other = tmp_path / "other" / "snapshots" / "rev"
    other.mkdir(parents=True)
    (tmp_path / "other" / "blobs").symlink_to(tmp_path)
    (other / "d").symlink_to("../../blobs/secret")
    with pytest.raises(ValueError, match="leads out of the folder"):
        inside(other, "d")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('{"a": 1, "a": 2}', "'a' is there twice"),
        ("[NaN]", "NaN is no number"),
        ("[-Infinity]", "-Infinity is no number"),
        ("[1e999]", "1e999 is too large"),
        ("[" * 100_000, "nested too deep"),
        ('{"a":' * 100_000, "nested too deep"),
        ("1" * 5000, "4300"),
        ("", "Expecting value"),
        (b"\xff", "utf-8"),
    ],
)
def test_json_that_readers_may_take_differently_is_refused(text, reason):
    with pytest.raises(ValueError, match=reason):
        load_json(text)


@dataclass(frozen=True)
class Inner:
    values: list[int]


@dataclass(frozen=True)
class Outer:
    name: str
    kind: Literal["a", "b"]
    share: float
    inner: Inner | None = None
    digests: dict[str, str] = field(default_factory=dict)
    more: dict[str, Any] | None = None


PLAIN: dict[str, Any] = {"name": "x", "kind": "a", "share": 1}


def test_an_object_becomes_a_dataclass():
    stored = PLAIN | {"inner": {"values": [1, 2]}, "digests": {"a": "b"}, "more": {"c": [None]}}
    outer = conform_fields(stored, Outer)
    assert outer == Outer("x", "a", 1.0, Inner([1, 2]), {"a": "b"}, {"c": [None]})
    assert type(outer.share) is float
    assert conform_fields(PLAIN | {"new": 1}, Outer, ignore=True) == Outer("x", "a", 1.0)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"name": 1}, "name must be text, not 1"),
        ({"name": None}, "name must be text, not null"),
        ({"kind": "c"}, 'kind must be a or b, not "c"'),
        ({"kind": ["a"]}, "kind must be a or b, not a list"),
        ({"share": True}, "share must be a number, not true"),
        ({"share": 10**400}, "share must be a number, not 1000"),
        ({"inner": {"values": [1, 2.5]}}, r"inner.values\[1\] must be an integer, not 2.5"),
        ({"inner": {"values": [True]}}, r"inner.values\[0\] must be an integer, not true"),
        ({"inner": {"values": {}}}, "inner.values must be a list, not an object"),
        ({"inner": {}}, "inner.values is missing"),
        ({"inner": {"values": [], "x": 1}}, "inner.'x' is no known field"),
        ({"inner": []}, "inner must be an object, not a list"),
        ({"digests": {"a": 1}}, r"digests\['a'\] must be text, not 1"),
        ({"digests": None}, "digests must be an object, not null"),
        ({"more": "much " * 20}, 'more must be an object, not "much .*\\.\\.\\.'),
        ({"odd": 1}, "'odd' is no known field"),
    ],
)
def test_a_value_of_another_type_is_named(changes, reason):
    with pytest.raises(ValueError, match=f"^{reason}"):
        conform_fields(PLAIN | changes, Outer)


def test_a_missing_field_is_named():
    with pytest.raises(ValueError, match=r"^kind is missing"):
        conform_fields({"name": "x", "share": 1}, Outer)


def test_a_number_may_be_written_as_an_integer_and_not_the_reverse():
    assert conform(3, float, "it") == 3.0
    with pytest.raises(ValueError, match=r"it must be an integer, not 3\.0"):
        conform(3.0, int, "it")
