"""How threads wait that have nothing to do; imported before torch, which reads it only once."""

import os


def sleep_when_idle() -> None:
    """Let OpenMP threads sleep at the end of their part of an operator instead of spinning.

    A thread that spins takes the processor from the one it waits for as soon as another program
    runs beside it: steps then take ten times as long as with one thread. On an idle machine
    sleeping costs a tenth to a fifth of a step (training/LOG.md). What the environment says already
    stays.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # GNU's and LLVM's, and so Intel's
