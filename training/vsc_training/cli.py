"""`vsc train` and `vsc eval`; torch is imported inside, so that help stays fast."""

import json
import os
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vsc_serve.cli.options import (
    ActiveOption,
    BackboneOption,
    Device,
    DeviceOption,
    JsonOption,
    OverridesOption,
    SeedOption,
    ThreadsOption,
    TrainingData,
    find_backbone,
)
from vsc_serve.console import progress, require_extra, say
from vsc_serve.outputs import check_output
from vsc_training.threads import sleep_when_idle

if TYPE_CHECKING:
    from vsc_training.config import Recipe
    from vsc_training.data import Examples

app = typer.Typer()


@app.command()
def train(
    data: TrainingData,
    out: Annotated[Path, typer.Option(help="Run folder to write.")],
    *,
    recipe: Annotated[
        str | None,
        typer.Option(help="sparse (default), paper, or a TOML file; --resume keeps the run's."),
    ] = None,
    overrides: OverridesOption = None,
    active: ActiveOption = None,
    size: Annotated[
        int | None, typer.Option(help="Side of the square that images become.", min=1)
    ] = None,
    backbone: BackboneOption = None,
    device: DeviceOption = "auto",
    threads: ThreadsOption = 0,
    compile_step: Annotated[
        bool, typer.Option("--compile", help="Compile the step first: for long runs.")
    ] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the last checkpoint.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace the run.")] = False,
) -> None:
    """Fit a model to a folder of images or an array."""
    require_extra("train", "torch", "safetensors", "tensorboard")
    sleep_when_idle()
    from vsc_training.config import load_recipe
    from vsc_training.distributed import joined_group
    from vsc_training.fit import fit
    from vsc_training.resolve import resolve

    asked = load_recipe(recipe or _own_recipe(out, resume=resume), overrides or [], active=active)
    with joined_group(torch_device(device, threads)) as (group, own_device):
        talk = say if group.is_first else _keep_quiet
        if group.is_first:
            read = [path for path in (data, backbone, recipe) if path is not None]
            _check_out(out, read, resume=resume, force=force)
        file = find_backbone(backbone)
        if file is None:
            examples = load_data(data, size, talk)
        else:
            examples = embed_data(data, out, size, file, threads, talk)
        resolved = resolve(asked, examples, out if resume else None)
        say_model(resolved, examples, own_device, group.size, talk)
        with progress("train", resolved.steps, "steps") as shown:
            health = fit(
                resolved,
                examples,
                out,
                device=own_device,
                group=group,
                resume=resume,
                force=force,
                is_compiled=compile_step,
                name=out.resolve().name,
                report=shown.update,
            )
    talk("codes", f"{health}")
    talk("asked", f"{resolved.active:.1f} active per image, got {health.active:.1f}")
    behind = f" --backbone {backbone}" if backbone else ""
    talk("next", f"vsc export {out} --out model/{behind}")


@app.command("eval")
def evaluate(
    run: Annotated[Path, typer.Argument(help="Folder that `vsc train` wrote.")],
    data: Annotated[Path, typer.Argument(help="Folder of images, .npz or .npy to measure on.")],
    *,
    reference: Annotated[
        Path | None, typer.Option(help="Data to search neighbours in (default: half of DATA).")
    ] = None,
    factors: Annotated[
        Path | None, typer.Option(help="factors.npz with the true factors of DATA.")
    ] = None,
    backbone: BackboneOption = None,
    iwae_samples: Annotated[int, typer.Option(help="Draws of the bound.", min=1)] = 50,
    seed: SeedOption = 0,
    device: DeviceOption = "auto",
    threads: ThreadsOption = 0,
    as_json: JsonOption = False,
) -> None:
    """Measure a model: bounds, sparsity, neighbours, probe, factors, and the curve over tau."""
    require_extra("train", "torch", "safetensors", "tensorboard")
    sleep_when_idle()
    from vsc_training.evaluation.evaluate import evaluate_run

    evaluation = evaluate_run(
        run,
        data,
        reference=reference,
        factors=factors,
        backbone=find_backbone(backbone),
        iwae_samples=iwae_samples,
        device=torch_device(device, threads),
        seed=seed,
    )
    text = json.dumps(evaluation.to_json(), indent=2) if as_json else evaluation.table()
    sys.stdout.write(text + "\n")


def _own_recipe(run: Path, *, resume: bool) -> str:
    """Return the recipe of a run that is gone on with, else the default."""
    from vsc_training.checkpoint import RECIPE

    saved = run / RECIPE
    return str(saved) if resume and saved.is_file() else "sparse"


def _check_out(out: Path, inputs: list[Any], *, resume: bool, force: bool) -> None:
    """Refuse now, before data are read, what would be refused when the run is written."""
    from vsc_serve.locks import exclusive
    from vsc_training.checkpoint import CHECKPOINT, RUN_FOLDER

    if not (resume and (out / CHECKPOINT).is_file()):
        check_output(out, RUN_FOLDER, force=force or resume, inputs=inputs)
    if out.is_dir():
        with exclusive(Path(os.path.realpath(out))):
            pass  # nobody else trains into it; `fit` holds the lock while it does


def load_data(path: Path, size: int | None, talk: Callable[[str, str], None]) -> "Examples":
    """Read training data and say what they are."""
    from vsc_training.data import load_examples

    examples = load_examples(path, size=size)
    _say_data(path, examples, talk)
    return examples


def embed_data(
    path: Path,
    run: Path,
    size: int | None,
    file: Path,
    threads: int,
    talk: Callable[[str, str], None],
) -> "Examples":
    """Embed a folder of images, with what is known beside the run, and say what they are."""
    from vsc_serve.errors import UsageError
    from vsc_training.backbone import Backbone
    from vsc_training.data import embed_examples, find_images
    from vsc_training.embeddings import EmbeddingCache

    if size is not None:
        raise UsageError("--size: the file beside --backbone says what images become")
    require_extra("train,cpu", "onnxruntime")
    _check_exportable(file, talk)
    backbone = Backbone.open(file, threads=threads)
    spec = backbone.spec
    talk("backbone", f"{file}: {spec.pixel_spec} to {spec.dim}, sha256 {spec.sha256[:12]}")
    sources = find_images(path)
    with progress("embed", len(sources), "images") as shown:
        examples = embed_examples(
            path, sources, backbone, shown.update, EmbeddingCache.beside(run, spec)
        )
    _say_data(path, examples, talk)
    return examples


def _check_exportable(file: Path, talk: Callable[[str, str], None]) -> None:
    """Find before training, where onnx is installed, what would keep a backbone from export."""
    if not (find_spec("onnx") and find_spec("onnx_ir")):
        talk("backbone", "onnx is not installed: the export will show whether it takes the file")
        return
    from vsc_training.onnx_graph import check_exportable

    check_exportable(file)


def _say_data(path: Path, examples: "Examples", talk: Callable[[str, str], None]) -> None:
    spec = examples.spec.pixel_spec or f"vectors of {examples.spec.input_dim}"
    labels = "" if examples.labels is None else f", {len(set(examples.labels.tolist()))} classes"
    talk("data", f"{path}: {len(examples.rows):,} examples, {spec}{labels}")
    if examples.bad:
        talk("skipped", f"{len(examples.bad)} files that cannot be read (errors.jsonl in the run)")


def say_model(
    recipe: "Recipe",
    examples: "Examples",
    device: Any,
    process_count: int,
    talk: Callable[[str, str], None],
) -> None:
    """Say what model is fitted, and how."""
    from vsc_training.device import uses_bfloat16
    from vsc_training.model import choose_network

    network = choose_network(recipe, examples.spec)
    ends = {"encoder": recipe.encoder, "decoder": recipe.decoder}
    others = "".join(f", {kind} {end}" for end, kind in ends.items() if kind != "mlp")
    products = "bfloat16 products" if uses_bfloat16(recipe, device) else "float32"
    processes = f" in {process_count} processes" if process_count > 1 else ""
    talk(
        "model",
        f"VSC {network}{others}, J={recipe.latent_dim}, alpha={recipe.alpha:g},"
        f" U={recipe.pseudo_inputs}",
    )
    talk(
        "fit",
        f"{recipe.steps} steps of {recipe.batch_size} on {device.type}{processes}, {products}"
        f"{_regularisers(recipe)}",
    )


def _regularisers(recipe: "Recipe") -> str:
    """Say what is against overfitting, where something is."""
    given = {name: getattr(recipe, name) for name in ("input_dropout", "weight_decay")}
    return "".join(f", {name} {value:g}" for name, value in given.items() if value)


def torch_device(choice: Device, threads: int) -> Any:
    """Return the device of torch to compute on, with so many threads (0: torch chooses)."""
    import torch

    from vsc_training.device import choose_device

    if threads:
        torch.set_num_threads(threads)
    return choose_device(choice)


def _keep_quiet(_label: str, _text: str) -> None:
    """Say nothing: one process of several talks for all."""
