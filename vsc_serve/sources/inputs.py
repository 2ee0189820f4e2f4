"""Inputs as they were typed: what is there under a name."""

import os
import stat
from collections.abc import Callable, Sequence
from functools import partial
from os import PathLike
from typing import TypeAlias

from vsc_serve.errors import InputError, SourceUnavailable, UsageError
from vsc_serve.sources.faults import Fault, fault_of_file
from vsc_serve.sources.retry import RetryPolicy, reach
from vsc_serve.sources.stores import is_url
from vsc_serve.sources.url import is_folder_url

Input: TypeAlias = str | PathLike[str]


def given_names(inputs: Input | Sequence[Input]) -> list[str]:
    """Return inputs as they were typed. Raises UsageError when there is none."""
    several = [inputs] if isinstance(inputs, str | PathLike) else inputs
    names = [os.fsdecode(given) for given in several]
    if not names:
        raise UsageError("no input. Give folders, files or URLs, or - for a list of paths.")
    return names


def whole_path(place: str) -> str:
    """Return the whole path, links and all, or the URL, without `/` at its end."""
    return (place if is_url(place) else os.path.abspath(place)).rstrip("/")  # noqa: PTH100


def is_folder(place: str, retry: RetryPolicy) -> bool:
    """Tell whether there is a folder. Raises InputError where that cannot be found out."""
    if is_url(place):
        return is_folder_url(place, retry) is True
    status = _status(place, os.stat, retry)
    return status is not None and stat.S_ISDIR(status.st_mode)


def is_there(place: str, retry: RetryPolicy) -> bool:
    """Tell whether there is a file, folder or link. Raises InputError as `is_folder` does."""
    if is_url(place):
        return is_folder_url(place, retry) is not None
    return _status(place, os.lstat, retry) is not None


def _status(
    place: str, look: Callable[[str], os.stat_result], retry: RetryPolicy
) -> os.stat_result | None:
    """Return the status of a path, None where nothing can be of that name."""
    try:
        return reach(place, partial(look, place), retry, _judge_name)
    except SourceUnavailable:
        raise
    except InputError as error:
        if error.kind == "missing":
            return None
        raise InputError(f"{place}: {error}", kind=error.kind) from error


def _judge_name(error: Exception) -> Fault:
    """Judge why a path has no status: one that is too long, or leads round, is not there."""
    if not isinstance(error, OSError | ValueError):
        raise error
    fault = fault_of_file(error)
    is_locked = isinstance(error, PermissionError)
    return fault if fault.kind == "unavailable" or is_locked else fault._replace(kind="missing")


def is_folder_or_unknown(place: str, retry: RetryPolicy) -> bool:
    """Tell whether there is a folder; what a store cannot look for is none."""
    try:
        return is_folder(place, retry)
    except SourceUnavailable:
        raise
    except InputError:
        return False
