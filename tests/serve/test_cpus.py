"""How many processors a process may use."""

from pathlib import Path

import pytest

from vsc_serve import cpus as machine
from vsc_serve.cpus import cgroup_quota, usable_cpus


@pytest.mark.parametrize(
    ("content", "quota"), [("max 100000\n", None), ("150000 100000\n", 1.5), ("400000 100000", 4.0)]
)
def test_the_quota_of_a_container_is_read(
    tmp_path: Path, content: str, quota: float | None
) -> None:
    (tmp_path / "cpu.max").write_text(content)
    assert cgroup_quota(tmp_path, tmp_path / "none") == quota


@pytest.mark.parametrize(("quota", "expected"), [("-1", None), ("250000", 2.5)])
def test_the_older_kind_of_quota_is_read(
    tmp_path: Path, quota: str, expected: float | None
) -> None:
    (tmp_path / "cpu.cfs_quota_us").write_text(f"{quota}\n")
    (tmp_path / "cpu.cfs_period_us").write_text("100000\n")
    assert cgroup_quota(tmp_path / "none", tmp_path) == expected


def test_without_a_container_there_is_no_quota(tmp_path: Path) -> None:
    assert cgroup_quota(tmp_path, tmp_path) is None


def test_the_quota_is_rounded_up_and_never_below_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine.os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    for quota, cpus in ((None, 8), (2.5, 3), (0.2, 1), (64.0, 8)):
        monkeypatch.setattr(machine, "cgroup_quota", lambda *paths, quota=quota: quota)
        assert usable_cpus() == cpus
