"""Read again what cannot be reached, for a while; then say so."""

import logging
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, TypeVar

from vsc_serve.errors import InputError, SourceUnavailable, VscError
from vsc_serve.sources.faults import Fault, fault_of_store

logger = logging.getLogger(__name__)

PATIENCE_S: Final = 60.0
"""Seconds for which one read is tried again. A worker may spend twice as long on one image."""
LASTING_PATIENCE_S: Final = 5.0
"""The same where waiting seldom helps: access was refused, or the machine is exhausted."""

Result = TypeVar("Result")


@dataclass(frozen=True, kw_only=True)
class RetryPolicy:
    """How often and how long a read is tried again when its source cannot be reached.

    The pauses double from `first_pause_s` to `longest_pause_s`, each shortened at random by up to
    a half, so that many readers do not come back at once. Where a store says how long to wait
    (`Retry-After`), that is waited.
    """

    patience_s: float = PATIENCE_S
    """Seconds from the first failure to giving up; 0 tries once."""
    lasting_patience_s: float = LASTING_PATIENCE_S
    """The same where waiting seldom helps (401, 403, no credentials, too many open files)."""
    first_pause_s: float = 0.25
    longest_pause_s: float = 10.0
    wait: Callable[[float], None] = time.sleep
    """Waits so many seconds; a worker gives one that keeps its heartbeat going."""

    def pause_s(self, tries: int, fault: Fault) -> float:
        """Return how long to wait after so many tries."""
        doubled: float = self.first_pause_s * 2 ** min(tries - 1, 32)
        pause = min(doubled, self.longest_pause_s) * random.uniform(0.5, 1.0)
        return max(pause, fault.retry_after_s or 0.0)

    def limit_s(self, fault: Fault) -> float:
        """Return for how long a fault is borne."""
        return (
            min(self.patience_s, self.lasting_patience_s) if fault.is_lasting else self.patience_s
        )


RETRY: Final = RetryPolicy()
"""Default retry policy."""


def reach(
    place: str,
    action: Callable[[], Result],
    retry: RetryPolicy = RETRY,
    judge: Callable[[Exception], Fault] = fault_of_store,
) -> Result:
    """Do something with an input, and again while it cannot be reached.

    Args:
        place: Path or URL, for the message.
        action: What is done. It may be done several times.
        retry: How often and how long.
        judge: Tells what an error means.

    Raises:
        InputError: The input is at fault; the message is the reason, without the place.
        SourceUnavailable: It cannot be reached for longer than the policy allows.
    """
    tries, began, waited = 0, 0.0, 0.0
    while True:
        try:
            return action()
        except VscError:
            raise
        except Exception as error:  # every file system has errors of its own
            fault = judge(error)
            if fault.kind != "unavailable":
                raise InputError(fault.reason, kind=fault.kind) from error
            began = began or time.monotonic()
            tries += 1
            logger.info("%s: %s, try %d", place, fault.reason, tries)
            spent = max(time.monotonic() - began, waited)
            pause = retry.pause_s(tries, fault)
            if spent + pause > retry.limit_s(fault):
                raise SourceUnavailable(_gave_up(place, fault, tries, spent)) from error
        retry.wait(pause)
        waited += pause


def _gave_up(place: str, fault: Fault, tries: int, spent_s: float) -> str:
    often = f" ({tries} tries in {spent_s:.0f} s)" if tries > 1 else ""
    asked = f"; it asks to wait {fault.retry_after_s:,.0f} s" if fault.retry_after_s else ""
    return f"{place}: cannot be reached now: {fault.reason}{asked}{often}. {fault.advice}".rstrip()
