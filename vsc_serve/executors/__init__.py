"""How work on chunks of sources is run: worker processes, threads, GPUs.

`open_pool` chooses and opens an executor; `Pool` is the protocol of all of them.
"""

from vsc_serve.executors.choose import open_pool
from vsc_serve.executors.chunks import ChunkSize
from vsc_serve.executors.task import Pool, Seconds
from vsc_serve.executors.threads import ArrayLoop, Row, ThreadPool

__all__ = ["ArrayLoop", "ChunkSize", "Pool", "Row", "Seconds", "ThreadPool", "open_pool"]
