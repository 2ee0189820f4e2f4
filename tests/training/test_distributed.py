"""Two processes train the model that one process would train."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from vsc_serve.errors import UsageError
from vsc_training.checkpoint import load_checkpoint
from vsc_training.distributed import Group, joined_group, mean_over_ranks

TERMS_OF_TWO_RANKS = """
import sys
from pathlib import Path

import torch
from vsc_training.distributed import joined_group, mean_over_ranks
from vsc_training.objective import sparsity_per_latent

torch.manual_seed(0)
logits = torch.randn(8, 5, dtype=torch.float64)
with joined_group(torch.device("cpu")) as (group, _):
    own = group.share(torch.arange(8))
    weight = torch.ones(5, dtype=torch.float64, requires_grad=True)
    term = sparsity_per_latent(mean_over_ranks(torch.sigmoid(logits[own] * weight).mean(0)), 0.05)
    term.backward()
    torch.distributed.all_reduce(weight.grad)
    averaged = weight.grad / group.size
    whole = torch.ones(5, dtype=torch.float64, requires_grad=True)
    expected = sparsity_per_latent(torch.sigmoid(logits * whole).mean(0), 0.05)
    expected.backward()
    torch.testing.assert_close(term, expected)
    torch.testing.assert_close(averaged, whole.grad)
    Path(sys.argv[1], f"rank{group.rank}").touch()
"""

ADDRESS = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}


def run_two(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Start two ranks as torchrun does, on a free port of this machine."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    environment = dict(os.environ) | {"OMP_NUM_THREADS": "1"}
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node=2", "--nnodes=1"]
    address = ["--master-addr=127.0.0.1", f"--master-port={port}"]
    return subprocess.run(
        [sys.executable, *launcher, *address, *arguments],
        capture_output=True,
        text=True,
        env=environment,
        timeout=300,
        check=False,
    )


@pytest.mark.slow
def test_terms_over_the_whole_batch_have_the_gradient_of_one_process(tmp_path: Path) -> None:
    script = tmp_path / "terms.py"
    script.write_text(TERMS_OF_TWO_RANKS, encoding="utf-8")
    done = run_two(str(script), str(tmp_path))
    assert done.returncode == 0, done.stderr
    # Files, not lines: both ranks print to one pipe, and lines can mix.
    assert sorted(path.name for path in tmp_path.glob("rank*")) == ["rank0", "rank1"]


@pytest.mark.slow
def test_vsc_train_runs_in_two_processes_and_resumes(grey_folder: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    fields = ["latent_dim=16", "hidden=64", "pseudo_inputs=4", "batch_size=32", "alpha=0.2"]
    fields += ["steps=300", "learning_rate=0.005"]
    sets = [part for field in fields for part in ("--set", field)]
    command = ["-m", "vsc_serve", "train", str(grey_folder), "--out", str(run), *sets]
    done = run_two(*command, "--threads", "1")
    assert done.returncode == 0, done.stderr
    assert "on cpu in 2 processes" in done.stderr
    assert done.stderr.count("data     ") == 1, "only the first process talks"
    checkpoint = load_checkpoint(run)
    assert checkpoint.state.step == 300
    assert set(checkpoint.random) == {"0", "1"}
    assert not torch.equal(checkpoint.random["0"], checkpoint.random["1"])
    assert checkpoint.state.metrics["live"] >= 12
    resumed = run_two(*command, "--threads", "1", "--resume")
    assert resumed.returncode == 0, resumed.stderr
    alone = subprocess.run(
        [sys.executable, *command, "--resume"], capture_output=True, text=True, check=False
    )
    assert alone.returncode == 2
    assert "began with 2 processes" in alone.stderr


def test_a_batch_that_cannot_be_shared_evenly_is_refused() -> None:
    assert Group(1, 2).share(torch.arange(6)).tolist() == [1, 3, 5]
    with pytest.raises(UsageError, match="batch_size=128"):
        Group(0, 2).share(torch.arange(129))


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE is 2, but RANK, MASTER_ADDR, MASTER_PORT are not set"),
        ({"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "x"}, "but MASTER_PORT is not set"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE is 'two', not a number from 1 on"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE is '0', not a number from 1 on"),
        (
            {"WORLD_SIZE": "2", "RANK": "2", "MASTER_ADDR": "x", "MASTER_PORT": "1"},
            "RANK is 2, but",
        ),
        (
            {"WORLD_SIZE": "2", "RANK": "", "MASTER_ADDR": "x", "MASTER_PORT": "1"},
            "RANK is '', not",
        ),
    ],
)
def test_an_environment_that_describes_a_group_only_in_part_says_what_is_missing(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], message: str
) -> None:
    for name in ("WORLD_SIZE", "RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, match=message), joined_group(torch.device("cpu")):
        pass


def test_a_group_of_one_in_the_environment_is_no_group(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.delenv("RANK", raising=False)
    with joined_group(torch.device("cpu")) as (group, _):
        assert group == Group()


def test_a_single_process_means_its_own_mean() -> None:
    local = torch.tensor([1.0, 2.0])
    assert mean_over_ranks(local) is local
