"""Do a job: open the inputs and the executor, keep other runs out, and run."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack
from dataclasses import replace
from itertools import chain, islice
from typing import Any, Final, NamedTuple

from vsc_serve.bundle import Bundle, open_bundle
from vsc_serve.console import Progress
from vsc_serve.domain import are_comparable, read_reference
from vsc_serve.encoder import Encoder
from vsc_serve.errors import UsageError
from vsc_serve.executors import FIRST, ArrayExecutor, Executor, open_executor
from vsc_serve.pipeline.job import STDIN, Job, Scan
from vsc_serve.pipeline.run import Convert, Outcome, Say, count_finished, run_job
from vsc_serve.pipeline.shards import ShardStore
from vsc_serve.pipeline.update import PreviousCodes, open_previous
from vsc_serve.sources import Source, find_sources, open_arrays

_DIGESTS: Final = "digests.npy"

Show = Callable[[str], AbstractContextManager[Progress]]


class Encoded(NamedTuple):
    """Result of an encode job."""

    outcome: Outcome
    scan: Scan
    executor: Executor
    """What did it."""


class Plan(NamedTuple):
    """Plan of an encode job, for a dry run."""

    scan: Scan
    finished: int
    """Sources that an interrupted run has done."""
    executor: Executor
    """What would do the work; not started."""


def encode_to_file(job: Job, *, say: Say, show: Show, convert: Convert | None = None) -> Encoded:
    """Do a job.

    Args:
        job: What.
        say: Told what a person should know: a label and a text.
        show: Opens a display of progress; given what is counted.
        convert: Writes the output from shards, where it is no codes file.

    Raises:
        VscError: See `run_job`, `open_executor`, `find_sources` and `check_output`.
    """
    job.check_out()
    bundle = open_bundle(job.model)
    store, scan = ShardStore(job.out, job.errors_path), Scan()
    with ExitStack() as stack:
        job, executor, sources = _open_inputs(job, bundle, scan, store)
        stack.enter_context(executor)
        chosen = scan.counted(sources)
        first = list(islice(chosen, FIRST * executor.workers))
        executor.expect(len(first))
        meta = executor.provenance()
        say("model", _describe(job, bundle, str(meta["engine"])))
        stack.enter_context(store.locked())
        job.check_out()  # once more: another run may have finished in the meantime
        previous = _open_previous(job, meta, store, say) if job.is_update else None
        chosen = chain(first, chosen)
        reference = read_reference(bundle)
        if not are_comparable(job.options, bundle.manifest):
            reference = None
        with show("rows" if job.is_array else "images") as report:
            outcome = run_job(
                job,
                executor,
                chosen,
                bundle.manifest.latent_dim,
                convert=convert,
                previous=previous,
                reference=reference,
                report=report,
                say=say,
            )
    return Encoded(outcome, scan, executor)


def plan(job: Job) -> Plan:
    """Find out what a job would do, and write nothing."""
    bundle = open_bundle(job.model)
    store, scan = ShardStore(job.out, job.errors_path), Scan()
    job, executor, sources = _open_inputs(job, bundle, scan, store)
    finished = count_finished(store, job.identity(), scan.counted(sources), job.shard_rows)
    return Plan(scan, finished, executor)


class _Opened(NamedTuple):
    """A job whose inputs were found."""

    job: Job
    executor: Executor
    sources: Iterator[Source]
    """Those of its share, once."""


def _open_inputs(job: Job, bundle: Bundle, scan: Scan, store: ShardStore) -> _Opened:
    if job.is_array:
        return _open_arrays(job, scan)
    read = replace(
        job.executor.read,
        keeps_digests=job.is_update,
        digest_table=store.folder / _DIGESTS if job.is_update else None,
    )
    executor = open_executor(bundle, job.options, replace(job.executor, read=read))
    found = find_sources(job.inputs, exclude=job.exclude, ids=job.ids, on_skip=scan.skip)
    if job.share == (1, 1):
        return _Opened(job, executor, found)
    if STDIN in job.inputs:
        listed = list(found)
        return _Opened(job, executor, _take_share(job, iter(listed), len(listed)))
    total = sum(1 for _ in found)
    again = find_sources(job.inputs, exclude=job.exclude, ids=job.ids)
    return _Opened(job, executor, _take_share(job, again, total))


def _open_arrays(job: Job, scan: Scan) -> _Opened:
    if job.is_update:
        raise UsageError("`is_update` compares files of images; encode arrays without it")
    arrays = open_arrays(job.inputs, exclude=job.exclude, ids=job.ids, on_skip=scan.skip)
    encoder = Encoder.open(job.model, device=job.executor.device)
    executor = ArrayExecutor(encoder, arrays, job.options)
    sources = _take_share(job, arrays.sources(), arrays.row_count)
    return _Opened(replace(job, arrays_signature=arrays.signature()), executor, sources)


def _take_share(job: Job, sources: Iterator[Source], total: int) -> Iterator[Source]:
    """Return the sources of one machine of several: a run of consecutive ones, the same always."""
    number, count = job.share
    start, stop = total * (number - 1) // count, total * number // count
    if start == stop:
        raise UsageError(f"`share={number}/{count}`: {total} inputs leave nothing for this share")
    return islice(sources, start, stop)


def _open_previous(
    job: Job, meta: dict[str, Any], store: ShardStore, say: Say
) -> PreviousCodes | None:
    """Open the codes that are updated, and lay out their digests for the workers."""
    previous, why = open_previous(job.out, meta, job.options)
    store.begin(job.identity() | {"meta": meta, "shard_rows": job.shard_rows})
    table = store.folder / _DIGESTS
    if previous is None:
        table.unlink(missing_ok=True)
        say("update", f"encoding everything: {why}")
    else:
        previous.save_digests(table)
    return previous


def _describe(job: Job, bundle: Bundle, engine: str) -> str:
    manifest = bundle.manifest
    tau, stored_tau = job.options.thresholds(manifest)
    queries = "" if stored_tau is None else f" (queries for rows of tau {stored_tau:g})"
    return (
        f"{job.model}  {manifest.name}, J={manifest.latent_dim}, tau {tau:g}{queries},"
        f" weights {manifest.digest[:6]}, {engine}"
    )
