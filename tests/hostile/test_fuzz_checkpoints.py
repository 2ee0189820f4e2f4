"""Damaged and invented checkpoints give our own errors and nothing else.

`VSC_FUZZ_ROUNDS=134` makes 20,000 changes of each kind, the ordinary ones first.
"""

import json
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Final

import numpy as np
import pytest
import torch
from odd_values import change_value

from vsc_serve.errors import InputError, UsageError
from vsc_serve.images import PixelSpec
from vsc_training.checkpoint import (
    CHECKPOINT,
    Checkpoint,
    RunState,
    load_checkpoint,
    save_checkpoint,
)
from vsc_training.config import load_recipe
from vsc_training.model import VSC, DataSpec

ROUNDS: Final = int(os.environ.get("VSC_FUZZ_ROUNDS", "1"))
CHANGES: Final = 150 * ROUNDS
LENGTH_BYTES: Final = 8
"""Before the header of a safetensors file: how long it is."""


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """The run of a model that was never trained."""
    overrides = ["latent_dim=4", "hidden=8", "pseudo_inputs=3"]
    recipe = load_recipe("sparse", overrides)
    data = DataSpec(pixel_spec=PixelSpec(height=4, width=4, channels=1))
    weights = VSC(recipe, data).state_dict()
    state = RunState(
        step=3,
        recipe=recipe,
        data=data,
        data_fingerprint="0" * 16,
        metrics={"loss": 1.5},
        name="größe",
    )
    moments = {"0.exp_avg": torch.zeros(3)}
    save_checkpoint(tmp_path, Checkpoint(state, weights, moments, {"torch": torch.zeros(4)}))
    return tmp_path


def change_bytes(content: bytes, rng: np.random.Generator) -> bytes:
    """Flip, cut, repeat and overwrite, mostly in the header."""
    changed = bytearray(content)
    header = int.from_bytes(content[:LENGTH_BYTES], "little") + LENGTH_BYTES
    for _ in range(rng.integers(1, 5)):
        place = int(rng.integers(header if rng.integers(4) else len(changed)))
        how = rng.integers(6)
        if how < 3 and place < len(changed):
            changed[place] ^= int(rng.integers(1, 256))
        elif how == 3:
            del changed[place : place + int(rng.integers(1, 20))]
        elif how == 4:
            changed[place:place] = changed[place : place + int(rng.integers(1, 40))]
        elif rng.integers(4) == 0:
            del changed[place:]
    return bytes(changed)


def change_state(content: bytes, rng: np.random.Generator) -> bytes:
    """Put an odd value into the header, whose lengths stay right."""
    end = int.from_bytes(content[:LENGTH_BYTES], "little") + LENGTH_BYTES
    header = json.loads(content[LENGTH_BYTES:end])
    stored = json.loads(header["__metadata__"]["vsc_state"])
    text = json.dumps(change_value(stored, rng, depth=8))
    header["__metadata__"]["vsc_state"] = text
    changed = json.dumps(header).encode()
    return len(changed).to_bytes(LENGTH_BYTES, "little") + changed + content[end:]


@pytest.mark.filterwarnings("ignore:Initializing zero-element:UserWarning")  # layers of size 0
@pytest.mark.timeout(120 * ROUNDS + 60)
@pytest.mark.parametrize("change", [change_bytes, change_state])
def test_a_changed_checkpoint_is_read_or_refused(
    run: Path, change: Callable[[bytes, np.random.Generator], bytes]
) -> None:
    whole = (run / CHECKPOINT).read_bytes()
    load_checkpoint(run).build_model()
    found: Counter[str] = Counter()
    for seed in range(CHANGES):
        (run / CHECKPOINT).write_bytes(change(whole, np.random.default_rng(seed)))
        try:
            load_checkpoint(run).build_model()
        except (InputError, UsageError):
            found["refused"] += 1
        else:
            found["read"] += 1
    assert found["refused"] > CHANGES / 3
    assert found["read"] > CHANGES / 100
