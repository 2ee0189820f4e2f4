"""The file `index.json` of the engine `exact`: which segments count. docs/formats.md."""

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from vsc_serve.atomic import atomic_file
from vsc_serve.errors import InputError
from vsc_serve.index.base import INDEX_FILE, damaged, read_index_file
from vsc_serve.index.segment import SegmentFacts
from vsc_serve.outputs import FolderKind, remove_folder
from vsc_serve.schema import conform_fields

FORMAT: Final = 1
"""Newest format of the folder that this version reads and writes."""

_SEGMENT: Final = re.compile(r"segment-[0-9]{6,}")
_REMOVED: Final = re.compile(r"removed-[0-9]{6,}\.npy")


def _contents(stored: dict[str, Any]) -> Sequence[str] | None:
    is_ours = stored.get("engine") == "exact" and isinstance(stored.get("segments"), list)
    return ("segment-*/*.npy",) if is_ours else None


class _SegmentFolder(FolderKind):
    """Segments that no index names: they are known by their names and what they hold."""

    def why_not_ours(self, path: Path) -> str | None:
        is_ours = _SEGMENT.fullmatch(path.name) and all(
            entry.suffix == ".npy" for entry in path.iterdir()
        )
        return None if is_ours else "no segment of an index"


_SEGMENT_FOLDER: Final = _SegmentFolder(name="a segment", contents=lambda stored: None)
INDEX_FOLDER: Final = FolderKind(name="an index", markers=(INDEX_FILE,), contents=_contents)


@dataclass(frozen=True, kw_only=True)
class IndexFile:
    """Content of index.json."""

    format: int
    engine: str
    latents: int
    meta: dict[str, Any]
    segments: list[SegmentFacts]
    next: int
    """Number of the next file or folder."""


def write_index_file(folder: Path, manifest: IndexFile) -> None:
    """Write index.json in one step: from then on it is what counts. Raises InputError."""
    with atomic_file(folder / INDEX_FILE) as file:
        file.write((json.dumps(asdict(manifest), indent=1) + "\n").encode())


def read_exact_file(path: Path) -> IndexFile:
    """Read index.json of an index of this engine. Raises InputError."""
    stored = read_index_file(path)
    found = stored.get("format")
    if type(found) is int and found > FORMAT:
        raise InputError(
            f"{path / INDEX_FILE}: format {found}, but this vsc-serve reads up to {FORMAT}."
            " Upgrade vsc-serve."
        )
    try:
        manifest = conform_fields(stored, IndexFile)
        for facts in manifest.segments:
            if not _SEGMENT.fullmatch(facts.name) or facts.rows < facts.live:
                raise ValueError(f"{facts.name[:100]!r} is no segment")
            if facts.removed is not None and not _REMOVED.fullmatch(facts.removed.file):
                raise ValueError(f"{facts.removed.file[:100]!r} is no list of rows")
    except ValueError as error:
        raise InputError(damaged(path / INDEX_FILE, str(error))) from error
    return manifest


def clean(path: Path, manifest: IndexFile) -> None:
    """Write index.json in one step: from then on it is what counts. Raises InputError."""
    """Remove what a killed or an earlier change has left behind."""
    named = {facts.name: facts.removed for facts in manifest.segments}
    for folder in path.iterdir():
        if not _SEGMENT.fullmatch(folder.name):
            continue
        if folder.name not in named:
            remove_folder(folder, _SEGMENT_FOLDER)
            continue
        removed = named[folder.name]
        for file in folder.iterdir():
            if _REMOVED.fullmatch(file.name) and (removed is None or file.name != removed.file):
                file.unlink()
