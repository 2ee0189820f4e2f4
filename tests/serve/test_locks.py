"""Two runs never write one output at a time, whatever the file system can do."""

import errno
import fcntl
import logging
import subprocess
import sys
from pathlib import Path

import pytest

from vsc_serve.errors import InputError, UsageError
from vsc_serve.locks import exclusive

_HOLDER = """
import sys, time
from pathlib import Path
from vsc_serve.locks import exclusive
with exclusive(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.readline()
"""


def start_holder(out: Path) -> "subprocess.Popen[str]":
    """Start a process that holds the lock of an output until its stdin closes."""
    holder = subprocess.Popen(
        [sys.executable, "-c", _HOLDER, str(out)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    return holder


def refused(out: Path) -> None:
    with pytest.raises(UsageError, match=f"{out}: another run is writing there"), exclusive(out):
        pass


def test_a_second_run_is_refused_until_the_first_has_ended(tmp_path: Path) -> None:
    out = tmp_path / "codes.npz"
    with start_holder(out) as holder:
        with (
            pytest.raises(UsageError, match=r"codes\.npz: another run is writing there"),
            exclusive(out),
        ):
            pass
        holder.communicate("\n")
    with exclusive(out):
        assert [path.name for path in tmp_path.iterdir()] == [".codes.npz.lock"]
    assert not list(tmp_path.iterdir())


def test_a_killed_run_leaves_no_lock(tmp_path: Path) -> None:
    with start_holder(tmp_path / "out") as holder:
        holder.kill()
    with exclusive(tmp_path / "out"):
        pass
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_without_flock_another_lock_is_used_and_said(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    number: int,
) -> None:
    def fail(file: int, operation: int) -> None:
        raise OSError(number, "no flock here")

    monkeypatch.setattr(fcntl, "flock", fail)
    with caplog.at_level(logging.WARNING), exclusive(tmp_path / "out"):
        assert "no flock on this file system" in caplog.text
        with (
            pytest.raises(UsageError, match="another run is writing there"),
            exclusive(tmp_path / "out"),
        ):
            pass
    with exclusive(tmp_path / "out"):
        pass
    assert not list(tmp_path.iterdir())


def test_a_place_where_no_lock_can_be_made_is_no_other_run(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with (
        pytest.raises(InputError, match=r"out: cannot be written"),
        exclusive(tmp_path / "file" / "out"),
    ):
        pass
