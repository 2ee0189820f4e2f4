"""Images and rows where they lie: folders, files, patterns, archives, tables, URLs and lists."""

from vsc_serve.sources.arrays import ArraySet, RowSource, holds_arrays, open_arrays
from vsc_serve.sources.base import MAX_BYTES, FileSource, Source, UnreadableSource, read_file
from vsc_serve.sources.find import find_sources
from vsc_serve.sources.names import IMAGE_SUFFIXES, Ids, is_junk
from vsc_serve.sources.retry import RETRY, RetryPolicy

__all__ = [
    "IMAGE_SUFFIXES",
    "MAX_BYTES",
    "RETRY",
    "ArraySet",
    "FileSource",
    "Ids",
    "RetryPolicy",
    "RowSource",
    "Source",
    "UnreadableSource",
    "find_sources",
    "holds_arrays",
    "is_junk",
    "open_arrays",
    "read_file",
]
