"""The run folder: one checkpoint that is always whole, and JSON for people and programs.

A run folder holds

    checkpoint.safetensors   weights, optimiser moments, random states; the JSON state as header
    recipe.toml              the resolved recipe
    samples.npz              some examples, on which an export is compared with the model
    run.json                 what the run is: data, network, step, metrics
    log.jsonl                one line per logged step
    tensorboard/             the same for TensorBoard

The checkpoint is written under a temporary name and renamed, so the last good one survives
anything.
"""

import json
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from vsc_serve.atomic import atomic_file
from vsc_serve.errors import InputError, UsageError
from vsc_serve.images import PixelSpec
from vsc_serve.images.preprocess import stored_fields
from vsc_serve.outputs import MARKER, FolderKind, check_output, remove_folder, write_marker
from vsc_serve.schema import conform, conform_fields, load_json
from vsc_training.backbone import BackboneSpec
from vsc_training.config import Recipe
from vsc_training.data import Examples, split_rows
from vsc_training.model import VSC, DataSpec

FORMAT: Final = 1
CHECKPOINT: Final = "checkpoint.safetensors"
RECIPE: Final = "recipe.toml"
SUMMARY: Final = "run.json"
LOG: Final = "log.jsonl"
SAMPLES: Final = "samples.npz"
ERRORS: Final = "errors.jsonl"
SAMPLE_COUNT: Final = 512
"""Examples kept for the export's comparison."""

_OLD_METRICS: Final = "figures"
_OLD_RECIPE: Final = {"encoder": "mlp", "decoder": "mlp", "regularisation": "none"}
"""Fields of the recipe that runs of an earlier release lack, and what they were."""
_OLD_SAMPLES: Final = {"images": "pictures"}
"""Keys of the metrics, and of arrays in `samples.npz`, in runs of an earlier release."""

_KIND: Final = "run"
_WEIGHTS: Final = "weights."
_OPTIMIZER: Final = "optimizer."
_RANDOM: Final = "random."


def _run_files(stored: dict[str, Any]) -> Sequence[str] | None:
    """Return patterns of what a run folder holds; None where it is none."""
    is_run = stored.get("kind") == _KIND or {"recipe", "step"} <= stored.keys()
    names = (CHECKPOINT, RECIPE, SUMMARY, SAMPLES, LOG, ERRORS, "tensorboard/*")
    return names if is_run else None


RUN_FOLDER: Final = FolderKind(
    name="a training run", markers=(SUMMARY, MARKER), contents=_run_files
)


@dataclass(frozen=True, kw_only=True)
class RunState:
    """The part of a checkpoint that is not tensors."""

    step: int
    """Optimiser steps done."""
    recipe: Recipe
    """The resolved recipe."""
    data: DataSpec
    """What the model is fitted to."""
    data_fingerprint: str
    """Digest of the training data."""
    metrics: dict[str, Any]
    """Last metrics of health and loss."""
    name: str
    """Name of the model."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint in memory."""

    state: RunState
    weights: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    random: dict[str, Tensor]

    def build_model(self) -> VSC:
        """Return the model with the stored weights, in eval mode, on the CPU.

        Raises:
            InputError: The weights are not those of the recipe.
        """
        self._check_weights()
        model = VSC(self.state.recipe, self.state.data)
        model.load_state_dict(self.weights)
        return model.eval()

    def _check_weights(self) -> None:
        """Compare names and shapes first: a wrong number in a recipe must not take memory."""
        try:
            with torch.device("meta"):
                wanted = VSC(self.state.recipe, self.state.data).state_dict()
        except (RuntimeError, ValueError, TypeError, OverflowError, MemoryError) as error:
            reason = str(error).partition("\n")[0]
            raise InputError(f"the recipe of the checkpoint makes no model ({reason}).") from error
        found = self.weights
        differing = sorted(wanted.keys() ^ found.keys()) or [
            name for name in wanted if wanted[name].shape != found[name].shape
        ]
        if differing:
            raise InputError(
                f"the weights of the checkpoint are not those of its recipe: {differing[0][:100]}."
                " Train again or restore a copy."
            )


def save_checkpoint(run: Path, checkpoint: Checkpoint) -> None:
    """Write a checkpoint and the JSON summary beside it. Raises InputError (a full disk)."""
    tensors = (
        _prefixed(_WEIGHTS, checkpoint.weights)
        | _prefixed(_OPTIMIZER, checkpoint.optimizer)
        | _prefixed(_RANDOM, checkpoint.random)
    )
    state = _state_to_json(checkpoint.state)
    content = save(tensors, metadata={"vsc_state": json.dumps(state, sort_keys=True)})
    with atomic_file(run / CHECKPOINT) as file:
        file.write(content)
    with atomic_file(run / SUMMARY) as file:
        file.write((json.dumps(state, indent=2, sort_keys=True) + "\n").encode())


def load_checkpoint(run: Path) -> Checkpoint:
    """Read the checkpoint of a run.

    Raises:
        UsageError: There is none.
        InputError: It is damaged or of a newer format.
    """
    with _opened(run) as stored:
        tensors = {name: stored.get_tensor(name) for name in list(stored.keys())}
        state = _read_state(stored, run)
    return Checkpoint(
        state,
        _stripped(_WEIGHTS, tensors),
        _stripped(_OPTIMIZER, tensors),
        _stripped(_RANDOM, tensors),
    )


def load_state(run: Path) -> RunState:
    """Read what is not tensors of a run's checkpoint. Raises as `load_checkpoint` does."""
    with _opened(run) as stored:
        return _read_state(stored, run)


@contextmanager
def _opened(run: Path) -> Iterator[Any]:
    path = run / CHECKPOINT
    if not path.is_file():
        raise UsageError(f"{run}: no {CHECKPOINT} there. Train first: vsc train DATA --out {run}")
    try:
        with safe_open(path, framework="pt") as stored:
            yield stored
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise InputError(f"{path}: damaged ({error}). Train again or restore a copy.") from error


def _read_state(stored: Any, run: Path) -> RunState:
    metadata = stored.metadata() or {}
    return _state_from_json(load_json(metadata["vsc_state"]), run / CHECKPOINT)


def start_run(
    run: Path, recipe: Recipe, examples: Examples, *, resume: bool, force: bool = False
) -> None:
    """Make the run folder and write what is known before training.

    Args:
        run: The folder.
        recipe: The resolved recipe.
        examples: The data; a few rows are kept for the export.
        resume: Keep what is there; only the recipe is written again, where it has changed.
        force: Remove a run that is there.

    Raises:
        UsageError: The folder is there already and may not be replaced.
        InputError: The folder cannot be written.
    """
    if resume:
        _write_recipe(run, recipe)
        return
    check_output(run, RUN_FOLDER, force=force)
    try:
        remove_folder(run, RUN_FOLDER)
        run.mkdir(parents=True, exist_ok=True)
        write_marker(run, _KIND)
    except OSError as error:
        raise InputError(f"{run}: cannot be written ({error.strerror or error}).") from error
    _write_recipe(run, recipe)
    held_out = examples.split(recipe.validation_share)[1]
    save_samples(
        run,
        examples.rows[_spread(np.arange(len(examples.rows)))],
        examples.images,
        examples.rows[_spread(held_out)] if len(held_out) else None,
    )
    if examples.bad:
        with atomic_file(run / ERRORS) as file:
            file.writelines(
                (json.dumps({"id": image.id, "reason": image.reason}) + "\n").encode()
                for image in examples.bad
            )


def _spread(rows: NDArray[np.intp]) -> NDArray[np.intp]:
    """Return at most SAMPLE_COUNT of some row numbers, from the first to the last."""
    count = min(len(rows), SAMPLE_COUNT)
    return rows[np.linspace(0, len(rows) - 1, count).astype(np.intp)]


def _write_recipe(run: Path, recipe: Recipe) -> None:
    text = recipe.to_toml().encode()
    path = run / RECIPE
    if path.is_file() and path.read_bytes() == text:
        return
    with atomic_file(path) as file:
        file.write(text)


def save_samples(
    run: Path,
    rows: NDArray[Any],
    images: NDArray[np.uint8] | None = None,
    held_out: NDArray[Any] | None = None,
) -> None:
    """Keep some examples beside the checkpoint.

    Args:
        run: The run folder.
        rows: Shape (rows, *shape).
        images: Pixels of some images, where a backbone made the rows out of images.
        held_out: Rows that are not trained on, if any are kept out.
    """
    optional = {"images": images, "held_out": held_out}
    kept: dict[str, Any] = {name: part for name, part in optional.items() if part is not None}
    with atomic_file(run / SAMPLES) as file:
        np.savez_compressed(file, rows=rows, **kept)


def load_samples(run: Path) -> NDArray[Any]:
    """Read the rows that `save_samples` kept. Raises InputError when missing or damaged."""
    return _load_kept(run, "rows")


def load_images(run: Path) -> NDArray[np.uint8]:
    """Read the images that `save_samples` kept. Raises InputError when there are none."""
    return _load_kept(run, "images")


def load_held_out(run: Path, validation_share: float) -> NDArray[Any]:
    """Read rows that were not trained on; of an older run those among `load_samples`. May be none.

    Raises:
        InputError: As `load_samples`.
    """
    rows = load_samples(run)
    return _load_kept(run, "held_out", rows[split_rows(rows, validation_share)[1]])


def _load_kept(run: Path, name: str, default: NDArray[Any] | None = None) -> NDArray[Any]:
    try:
        with np.load(run / SAMPLES, allow_pickle=False) as stored:
            old = _OLD_SAMPLES.get(name)
            if default is not None and name not in stored:
                return default
            kept: NDArray[Any] = stored[old if old in stored else name]
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise InputError(f"{run / SAMPLES}: unreadable ({error}). Train again.") from error
    return kept


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return the optimiser's state as named tensors."""
    return {
        f"{position}.{name}": value
        for position, slots in optimizer.state_dict()["state"].items()
        for name, value in slots.items()
    }


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Put back what `optimizer_tensors` took."""
    stored = optimizer.state_dict()
    slots: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        position, name = key.split(".", 1)
        slots.setdefault(int(position), {})[name] = value
    stored["state"] = slots
    optimizer.load_state_dict(stored)


def _state_to_json(state: RunState) -> dict[str, Any]:
    spec = state.data.pixel_spec
    return {
        "format": FORMAT,
        "name": state.name,
        "step": state.step,
        "recipe": asdict(state.recipe),
        "pixel_spec": spec.to_json() if spec else None,
        "input_dim": state.data.input_dim,
        "backbone": state.data.backbone.to_json() if state.data.backbone else None,
        "data_fingerprint": state.data_fingerprint,
        "metrics": state.metrics,
    }


@dataclass(frozen=True, kw_only=True)
class _StoredState:
    """The JSON in the header."""

    step: int
    recipe: Recipe
    pixel_spec: dict[str, Any] | None
    input_dim: int | None
    data_fingerprint: str
    metrics: dict[str, Any]
    name: str
    backbone: dict[str, Any] | None = None


def _state_from_json(stored: Any, path: Path) -> RunState:
    """Return what the header says. Raises ValueError, KeyError, InputError or UsageError."""
    stored = conform(stored, dict[str, Any], "the state")
    if stored.get("format") != FORMAT:
        raise InputError(
            f"{path}: checkpoint format {stored.get('format')}, but this version reads format"
            f" {FORMAT}."
            " Upgrade vsc-serve, or train again."
        )
    if "metrics" not in stored and _OLD_METRICS in stored:
        stored = {**stored, "metrics": stored[_OLD_METRICS]}
    if isinstance(recipe := stored.get("recipe"), dict):
        stored = {**stored, "recipe": _OLD_RECIPE | recipe}
    found = conform_fields(stored, _StoredState, ignore=True)
    backbone = BackboneSpec.from_json(found.backbone) if found.backbone else None
    spec = found.pixel_spec and conform_fields(
        stored_fields(found.pixel_spec), PixelSpec, "pixel_spec", ignore=True
    )
    return RunState(
        step=found.step,
        recipe=found.recipe,
        data=DataSpec(pixel_spec=spec or None, input_dim=found.input_dim, backbone=backbone),
        data_fingerprint=found.data_fingerprint,
        metrics=found.metrics,
        name=found.name,
    )


def _prefixed(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def _stripped(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name[len(prefix) :]: t for name, t in tensors.items() if name.startswith(prefix)}
