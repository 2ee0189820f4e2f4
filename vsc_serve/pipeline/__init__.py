"""One run from sources to codes, in order, with nothing lost.

`encode_to_file` does a `Job`: it writes codes in shards that a later run finds again, and joins
them at the end. `stream` hands codes to a program instead.
"""

from vsc_serve.pipeline.encode import Encoded, Plan, encode_to_file, plan
from vsc_serve.pipeline.job import Job, OnError, Scan
from vsc_serve.pipeline.run import Outcome, run_job
from vsc_serve.pipeline.streaming import Batch, batches, stream

__all__ = [
    "Batch",
    "Encoded",
    "Job",
    "OnError",
    "Outcome",
    "Plan",
    "Scan",
    "batches",
    "encode_to_file",
    "plan",
    "run_job",
    "stream",
]
