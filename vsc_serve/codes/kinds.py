"""Kinds of outputs that hold codes, for `outputs.check_output`."""

import json
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from vsc_serve.codes.folder import SHARD_LIST
from vsc_serve.outputs import FileKind, FolderKind

ERRORS_LIST: Final = "errors.jsonl"
"""Inputs without a row, in a folder of shards."""

_OF_THE_RUN: Final = ("run.json", "part-*.json", "digests.npy")
"""Leftovers of a run that was killed in its last moment."""


def _is_codes(path: Path) -> bool:
    try:
        with zipfile.ZipFile(path) as archive:
            return {"data.npy", "indices.npy", "indptr.npy"} <= set(archive.namelist())
    except (zipfile.BadZipFile, ValueError):
        return False


def _is_error_list(path: Path) -> bool:
    with path.open("rb") as file:
        first = file.readline(1_000_000)
    try:
        entry = json.loads(first)
    except (ValueError, RecursionError):
        return False
    return isinstance(entry, dict) and {"id", "reason"} <= entry.keys()


def _shards(stored: dict[str, Any]) -> Sequence[str] | None:
    is_list = isinstance(stored.get("shards"), list)
    return ("part-*.npz", ERRORS_LIST, *_OF_THE_RUN) if is_list else None


CODES_FILE: Final = FileKind(name="a file of codes", recognises=_is_codes)
CODES_FOLDER: Final = FolderKind(name="a folder of codes", markers=(SHARD_LIST,), contents=_shards)
ERROR_FILE: Final = FileKind(name="a list of inputs without a row", recognises=_is_error_list)
