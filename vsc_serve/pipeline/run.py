"""One run from sources to an output: shards, resume, the list of what has no row, the join."""

import json
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count, islice
from pathlib import Path
from typing import Any, Final, NamedTuple, TypeAlias

from vsc_serve.atomic import atomic_file
from vsc_serve.codes import CodeRows, join_codes, stack_rows
from vsc_serve.codes.statistics import Figures
from vsc_serve.console import Progress
from vsc_serve.errors import InputError, Interrupted
from vsc_serve.executors.chunks import ChunkSize
from vsc_serve.executors.read import stamp_of
from vsc_serve.executors.task import Chunk, Piece, Pool, Seconds
from vsc_serve.pipeline.shards import SHARD_ROWS, Fingerprint, Parts, ShardRecord
from vsc_serve.pipeline.update import OldCodes
from vsc_serve.sources import Source

_ERRORS: Final = "errors.jsonl"


Convert: TypeAlias = Callable[[Sequence[Path], Path], None]
"""Writes a file from shards: their paths, and the file."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """What a run is to write, and how."""

    out: Path
    """`codes.npz`, or the folder of shards."""
    is_folder: bool = False
    """Keep the shards, in the folder `out`."""
    identity: dict[str, Any] = field(default_factory=dict)
    """What the run is, beside its model: shards of a run with another identity are discarded."""
    shard_rows: int = SHARD_ROWS
    """Sources in a shard."""
    chunk_size: int | None = None
    """Sources read and encoded together; by default as many as take a tenth of a second."""
    convert: Convert | None = None
    """Writes `out` from the shards, in another format than codes."""
    compress: bool = False
    """Deflate the numbers of the joined file."""
    has_digests: bool = False
    """Whether rows get the sha256 of what they were made from."""
    fails_at_once: bool = False
    """Stop at the first source that cannot be read."""
    is_strict: bool = False
    """Write nothing when any source cannot be read."""


@dataclass
class Outcome:
    """What a run did."""

    figures: Figures
    bad: int = 0
    """Sources without a row."""
    reasons: dict[str, int] = field(default_factory=dict)
    """How often each kind of reason was given."""
    resumed: int = 0
    """Sources that an earlier run had done."""
    seconds: Seconds = field(default_factory=Seconds)
    total_s: float = 0.0
    """From the first source to the finished output."""


def run_job(
    job: Job,
    pool: Pool,
    sources: Iterator[Source],
    latent_dim: int,
    *,
    old: OldCodes | None = None,
    report: Progress | None = None,
    say: Callable[[str, str], None] = lambda label, text: None,
) -> Outcome:
    """Encode sources into the job's output. `Parts.locked` must hold.

    Args:
        job: What to write.
        pool: What reads and encodes; entered.
        sources: Lazily, in a fixed order.
        latent_dim: Columns of a code.
        old: Codes whose rows are reused.
        report: Told how many sources are done.
        say: Told what a person should know.

    Raises:
        InputError: No source can be read; or one cannot and the job is strict; or the output cannot
            be written.
        Interrupted: Stopped by SIGINT or SIGTERM; finished shards are kept.
    """
    parts = Parts.beside(job.out)
    meta = pool.provenance()
    if differing := parts.begin(job.identity | {"meta": meta, "shard_rows": job.shard_rows}):
        say("resume", f"{parts.folder} discarded: another {', '.join(differing)}")
    run = _Run(job, parts, meta, Outcome(Figures.none(latent_dim)), old, report)
    began = time.perf_counter()
    try:
        run.encode(pool, sources)
        run.finish()
    except KeyboardInterrupt:
        raise Interrupted(run.how_to_go_on()) from None
    run.outcome.total_s = time.perf_counter() - began
    return run.outcome


class _Planned(NamedTuple):
    """What comes next, in the order of the sources: a chunk, or a shard that is there already."""

    shard: int
    chunk: Chunk
    record: ShardRecord | None = None


class _Shard:
    """The shard in hand."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.source_count = 0
        self.fresh = 0
        self.rows: list[CodeRows] = []
        self.ids: list[str] = []
        self.digests: list[str] = []
        self.bad: list[tuple[str, str]] = []
        self.fingerprint = Fingerprint()

    def add(self, chunk: Chunk, piece: Piece, rows: CodeRows) -> None:
        """Add a chunk and what became of it, with all its rows."""
        ids = [source.id for source in chunk]
        self.source_count += len(ids)
        self.fresh += piece.rows.codes.shape[0]
        self.rows.append(rows)
        self.ids += [ids[place] for place in piece.kept] if piece.bad else ids
        self.digests += piece.digests
        self.bad += [(ids[bad.position], bad.reason) for bad in piece.bad]
        self.fingerprint.add(ids, piece.stamps)


class _Run:
    """A run while it goes on."""

    def __init__(
        self,
        job: Job,
        parts: Parts,
        meta: dict[str, Any],
        outcome: Outcome,
        old: OldCodes | None,
        report: Progress | None,
    ) -> None:
        self.outcome = outcome
        self.records: list[ShardRecord] = []
        self._job, self._parts, self._meta = job, parts, meta
        self._old, self._report = old, report
        self._planned: deque[_Planned] = deque()
        self._shard: _Shard | None = None
        self._done = 0
        self._counts_near = True

    def encode(self, pool: Pool, sources: Iterator[Source]) -> None:
        """Make every shard that is not there yet."""
        self._counts_near = pool.counts_near
        size = ChunkSize(self._job.chunk_size, pool.largest_chunk, pool.workers)
        for piece in pool.run(self._plan(sources, size)):
            size.learn(piece)
            self._reuse_shards()
            planned = self._planned.popleft()
            if self._shard is None or self._shard.number != planned.shard:
                self._write_shard()
                self._shard = _Shard(planned.shard)
            self._add(self._shard, planned.chunk, piece)
        self._reuse_shards()
        self._write_shard()

    def finish(self) -> None:
        """Write the list of bad sources, and make the shards the output.

        Raises:
            InputError: There is no row, or a bad source and the job is strict.
        """
        began = time.perf_counter()
        errors = self._write_errors()
        if not self.outcome.figures.rows:
            raise _none_readable(self.records)
        if self._job.is_strict and self.outcome.bad:
            total = self.outcome.bad + self.outcome.figures.rows
            raise InputError(
                f"--strict: {self.outcome.bad} of {total} files cannot be read, see {errors}."
                f" No codes were written; what was encoded is kept in {self._parts.folder}."
            )
        if self._job.is_folder:
            self._parts.keep(self.records, self._job.out, errors.name if errors else None)
        else:
            paths = self._parts.paths(len(self.records))
            if self._job.convert is not None:
                self._job.convert(paths, self._job.out)
            else:
                join_codes(paths, self._job.out, self._meta, compress=self._job.compress)
            self._parts.remove()
        self.outcome.seconds.write += time.perf_counter() - began

    def how_to_go_on(self) -> str:
        """Return what to tell someone who interrupted the run."""
        kept = self._parts.count_sources()
        if not kept:
            return "interrupted before the first shard was whole. Nothing was written."
        return (
            f"interrupted; {kept:,} images are done and kept in {self._parts.folder}. Run the same"
            " command again to go on from there."
        )

    def _plan(self, sources: Iterator[Source], size: ChunkSize) -> Iterator[Chunk]:
        """Give the chunks of the shards that are not there, and note the order of everything."""
        for number in count():
            group: Iterator[Source] = islice(sources, self._job.shard_rows)
            record = self._parts.record(number)
            if record is not None:
                listed = tuple(group)
                if listed and _fingerprint(listed) == record.fingerprint:
                    self._planned.append(_Planned(number, (), record))
                    continue
                group = iter(listed)
            is_empty = True
            for chunk in size.cut(group):
                is_empty = False
                self._planned.append(_Planned(number, chunk))
                yield chunk
            if is_empty:
                return

    def _reuse_shards(self) -> None:
        """Take over the shards that are there and come next."""
        while self._planned and self._planned[0].record is not None:
            self._write_shard()
            record = self._planned.popleft().record
            assert record is not None
            self.outcome.resumed += record.sources
            self._note(record)
            self._tell(record.sources)

    def _add(self, shard: _Shard, chunk: Chunk, piece: Piece) -> None:
        if piece.bad and self._job.fails_at_once:
            first = piece.bad[0]
            raise InputError(
                f"{chunk[first.position].id}: {first.reason}."
                " --on-error fail stops at the first unreadable file."
            )
        rows = piece.rows if self._old is None else self._old.merge(piece.rows, piece.old_rows)
        shard.add(chunk, piece, rows)
        self.outcome.seconds.add(piece.seconds)
        self._tell(len(chunk))

    def _write_shard(self) -> None:
        """Write the shard in hand, if there is one."""
        shard, self._shard = self._shard, None
        if shard is None:
            return
        began = time.perf_counter()
        latent_dim = len(self.outcome.figures.firing)
        rows = stack_rows(shard.rows, latent_dim)
        record = self._parts.write(
            shard.number,
            rows,
            shard.ids,
            shard.digests if self._job.has_digests else None,
            self._meta,
            sources=shard.source_count,
            fingerprint=shard.fingerprint.value(),
            bad=shard.bad,
            figures=Figures.of(
                rows, fresh=shard.fresh, judged=shard.fresh if self._counts_near else 0
            ).to_json(),
        )
        self._note(record)
        self.outcome.seconds.write += time.perf_counter() - began

    def _note(self, record: ShardRecord) -> None:
        self.records.append(record)
        self.outcome.figures.add(Figures.from_json(record.figures))
        self.outcome.bad += len(record.bad)
        for _, reason in record.bad:
            kind = reason.split(":")[0]
            self.outcome.reasons[kind] = self.outcome.reasons.get(kind, 0) + 1

    def _tell(self, source_count: int) -> None:
        self._done += source_count
        if self._report is not None:
            self._report.update(self._done)

    def _write_errors(self) -> Path | None:
        """Write the sources without a row as JSON lines; without any, remove an earlier list."""
        folder = self._parts.folder if self._job.is_folder else None
        path = errors_path(self._job.out) if folder is None else folder / _ERRORS
        if not self.outcome.bad:
            path.unlink(missing_ok=True)
            return None
        with atomic_file(path) as file:
            for record in self.records:
                for name, reason in record.bad:
                    line = json.dumps({"id": name, "reason": reason}) + "\n"
                    file.write(line.encode())
        return path


def count_finished(
    parts: Parts, identity: dict[str, Any], sources: Iterator[Source], shard_rows: int
) -> int:
    """Return how many of the sources an interrupted run of this identity has done."""
    is_same = parts.is_of(identity | {"shard_rows": shard_rows})
    done = 0
    for number in count():
        group = tuple(islice(sources, shard_rows))
        if not group:
            return done
        record = parts.record(number) if is_same else None
        if record is not None and _fingerprint(group) == record.fingerprint:
            done += record.sources
    raise AssertionError("count() does not end")


def errors_path(out: Path) -> Path:
    """Return where inputs without a row are listed.

    `codes.npz` gives `codes.errors.jsonl`, `codes.parquet` `codes.parquet.errors.jsonl`: both
    may lie in one folder.
    """
    return out.with_name(f"{out.stem if out.suffix == '.npz' else out.name}.errors.jsonl")


def _fingerprint(sources: Sequence[Source]) -> str:
    digest = Fingerprint()
    digest.add([source.id for source in sources], [stamp_of(source) for source in sources])
    return digest.value()


def _none_readable(records: Sequence[ShardRecord]) -> InputError:
    total = sum(len(record.bad) for record in records)
    name, reason = records[0].bad[0]
    return InputError(
        f"none of {total} image files can be read; the first: {name}: {reason}."
        " Nothing was written."
    )
