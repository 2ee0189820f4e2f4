"""What can be searched: one small interface, and one file for each engine behind it.

`Searchable` is anything that answers queries; a stored index, `Engine`, can also be built, changed
and opened. An engine of another package joins through the entry-point group `vsc.engines`: the name
of the entry point is the name of the engine, what it loads is a subclass of `Engine`.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, ClassVar, Final, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from vsc_serve.codes import CodeFile, Codes
from vsc_serve.convert.limits import Limits
from vsc_serve.errors import InputError, UsageError
from vsc_serve.index.exact import Nearest
from vsc_serve.index.metrics import Metric
from vsc_serve.index.rows import Rows
from vsc_serve.outputs import FolderKind
from vsc_serve.schema import load_json
from vsc_serve.untrusted import is_folder, read_plain

INDEX_FILE: Final = "index.json"
"""Says what an index is, and which engine reads it."""

MAX_INDEX_BYTES: Final = 2**26

_ENGINES: Final = {"exact": "vsc_serve.index.inverted:ExactIndex"}
"""Engines of this package: the module and class of each."""


class Part(NamedTuple):
    """Codes to put into an index."""

    path: Path
    """Their file, for messages."""
    stored: CodeFile


class Searchable(ABC):
    """Rows that can be searched."""

    is_exact: ClassVar[bool] = True
    """Every answer is the right one."""

    @property
    @abstractmethod
    def meta(self) -> dict[str, Any]:
        """Provenance of the codes."""

    @property
    @abstractmethod
    def rows(self) -> Rows:
        """Codes by row number."""

    @property
    @abstractmethod
    def count(self) -> int:
        """Rows that can be found."""

    @abstractmethod
    def numbers(self) -> NDArray[np.intp]:
        """Return the row numbers that can be found, ascending."""

    @abstractmethod
    def id_of(self, row: int) -> str:
        """Return the id of a row."""

    @abstractmethod
    def row_of(self, name: str) -> int | None:
        """Return the row of an id; None where there is none."""

    @abstractmethod
    def search(
        self,
        queries: Codes,
        *,
        top: int = 10,
        metric: Metric = "cosine",
        among: NDArray[np.bool_] | None = None,
    ) -> Nearest:
        """Find the rows most like each query; see `exact.search_many`.

        Args:
            queries: Codes, shape (queries, latents).
            top: Hits wanted of each query, at least 1.
            metric: What they are compared by.
            among: Limit the search to these rows: one truth value for each row number.
        """

    @abstractmethod
    def having(self, latent: int) -> NDArray[np.intp]:
        """Return the rows in which a latent is active, ascending."""


@dataclass(frozen=True, kw_only=True)
class Change:
    """Number of rows that a change of an index has touched."""

    added: int = 0
    """New ids."""
    replaced: int = 0
    """Ids that were there with another code."""
    unchanged: int = 0
    """Ids that were there with the same code."""
    removed: int = 0
    """Ids that are gone."""


class Engine(Searchable):
    """A stored index. Subclasses are final."""

    name: ClassVar[str]
    """Name of the engine, for `engine` in index.json and --engine."""
    limits: ClassVar[Limits]
    """What it takes."""
    kind: ClassVar[FolderKind]
    """How its folder is recognised before it is replaced."""

    @classmethod
    @abstractmethod
    def build(cls, parts: Iterable[Part], out: Path) -> Self:
        """Write a new index, whole or not at all; a folder of this kind is replaced.

        Args:
            parts: Codes, one after the other, of one model and the same options.
            out: Folder to write.
        """

    @classmethod
    @abstractmethod
    def open(cls, path: Path) -> Self:
        """Open an index. Raises InputError for one that is damaged or of a newer format."""

    @abstractmethod
    def add(self, parts: Iterable[Part], *, update: bool = False) -> Change:
        """Add rows; the row of an id that is there is replaced where its code is another.

        Args:
            parts: Codes of the model of the index, made with the same options.
            update: Whether ids that are not among these are removed.
        """

    @abstractmethod
    def remove(self, ids: Sequence[str]) -> Change:
        """Remove rows by their ids. Raises UsageError, and removes none, where one is not there."""

    @abstractmethod
    def facts(self) -> dict[str, Any]:
        """Return what a person or a program wants to know, as JSON."""

    @abstractmethod
    def verify(self) -> None:
        """Compare all files with their digests. Raises InputError for one that was changed."""


def engine_names() -> list[str]:
    """Return the names of all engines, those of other packages too."""
    return sorted({*_ENGINES, *(entry.name for entry in entry_points(group="vsc.engines"))})


def find_engine(name: str) -> type[Engine]:
    """Return an engine by its name. Raises UsageError for one that is not there."""
    if name in _ENGINES:
        module, kind = _ENGINES[name].split(":")
        found: type[Engine] = getattr(import_module(module), kind)
        return found
    for entry in entry_points(group="vsc.engines", name=name):
        joined: type[Engine] = entry.load()
        return joined
    raise UsageError(f"`engine` must be one of {', '.join(engine_names())}, not {name}")


def is_index(path: Path) -> bool:
    """Tell whether a folder holds an index."""
    return is_folder(path) and (path / INDEX_FILE).is_file()


def open_index(path: Path) -> Engine:
    """Open an index, whatever its engine.

    Raises:
        InputError: It is missing, damaged, or of a newer format.
        UsageError: Its engine is not installed.
    """
    return find_engine(str(read_index_file(path)["engine"])).open(path)


def read_index_file(path: Path) -> dict[str, Any]:
    """Read `index.json` of an index. Raises InputError."""
    try:
        stored = load_json(read_plain(path / INDEX_FILE, MAX_INDEX_BYTES))
        if not isinstance(stored, dict) or not isinstance(stored.get("engine"), str):
            raise ValueError("no engine")
    except (FileNotFoundError, NotADirectoryError):
        raise InputError(
            f"{path}: no index here (no {INDEX_FILE}). Build one with"
            f" `vsc index build codes.npz --out {path}`."
        ) from None
    except (OSError, ValueError) as error:
        raise InputError(damaged(path / INDEX_FILE, str(error))) from error
    return stored


def damaged(path: Path, reason: str) -> str:
    """Return the message for a damaged file of an index."""
    return f"{path}: damaged ({reason}). Build the index again with `vsc index build`."
