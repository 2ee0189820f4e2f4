"""Embeddings of images, kept by content: a second training on the same images costs seconds.

A cache is a folder of small npz files that may be removed at any time. Its key is what an embedding
depends on: the bytes of the image, the rule that makes pixels of them, and the backbone.
"""

import hashlib
import json
import logging
import zipfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from vsc_serve.atomic import atomic_file
from vsc_serve.cpus import usable_cpus
from vsc_serve.errors import InputError
from vsc_serve.images import BadImage, read_pixels
from vsc_serve.sources import Source
from vsc_training.backbone import Backbone, BackboneSpec

logger = logging.getLogger(__name__)

_FOLDER: Final = ".vsc-embeddings"
_WRITTEN_AT_ONCE: Final = 1024
"""Embeddings of a file: what a run that is killed computes again, at most."""
_DIGEST_BYTES: Final = 20


class EmbeddingCache:
    """Embeddings by the digest of the image's bytes.

    Args:
        folder: Where it lies; made when something is kept.
        spec: The backbone.
    """

    def __init__(self, folder: Path, spec: BackboneSpec) -> None:
        key = hashlib.sha256(json.dumps(spec.to_json(), sort_keys=True).encode()).hexdigest()
        self._folder = folder / key[:16]
        self._dim = spec.dim
        self._rows: dict[bytes, NDArray[np.float32]] = {}
        self._new: list[bytes] = []
        self._is_writable = True
        for path in sorted(self._folder.glob("*.npz")):
            self._read(path)

    @classmethod
    def beside(cls, run: Path, spec: BackboneSpec) -> "EmbeddingCache":
        """Return the cache of all runs that lie where this one does."""
        return cls(run.absolute().parent / _FOLDER, spec)

    def __len__(self) -> int:
        return len(self._rows)

    def get(self, digest: bytes) -> NDArray[np.float32] | None:
        """Return the embedding of an image, shape (dimensions,), or None."""
        return self._rows.get(digest)

    def put(self, digests: Sequence[bytes], rows: NDArray[np.float32]) -> None:
        """Keep embeddings, shape (images, dimensions)."""
        for digest, row in zip(digests, rows, strict=True):
            if digest not in self._rows:
                self._rows[digest] = row
                self._new.append(digest)
        if len(self._new) >= _WRITTEN_AT_ONCE:
            self.flush()

    def flush(self) -> None:
        """Write what is new. A folder that cannot be written costs a warning, not the run."""
        if self._new and self._is_writable:
            names = np.frombuffer(b"".join(self._new), np.uint8).reshape(-1, _DIGEST_BYTES)
            rows = np.stack([self._rows[digest] for digest in self._new])
            try:
                with atomic_file(self._folder / f"{_name_of(self._new)}.npz") as file:
                    np.savez(file, digests=names, rows=rows)
            except InputError as error:
                self._is_writable = False
                logger.warning("embeddings are not kept for the next training: %s", error)
        self._new = []

    def _read(self, path: Path) -> None:
        try:
            with path.open("rb") as file, np.load(file, allow_pickle=False) as stored:
                names, rows = stored["digests"], stored["rows"]
            self._check(names, rows)
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            logger.warning("%s: damaged (%s); its images are embedded again", path, error)
            return
        self._rows.update(zip(map(bytes, names), rows, strict=True))

    def _check(self, names: NDArray[Any], rows: NDArray[Any]) -> None:
        if names.dtype != np.uint8 or names.shape[1:] != (_DIGEST_BYTES,):
            raise ValueError("no digests")
        if rows.dtype != np.float32 or rows.shape != (len(names), self._dim):
            raise ValueError(f"rows of shape {rows.shape}")


class Embedded(NamedTuple):
    """Embeddings of some images."""

    rows: NDArray[np.float32]
    """Shape (images, dimensions)."""
    sources: list[Source]
    """One for each row."""
    bad: list[BadImage]
    """Those that cannot be read, and have no row."""


class _Read(NamedTuple):
    """An image that was read: its embedding where the cache has it, else its pixels."""

    source: Source
    digest: bytes
    embedding: NDArray[np.float32] | None
    pixels: NDArray[np.uint8] | None


class Embedder:
    """Images to embeddings: read and decoded by all processors, or taken from the cache.

    Args:
        backbone: What embeds.
        cache: Embeddings of earlier runs; gets the new ones. None keeps nothing.
    """

    def __init__(self, backbone: Backbone, cache: EmbeddingCache | None = None) -> None:
        self._backbone = backbone
        self._cache = cache

    def embed(self, sources: Sequence[Source]) -> Embedded:
        """Embed some images, all in memory at once."""
        with ThreadPoolExecutor(usable_cpus()) as threads:
            found = list(threads.map(self._read, sources))
        read = [one for one in found if isinstance(one, _Read)]
        bad = [one for one in found if isinstance(one, BadImage)]
        return Embedded(self._rows(read), [one.source for one in read], bad)

    def flush(self) -> None:
        """Write what the cache has not written yet."""
        if self._cache is not None:
            self._cache.flush()

    def _read(self, source: Source) -> _Read | BadImage:
        try:
            content = source.read()
            digest = content_digest(content)
            known = None if self._cache is None else self._cache.get(digest)
            if known is not None:
                return _Read(source, digest, known, None)
            return _Read(source, digest, None, read_pixels(content, self._backbone.spec.pixel_spec))
        except InputError as error:
            return BadImage(source.id, str(error), error.kind)

    def _rows(self, read: Sequence[_Read]) -> NDArray[np.float32]:
        rows = np.empty((len(read), self._backbone.spec.dim), np.float32)
        for row, image in enumerate(read):
            if image.embedding is not None:
                rows[row] = image.embedding
        new = {row: image.pixels for row, image in enumerate(read) if image.pixels is not None}
        if new:
            rows[list(new)] = self._backbone.embed(np.stack(list(new.values())))
            if self._cache is not None:
                self._cache.put([read[row].digest for row in new], rows[list(new)])
        return rows


def content_digest(content: bytes) -> bytes:
    """Return the digest of an image's bytes, 20 bytes."""
    return hashlib.blake2b(content, digest_size=_DIGEST_BYTES).digest()


def _name_of(digests: Sequence[bytes]) -> str:
    """Return a name for a file that follows from what is in it: two runs write the same one."""
    return content_digest(b"".join(digests)).hex()[:16]
