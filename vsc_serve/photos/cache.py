"""Where the backbone lies: made once from the installed package, in the user's cache."""

import hashlib
import logging
import os
import tempfile
from functools import cache
from pathlib import Path
from typing import Final

from vsc_serve.atomic import atomic_file
from vsc_serve.errors import InputError
from vsc_serve.photos.weights import find_weights, folded, read_weights

logger = logging.getLogger(__name__)

GRAPH: Final = "efficientnet_lite0.onnx"
RULE: Final = "efficientnet_lite0.json"
WEIGHTS: Final = "efficientnet_lite0.bin"
"""Weights of the graph: made here, as the package has them in another form."""
WEIGHTS_SHA256: Final = "3898d8711b1e8752966441ec14cf9fb206f810fdf0815341946fb8bd688248d2"

_HERE: Final = Path(__file__).parent
_CACHE: Final = "VSC_CACHE"
"""Environment variable with a folder to use in place of the user's cache."""


def photos_backbone() -> Path:
    """Return the ONNX file of the backbone, with its rule and its weights beside it.

    They are made at the first use, in the cache folder: `$VSC_CACHE`, else the user's own. Where
    that cannot be written, they are made for this process alone, in a temporary folder.

    Raises:
        UsageError: The package with the weights is missing, or not the one that is known.
        InputError: There is no room for them anywhere.
    """
    folder = cache_folder() / f"photos-{WEIGHTS_SHA256[:12]}"
    if _is_whole(folder):
        return folder / GRAPH
    weights = folded(read_weights(find_weights()))
    try:
        return _write(folder, weights)
    except InputError as error:
        logger.warning("%s The backbone is made again by every process; set %s.", error, _CACHE)
    return _write(_own_folder(), weights)


def cache_folder() -> Path:
    """Return where what can be made again is kept."""
    if given := os.environ.get(_CACHE):
        return Path(given)
    from platformdirs import user_cache_path

    return user_cache_path("vsc-serve", appauthor=False)


def _is_whole(folder: Path) -> bool:
    """Tell whether graph, rule and weights are there, to the byte."""
    try:
        same = all((folder / name).read_bytes() == (_HERE / name).read_bytes() for name in _OURS)
        with (folder / WEIGHTS).open("rb") as file:
            return same and hashlib.file_digest(file, "sha256").hexdigest() == WEIGHTS_SHA256
    except OSError:
        return False


_OURS: Final = (RULE, GRAPH)


def _write(folder: Path, weights: bytes) -> Path:
    """Write the three files, the graph last; two processes at once write the same bytes."""
    for name, content in [(WEIGHTS, weights), *((name, _content(name)) for name in _OURS)]:
        with atomic_file(folder / name) as file:
            file.write(content)
    return folder / GRAPH


def _content(name: str) -> bytes:
    return (_HERE / name).read_bytes()


@cache
def _temporary() -> "tempfile.TemporaryDirectory[str]":
    return tempfile.TemporaryDirectory(prefix="vsc-photos-", ignore_cleanup_errors=True)


def _own_folder() -> Path:
    """Return a folder that is removed when this process ends."""
    try:
        return Path(_temporary().name)
    except OSError as error:
        raise InputError(f"no folder for the backbone can be made ({error}).") from error
