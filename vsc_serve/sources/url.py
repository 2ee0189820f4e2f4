"""Pictures behind URLs that fsspec opens: object stores, web servers, memory."""

from dataclasses import dataclass

from vsc_serve.errors import InputError
from vsc_serve.sources.base import check_size
from vsc_serve.sources.folder import Entry
from vsc_serve.sources.places import call, file_system


@dataclass(frozen=True, slots=True)
class UrlSource:
    """A picture behind a URL."""

    id: str
    """Path relative to the URL it was found under, or the URL."""
    url: str
    size: int = -1
    """Its bytes, where they are known: they are checked before they are fetched."""

    def read(self) -> bytes:
        """Fetch it. Raises InputError with the reason."""
        system, path = file_system(self.url)
        size = self.size if self.size >= 0 else call(system.size, path)
        check_size(size or 0)
        content: bytes = call(system.cat_file, path)
        return content


class UrlTree:
    """Folders below a URL.

    Args:
        top: The URL.
    """

    def __init__(self, top: str) -> None:
        self._start = f"{top.rstrip('/')}/"
        self.top = top.rstrip("/")

    def entries(self, folder: str) -> list[Entry]:
        """List a folder in order. Raises InputError with the reason."""
        system, path = file_system(self._start + folder)
        path = path.rstrip("/")
        found = call(system.ls, path, detail=True)
        system.invalidate_cache(path)  # it would keep every listing
        return sorted(
            entry
            for one in found
            if one["name"].rstrip("/") != path and (entry := _entry(one, path)) is not None
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


def _entry(found: dict[str, object], folder: str) -> Entry | None:
    name = str(found["name"]).rstrip("/").rpartition("/")[2]
    is_folder = found["type"] == "directory"
    size = found.get("size")
    if not name:
        return None
    known = size if isinstance(size, int) and not is_folder else -1
    return Entry(f"{name}/" if is_folder else name, is_folder, size=known)


def is_folder_url(url: str) -> bool | None:
    """Tell whether a URL is a folder; None where there is nothing.

    Raises:
        InputError: The file system does not say.
        UsageError: There is no such file system.
    """
    system, path = file_system(url)
    try:
        return bool(call(system.info, path)["type"] == "directory")
    except InputError as error:
        if isinstance(error.__cause__, FileNotFoundError):
            return None
        raise InputError(f"{url}: {error}") from error
