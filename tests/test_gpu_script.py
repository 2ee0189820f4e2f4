"""The script that measures on a GPU keeps what it has measured, and stops without a GPU."""

import json
from pathlib import Path

import pytest

from benchmarks.gpu import __main__ as script
from benchmarks.gpu.results import Results
from benchmarks.gpu.sizes import DRY, FULL
from vsc_serve.session import cuda_is_there


def test_without_a_gpu_it_stops_with_the_reason(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if cuda_is_there():
        pytest.skip("this machine has CUDA")
    monkeypatch.setenv("VSC_REQUIRE_GPU", "1")
    for arguments in ([], ["--dry"]):
        assert script.main([*arguments, "--out", str(tmp_path / "out")]) == 5
        assert "no GPU to measure" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_parts_that_are_done_are_kept_and_written_after_each(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[str] = []

    def part(name: str, *, fails: bool = False) -> script.Part:
        def run(sizes: object, work: Path) -> dict[str, object]:
            ran.append(name)
            if fails:
                raise RuntimeError("out of memory")
            return {"rows": [{"images": name, "images/s": 12345.6}], "passed": name != "serve"}

        return run

    parts = {"parity": part("parity"), "encode": part("encode", fails=True)}
    monkeypatch.setattr(script, "PARTS", parts)
    monkeypatch.delenv("VSC_REQUIRE_GPU", raising=False)
    arguments = ["--dry", "--out", str(tmp_path), "--parts", "parity", "encode"]
    with pytest.raises(RuntimeError, match="out of memory"):
        script.main(arguments)
    stored = json.loads((tmp_path / "results.json").read_text())
    assert list(stored["parts"]) == ["parity"]
    assert "| parity | 12,346 |" in (tmp_path / "results.md").read_text()
    parts["encode"] = part("encode")
    parts["serve"] = part("serve")
    assert script.main([*arguments, "serve"]) == 1
    assert ran == ["parity", "encode", "encode", "serve"]
    assert "failed: serve" in capsys.readouterr().err
    assert script.main([*arguments, "--again"]) == 0
    assert ran[4:] == ["parity", "encode"]


def test_results_of_another_machine_or_size_are_not_mixed(tmp_path: Path) -> None:
    machine = {"gpu": "one"}
    Results.open(tmp_path, machine, DRY, again=False).add("parity", {"seconds": 1.0})
    assert Results.open(tmp_path, machine, DRY, again=False).has("parity")
    assert not Results.open(tmp_path, {"gpu": "two"}, DRY, again=False).has("parity")
    assert not Results.open(tmp_path, machine, FULL, again=False).has("parity")
