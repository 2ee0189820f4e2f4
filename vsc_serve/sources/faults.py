"""Tell a fault of one input from a fault of the way to all of them.

A file that is missing, locked or damaged costs its row. A disk, mount, network or store that has
failed says nothing about the file: the same read may succeed later.
"""

import errno
import socket
import ssl
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from http import HTTPStatus
from typing import Any, Final, NamedTuple

from vsc_serve.errors import Kind


class Fault(NamedTuple):
    """Meaning of a read error."""

    kind: Kind
    """`unavailable` where the way to the input has failed, else what is wrong with this input."""
    reason: str
    advice: str = ""
    """Advice for an input that is unavailable."""
    is_lasting: bool = False
    """Whether waiting seldom helps: access was refused, or the machine is exhausted."""
    retry_after_s: float | None = None
    """Seconds that the store asks to wait."""


def _numbers(*names: str) -> frozenset[int]:
    return frozenset(getattr(errno, name) for name in names if hasattr(errno, name))


_EXHAUSTED: Final = _numbers("ENOMEM", "EMFILE", "ENFILE", "ENOBUFS")
_UNREACHABLE: Final = _numbers(
    *("ESTALE", "EIO", "EREMOTEIO", "EUCLEAN", "EBADMSG", "ENODEV", "ENXIO", "ENOMEDIUM"),
    *("ENOTCONN", "ESHUTDOWN", "EPIPE", "ETIMEDOUT", "ETIME", "EHOSTDOWN", "EHOSTUNREACH"),
    *("ENETDOWN", "ENETUNREACH", "ENETRESET", "ENONET", "ENOLINK", "ECOMM", "EPROTO", "EREMCHG"),
    *("ECONNRESET", "ECONNREFUSED", "ECONNABORTED", "EAGAIN", "EBUSY"),
    *("ENOKEY", "EKEYEXPIRED", "EKEYREVOKED", "EKEYREJECTED"),
)
"""Errors of a disk, a mount or a network."""

_CHECK_DISK: Final = "Check the disk, the mount and the network."
_CHECK_NETWORK: Final = "Check the address and the network."
_CHECK_ACCESS: Final = "Check the address, the credentials and what they permit."
_CHECK_RATE: Final = "Wait, or use fewer workers."
_CHECK_MACHINE: Final = "Free memory, or raise the limit of open files (ulimit -n)."

_REFUSED: Final = frozenset({401, 403, 407})
_TOO_BUSY: Final = frozenset({425, 429, 503})
_LATER: Final = frozenset({408, *_TOO_BUSY})
_GONE: Final = frozenset({404, 410})

_OF_THE_OBJECT: Final = frozenset({"InvalidObjectState", "KeyTooLongError"})
"""Codes of object stores that speak of one object, whatever their status."""
_OF_THE_STORE: Final = frozenset(
    {
        *("NoSuchBucket", "InvalidBucketName", "ExpiredToken", "InvalidToken", "400"),
        *("TokenRefreshRequired", "AuthorizationHeaderMalformed", "MissingSecurityHeader"),
        *("RequestTimeout", "PermanentRedirect", "TemporaryRedirect", "Redirect", "301", "307"),
    }
)
"""Codes of object stores that speak of all objects, whatever their status."""
_ACCESS_WORDS: Final = ("Credential", "Token", "Unauthorized", "Authentication", "RefreshError")
"""Parts of the names of errors that say that somebody may not, or cannot prove who they are."""
_OF_THE_CALL: Final = (
    *(ValueError, TypeError, LookupError, AttributeError, NotImplementedError, MemoryError),
    *(IsADirectoryError, PermissionError, FileExistsError),
)
"""Errors that say nothing about the way to a store."""
_LONGEST_TEXT: Final = 300


def fault_of_file(error: OSError | ValueError | MemoryError) -> Fault:
    """Judge what the operating system said of one file or folder."""
    if isinstance(error, MemoryError):
        return Fault(
            "unavailable", "the machine failed: no memory", _CHECK_MACHINE, is_lasting=True
        )
    if not isinstance(error, OSError):  # a zero byte inside the name
        return Fault("unreadable", f"unreadable: {error}")
    if isinstance(error, FileNotFoundError | NotADirectoryError):
        return Fault("missing", "no such file (a link that leads nowhere?)")
    text = error.strerror or str(error) or type(error).__name__
    if error.errno in _EXHAUSTED:
        return Fault("unavailable", f"the machine failed: {text}", _CHECK_MACHINE, is_lasting=True)
    if error.errno in _UNREACHABLE:
        return Fault("unavailable", text, _CHECK_DISK)
    return Fault("unreadable", f"unreadable: {text}")


def fault_of_store(error: BaseException) -> Fault:
    """Judge what a remote file system raised: every one has errors of its own.

    What is not known to speak of one object is taken for a store that cannot be reached: a run
    that stops can resume, and a row that is left out in error is lost.
    """
    errors = list(_with_causes(error))
    if len(errors) > 1 and isinstance(error, FileNotFoundError):
        errors = errors[1:]  # a wrapper that takes every failure for a missing file
    for one in errors:
        if (status := _status(one)) is not None:
            return _fault_of_status(status, one)
    return next(filter(None, map(_fault_of_kind, errors)), None) or _fault_of_text(errors[0])


def _with_causes(error: BaseException) -> Iterator[BaseException]:
    """Give an error and those that it was made from."""
    seen: set[int] = set()
    following: BaseException | None = error
    while following is not None and id(following) not in seen:
        seen.add(id(following))
        yield following
        inner = getattr(following, "os_error", None)  # aiohttp's name for it
        following = following.__cause__ or (inner if isinstance(inner, BaseException) else None)


def _status(error: BaseException) -> int | None:
    """Return the HTTP status that an error carries."""
    if type(error).__module__ == "aiohttp.http_exceptions":
        return None  # of an answer that broke off: the number is its own
    response = getattr(error, "response", None)
    found = getattr(error, "status", None) or getattr(error, "status_code", None)
    if found is None and isinstance(response, Mapping):  # botocore
        found = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    elif found is None:
        found = getattr(response, "status_code", None) or getattr(error, "code", None)
    is_status = str(found).isdecimal() and 300 <= int(str(found)) < 600
    return int(str(found)) if is_status else None


def _fault_of_status(status: int, error: BaseException) -> Fault:
    code, reason = _store_code(error), _status_text(status, error)
    if code in _OF_THE_OBJECT:
        return Fault("unreadable", reason)
    if status in _REFUSED or code in _OF_THE_STORE:
        return Fault("unavailable", reason, _CHECK_ACCESS, is_lasting=True)
    if status in _GONE:
        return Fault("missing", reason)
    if status in _LATER or status >= 500:
        advice = _CHECK_RATE if status in _TOO_BUSY else _CHECK_NETWORK
        return Fault("unavailable", reason, advice, retry_after_s=_retry_after(error))
    return Fault("unreadable", reason)


def _store_code(error: BaseException) -> str | None:
    response = getattr(error, "response", None)
    found = response.get("Error", {}).get("Code") if isinstance(response, Mapping) else None
    return None if found is None else str(found)


def _status_text(status: int, error: BaseException) -> str:
    """Return a status with its name, and what the store says beside it."""
    name = HTTPStatus(status).phrase if status in {*HTTPStatus} else "unknown status"
    response = getattr(error, "response", None)
    said = response.get("Error", {}) if isinstance(response, Mapping) else {}
    parts = [str(said[key]) for key in ("Code", "Message") if said.get(key)]
    beside = ": ".join(part for part in parts if part not in (str(status), name))
    return _short(f"{status} {name} ({beside})" if beside else f"{status} {name}")


def _retry_after(error: BaseException) -> float | None:
    """Return how many seconds the store asks to wait."""
    text = str(_header(error, "retry-after") or "").strip()
    if text.isdecimal():
        return float(text)
    try:
        moment = parsedate_to_datetime(text)
    except ValueError:
        return None
    moment = moment if moment.tzinfo else moment.replace(tzinfo=UTC)
    return max((moment - datetime.now(UTC)).total_seconds(), 0.0)


def _header(error: BaseException, name: str) -> object:
    response: Any = getattr(error, "response", None)
    found: Any = getattr(error, "headers", None)
    if isinstance(response, Mapping):
        found = response.get("ResponseMetadata", {}).get("HTTPHeaders")
    elif found is None:
        found = getattr(response, "headers", None)
    items = found.items() if isinstance(found, Mapping) else ()
    return next((value for key, value in items if str(key).lower() == name), None)


def _fault_of_kind(error: BaseException) -> Fault | None:
    """Judge an error without a status by its class; None where the class says nothing."""
    if any(word in type(error).__name__ for word in _ACCESS_WORDS):
        return Fault("unavailable", _text(error), _CHECK_ACCESS, is_lasting=True)
    if isinstance(error, socket.gaierror):
        text = f"the name does not resolve ({error.strerror})"
        return Fault("unavailable", text, _CHECK_NETWORK)
    if isinstance(error, ssl.SSLError):
        return Fault("unavailable", f"TLS failed: {_text(error)}", _CHECK_NETWORK)
    if isinstance(error, TimeoutError):
        return Fault("unavailable", "timed out", _CHECK_NETWORK)
    if isinstance(error, FileNotFoundError | NotADirectoryError):
        return Fault("missing", "no such file")
    if isinstance(error, OSError) and error.errno in _EXHAUSTED | _UNREACHABLE:
        return fault_of_file(error)
    return None


def _fault_of_text(error: BaseException) -> Fault:
    """Judge an error by itself, when neither a status nor its class has decided."""
    is_local = isinstance(error, OSError) and (error.errno or 0) > 0
    if is_local or isinstance(error, _OF_THE_CALL):
        return Fault("unreadable", f"unreadable: {_text(error)}")
    return Fault("unavailable", _text(error), _CHECK_NETWORK)


def _text(error: BaseException) -> str:
    return _short(" ".join(str(error).split()) or type(error).__name__)


def _short(text: str) -> str:
    return text if len(text) <= _LONGEST_TEXT else f"{text[:_LONGEST_TEXT]}..."
