"""Codes as a stream, for programs that do not want a file."""

from collections import deque
from collections.abc import Generator, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from vsc_serve.bundle import open_bundle
from vsc_serve.codes import CodeRows
from vsc_serve.encoder import Encoder
from vsc_serve.executors import (
    ArrayExecutor,
    Chunk,
    ChunkSize,
    Executor,
    ExecutorOptions,
    ReadOptions,
    open_executor,
)
from vsc_serve.images import MAX_PIXELS
from vsc_serve.options import PLAIN, EncodeOptions
from vsc_serve.session import Device
from vsc_serve.sources import Ids, Source, find_sources, holds_arrays, open_arrays


class Batch(NamedTuple):
    """Codes of consecutive sources."""

    rows: CodeRows
    """One row per source that could be read."""
    ids: list[str]
    """Id of each row."""
    rejected: list[tuple[str, str]]
    """Id and reason of each source without a row."""

    @property
    def bad(self) -> list[tuple[str, str]]:
        """The same as `rejected`, by its name before version 0.2."""
        return self.rejected


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
    max_pixels: int = MAX_PIXELS,
) -> Generator[Batch, None, None]:
    """Encode images or vectors as `vsc encode` does; give the codes in order, as they are ready.

        for batch in stream("model/", ["images/"]):
            batch.ids, batch.rows.codes, batch.rejected

    Args:
        model: The bundle.
        inputs: Folders, files, patterns, archives and URLs; or numpy files of rows.
        options: Threshold, values, and what else to give.
        device: Where the model runs.
        workers: Processes; by default one for each processor that may be used; 0 is threads.
        batch_size: Sources of a batch; by default as many as take a tenth of a second.
        exclude: Patterns of paths to leave out.
        ids: What rows are called.
        max_pixels: Largest image that is decoded, in pixels.

    Raises:
        VscError: No image was found, or the model cannot be opened; on the first batch.
    """
    given = [str(one) for one in inputs]
    executor: Executor
    sources: Iterator[Source]
    if holds_arrays(given, exclude=exclude):
        arrays = open_arrays(given, exclude=exclude, ids=ids)
        executor = ArrayExecutor(Encoder.open(model, device=device), arrays, options)
        sources = arrays.sources()
    else:
        read = ReadOptions(max_pixels=max_pixels)
        how = ExecutorOptions(device=device, workers=workers, read=read)
        executor = open_executor(open_bundle(Path(model)), options, how)
        sources = find_sources(given, exclude=exclude, ids=ids)
    with executor:
        yield from batches(executor, sources, batch_size)


def batches(
    executor: Executor, sources: Iterator[Source], batch_size: int | None
) -> Iterator[Batch]:
    """Encode sources with an executor; see `stream`."""
    size = ChunkSize(batch_size, executor.largest_chunk, executor.workers)
    waiting: deque[Chunk] = deque()

    def noted() -> Iterator[Chunk]:
        for chunk in size.cut(sources):
            waiting.append(chunk)
            yield chunk

    for result in executor.run(noted()):
        size.learn(result)
        chunk = waiting.popleft()
        rejected = [(chunk[one.position].id, one.reason) for one in result.rejected]
        yield Batch(result.rows, [chunk[place].id for place in result.kept], rejected)
