"""The job of `vsc encode`: what to encode, how, and where to."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Final, Literal

from vsc_serve.codes import CODES_FILE, CODES_FOLDER, ERROR_FILE, ERRORS_LIST
from vsc_serve.convert.kinds import PARQUET
from vsc_serve.errors import UsageError
from vsc_serve.executors import ExecutorOptions, file_signature
from vsc_serve.options import PLAIN, EncodeOptions
from vsc_serve.outputs import Kind, check_output
from vsc_serve.pipeline.shards import SHARD_ROWS
from vsc_serve.sources import FileSource, Ids, Source, holds_arrays
from vsc_serve.sources.stores import is_url, local_path

FILE_SUFFIXES: Final = (".npz", ".parquet")
"""Extensions of outputs that are one file."""

OnError = Literal["skip", "fail"]

STDIN: Final = "-"
"""Input that stands for a list of paths on standard input."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """Encode job: inputs, options and output. Raises UsageError for what makes no sense."""

    inputs: list[str]
    """Folders, files, patterns, archives, URLs, `-`; or numpy files of rows."""
    out: Path
    """A codes file, or a folder for shards."""
    model: Path
    """The bundle."""
    options: EncodeOptions = PLAIN
    executor: ExecutorOptions = ExecutorOptions()  # noqa: RUF009  # frozen
    batch_size: int | None = None
    """Images read and encoded together; by default as many as take a tenth of a second."""
    exclude: list[str] = field(default_factory=list)
    """Patterns of paths to leave out."""
    ids: Ids = "relative"
    share: tuple[int, int] = (1, 1)
    """Which of how many shares of the sources."""
    shard_rows: int = SHARD_ROWS
    """Sources in a shard."""
    is_update: bool = False
    """Take over the rows of `out` that were made from the same content."""
    compress: bool = False
    """Deflate the numbers."""
    on_error: OnError = "skip"
    """What an image that cannot be read does: cost its row, or stop the run."""
    is_strict: bool = False
    """Write no codes when any image cannot be read."""
    force: bool = False
    """Replace codes that are there."""
    arrays_signature: str | None = None
    """Signature of the numpy files, once they are open."""

    def __post_init__(self) -> None:
        if self.is_folder and self.out.suffix and not self.out.is_dir():
            raise UsageError(
                f"{self.out}: `out` must end in {' or '.join(FILE_SUFFIXES)}, or be a folder (a"
                " name without an extension)"
            )
        if self.is_update and self.out.suffix == ".parquet":
            raise UsageError(f"{self.out}: `is_update` works on .npz and on folders of shards")
        for name, number in (("batch_size", self.batch_size), ("shard_rows", self.shard_rows)):
            if number is not None and number < 1:
                raise UsageError(f"`{name}` must be 1 or more, not {number}")

    @property
    def is_folder(self) -> bool:
        """Whether shards are kept, in a folder."""
        return self.out.suffix not in FILE_SUFFIXES

    @cached_property
    def is_array(self) -> bool:
        """Whether the rows of numpy files are to be encoded."""
        return holds_arrays(self.inputs, exclude=self.exclude)

    @property
    def errors_path(self) -> Path:
        """Where inputs without a row are listed.

        `codes.npz` gives `codes.errors.jsonl`, `codes.parquet` `codes.parquet.errors.jsonl`: both
        may lie in one folder. A folder of shards holds its own list.
        """
        if self.is_folder:
            return self.out / ERRORS_LIST
        name = self.out.stem if self.out.suffix == ".npz" else self.out.name
        return self.out.with_name(f"{name}.errors.jsonl")

    def check_out(self) -> None:
        """Check that the output may be written: see `outputs.check_output`."""
        kinds: dict[str, Kind] = {".npz": CODES_FILE, ".parquet": PARQUET}
        kind = CODES_FOLDER if self.is_folder else kinds[self.out.suffix]
        read = [given for given in self.inputs if given != STDIN and not is_url(given)]
        force = self.force or self.is_update
        check_output(self.out, kind, force=force, inputs=[self.model, *map(local_path, read)])
        if not self.is_folder:
            check_output(self.errors_path, ERROR_FILE, force=True)

    def identity(self) -> dict[str, Any]:
        """Return what must be the same for an interrupted run to be resumed."""
        return {
            "inputs": self.inputs,
            "exclude": self.exclude,
            "ids": self.ids,
            "max_pixels": self.executor.read.max_pixels,
            "options": asdict(self.options),
            "share": list(self.share),
            "arrays": self.arrays_signature,
            "update": file_signature(FileSource("", str(self.out))) if self.is_update else None,
        }


@dataclass
class Scan:
    """What was found where images were looked for."""

    sources: int = 0
    """Images that were given out so far."""
    skipped: Counter[str] = field(default_factory=Counter)
    """What was passed over, by reason."""

    def skip(self, path: str, why: str) -> None:
        """Note something that was passed over."""
        self.skipped[why] += 1

    def counted(self, sources: Iterator[Source]) -> Iterator[Source]:
        """Count sources while they are taken."""
        for source in sources:
            self.sources += 1
            yield source
