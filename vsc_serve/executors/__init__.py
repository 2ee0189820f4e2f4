"""How work on chunks of sources is run: worker processes, threads, GPUs, a loop over an array.

`open_executor` chooses and opens one; `Executor` is the protocol of all of them.
"""

from vsc_serve.executors.arrays import ArrayExecutor
from vsc_serve.executors.choose import ExecutorOptions, open_executor
from vsc_serve.executors.chunks import FIRST, ChunkSize
from vsc_serve.executors.digests import save_digests
from vsc_serve.executors.protocol import Executor
from vsc_serve.executors.read import ReadOptions, file_signature
from vsc_serve.executors.task import Chunk, ChunkResult, Rejected, StageSeconds
from vsc_serve.executors.threads import ThreadExecutor

__all__ = [
    "FIRST",
    "ArrayExecutor",
    "Chunk",
    "ChunkResult",
    "ChunkSize",
    "Executor",
    "ExecutorOptions",
    "ReadOptions",
    "Rejected",
    "StageSeconds",
    "ThreadExecutor",
    "file_signature",
    "open_executor",
    "save_digests",
]
