"""A folder of codes files, shards, that are read as one."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any, Final

from vsc_serve.codes.npz import CodeFile
from vsc_serve.codes.read import code_file, load_arrays
from vsc_serve.codes.rows import concatenate_aligned, stack_codes
from vsc_serve.errors import InputError
from vsc_serve.schema import conform, conform_fields, load_json
from vsc_serve.untrusted import inside, is_folder, read_plain

SHARD_LIST: Final = "manifest.json"
"""Names the shards of a folder, in order."""

SHARD_FORMAT: Final = 1
"""Newest format of that list this version reads."""

_MAX_LIST_BYTES: Final = 2**26
"""Half a million shards."""

_SAME_IN_ALL_SHARDS: Final = (
    "format",
    "model_digest",
    "tau",
    "view",
    "max_active",
    "values",
    "stored_tau",
)


_OF_ALL_SHARDS: Final = ("out_of_domain",)
"""Provenance that is known when all shards are there, and stands in their list."""


@dataclass(frozen=True, kw_only=True)
class Shard:
    """One file of a folder of shards."""

    path: Path
    """The `.npz` file."""
    rows: int
    """Rows it must hold."""
    sha256: str | None
    """Digest it must have, where the list gives one."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """What the list says of all shards together; it belongs to their provenance."""


def read_codes(path: Path | str) -> CodeFile:
    """Read a `codes.npz`, or a folder of shards as one.

    Returns:
        Codes, ids and provenance. A matrix that plain scipy wrote gets its row numbers as ids.

    Raises:
        InputError: The file is missing, not a codes file, damaged, or of a newer format; or shards
            do not belong together.
    """
    path = Path(path)
    parts = list(read_parts(path))
    return parts[0] if len(parts) == 1 else _stack_files(path, parts)


def read_parts(path: Path) -> Iterator[CodeFile]:
    """Read a `codes.npz`, or the shards of a folder one after the other.

    Raises:
        InputError: As `read_codes`; of shards that do not belong together it knows nothing.
    """
    if is_folder(path):
        yield from map(_read_shard, list_shards(path))
    else:
        yield code_file(path, load_arrays(path))


def part_paths(path: Path) -> list[Path]:
    """Return the files a path stands for: itself, or the shards of a folder."""
    return [shard.path for shard in list_shards(path)] if is_folder(path) else [path]


def is_shard_folder(path: Path) -> bool:
    """Tell whether a folder holds shards of codes (a bundle's manifest lists no shards)."""
    try:
        return "shards" in _load_list(path)
    except (OSError, ValueError, TypeError):
        return False


def list_shards(folder: Path) -> list[Shard]:
    """Return the shards of a folder in the order of their rows.

    Raises:
        InputError: The list is missing, damaged or of a newer format, or names no shards, or files
            outside the folder.
    """
    path = folder / SHARD_LIST
    try:
        stored = _load_list(folder)
        found, entries = conform(stored["format"], int, "format"), list(stored["shards"])
        facts = {name: stored[name] for name in _OF_ALL_SHARDS if name in stored}
    except FileNotFoundError:
        raise InputError(
            f"{folder}: a folder without {SHARD_LIST}, so no shards of codes. Give a codes.npz, or"
            " a folder that `vsc encode --out FOLDER` wrote to its end."
        ) from None
    except KeyError as error:
        raise InputError(
            f"{path}: lists no shards of codes (no {error}). Is it a model bundle? Give codes."
        ) from None
    except (OSError, ValueError, TypeError) as error:
        raise InputError(f"{path}: damaged ({error}). Encode again.") from error
    if found > SHARD_FORMAT:
        raise InputError(
            f"{path}: format {found}, but this vsc-serve reads up to {SHARD_FORMAT}."
            " Upgrade vsc-serve."
        )
    if not entries:
        raise InputError(f"{path}: lists no shard. Encode again.")
    return [_shard(path, entry, facts) for entry in entries]


def _load_list(folder: Path) -> Any:
    return load_json(read_plain(inside(folder, SHARD_LIST), _MAX_LIST_BYTES))


@dataclass(frozen=True)
class _Entry:
    """Entry of a shard in the list."""

    file: str
    rows: int
    sha256: str | None = None


def _shard(path: Path, stored: Any, facts: Mapping[str, Any]) -> Shard:
    try:
        entry = conform_fields(conform(stored, dict[str, Any], "shard"), _Entry, ignore=True)
        if "/" in entry.file:
            raise ValueError(f"{entry.file[:100]!r} is no name of a file in this folder")
        place = inside(path.parent, entry.file)
    except ValueError as error:
        raise InputError(f"{path}: damaged ({error}). Encode again.") from error
    return Shard(path=place, rows=entry.rows, sha256=entry.sha256, facts=facts)


def _read_shard(shard: Shard) -> CodeFile:
    """Read one shard and compare it with the list."""
    stored = code_file(shard.path, load_arrays(shard.path, sha256=shard.sha256))
    if len(stored.ids) != shard.rows:
        raise InputError(
            f"{shard.path}: {len(stored.ids)} rows, but {SHARD_LIST} says {shard.rows}."
            " Delete the file and encode again."
        )
    return stored._replace(meta={**stored.meta, **shard.facts}) if shard.facts else stored


def _stack_files(folder: Path, parts: Sequence[CodeFile]) -> CodeFile:
    """Put the shards of a folder below one another; provenance is that of the first."""
    first = parts[0]
    for part in parts[1:]:
        _refuse_other_kind(folder, part, first)
    try:
        return CodeFile(
            codes=stack_codes([part.codes for part in parts], first.codes.shape[1]),
            ids=list(chain.from_iterable(part.ids for part in parts)),
            meta=first.meta,
            gamma=concatenate_aligned("gamma", [part.gamma for part in parts]),
            sigma=concatenate_aligned("sigma", [part.sigma for part in parts]),
            digests=_chain_digests([part.digests for part in parts]),
        )
    except ValueError as error:
        raise InputError(f"{folder}: {error}. Encode again.") from error


def _chain_digests(parts: Sequence[list[str] | None]) -> list[str] | None:
    given = [part for part in parts if part is not None]
    if given and len(given) < len(parts):
        raise ValueError(f"{len(given)} of {len(parts)} parts have digests: all or none must")
    return list(chain.from_iterable(given)) if given else None


def _refuse_other_kind(folder: Path, part: CodeFile, first: CodeFile) -> None:
    """Raise InputError for a shard that cannot stand below the first one."""
    facts: list[tuple[str, Any, Any]] = [("latents", part.codes.shape[1], first.codes.shape[1])]
    facts += [(name, part.meta.get(name), first.meta.get(name)) for name in _SAME_IN_ALL_SHARDS]
    for name, found, expected in facts:
        if found != expected:
            raise InputError(
                f"{folder}: shards of two kinds: {name} is {expected} in the first and {found} in"
                " another. Encode all with one model and the same options."
            )
