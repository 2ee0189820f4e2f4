"""The run of a fit: kept beside the bundle, so that the same fit goes on or costs seconds."""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from vsc_serve.bundle import BUNDLE_FOLDER
from vsc_serve.errors import InputError, UsageError
from vsc_serve.outputs import check_output
from vsc_training.checkpoint import CHECKPOINT, RUN_FOLDER, load_state
from vsc_training.config import Recipe
from vsc_training.data import Examples
from vsc_training.fit import fit
from vsc_training.metrics import Health
from vsc_training.resume import check_resume


def run_of(out: Path) -> Path:
    """Return the run folder of a bundle: `model-run` for `model`."""
    real = out.absolute()
    return out.parent / f"{real.name}-run"


def check_outputs(out: Path, *, force: bool, inputs: Sequence[Path]) -> None:
    """Refuse, before data are read, what could not be written. A run of an earlier fit may stay.

    Raises:
        UsageError: The bundle is there already and `force` is not given; or a folder is of another
            kind, or holds an input.
        InputError: A folder cannot be written.
    """
    check_output(out, BUNDLE_FOLDER, force=force, inputs=inputs)
    check_output(run_of(out), RUN_FOLDER, force=True, inputs=inputs)


def fit_again(
    recipe: Recipe,
    examples: Examples,
    run: Path,
    *,
    device: torch.device,
    name: str,
    report: Callable[[int, str], None],
    force: bool,
) -> Health:
    """Train, or go on with the run that is there where it is of the same data and recipe.

    Args:
        recipe: Every choice, resolved.
        examples: The data.
        run: The run folder.
        device: Where to compute.
        name: Name of the model.
        report: Is told the steps that are done.
        force: Replace a run of other data or another recipe.

    Raises:
        UsageError: The run there is another one, and `force` is not given.
        CheckFailed: The model has collapsed.
    """
    resumes = _is_same(recipe, examples, run, force=force)
    return fit(
        recipe,
        examples,
        run,
        device=device,
        resume=resumes,
        force=not resumes,
        name=name,
        report=report,
    )


def _is_same(recipe: Recipe, examples: Examples, run: Path, *, force: bool) -> bool:
    """Tell whether there is a run to go on with."""
    if not (run / CHECKPOINT).is_file():
        return False
    try:
        check_resume(run, load_state(run), recipe, examples.fingerprint())
    except (UsageError, InputError) as error:
        if force:
            return False
        raise type(error)(f"{error} `force=True` replaces the run and the bundle.") from error
    return True
