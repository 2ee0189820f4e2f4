"""Errors a caller can act on, and the exit code each one ends a command with.

    VscError             1    base class; never raised itself
    ├── CheckFailed      1    a check ran and did not pass
    ├── UsageError       2    wrong arguments or configuration, or nothing to do
    ├── InputError       3    an input file or array cannot be used
    │   └── SourceUnavailable    3    an input cannot be reached now; the same run may succeed later
    ├── BundleError      4    a model bundle is missing, damaged or of another format
    ├── DeviceError      5    the device or engine that was asked for is not there
    ├── ExportError      6    a model cannot be exported, or its export is not equal to it
    └── Interrupted    130    stopped by the user; what was written can be continued

Every message says what happened, where, and what to do about it, in one line. What a caller needs
beside the text is an attribute of the exception: nothing parses a message.
"""

from typing import ClassVar, Literal

Kind = Literal[
    "missing",
    "not a file",
    "unreadable",
    "empty",
    "not an image",
    "broken",
    "too large",
    "unsupported",
    "package missing",
    "not finite",
    "crash",
    "unavailable",
    "unusable",
]
"""Kinds of faults of an input: rejected inputs are counted by them."""


class VscError(Exception):
    """Base of every error that is the caller's to act on."""

    exit_code: ClassVar[int] = 1


class CheckFailed(VscError):
    """A check ran to its end and did not pass."""

    exit_code: ClassVar[int] = 1


class UsageError(VscError):
    """The arguments or the configuration make no sense together, or there is nothing to do."""

    exit_code: ClassVar[int] = 2


class InputError(VscError):
    """An input file or array cannot be used.

    Args:
        message: What is wrong.
        kind: Kind of the fault.
        row: Row at fault of the array that was given, from 0.
    """

    exit_code: ClassVar[int] = 3

    def __init__(self, message: str, *, kind: Kind = "unusable", row: int | None = None) -> None:
        super().__init__(message)
        self.kind: Kind = kind
        self.row = row


class SourceUnavailable(InputError):
    """An input cannot be reached now: the disk, the mount, the network or the store has failed.

    The input itself may be sound, so a run stops here and can resume, and nothing is rejected.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message, kind="unavailable")


class BundleError(VscError):
    """A model bundle is missing, damaged, or of a format this version does not read."""

    exit_code: ClassVar[int] = 4


class DeviceError(VscError):
    """The device or the inference engine that was asked for is not available."""

    exit_code: ClassVar[int] = 5


class ExportError(VscError):
    """A model cannot be exported, or what was exported does not compute the same."""

    exit_code: ClassVar[int] = 6


class Interrupted(VscError):
    """The user stopped the run."""

    exit_code: ClassVar[int] = 130
