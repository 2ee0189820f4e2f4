"""Training by the paper's schedule, with and without a compiled step."""

import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.gpu.sizes import Sizes
from vsc_serve.errors import UsageError
from vsc_serve.images import PixelSpec
from vsc_training.config import load_recipe
from vsc_training.data import Examples
from vsc_training.model import DataSpec
from vsc_training.trainer import Trainer

_WARM_STEPS = 30
"""Steps before the clock starts: kernels are chosen, and the compiler is done."""


def run(sizes: Sizes, work: Path) -> dict[str, Any]:
    """Train both ways and give the rates."""
    rows = []
    for is_compiled in (False, True):
        name = "--compile" if is_compiled else "plain"
        try:
            rows.append({"step": name} | _train(sizes, is_compiled=is_compiled))
        except UsageError as error:
            rows.append({"step": name, "note": str(error)[:120]} | _none())
    return {"rows": rows, "facts": {"settings": f"paper recipe, J=200, U=20, {sizes.train_batch}"}}


def _none() -> dict[str, Any]:
    return {"steps": 0, "seconds": 0.0, "steps/s": 0.0, "images/s": 0.0, "70,000 steps, s": 0.0}


def _train(sizes: Sizes, *, is_compiled: bool) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    side = 28
    pixels = (rng.random((sizes.train_images, side, side, 1)) < 0.2).astype(np.uint8) * 255
    spec = DataSpec(pixel_spec=PixelSpec(height=side, width=side, channels=1))
    ids = [str(number) for number in range(sizes.train_images)]
    overrides = [
        f"steps={sizes.train_steps}",
        f"batch_size={sizes.train_batch}",
        f"hidden={sizes.train_hidden}",
        "latent_dim=200",
        "pseudo_inputs=20",
        "on_collapse=warn",
    ]
    recipe = load_recipe("paper", overrides)
    device = torch.device(sizes.device)
    trainer = Trainer(recipe, Examples(pixels, ids, spec), device, is_compiled=is_compiled)
    for _ in range(min(_WARM_STEPS, sizes.train_steps // 4)):
        trainer.advance()
    _synchronise(device)
    began, first = time.perf_counter(), trainer.step
    while trainer.step < recipe.steps and time.perf_counter() - began < sizes.train_limit_s:
        for _ in range(min(50, recipe.steps - trainer.step)):
            trainer.advance()
    _synchronise(device)
    seconds, steps = time.perf_counter() - began, trainer.step - first
    return {
        "note": "whole schedule" if trainer.step == recipe.steps else "stopped at the limit",
        "steps": steps,
        "seconds": seconds,
        "steps/s": steps / seconds,
        "images/s": steps * sizes.train_batch / seconds,
        "70,000 steps, s": 70_000 * seconds / steps,
    }


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()
