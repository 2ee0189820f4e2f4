"""Blocks of code in the pages of the documentation, and commands in their prose."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from markdown_it import MarkdownIt

ROOT: Final = Path(__file__).parents[2]
PAGES: Final = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "docs").rglob("*.md")),
]

_MARK: Final = re.compile(r"<!-- not run: (.+?) -->")
_COMMAND: Final = re.compile(r"(vsc|python|pip|make|curl|docker|bash|torchrun|tritonserver)\b")


@dataclass(frozen=True)
class Block:
    """A block of code."""

    page: Path
    line: int
    """Its first line in the page, from 1."""
    language: str
    text: str
    reason: str | None
    """Why it is not run, where a comment before it says so."""

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks_of(page: Path) -> Iterator[Block]:
    """Yield the blocks of a page. One that is indented is a command or plain text."""
    yield from blocks_in(page.read_text(encoding="utf-8"), page)


def blocks_in(text: str, page: Path) -> Iterator[Block]:
    """Yield the blocks of a text."""
    reason = None
    for token in MarkdownIt().parse(text):
        if token.type in ("fence", "code_block"):
            assert token.map is not None
            language = token.info.strip() or "no language"
            if token.type == "code_block":
                language = "sh" if _COMMAND.match(token.content.lstrip()) else "text"
            yield Block(page, token.map[0] + 1, language, token.content, reason)
        mark = _MARK.search(token.content) if token.type == "html_block" else None
        reason = mark[1] if mark else None


def commands_in_prose(page: Path) -> Iterator[str]:
    """Yield what stands in backticks and begins with `vsc `."""
    yield from commands_in(page.read_text(encoding="utf-8"))


def commands_in(text: str) -> Iterator[str]:
    """Yield the commands in the prose of a text."""
    for token in MarkdownIt().enable("table").parse(text):
        for child in token.children or []:
            if child.type == "code_inline" and re.match(r"vsc\s", child.content):
                yield child.content
