"""From sources to codes, at the speed of the machine, in order, with nothing lost.

`open_pool` starts what reads and encodes: worker processes, or threads. `run_job` writes codes with
it, in shards that a later run finds again; `stream` hands codes to a program instead.
"""

from vsc_serve.codes.statistics import Figures
from vsc_serve.cpus import usable_cpus
from vsc_serve.executors.choose import open_pool
from vsc_serve.executors.read import Work
from vsc_serve.executors.task import Pool, Seconds
from vsc_serve.executors.threads import ArrayLoop, Row, ThreadPool
from vsc_serve.pipeline.job import Request, Scan, encode_to_file, plan
from vsc_serve.pipeline.run import Job, Outcome, errors_path, run_job
from vsc_serve.pipeline.streaming import Batch, batches, stream
from vsc_serve.pipeline.update import OldCodes, open_old

__all__ = [
    "ArrayLoop",
    "Batch",
    "Figures",
    "Job",
    "OldCodes",
    "Outcome",
    "Pool",
    "Request",
    "Row",
    "Scan",
    "Seconds",
    "ThreadPool",
    "Work",
    "batches",
    "encode_to_file",
    "errors_path",
    "open_old",
    "open_pool",
    "plan",
    "run_job",
    "stream",
    "usable_cpus",
]
