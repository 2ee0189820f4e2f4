"""Which names of the package a public signature needs, found in the source."""

import ast
from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

Definition = ast.ClassDef | ast.FunctionDef | ast.Assign | ast.AnnAssign


class Name(NamedTuple):
    """A name where it is defined."""

    module: str
    name: str


@cache
def tree(module: str) -> ast.Module:
    spec = find_spec(module)
    assert spec is not None, module
    assert spec.origin is not None, module
    return ast.parse(Path(spec.origin).read_text(encoding="utf-8"))


def definition(module: str, name: str) -> Definition | None:
    """Return where a module itself defines a name."""
    for node in tree(module).body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name == name:
            return node
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        if isinstance(node, ast.Assign | ast.AnnAssign) and any(
            isinstance(target, ast.Name) and target.id == name for target in targets
        ):
            return node
    return None


def home(package: str, module: str, name: str) -> Name | None:
    """Return where a name that a module uses is defined; None outside the package."""
    if definition(module, name) is not None:
        return Name(module, name)
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == package:
            for alias in node.names:
                if (alias.asname or alias.name) == name:
                    return home(package, str(node.module), alias.name)
    return None


def needed(package: str, names: set[Name]) -> set[Name]:
    """Return the names of the package that the signatures of public names need, in turn."""
    found: set[Name] = set()
    left = list(names)
    while left:
        module, name = left.pop()
        node = definition(module, name)
        assert node is not None, (module, name)
        for used in used_names(node):
            place = home(package, module, used)
            if place is not None and place not in found and not is_private(place):
                found.add(place)
                left.append(place)
    return found


def is_private(place: Name) -> bool:
    """Tell a type variable or a name that no caller can see from the others."""
    node = definition(*place)
    is_variable = isinstance(node, ast.Assign) and "TypeVar(" in ast.unparse(node)
    return is_variable or place.name.startswith("_")


def used_names(node: Definition) -> Iterator[str]:
    """Yield the names in the bases, fields and signatures of a definition, or in an alias."""
    if isinstance(node, ast.FunctionDef):
        yield from signature_names(node)
    elif isinstance(node, ast.ClassDef):
        for base in node.bases:
            yield from names_in(base)
        for inner in node.body:
            if isinstance(inner, ast.AnnAssign) and not ast.unparse(inner.target).startswith("_"):
                yield from names_in(inner.annotation)
            elif isinstance(inner, ast.FunctionDef) and is_called(inner.name):
                yield from signature_names(inner)
    elif isinstance(node, ast.AnnAssign) and ast.unparse(node.annotation) != "TypeAlias":
        yield from names_in(node.annotation)
    elif node.value is not None:
        yield from names_in(node.value)


def is_called(name: str) -> bool:
    return not name.startswith("_") or name.startswith("__")


def signature_names(node: ast.FunctionDef) -> Iterator[str]:
    arguments = node.args
    given = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
    given += [one for one in (arguments.vararg, arguments.kwarg) if one is not None]
    for annotation in [*(one.annotation for one in given), node.returns]:
        if annotation is not None:
            yield from names_in(annotation)


def names_in(annotation: ast.expr) -> Iterator[str]:
    """Yield the names in an annotation, also in one that is written as a string."""
    for node in ast.walk(annotation):
        if isinstance(node, ast.Name):
            yield node.id
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            try:
                quoted = ast.parse(node.value, mode="eval")
            except SyntaxError:
                continue
            yield from names_in(quoted.body)
