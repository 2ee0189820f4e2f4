"""Options that several commands share, and what they mean."""

import json
import os
import sys
from pathlib import Path
from typing import Annotated, Any, Final, Literal, Protocol

import typer

from vsc_serve.console import printable, require_extra
from vsc_serve.errors import BundleError, UsageError
from vsc_serve.models import builtin_model

_DEFAULT_MODEL: Final = Path("model")
PHOTOS: Final = "photos"
"""Name of the backbone that the extra of that name brings."""

Device = Literal["auto", "cpu", "cuda"]
"""The same as `session.Device`, which importing would load numpy for `vsc --help`; a test compares
them."""

ModelOption = Annotated[
    Path | None, typer.Option(help="Bundle (default: $VSC_MODEL, ./model, the built-in one).")
]
BackboneOption = Annotated[
    Path | None,
    typer.Option(help="Image encoder before the model: an ONNX file, or photos (extra photos)."),
]
DeviceOption = Annotated[Device, typer.Option(help="Where the model runs.")]
ThreadsOption = Annotated[
    int, typer.Option(help="CPU threads (0: torch chooses).", min=0, max=1024)
]
OverridesOption = Annotated[
    list[str] | None, typer.Option("--set", help="Override a field: key=value.")
]
ActiveOption = Annotated[
    float | None, typer.Option(help="Active latents per image to ask for (sets alpha).")
]
AllowCollapsedOption = Annotated[
    bool, typer.Option("--allow-collapsed", help="Export a collapsed model as well.")
]
SeedOption = Annotated[int, typer.Option(help="Seed of choices and noise.", min=0)]
TrainingData = Annotated[Path, typer.Argument(help="Folder of images, .npz or .npy.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON to stdout.")]
ForceOption = Annotated[bool, typer.Option("--force", help="Replace the output.")]


def find_model(given: Path | None) -> Path:
    """Return the bundle to use: as given, else $VSC_MODEL, else ./model, else the built-in one.

    Raises:
        BundleError: There is none.
    """
    if given is not None:
        return given
    named = os.environ.get("VSC_MODEL")
    if named:
        return Path(named)
    if _DEFAULT_MODEL.is_dir():
        return _DEFAULT_MODEL
    builtin = builtin_model()
    if builtin.is_dir():
        return builtin
    raise BundleError(
        f"no model: the built-in one is missing ({builtin}). Give --model DIR, set VSC_MODEL, or"
        " make ./model with `vsc train` and `vsc export`."
    )


def find_backbone(given: Path | None) -> Path | None:
    """Return the ONNX file of a backbone: as given, or that of the extra `photos` for its name.

    Raises:
        UsageError: The extra is not installed, or holds other weights than it should.
    """
    if given is None or given != Path(PHOTOS) or given.exists():
        return given
    require_extra("photos", "platformdirs")
    from vsc_serve.photos import photos_backbone

    return photos_backbone()


def print_text(text: str) -> None:
    """Print a line for a person to stdout; an id or a name of a file in it cannot do harm."""
    sys.stdout.write(printable(text) + "\n")


def print_json(value: Any, *, indent: int | None = None) -> None:
    """Print JSON for a program to stdout: exact, and pure ASCII."""
    sys.stdout.write(json.dumps(value, indent=indent) + "\n")


class Provenance(Protocol):
    """Codes that say what made them."""

    @property
    def meta(self) -> dict[str, Any]:
        """Provenance of the codes."""


def refuse_other_model(stored: Provenance, digest: str, bundle: Path) -> None:
    """Raise UsageError when codes were made by another model than the bundle with this digest."""
    made_by = stored.meta.get("model_digest")
    if made_by is not None and made_by != digest:
        raise UsageError(
            f"the codes were made by model {stored.meta.get('model')} ({made_by}), but {bundle}"
            f" is {digest}."
            " Codes of two models cannot be compared: give the --model that made them."
        )
