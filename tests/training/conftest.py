"""Settings of all tests of training."""

import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    """Compute small products on one thread: the other cores are busy with tests."""
    torch.set_num_threads(1)
