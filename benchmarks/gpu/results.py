"""Results of the parts: a JSON file that is extended, and the same as Markdown tables."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any, Self

from benchmarks.gpu.sizes import Sizes
from vsc_serve.atomic import atomic_file


class Results:
    """What was measured so far.

    Args:
        folder: Where the two files are.
        content: What `results.json` holds.
    """

    def __init__(self, folder: Path, content: dict[str, Any]) -> None:
        self._folder = folder
        self._content = content

    @classmethod
    def open(cls, folder: Path, machine: dict[str, str], sizes: Sizes, *, again: bool) -> Self:
        """Open the results of this machine with these sizes; those of another are dropped."""
        wanted = {"machine": machine, "sizes": json.loads(json.dumps(asdict(sizes)))}
        path = folder / "results.json"
        if path.is_file() and not again:
            stored = json.loads(path.read_text(encoding="utf-8"))
            if {name: stored.get(name) for name in wanted} == wanted:
                return cls(folder, stored)
        return cls(folder, {**wanted, "parts": {}})

    def has(self, part: str) -> bool:
        """Tell whether a part is done."""
        return part in self._content["parts"]

    def add(self, part: str, found: dict[str, Any]) -> None:
        """Add a part, and write both files."""
        self._content["parts"][part] = found
        text = json.dumps(self._content, indent=2) + "\n"
        for name, content in (("results.json", text), ("results.md", self.table())):
            with atomic_file(self._folder / name) as file:
                file.write(content.encode())

    def table(self) -> str:
        """Return everything as Markdown."""
        lines = [f"- {name}: {value}" for name, value in self._content["machine"].items()]
        lines.append(f"- sizes: {json.dumps(self._content['sizes'])}")
        for part, found in self._content["parts"].items():
            lines += ["", f"## {part} ({found['seconds']} s)", ""]
            lines += [f"{name}: {value}" for name, value in found.get("facts", {}).items()]
            lines += _rows(found.get("rows", []))
        return "\n".join(lines) + "\n"


def _rows(rows: list[dict[str, Any]]) -> list[str]:
    if not rows:
        return []
    names = list(rows[0])
    lines = ["", f"| {' | '.join(names)} |", f"|{'---|' * len(names)}"]
    lines += [f"| {' | '.join(_cell(row[name]) for name in names)} |" for row in rows]
    return lines


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
    return str(value)
