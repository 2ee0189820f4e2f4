"""Ask the file systems behind URLs that fsspec opens: object stores, web servers, memory."""

import re
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any, Final

from vsc_serve.errors import UsageError
from vsc_serve.sources.base import check_size
from vsc_serve.sources.retry import RETRY, RetryPolicy, reach

_URL: Final = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+(::|://)")
_LOCAL: Final = "file://"

_CALL_S: Final = 30
"""Seconds without an answer after which a request is given up, and tried again."""
_BLOCK: Final = 2**20


def is_url(place: str) -> bool:
    """Tell whether a place is a URL that fsspec opens; `file://` is a path."""
    return _URL.match(place) is not None and not place.startswith(_LOCAL)


def local_path(given: str) -> str:
    """Return a path, with `file://` taken off."""
    return given.removeprefix(_LOCAL)


def file_system(url: str) -> tuple[Any, str]:
    """Return the fsspec file system of a URL, and the path in it.

    Raises:
        UsageError: fsspec or the package for this kind of URL is not installed, or it is unknown.
    """
    try:
        import fsspec

        system, path = fsspec.core.url_to_fs(url, **_options(url.partition(":")[0]))
    except ImportError as error:
        raise UsageError(f"{url}: {error}. Install: pip install 'vsc-serve[urls]'") from error
    except ValueError as error:
        raise UsageError(f"{url}: {error}. Check the URL.") from error
    return system, path


def _options(protocol: str) -> dict[str, Any]:
    """Return limits of time for the stores that have none or multiply them by tries of their own.

    Who has set them in fsspec's configuration keeps what was set.
    """
    from fsspec.config import conf

    if protocol in ("http", "https") and "client_kwargs" not in conf.get(protocol, {}):
        from aiohttp import ClientTimeout

        limits = ClientTimeout(total=None, sock_connect=_CALL_S, sock_read=_CALL_S)
        return {"client_kwargs": {"timeout": limits}}
    if protocol in ("s3", "s3a") and "config_kwargs" not in conf.get(protocol, {}):
        return {"config_kwargs": {"retries": {"total_max_attempts": 1}}}
    return {}


def ask(url: str, retry: RetryPolicy, method: str, **named: Any) -> Any:
    """Call a method of a store's file system with the path of a URL.

    Raises:
        InputError: The store has answered that it cannot; the message is the reason.
        SourceUnavailable: It cannot be reached.
        UsageError: There is no such kind of URL.
    """
    system, path = file_system(url)
    return reach(url, partial(getattr(system, method), path, **named), retry)


def forget_listing(url: str) -> str:
    """Make a store forget what it has listed, which it would keep for ever; return the path."""
    system, path = file_system(url)
    path = path.rstrip("/")
    system.invalidate_cache(path)
    return path


def fetch(url: str, max_bytes: int, retry: RetryPolicy = RETRY) -> bytes:
    """Return all bytes of an object, as long as there are not too many.

    They are counted while they come: an answer may have no length, or a wrong one.

    Raises:
        InputError: The object is not there, too large or not readable.
        SourceUnavailable: The store cannot be reached.
    """
    system, path = file_system(url)
    return reach(url, partial(_reader(system), system, path, max_bytes), retry)


def _reader(system: Any) -> Callable[[Any, str, int], bytes]:
    from fsspec.asyn import AsyncFileSystem

    if not isinstance(system, AsyncFileSystem):
        return _read_file
    if hasattr(system, "encode_url"):  # the web's, whose streams keep what they refuse open
        return _read_answer
    is_streamed = type(system).open_async is not AsyncFileSystem.open_async
    return _read_stream if is_streamed else _read_range


def _read_file(system: Any, path: str, max_bytes: int) -> bytes:
    with system.open(path, "rb") as file:
        return _collect(file.read, max_bytes)


def _read_range(system: Any, path: str, max_bytes: int) -> bytes:
    """Read from a store that gives no stream: ask for one byte more than is allowed."""
    check_size(system.size(path) or 0, max_bytes)
    content: bytes = system.cat_file(path, end=max_bytes + 1, timeout=_CALL_S)
    check_size(len(content), max_bytes)
    return content


def _read_stream(system: Any, path: str, max_bytes: int) -> bytes:
    """Read a stream block by block, in the thread that belongs to the file system."""
    from fsspec.asyn import sync

    async def read() -> bytes:
        file = await system.open_async(path, "rb")
        try:
            return await _collect_stream(file.read, max_bytes)
        finally:
            if (body := getattr(file, "r", None)) is not None:  # it may not be read to its end
                body.close()

    content: bytes = sync(system.loop, read)
    return content


def _read_answer(system: Any, url: str, max_bytes: int) -> bytes:
    """Read from a web server: with one request, and every answer closed."""
    from fsspec.asyn import sync

    async def read() -> bytes:
        session = await system.set_session()
        async with session.get(system.encode_url(url), **system.kwargs) as answer:
            answer.raise_for_status()
            return await _collect_stream(answer.content.read, max_bytes)

    content: bytes = sync(system.loop, read)
    return content


async def _collect_stream(read: Callable[[int], Awaitable[bytes]], max_bytes: int) -> bytes:
    import asyncio

    blocks, total = [], 0
    while block := await asyncio.wait_for(read(_BLOCK), _CALL_S):
        blocks.append(block)
        total += len(block)
        check_size(total, max_bytes)
    return b"".join(blocks)


def _collect(read: Callable[[int], bytes], max_bytes: int) -> bytes:
    blocks, total = [], 0
    while block := read(_BLOCK):
        blocks.append(block)
        total += len(block)
        check_size(total, max_bytes)
    return b"".join(blocks)
