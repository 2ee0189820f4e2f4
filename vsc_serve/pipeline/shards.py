"""Shards of a run in progress, in a folder beside the output: each whole or not there.

A shard is a codes file and a record; the record is written last, so a shard with a record is
complete. `run.json` says what the run is. The same run finds its shards again after any
interruption; another run discards them. At the end they become the output.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final, NamedTuple

from vsc_serve.atomic import atomic_file, left_behind, name_beside, remove_at_once, replace_folder
from vsc_serve.codes import (
    CODES_FOLDER,
    ERRORS_LIST,
    SHARD_FORMAT,
    SHARD_LIST,
    CodeFile,
    write_codes,
)
from vsc_serve.console import holding_signals
from vsc_serve.errors import InputError, Kind, UsageError
from vsc_serve.locks import exclusive
from vsc_serve.outputs import TEMPORARY, FolderKind, remove_folder

SHARD_ROWS: Final = 100_000
"""Sources in a shard."""

_FORMAT: Final = 2
_RUN: Final = "run.json"


def _contents(stored: dict[str, Any]) -> Sequence[str] | None:
    is_ours = "shard_rows" in stored and "format" in stored
    files = ("*.npz", "*.parquet", "part-*.json", "*.npy", SHARD_LIST, ERRORS_LIST)
    return files if is_ours else None


WORK_FOLDER: Final = FolderKind(
    name="the shards of an unfinished run", markers=(_RUN,), contents=_contents
)


class RejectedSource(NamedTuple):
    """A source without a row."""

    position: int
    """Its place in the shard."""
    id: str
    reason: str
    kind: Kind


@dataclass(frozen=True, kw_only=True)
class ShardRecord:
    """Facts about a finished shard."""

    rows: int
    sources: int
    """Rows and sources without one."""
    fingerprint: str
    """Digest of the sources: ids, and sizes and times of those with a row."""
    sha256: str
    """Digest of the codes file."""
    rejected: list[RejectedSource]
    """Sources without a row; they are tried again by every run."""
    statistics: dict[str, Any]
    """Totals of the closing summary."""


class Fingerprint:
    """Digest of a sequence of sources."""

    def __init__(self) -> None:
        self._digest = hashlib.sha256()

    def add(self, ids: Sequence[str], signatures: Sequence[str]) -> None:
        """Add sources by their ids, and by what changes when they do."""
        pairs = zip(ids, signatures, strict=True)
        lines = [f"{name}\0{signature}\n" for name, signature in pairs]
        self._digest.update("".join(lines).encode("utf-8", "surrogatepass"))

    def value(self) -> str:
        """Return the digest of what was added so far."""
        return self._digest.hexdigest()


class ShardStore:
    """The folder of a run's shards.

    Args:
        out: What the run writes: `codes.npz` has its shards in `codes.npz.parts`. Of a link, they
            lie beside what it leads to.
        beside: Another file that the run writes.
    """

    def __init__(self, out: Path, beside: Path | None = None) -> None:
        self._out, self._beside = out, beside
        self._target = Path(os.path.realpath(out))
        self.folder = name_beside(self._target, suffix=".parts")
        name = self._target.with_suffix("").name
        self.joined = name_beside(self.folder / name, "joined-", self._target.suffix)
        """File that becomes the output, where that is one file."""
        self.is_published = False
        """Whether the output is whole."""

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other runs out of the output; the folder goes again without a finished shard.

        Raises:
            UsageError: Another run is writing there, or the folder's name is taken.
            InputError: The folder cannot be made.
        """
        with exclusive(self._target):
            with self._writing():
                self._tidy()
            if os.path.lexists(self.folder) and (why := WORK_FOLDER.why_not_ours(self.folder)):
                raise UsageError(
                    f"{self.folder}: is {why}. The shards of a run go there: move it, or choose"
                    " another `out`."
                )
            try:
                yield
            finally:
                with suppress(OSError):  # what led here says more, and is on its way
                    if self.is_published or not any(self._records()):
                        self.remove()
                        self._remove_left_behind()

    def begin(self, run: dict[str, Any]) -> list[str]:
        """Say what the run is, and discard the shards of another one.

        Returns:
            What differs from the run whose shards were discarded; empty when nothing was.
        """
        run = json.loads(json.dumps(run | {"format": _FORMAT}))
        earlier = self._read(self.folder / _RUN)
        if earlier == run:
            return []
        differing = sorted(name for name in run if earlier.get(name) != run[name])
        with self._writing():
            had_shards = any(self._records())
            for path in self.folder.glob("part-*"):
                path.unlink()
        _write_json(self.folder / _RUN, run)
        return differing if had_shards else []

    def is_of(self, run: dict[str, Any]) -> bool:
        """Tell whether the folder holds the shards of a run that is described by at least this."""
        stored = self._read(self.folder / _RUN)
        wanted = json.loads(json.dumps(run))
        return bool(stored) and all(stored.get(name) == wanted[name] for name in wanted)

    def record(self, number: int) -> ShardRecord | None:
        """Return the record of a shard, None when it is not finished."""
        stored = self._read(self._path(number, "json"))
        if not stored or not self._path(number, "npz").is_file():
            return None
        rejected = [RejectedSource(*entry) for entry in stored["rejected"]]
        return ShardRecord(**stored | {"rejected": rejected})

    def count_sources(self) -> int:
        """Return how many sources the finished shards have."""
        numbers: list[int] = []
        with suppress(OSError):
            numbers = [int(path.stem.removeprefix("part-")) for path in self._records()]
        records = [self.record(number) for number in numbers]
        return sum(record.sources for record in records if record is not None)

    def write(self, number: int, shard: CodeFile, **facts: Any) -> ShardRecord:
        """Write a shard and its record.

        Args:
            number: Its place, from 0.
            shard: Codes, ids and provenance.
            **facts: Fields of the record.

        Raises:
            InputError: It cannot be written (disk full, no permission).
        """
        path = self._path(number, "npz")
        codes, ids, meta, gamma, sigma, digests = shard
        with self._writing():
            self._path(number, "json").unlink(missing_ok=True)
            write_codes(path, codes, ids, meta, gamma=gamma, sigma=sigma, digests=digests)
            with path.open("rb") as file:
                sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        record = ShardRecord(rows=len(ids), sha256=sha256, **facts)
        self.write_record(number, record)
        return record

    def write_record(self, number: int, record: ShardRecord) -> None:
        """Write the record of a shard whose codes are there. Raises InputError."""
        _write_json(self._path(number, "json"), asdict(record))

    def path(self, number: int) -> Path:
        """Return the codes file of a shard."""
        return self._path(number, "npz")

    def paths(self, count: int) -> list[Path]:
        """Return the files of the first `count` shards."""
        return [self.path(number) for number in range(count)]

    def keep(
        self,
        records: Sequence[ShardRecord],
        also: str | None = None,
        facts: Mapping[str, Any] | None = None,
    ) -> None:
        """Make the folder itself the output: shards, their list, the file `also`, nothing else.

        `facts` stand in the list: what is known of all rows once they are there.

        What only a run needs is removed last: one that is killed before can resume.

        Raises:
            UsageError: What is there is no folder of codes.
            InputError: It cannot be written.
        """
        shards = [
            {"file": self.path(number).name, "rows": record.rows, "sha256": record.sha256}
            for number, record in enumerate(records)
        ]
        listed = {**(facts or {}), "format": SHARD_FORMAT, "shards": shards}
        _write_json(self.folder / SHARD_LIST, listed)
        wanted = {SHARD_LIST, also, *(str(shard["file"]) for shard in shards)}
        with self._writing():
            for path in self.folder.glob("part-*.npz"):
                if path.name not in wanted:
                    path.unlink()
            with holding_signals():  # or nobody could say whether the output is the new one
                replace_folder(self.folder, self._target, CODES_FOLDER)
                self.is_published = True
        with suppress(OSError):
            for path in self._target.iterdir():
                if path.name not in wanted:
                    path.unlink()

    def publish(self) -> None:
        """Make the file `joined` the output. Raises InputError."""
        with self._writing(), holding_signals():
            self.joined.replace(self._target)
            self.is_published = True

    def remove(self) -> None:
        """Remove the folder with all in it, unless somebody has put something of theirs there."""
        with suppress(OSError, UsageError):
            remove_at_once(self.folder, WORK_FOLDER)

    def _tidy(self) -> None:
        """Take back or remove what killed runs have left under temporary names."""
        for path in left_behind(self._target, "old"):
            if not os.path.lexists(self._target):
                path.rename(self._target)  # a run was killed while it replaced it
        for path in left_behind(self._target, "tmp"):
            has_shards = path.is_dir() and (path / _RUN).is_file()
            if has_shards and not os.path.lexists(self.folder):
                path.rename(self.folder)
        self._remove_left_behind()

    def _remove_left_behind(self) -> None:
        names = [self._target, self.folder, *([self._beside] if self._beside else [])]
        found = [path for name in names for path in left_behind(name, "tmp")]
        for path in (*found, *left_behind(self._target, "old")):
            if path.is_dir():
                remove_folder(path, TEMPORARY)
            else:
                path.unlink()

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Make an error of the file system an InputError that names the output."""
        try:
            yield
        except OSError as error:
            raise InputError(
                f"{self._out}: cannot be written ({error.strerror or error})."
            ) from error

    def _records(self) -> Iterator[Path]:
        return self.folder.glob("part-*.json")

    def _path(self, number: int, extension: str) -> Path:
        return self.folder / f"part-{number:05}.{extension}"

    def _read(self, path: Path) -> dict[str, Any]:
        """Read a JSON object; one that is missing or damaged is empty."""
        with suppress(OSError, ValueError):
            stored = json.loads(path.read_text(encoding="utf-8"))
            if isinstance(stored, dict):
                return stored
        return {}


def _write_json(path: Path, content: dict[str, Any]) -> None:
    with atomic_file(path) as file:
        file.write((json.dumps(content, sort_keys=True) + "\n").encode())
