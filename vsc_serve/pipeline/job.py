"""What a person asks of `vsc encode`, and the run that answers it."""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack
from dataclasses import asdict, dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import Any, Final

from vsc_serve.bundle import Manifest, open_bundle
from vsc_serve.codes import CODES_FILE, CODES_FOLDER, ERROR_FILE
from vsc_serve.console import Progress
from vsc_serve.convert.kinds import PARQUET
from vsc_serve.encoder import Encoder
from vsc_serve.errors import UsageError
from vsc_serve.executors.choose import open_pool
from vsc_serve.executors.chunks import FIRST
from vsc_serve.executors.read import stamp_of
from vsc_serve.executors.task import Pool
from vsc_serve.executors.threads import ArrayLoop, Row
from vsc_serve.options import PLAIN, EncodeOptions
from vsc_serve.outputs import Kind, check_output
from vsc_serve.pipeline.run import Convert, Job, Outcome, count_finished, errors_path, run_job
from vsc_serve.pipeline.shards import SHARD_ROWS, Parts
from vsc_serve.pipeline.update import OldCodes, open_old
from vsc_serve.session import Device
from vsc_serve.sources import FileSource, Ids, Source, find_sources
from vsc_serve.sources.arrays import SUFFIXES, read_rows
from vsc_serve.sources.places import is_url, local_path

FILE_SUFFIXES: Final = (".npz", ".parquet")
"""Endings of outputs that are one file."""

_STDIN: Final = "-"
_KNOWN: Final = "known.npy"

Say = Callable[[str, str], None]
Show = Callable[[str], AbstractContextManager[Progress]]


@dataclass(frozen=True, kw_only=True)
class Request:
    """What to encode, how, and where to."""

    inputs: list[str]
    """Folders, files, patterns, archives, URLs, `-`; or one numpy file."""
    out: Path
    """A codes file, or a folder for shards."""
    model: Path
    """The bundle."""
    options: EncodeOptions = PLAIN
    device: Device = "auto"
    exclude: list[str] = field(default_factory=list)
    ids: Ids = "relative"
    workers: int | None = None
    batch_size: int | None = None
    share: tuple[int, int] = (1, 1)
    """Which of how many shares of the sources."""
    shard_rows: int = SHARD_ROWS
    is_update: bool = False
    """Take over the rows of `out` that were made from the same content."""
    compress: bool = False
    fails_at_once: bool = False
    is_strict: bool = False
    force: bool = False
    """Replace codes that are there."""

    def __post_init__(self) -> None:
        if self.is_folder and self.out.suffix and not self.out.is_dir():
            raise UsageError(
                f"{self.out}: --out must end in {' or '.join(FILE_SUFFIXES)}, or be a folder (a"
                " name without an ending)"
            )
        if self.is_update and self.out.suffix == ".parquet":
            raise UsageError(f"{self.out}: --update works on .npz and on folders of shards")

    @property
    def is_folder(self) -> bool:
        """Whether shards are kept, in a folder."""
        return self.out.suffix not in FILE_SUFFIXES

    @property
    def is_array(self) -> bool:
        """Whether a numpy file is to be encoded."""
        return any(given.endswith(SUFFIXES) for given in self.inputs)

    def check_out(self) -> None:
        """Check that the output may be written: see `outputs.check_output`."""
        kinds: dict[str, Kind] = {".npz": CODES_FILE, ".parquet": PARQUET}
        kind = CODES_FOLDER if self.is_folder else kinds[self.out.suffix]
        read = [given for given in self.inputs if given != _STDIN and not is_url(given)]
        force = self.force or self.is_update
        check_output(self.out, kind, force=force, inputs=[self.model, *map(local_path, read)])
        if not self.is_folder:
            check_output(errors_path(self.out), ERROR_FILE, force=True)

    def identity(self) -> dict[str, Any]:
        """Return what must be the same for an interrupted run to be gone on with."""
        return {
            "inputs": self.inputs,
            "exclude": self.exclude,
            "ids": self.ids,
            "options": asdict(self.options),
            "share": list(self.share),
            "update": stamp_of(FileSource("", str(self.out))) if self.is_update else None,
            "array": stamp_of(FileSource("", self.inputs[0])) if self.is_array else None,
        }


@dataclass
class Scan:
    """What was found where pictures were looked for."""

    sources: int = 0
    """Pictures that were given out so far."""
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


def encode_to_file(
    request: Request, *, say: Say, show: Show, convert: Convert | None = None
) -> tuple[Outcome, Scan, Pool]:
    """Do what was asked.

    Args:
        request: What.
        say: Told what a person should know: a label and a text.
        show: Opens a display of progress; given what is counted.
        convert: Writes the output from shards, where it is no codes file.

    Returns:
        What was done, what was found, and what did it.

    Raises:
        VscError: See `run_job`, `open_pool` and `find_sources`.
    """
    request.check_out()
    manifest = open_bundle(request.model).manifest
    parts, scan = Parts.beside(request.out), Scan()
    with ExitStack() as stack:
        pool, sources = _open_inputs(request, manifest, scan, parts)
        stack.enter_context(pool)
        chosen = scan.counted(_take_share(request, sources))
        first = list(islice(chosen, FIRST * pool.workers))
        pool.expect(len(first))
        meta = pool.provenance()
        say("model", _describe(request, manifest, str(meta["engine"])))
        stack.enter_context(parts.locked())
        request.check_out()  # once more: another run may have finished in the meantime
        old = _open_old(request, meta, parts, say) if request.is_update else None
        job = _job(request, convert)
        chosen = chain(first, chosen)
        with show("rows" if request.is_array else "images") as report:
            outcome = run_job(
                job, pool, chosen, manifest.latent_dim, old=old, report=report, say=say
            )
    return outcome, scan, pool


def _job(request: Request, convert: Convert | None) -> Job:
    return Job(
        out=request.out,
        is_folder=request.is_folder,
        identity=request.identity(),
        shard_rows=request.shard_rows,
        chunk_size=request.batch_size,
        convert=convert,
        compress=request.compress,
        has_digests=request.is_update,
        fails_at_once=request.fails_at_once,
        is_strict=request.is_strict,
    )


def plan(request: Request) -> tuple[Scan, int, Pool]:
    """Find out what a request would do, and write nothing.

    Returns:
        What there is, how many sources an interrupted run has done, and what would do the work.
    """
    manifest = open_bundle(request.model).manifest
    parts, scan = Parts.beside(request.out), Scan()
    pool, sources = _open_inputs(request, manifest, scan, parts)
    chosen = scan.counted(_take_share(request, sources))
    finished = count_finished(parts, request.identity(), chosen, request.shard_rows)
    return scan, finished, pool


def _open_inputs(
    request: Request, manifest: Manifest, scan: Scan, parts: Parts
) -> tuple[Pool, Iterator[Source]]:
    if request.is_array:
        return _open_array(request)
    pool = open_pool(
        request.model,
        manifest,
        request.options,
        device=request.device,
        workers=request.workers,
        has_digests=request.is_update,
        known=parts.folder / _KNOWN if request.is_update else None,
    )
    found = find_sources(
        request.inputs, exclude=request.exclude, ids=request.ids, on_skip=scan.skip
    )
    return pool, found


def _open_array(request: Request) -> tuple[Pool, Iterator[Source]]:
    """Open one numpy file. Its rows have numbers for ids, so it cannot join other inputs."""
    path = Path(request.inputs[0])
    if len(request.inputs) > 1:
        raise UsageError("an .npy or .npz file is encoded by itself: give no other input with it")
    if not path.is_file():
        raise UsageError(f"{path}: no such file. Check the path.")
    if request.is_update:
        raise UsageError(f"{path}: --update compares files; encode an array without it")
    array = read_rows(path)
    if not array.ids:
        raise UsageError(f"{path}: holds no rows. Nothing was written.")
    encoder = Encoder.open(request.model, device=request.device)
    rows = (Row(name, number) for number, name in enumerate(array.ids))
    return ArrayLoop(encoder, array.rows, request.options), rows


def _take_share(request: Request, sources: Iterator[Source]) -> Iterator[Source]:
    """Return the sources of one machine of several: a run of consecutive ones, the same always."""
    number, count = request.share
    if count == 1:
        return sources
    if request.is_array or _STDIN in request.inputs:
        listed = list(sources)
        total, again = len(listed), iter(listed)
    else:
        total = sum(1 for _ in sources)
        again = find_sources(request.inputs, exclude=request.exclude, ids=request.ids)
    start, stop = total * (number - 1) // count, total * number // count
    if start == stop:
        raise UsageError(f"--shard {number}/{count}: {total} images leave nothing for this share")
    return islice(again, start, stop)


def _open_old(request: Request, meta: dict[str, Any], parts: Parts, say: Say) -> OldCodes | None:
    """Open the codes that are updated, and lay out their digests for the workers."""
    old, why = open_old(request.out, meta, request.options)
    known = parts.folder / _KNOWN
    if old is None:
        known.unlink(missing_ok=True)
        say("update", f"encoding everything: {why}")
    else:
        old.save_digests(known)
    return old


def _describe(request: Request, manifest: Manifest, engine: str) -> str:
    tau = manifest.tau if request.options.tau is None else request.options.tau
    return (
        f"{request.model}  {manifest.name}, J={manifest.latent_dim}, tau {tau:g},"
        f" weights {manifest.digest[:6]}, {engine}"
    )
