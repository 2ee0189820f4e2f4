"""Where pictures come from: folders, files, patterns, archives, tables, URLs and lists."""

from vsc_serve.sources.base import MAX_BYTES, FileSource, Source, UnreadableSource, read_file
from vsc_serve.sources.find import find_sources
from vsc_serve.sources.names import IMAGE_SUFFIXES, Ids, is_array, is_junk

__all__ = [
    "IMAGE_SUFFIXES",
    "MAX_BYTES",
    "FileSource",
    "Ids",
    "Source",
    "UnreadableSource",
    "find_sources",
    "is_array",
    "is_junk",
    "read_file",
]
