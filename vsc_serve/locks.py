"""Keep two runs out of one output.

The lock is a file beside the output, held through `flock`; it goes when the process ends, however
it ends. Where the file system has no `flock` (some network disks), a lock file with the name of its
owner takes its place: one that a killed run has left behind is taken over on the same machine.
"""

import errno
import logging
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final

from vsc_serve.atomic import name_beside
from vsc_serve.errors import InputError, UsageError

logger = logging.getLogger(__name__)

_NO_FLOCK: Final = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL)


@contextmanager
def exclusive(out: Path) -> Iterator[None]:
    """Hold the lock of an output, so that no other run of this tool writes there.

    Args:
        out: File or folder; need not be there.

    Raises:
        UsageError: Another run is writing there.
        InputError: The lock cannot be made (no permission, disk full).
    """
    path = name_beside(out, ".", ".lock")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = _acquire(path)
    except OSError as error:
        raise InputError(
            f"{out}: cannot be written ({path.name}: {error.strerror or error})."
        ) from error
    if lock is None:
        raise UsageError(f"{out}: another run is writing there. Wait for it, or choose another.")
    try:
        yield
    finally:
        lock.release()


class _NativeLock:
    """A `flock` that takes its file along when it is released."""

    def __init__(self, path: Path) -> None:
        from filelock import FileLock

        self._path = path
        self._lock: Any = FileLock(path, timeout=0, fallback_to_soft=False)
        self._lock.acquire()

    def release(self) -> None:
        """Release the lock. Whoever waits for it sees that the file it has opened is gone."""
        with suppress(OSError):
            self._path.unlink()
        self._lock.release()


def _acquire(path: Path) -> Any:
    """Return the lock, held; None where another run has it. Raises OSError."""
    from filelock import SoftFileLock, Timeout

    try:
        return _NativeLock(path)
    except Timeout:
        return None
    except (OSError, NotImplementedError) as error:
        if isinstance(error, OSError) and error.errno not in _NO_FLOCK:
            raise
    with suppress(OSError):
        path.unlink()
    logger.warning("%s: no flock on this file system; a lock file is used instead", path.parent)
    try:
        soft: Any = SoftFileLock(path.with_name(f"{path.name}-owner"), timeout=0)
        soft.acquire()
    except Timeout:
        return None
    return soft
