"""What is said of a backbone, in the JSON beside its file: how an image becomes its input."""

import difflib
import json
import math
from pathlib import Path
from typing import Any, Final, Literal, get_args

from vsc_serve.errors import UsageError
from vsc_serve.images import PixelSpec
from vsc_serve.session import Port

Layout = Literal["NCHW", "NHWC"]

LEVELS: Final = 255.0
"""Pixels are divided by it first."""

_LEAST_STD: Final = 1e-30
"""Smaller ones have no reciprocal in float32."""
_PIXELS: Final = ("height", "width", "channels", "fit", "resample", "crop_pct")
_KEYS: Final = (*_PIXELS, "layout", "mean", "std", "output")


def read_stated(path: Path, taken: Port) -> dict[str, Any]:
    """Read the JSON beside the graph. Where there is none, the error shows what to write.

    Raises:
        UsageError: It is missing, not readable, or has other fields.
    """
    stated_path = path.with_suffix(".json")
    try:
        stated = json.loads(stated_path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UsageError(
            f"{stated_path}: not there. It says how an image becomes the input of {path.name}"
            f" ({taken.type} {list(taken.shape)}), for example {_example(taken)}"
        ) from None
    except (OSError, ValueError) as error:
        raise UsageError(f"{stated_path}: unreadable ({error}).") from error
    for key in stated if isinstance(stated, dict) else ["a list"]:
        if key not in _KEYS:
            near = difflib.get_close_matches(key, _KEYS, n=1)
            hint = f"Did you mean {near[0]}?" if near else f"Known: {', '.join(_KEYS)}."
            raise UsageError(f"{stated_path}: no field {key!r}. {hint}")
    return dict(stated)


def _example(taken: Port) -> str:
    height, width = taken.shape[2:] if taken.shape[1] in (1, 3) else taken.shape[1:3]
    sizes = {
        "height": height if isinstance(height, int) else 224,
        "width": width if isinstance(width, int) else 224,
    }
    scaling = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
    return json.dumps(sizes | ({} if taken.type == "tensor(uint8)" else scaling))


def pixel_spec_of(path: Path, stated: dict[str, Any]) -> PixelSpec:
    """Return how an image becomes pixels. Raises UsageError."""
    try:
        needed = {"height": stated["height"], "width": stated["width"], "channels": 3}
        return PixelSpec(**needed | {key: stated[key] for key in _PIXELS if key in stated})
    except KeyError as error:
        raise UsageError(f"{path.with_suffix('.json')}: {error} is missing.") from None
    except (ValueError, TypeError) as error:
        raise UsageError(f"{path.with_suffix('.json')}: {error}.") from error


def layout_of(path: Path, stated: dict[str, Any]) -> Layout:
    """Return the order of the axes. Raises UsageError."""
    layout = stated.get("layout", "NCHW")
    if layout not in get_args(Layout):
        raise UsageError(f"{path.with_suffix('.json')}: layout is {layout!r}; give NCHW or NHWC.")
    return layout  # type: ignore[no-any-return]  # checked above


def scaling_of(path: Path, stated: dict[str, Any], taken: Port) -> dict[str, tuple[float, ...]]:
    """Return mean and std of each channel, or none of both for a file that takes uint8.

    Raises:
        UsageError: They are missing, no numbers, or not for pixels in [0, 1].
    """
    where = path.with_suffix(".json")
    if taken.type == "tensor(uint8)":
        if "mean" in stated or "std" in stated:
            raise UsageError(
                f"{where}: mean and std, but {path.name} takes uint8 and scales"
                " inside. Remove them."
            )
        return {"mean": (), "std": ()}
    read = {name: _numbers(where, name, stated) for name in ("mean", "std")}
    if not all(0 <= one <= 1 for one in read["mean"]) or max(read["std"]) > 1:
        raise UsageError(_why_not_scaled(where, read))
    if min(read["std"]) < _LEAST_STD:
        raise UsageError(f"{where}: std must be above 0; found {list(read['std'])}.")
    return read


def _numbers(where: Path, name: str, stated: dict[str, Any]) -> tuple[float, ...]:
    values, channels = stated.get(name), stated.get("channels", 3)
    numbers = values if isinstance(values, list) else []
    if len(numbers) != channels or not all(map(_is_number, numbers)):
        raise UsageError(
            f"{where}: {name} must be {channels} numbers, one for each channel, for pixels in"
            f" [0, 1]; found {values}. No scaling is mean 0 and std 1."
        )
    return tuple(float(one) for one in numbers)


def _is_number(value: Any) -> bool:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and math.isfinite(value)


def _why_not_scaled(where: Path, read: dict[str, tuple[float, ...]]) -> str:
    """Say what is wrong with mean and std; on the scale of bytes, say what they are here."""
    found = f"{where}: mean {list(read['mean'])} and std {list(read['std'])} are not for pixels in"
    found += " [0, 1], where both lie in [0, 1]."
    if not all(0 <= one <= LEVELS for one in (*read["mean"], *read["std"])):
        return f"{found} The input is (pixels / 255 - mean) / std."
    is_mean_of_bytes = max(read["mean"]) > 1
    mean = _divided(read["mean"]) if is_mean_of_bytes else list(read["mean"])
    return (
        f"{found} The input is (pixels / 255 - mean) / std; if yours are for pixels from 0 to 255,"
        f' write "mean": {mean}, "std": {_divided(read["std"])}.'
    )


def _divided(numbers: tuple[float, ...]) -> list[float]:
    return [float(f"{one / LEVELS:.6g}") for one in numbers]
