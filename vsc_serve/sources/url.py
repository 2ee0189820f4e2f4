"""Images behind URLs that fsspec opens: object stores, web servers, memory."""

from dataclasses import dataclass

from vsc_serve.errors import InputError, SourceUnavailable
from vsc_serve.sources.base import MAX_BYTES, check_size
from vsc_serve.sources.folder import Entry
from vsc_serve.sources.retry import RETRY, RetryPolicy
from vsc_serve.sources.stores import ask, fetch, forget_listing


@dataclass(frozen=True, slots=True)
class UrlSource:
    """Image behind a URL."""

    id: str
    """Path relative to the URL it was found under, or the URL."""
    url: str
    size: int = -1
    """Its bytes, where they are known: they are checked before they are fetched."""

    @property
    def where(self) -> str:
        """Where it lies, for people."""
        return self.url

    def read(self, retry: RetryPolicy = RETRY) -> bytes:
        """Fetch it; see `Source.read`."""
        check_size(self.size)
        return fetch(self.url, MAX_BYTES, retry)


class UrlTree:
    """Folders below a URL.

    Args:
        top: The URL.
        retry: How often and how long to try while it cannot be reached.
    """

    def __init__(self, top: str, retry: RetryPolicy = RETRY) -> None:
        self._start = f"{top.rstrip('/')}/"
        self._retry = retry
        self.top = top.rstrip("/")

    def entries(self, folder: str) -> list[Entry]:
        """List a folder in order. Raises InputError with the reason, or SourceUnavailable."""
        url = (self._start + folder).rstrip("/")
        found = ask(url, self._retry, "ls", detail=True)
        path = forget_listing(url)
        return sorted(
            entry
            for one in found
            if one["name"].rstrip("/") != path and (entry := _entry(one)) is not None
        )

    def real(self, path: str) -> str:
        """Return the URL: there are no links."""
        return (self._start + path).rstrip("/")

    def place(self, path: str) -> str:
        """Return the whole URL."""
        return self._start + path

    def source(self, name: str, path: str, entry: Entry) -> UrlSource:
        """Return a file as a source of the given id."""
        return UrlSource(name, self._start + path, entry.size)


def _entry(found: dict[str, object]) -> Entry | None:
    name = str(found["name"]).rstrip("/").rpartition("/")[2]
    is_folder = found["type"] == "directory"
    size = found.get("size")
    if not name:
        return None
    known = size if isinstance(size, int) and not is_folder else -1
    return Entry(f"{name}/" if is_folder else name, is_folder, size=known)


def is_folder_url(url: str, retry: RetryPolicy = RETRY) -> bool | None:
    """Tell whether a URL is a folder; None where there is nothing.

    Raises:
        InputError: The store does not say.
        SourceUnavailable: It cannot be reached.
        UsageError: There is no such file system.
    """
    try:
        return bool(ask(url, retry, "info")["type"] == "directory")
    except SourceUnavailable:
        raise
    except InputError as error:
        if error.kind == "missing":
            return None
        raise InputError(f"{url}: {error}", kind=error.kind) from error
