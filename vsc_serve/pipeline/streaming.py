"""Codes as a stream, for programs that do not want a file."""

from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from vsc_serve.bundle import open_bundle
from vsc_serve.codes import CodeRows
from vsc_serve.executors.choose import open_pool
from vsc_serve.executors.chunks import ChunkSize
from vsc_serve.executors.task import Chunk, Pool
from vsc_serve.options import PLAIN, EncodeOptions
from vsc_serve.session import Device
from vsc_serve.sources import Ids, Source, find_sources


class Batch(NamedTuple):
    """Codes of consecutive sources."""

    rows: CodeRows
    """One row per source that could be read."""
    ids: list[str]
    """Id of each row."""
    bad: list[tuple[str, str]]
    """Id and reason of each source without a row."""


def stream(
    model: Path | str,
    inputs: Sequence[Path | str],
    options: EncodeOptions = PLAIN,
    *,
    device: Device = "auto",
    workers: int | None = None,
    batch_size: int | None = None,
    exclude: Sequence[str] = (),
    ids: Ids = "relative",
) -> Iterator[Batch]:
    """Encode pictures as `vsc encode` does; give the codes in order, as they are ready.

        for batch in stream("model/", ["images/"]):
            batch.ids, batch.rows.codes, batch.bad

    Args:
        model: The bundle.
        inputs: Folders, files, patterns, archives and URLs.
        options: Threshold, values, and what else to give.
        device: Where the model runs.
        workers: Processes; by default one for each processor that may be used; 0 is threads.
        batch_size: Sources of a batch; by default as many as take a tenth of a second.
        exclude: Patterns of paths to leave out.
        ids: What rows are called.

    Raises:
        VscError: No picture was found, or the model cannot be opened; on the first batch.
    """
    manifest = open_bundle(Path(model)).manifest
    sources = find_sources([str(given) for given in inputs], exclude=exclude, ids=ids)
    with open_pool(Path(model), manifest, options, device=device, workers=workers) as pool:
        yield from batches(pool, sources, batch_size)


def batches(pool: Pool, sources: Iterator[Source], batch_size: int | None) -> Iterator[Batch]:
    """Encode sources with what reads and encodes; see `stream`."""
    size = ChunkSize(batch_size, pool.largest_chunk, pool.workers)
    waiting: deque[Chunk] = deque()

    def noted() -> Iterator[Chunk]:
        for chunk in size.cut(sources):
            waiting.append(chunk)
            yield chunk

    for piece in pool.run(noted()):
        size.learn(piece)
        chunk = waiting.popleft()
        bad = [(chunk[one.position].id, one.reason) for one in piece.bad]
        yield Batch(piece.rows, [chunk[place].id for place in piece.kept], bad)
