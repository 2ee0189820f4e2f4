"""JSON of known types: what a manifest says is checked before anything is done with it.

The functions raise ValueError with the reason; the caller knows which file it is about.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields, is_dataclass
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

T = TypeVar("T")


def load_json(content: bytes | str) -> Any:
    """Read JSON as the standard has it: no name twice in an object, no NaN, nothing endless.

    Raises:
        ValueError: It is no such JSON.
    """
    text = content if isinstance(content, str) else content.decode("utf-8")
    try:
        return json.loads(
            text,
            object_pairs_hook=_unique,
            parse_constant=_refuse_constant,
            parse_float=_finite,
        )
    except RecursionError:
        raise ValueError("nested too deep") from None


def _unique(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        repeated = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{repeated!r} is there twice")
    return found


def _refuse_constant(text: str) -> float:
    raise ValueError(f"{text} is no number")


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text[:20]} is too large")
    return number


def conform(value: Any, hint: Any, name: str) -> Any:
    """Return a JSON value as the type that it must have.

    Args:
        value: What `load_json` gave.
        hint: Type: str, int, float, bool, Any, a Literal, a list, a dict by str, a dataclass of
            these, or one of them or None. An integer is taken for a float; a bool is no number.
        name: What it is called, for the message.

    Raises:
        ValueError: It is of another type.
    """
    origin, arguments = get_origin(hint), get_args(hint)
    if hint is Any:
        return value
    if origin in (Union, UnionType):
        (other,) = (argument for argument in arguments if argument is not NoneType)
        return None if value is None else conform(value, other, name)
    if origin is Literal and isinstance(value, str) and value in arguments:
        return value
    if origin is list and isinstance(value, list):
        return [conform(part, arguments[0], f"{name}[{i}]") for i, part in enumerate(value)]
    if origin is dict and isinstance(value, dict):
        return {key: conform(part, arguments[1], f"{name}[{key!r}]") for key, part in value.items()}
    if is_dataclass(hint) and isinstance(hint, type) and isinstance(value, dict):
        return conform_fields(value, hint, name)
    if hint is float and type(value) in (int, float) and abs(value) < 1e300:
        return float(value)
    if hint in (str, int, bool) and type(value) is hint:
        return value
    raise ValueError(f"{name} must be {_described(hint)}, not {shortened(value)}")


def conform_fields(
    stored: Mapping[str, Any], kind: type[T], name: str = "", *, ignore: bool = False
) -> T:
    """Return a dataclass from a JSON object. Raises ValueError for what does not fit.

    Args:
        stored: The object; fields that have a default may be missing.
        kind: The dataclass.
        name: What the object is called, for messages.
        ignore: Leave out names that are no fields, instead of refusing them.
    """
    hints, known = get_type_hints(kind), fields(kind)  # type: ignore[arg-type]  # a dataclass
    prefix = f"{name}." if name else ""
    unknown = stored.keys() - {one.name for one in known}
    if unknown and not ignore:
        raise ValueError(f"{prefix}{min(unknown)[:100]!r} is no known field")
    needed = {one.name for one in known if MISSING is one.default is one.default_factory}
    missing = sorted(needed - stored.keys())
    if missing:
        raise ValueError(f"{prefix}{missing[0]} is missing")
    given = {
        one.name: conform(stored[one.name], hints[one.name], prefix + one.name)
        for one in known
        if one.name in stored
    }
    return kind(**given)


def _described(hint: Any) -> str:
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Literal:
        return " or ".join(map(str, arguments))
    if origin is list:
        return "a list"
    if origin is dict or is_dataclass(hint):
        return "an object"
    return {str: "text", int: "an integer", float: "a number", bool: "true or false"}[hint]


def shortened(value: Any) -> str:
    """Return a JSON value in a few words, for a message."""
    if isinstance(value, list | dict):
        return "a list" if isinstance(value, list) else "an object"
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
