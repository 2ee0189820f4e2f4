"""Sparse codes in memory (scipy CSR) and on disk (`codes.npz`).

In memory a set of codes is a bare `scipy.sparse.csr_array`; ids and provenance join it only in a
file. docs/formats.md describes the file, which plain `scipy.sparse.load_npz` opens. A job of many
rows leaves several such files, shards, in a folder with a list; `read_codes` and `join_codes` make
one of them.
"""

from vsc_serve.codes.folder import (
    SHARD_FORMAT,
    SHARD_LIST,
    Shard,
    is_shard_folder,
    list_shards,
    part_paths,
    read_codes,
    read_parts,
)
from vsc_serve.codes.join import join_codes
from vsc_serve.codes.kinds import CODES_FILE, CODES_FOLDER, ERROR_FILE, ERRORS_LIST
from vsc_serve.codes.npz import FORMAT, CodeFile, Member, codes_to_bytes, write_codes, write_members
from vsc_serve.codes.rows import (
    CodeRows,
    Codes,
    active_positions,
    build_csr,
    canonical,
    csr_at,
    dense_to_csr,
    empty_rows,
    index_type,
    stack_codes,
    stack_rows,
    take_rows,
    threshold,
    threshold_logit,
)
from vsc_serve.codes.statistics import (
    ALWAYS_ON_SHARE,
    LIVE_SHARE,
    CodeStatistics,
    DecisionStatistics,
)

__all__ = [
    "ALWAYS_ON_SHARE",
    "CODES_FILE",
    "CODES_FOLDER",
    "ERRORS_LIST",
    "ERROR_FILE",
    "FORMAT",
    "LIVE_SHARE",
    "SHARD_FORMAT",
    "SHARD_LIST",
    "CodeFile",
    "CodeRows",
    "CodeStatistics",
    "Codes",
    "DecisionStatistics",
    "Member",
    "Shard",
    "active_positions",
    "build_csr",
    "canonical",
    "codes_to_bytes",
    "csr_at",
    "dense_to_csr",
    "empty_rows",
    "index_type",
    "is_shard_folder",
    "join_codes",
    "list_shards",
    "part_paths",
    "read_codes",
    "read_parts",
    "stack_codes",
    "stack_rows",
    "take_rows",
    "threshold",
    "threshold_logit",
    "write_codes",
    "write_members",
]
