"""One run from sources to an output: shards, resume, rejected sources, the join."""

import json
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain, count, islice
from pathlib import Path
from typing import Any, Final, NamedTuple, TypeAlias

import numpy as np

from vsc_serve.atomic import atomic_file
from vsc_serve.codes import (
    ERRORS_LIST,
    CodeFile,
    CodeRows,
    CodeStatistics,
    DecisionStatistics,
    join_codes,
    read_codes,
    stack_rows,
    take_rows,
)
from vsc_serve.console import Progress
from vsc_serve.domain import DomainComparison, ReferenceStatistics, compare, domain_facts
from vsc_serve.errors import InputError, Interrupted, SourceUnavailable
from vsc_serve.executors import (
    Chunk,
    ChunkResult,
    ChunkSize,
    Executor,
    StageSeconds,
    file_signature,
)
from vsc_serve.pipeline.job import Job
from vsc_serve.pipeline.shards import (
    Fingerprint,
    RejectedSource,
    ShardRecord,
    ShardStore,
)
from vsc_serve.pipeline.update import PreviousCodes
from vsc_serve.sources import Source

Convert: TypeAlias = Callable[[Sequence[Path], Path], None]
"""Writes a file from shards: their paths, and the file."""

Say: TypeAlias = Callable[[str, str], None]
"""Told what a person should know: a label and a text."""

_NO_SIGNATURE: Final = ""
"""Signature of a rejected source: whatever it is, the source is tried again."""


@dataclass
class Outcome:
    """Result of a run."""

    statistics: CodeStatistics
    rejected: int = 0
    """Sources without a row."""
    reasons: dict[str, int] = field(default_factory=dict)
    """How often each kind of reason was given."""
    resumed: int = 0
    """Sources that an earlier run had done."""
    seconds: StageSeconds = field(default_factory=StageSeconds)
    total_s: float = 0.0
    """From the first source to the finished output."""
    domain: DomainComparison | None = None
    """How the codes differ from those of the model's own data, where that can be said."""
    example: str = ""
    """Id of a row, of one with active latents where the first shard has one."""


def run_job(
    job: Job,
    executor: Executor,
    sources: Iterator[Source],
    latent_dim: int,
    *,
    convert: Convert | None = None,
    previous: PreviousCodes | None = None,
    reference: ReferenceStatistics | None = None,
    report: Progress | None = None,
    say: Say = lambda label, text: None,
) -> Outcome:
    """Encode sources into the output of a job. `ShardStore.locked` must hold.

    Args:
        job: What to write, and how.
        executor: What reads and encodes; entered.
        sources: Lazily, in a fixed order.
        latent_dim: Columns of a code.
        convert: Writes the output from shards, where it is no codes file.
        previous: Codes whose rows are reused.
        reference: Statistics of the model's own data, where they can be compared.
        report: Told how many sources are done.
        say: Told what a person should know.

    Raises:
        InputError: No source can be read; or one cannot and the run is strict; or the output cannot
            be written.
        SourceUnavailable: A source cannot be reached now; finished shards are kept.
        Interrupted: Stopped by SIGINT or SIGTERM; finished shards are kept.
    """
    store = ShardStore(job.out, job.errors_path)
    meta = executor.provenance()
    if differing := store.begin(job.identity() | {"meta": meta, "shard_rows": job.shard_rows}):
        say("resume", f"{store.folder} discarded: another {', '.join(differing)}")
    outcome = Outcome(CodeStatistics.none(latent_dim))
    run = _Run(job, store, meta, outcome, previous, report)
    began = time.perf_counter()
    try:
        run.encode(executor, sources)
        if reference is not None:
            outcome.domain = compare(reference, outcome.statistics)
        run.finish(convert)
    except KeyboardInterrupt:
        raise Interrupted(f"interrupted; {run.how_to_resume()}") from None
    except SourceUnavailable as error:
        raise SourceUnavailable(f"{error} {run.how_to_resume().capitalize()}") from error
    outcome.total_s = time.perf_counter() - began
    return outcome


class _Shard:
    """A shard while its rows come in."""

    def __init__(self, number: int, latent_dim: int) -> None:
        self.number = number
        self._latent_dim = latent_dim
        self._source_count = 0
        self._fresh = 0
        self._rows: list[CodeRows] = []
        self._decisions = DecisionStatistics()
        self._ids: list[str] = []
        self._digests: list[str] = []
        self._rejected: list[RejectedSource] = []
        self._fingerprint = Fingerprint()

    def add(self, chunk: Chunk, result: ChunkResult, rows: CodeRows) -> None:
        """Add a chunk and its result, with all its rows."""
        ids = [source.id for source in chunk]
        signatures = list(result.signatures)
        for one in result.rejected:
            signatures[one.position] = _NO_SIGNATURE
            position = self._source_count + one.position
            self._rejected.append(RejectedSource(position, ids[one.position], one.reason, one.kind))
        self._fingerprint.add(ids, signatures)
        self._source_count += len(ids)
        self._fresh += result.rows.codes.shape[0]
        self._decisions.add(result.decisions)
        self._rows.append(rows)
        self._ids += [ids[place] for place in result.kept] if result.rejected else ids
        self._digests += result.digests

    def write(self, store: ShardStore, meta: dict[str, Any], *, has_digests: bool) -> ShardRecord:
        """Write the shard. Raises InputError."""
        rows = stack_rows(self._rows, self._latent_dim)
        statistics = CodeStatistics.of(rows.codes, fresh=self._fresh, decisions=self._decisions)
        digests = self._digests if has_digests else None
        return store.write(
            self.number,
            CodeFile(rows.codes, self._ids, meta, rows.gamma, rows.sigma, digests),
            sources=self._source_count,
            fingerprint=self._fingerprint.value(),
            rejected=self._rejected,
            statistics=statistics.to_json(),
        )


class _RetriedShard:
    """A finished shard of an earlier run, of which the rejected sources are tried again."""

    def __init__(self, number: int, record: ShardRecord) -> None:
        self.number = number
        self.record = record
        self._tried = 0
        self._rows: list[CodeRows] = []
        self._fresh = 0
        self._decisions = DecisionStatistics()
        self._gained: list[tuple[int, str]] = []
        self._digests: list[str] = []
        self._rejected: list[RejectedSource] = []

    def add(self, chunk: Chunk, result: ChunkResult, rows: CodeRows) -> None:
        """Add a chunk of rejected sources and its result, with all its rows."""
        before = self.record.rejected[self._tried : self._tried + len(chunk)]
        self._tried += len(chunk)
        self._rows.append(rows)
        self._fresh += result.rows.codes.shape[0]
        self._decisions.add(result.decisions)
        self._gained += [(before[place].position, before[place].id) for place in result.kept]
        self._digests += result.digests
        self._rejected += [
            before[one.position]._replace(reason=one.reason, kind=one.kind)
            for one in result.rejected
        ]

    def write(self, store: ShardStore, meta: dict[str, Any], *, has_digests: bool) -> ShardRecord:
        """Write the shard with the rows it has gained; without any, it stays as it is."""
        if self._rejected == self.record.rejected:
            return self.record
        stored = read_codes(store.path(self.number))
        rejected = {one.position for one in self.record.rejected}
        kept = [place for place in range(self.record.sources) if place not in rejected]
        order = np.argsort([*kept, *(position for position, _ in self._gained)], kind="stable")
        latent_dim = stored.codes.shape[1]
        earlier = CodeRows(codes=stored.codes, gamma=stored.gamma, sigma=stored.sigma)
        rows = take_rows(stack_rows([earlier, *self._rows], latent_dim), order)
        ids = [*stored.ids, *(name for _, name in self._gained)]
        digests = [*(stored.digests or []), *self._digests]
        statistics = CodeStatistics.from_json(self.record.statistics)
        statistics.decisions.add(self._decisions)
        fresh = statistics.fresh + self._fresh
        found = CodeStatistics.of(rows.codes, fresh=fresh, decisions=statistics.decisions)
        return store.write(
            self.number,
            CodeFile(
                rows.codes,
                [ids[place] for place in order],
                meta,
                rows.gamma,
                rows.sigma,
                [digests[place] for place in order] if has_digests else None,
            ),
            sources=self.record.sources,
            fingerprint=self.record.fingerprint,
            rejected=self._rejected,
            statistics=found.to_json(),
        )


class _Planned(NamedTuple):
    """What comes next, in the order of the sources: a chunk of a shard, or a finished shard."""

    shard: int
    chunk: Chunk
    record: ShardRecord | None = None
    """Record of the shard where an earlier run has finished it; the chunk is then of sources that
    it rejected."""


class _Run:
    """A run while it goes on."""

    def __init__(
        self,
        job: Job,
        store: ShardStore,
        meta: dict[str, Any],
        outcome: Outcome,
        previous: PreviousCodes | None,
        report: Progress | None,
    ) -> None:
        self._outcome = outcome
        self._records: list[ShardRecord] = []
        self._job, self._store, self._meta = job, store, meta
        self._previous, self._report = previous, report
        self._planned: deque[_Planned] = deque()
        self._shard: _Shard | _RetriedShard | None = None
        self._done = 0

    def encode(self, executor: Executor, sources: Iterator[Source]) -> None:
        """Make every shard that is not there yet."""
        size = ChunkSize(self._job.batch_size, executor.largest_chunk, executor.workers)
        for result in executor.run(self._plan(sources, size)):
            size.learn(result)
            self._reuse_shards()
            planned = self._planned.popleft()
            if self._shard is None or self._shard.number != planned.shard:
                self._write_shard()
                self._shard = self._open_shard(planned)
            self._add(self._shard, planned.chunk, result)
        self._reuse_shards()
        self._write_shard()

    def finish(self, convert: Convert | None) -> None:
        """Write the list of rejected sources, and make the shards the output.

        Raises:
            InputError: There is no row, or a rejected source and the run is strict.
        """
        began = time.perf_counter()
        self._refuse_too_few()
        self._outcome.example = self._find_example()
        if self._job.is_folder:
            errors = self._write_errors()
            self._store.keep(self._records, errors.name if errors else None, self._domain_facts())
        else:
            paths = self._store.paths(len(self._records))
            if convert is not None:
                convert(paths, self._store.joined)
            else:
                meta = self._meta | self._domain_facts()
                join_codes(paths, self._store.joined, meta, compress=self._job.compress)
            # Both are whole before the first gets its name, and the list does first: a run that is
            # killed between them is run again, and mends it.
            self._write_errors()
            self._store.publish()
            self._store.remove()
        self._outcome.seconds.write += time.perf_counter() - began

    def _domain_facts(self) -> dict[str, Any]:
        """Return what provenance says of rows that are far outside the model's own data."""
        return domain_facts(self._outcome.domain)

    def _find_example(self) -> str:
        first = next(number for number, record in enumerate(self._records) if record.rows)
        stored = read_codes(self._store.path(first))
        entries = zip(stored.ids, np.diff(stored.codes.indptr), strict=True)
        active = (name for name, count in entries if count and name.isprintable())
        printable = (name for name in stored.ids if name.isprintable())
        return next(chain(active, printable), stored.ids[0])

    def _refuse_too_few(self) -> None:
        """Raise InputError without a row, or with a rejected source where the run is strict."""
        if not self._outcome.statistics.images:
            errors = self._write_errors()
            self._store.remove()
            raise self._none_readable(errors)
        if self._job.is_strict and self._outcome.rejected:
            errors = self._write_errors()
            total = self._outcome.rejected + self._outcome.statistics.images
            raise InputError(
                f"`is_strict`: {self._outcome.rejected} of {total} inputs cannot be read, see"
                f" {errors}. No codes were written; what was encoded is kept in"
                f" {self._store.folder}, and the same command tries the others again."
            )

    def how_to_resume(self) -> str:
        """Return what to tell someone whose run has stopped."""
        if self._store.is_published:
            return f"{self._job.out} is whole all the same: there is nothing left to do."
        kept = self._store.count_sources()
        if not kept:
            return "no shard was finished, and nothing was written: run the same command again."
        return (
            f"{kept:,} images are done and kept in {self._store.folder}: run the same command"
            " again to resume."
        )

    def _plan(self, sources: Iterator[Source], size: ChunkSize) -> Iterator[Chunk]:
        """Give the chunks that are to be done, and note the order of everything."""
        for number in count():
            group: Iterator[Source] = islice(sources, self._job.shard_rows)
            record = self._store.record(number)
            if record is not None:
                listed = tuple(group)
                if listed and _fingerprint(listed, record) == record.fingerprint:
                    yield from self._plan_retries(number, listed, record, size)
                    continue
                group = iter(listed)
            is_empty = True
            for chunk in size.cut(group):
                is_empty = False
                self._planned.append(_Planned(number, chunk))
                yield chunk
            if is_empty:
                return

    def _plan_retries(
        self, number: int, listed: Sequence[Source], record: ShardRecord, size: ChunkSize
    ) -> Iterator[Chunk]:
        """Give the sources that an earlier run has rejected, to be tried again."""
        if not record.rejected:
            self._planned.append(_Planned(number, (), record))
        for chunk in size.cut(listed[one.position] for one in record.rejected):
            self._planned.append(_Planned(number, chunk, record))
            yield chunk

    def _open_shard(self, planned: _Planned) -> _Shard | _RetriedShard:
        if planned.record is None:
            return _Shard(planned.shard, self._outcome.statistics.latents)
        self._note_resumed(planned.record)
        return _RetriedShard(planned.shard, planned.record)

    def _reuse_shards(self) -> None:
        """Take over the finished shards that come next and have nothing to be tried again."""
        while self._planned and not self._planned[0].chunk:
            self._write_shard()
            record = self._planned.popleft().record
            assert record is not None
            self._note_resumed(record)
            self._note(record)

    def _note_resumed(self, record: ShardRecord) -> None:
        self._outcome.resumed += record.rows
        self._tell(record.rows)

    def _add(self, shard: _Shard | _RetriedShard, chunk: Chunk, result: ChunkResult) -> None:
        if result.rejected and self._job.on_error == "fail":
            first = result.rejected[0]
            raise InputError(
                f"{chunk[first.position].id}: {first.reason}."
                ' `on_error="fail"` stops at the first unreadable input.',
                kind=first.kind,
            )
        rows = result.rows
        if self._previous is not None:
            rows = self._previous.merge(rows, result.reused)
        shard.add(chunk, result, rows)
        self._outcome.seconds.add(result.seconds)
        self._tell(len(chunk))

    def _write_shard(self) -> None:
        """Write the shard in hand, if there is one."""
        shard, self._shard = self._shard, None
        if shard is None:
            return
        began = time.perf_counter()
        self._note(shard.write(self._store, self._meta, has_digests=self._job.is_update))
        self._outcome.seconds.write += time.perf_counter() - began

    def _note(self, record: ShardRecord) -> None:
        self._records.append(record)
        self._outcome.statistics.add(CodeStatistics.from_json(record.statistics))
        self._outcome.rejected += len(record.rejected)
        for one in record.rejected:
            self._outcome.reasons[one.kind] = self._outcome.reasons.get(one.kind, 0) + 1

    def _tell(self, source_count: int) -> None:
        self._done += source_count
        if self._report is not None:
            self._report.update(self._done)

    def _write_errors(self) -> Path | None:
        """Write the sources without a row as JSON lines; without any, remove an earlier list."""
        is_folder = self._job.is_folder
        path = self._store.folder / ERRORS_LIST if is_folder else self._job.errors_path
        if not self._outcome.rejected:
            _remove_file(path)
            return None
        with atomic_file(path) as file:
            for record in self._records:
                for one in record.rejected:
                    entry = {"id": one.id, "reason": one.reason, "kind": one.kind}
                    file.write((json.dumps(entry) + "\n").encode())
        return path

    def _none_readable(self, errors: Path | None) -> InputError:
        first = self._records[0].rejected[0]
        listed = "" if self._job.is_folder else f" All reasons are in {errors}."
        return InputError(
            f"none of {self._outcome.rejected} inputs can be read; the first: {first.id}:"
            f" {first.reason}. No codes were written.{listed}",
            kind=first.kind,
        )


def _remove_file(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise InputError(f"{path}: cannot be removed ({error.strerror or error}).") from error


def count_finished(
    store: ShardStore, identity: dict[str, Any], sources: Iterator[Source], shard_rows: int
) -> int:
    """Return how many of the sources an interrupted run of this identity has done."""
    is_same = store.is_of(identity | {"shard_rows": shard_rows})
    done = 0
    for number in count():
        group = tuple(islice(sources, shard_rows))
        if not group:
            return done
        record = store.record(number) if is_same else None
        if record is not None and _fingerprint(group, record) == record.fingerprint:
            done += record.rows
    raise AssertionError("count() does not end")


def _fingerprint(sources: Sequence[Source], record: ShardRecord) -> str:
    """Return the digest that sources would give if the same ones were rejected."""
    rejected = {one.position for one in record.rejected}
    signatures = [
        _NO_SIGNATURE if place in rejected else file_signature(source)
        for place, source in enumerate(sources)
    ]
    digest = Fingerprint()
    digest.add([source.id for source in sources], signatures)
    return digest.value()
