"""Plan a conversion: check every row against the limits of the target, then write."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import BinaryIO, Final, Literal, get_args

import numpy as np

from vsc_serve.atomic import atomic_file
from vsc_serve.codes import CODES_FILE, join_codes, part_paths, write_codes
from vsc_serve.console import Progress, require_extra
from vsc_serve.convert import text
from vsc_serve.convert.binary import write_bigann, write_h5ad, write_ids, write_parquet
from vsc_serve.convert.kinds import BIGANN, HDF5, LINES, PARQUET
from vsc_serve.convert.limits import SMALLEST_NORMAL, Limits, check
from vsc_serve.convert.rows import LONG_ROW, Block, Rows, Survey, gather, survey
from vsc_serve.errors import InputError, UsageError
from vsc_serve.options import SIGNED_VIEWS
from vsc_serve.outputs import FileKind, check_output

Sign = Literal["auto", "split", "keep", "error"]

_INT32_MAX: Final = 2**31 - 1


@dataclass(frozen=True, kw_only=True)
class Options:
    """How codes are written. Raises UsageError for what cannot be."""

    sign: Sign = "auto"
    """What becomes of negative values: `auto` splits where the target takes none, `split` always,
    `keep` never, `error` refuses any."""
    field: str = "code"
    """Name of the field or vector (Elasticsearch, OpenSearch, Qdrant)."""
    scale: float = 100.0
    """What values are multiplied with before they are rounded (Anserini)."""
    compress: bool = False
    """Deflate the numbers (npz)."""

    def __post_init__(self) -> None:
        if self.sign not in get_args(Sign):
            raise UsageError(f"`sign` must be one of {', '.join(get_args(Sign))}, not {self.sign}")
        if not (np.isfinite(self.scale) and self.scale > 0):
            raise UsageError(f"`scale` must be above 0, not {self.scale}")
        if not self.field or "." in self.field:
            raise UsageError(f"`field` {self.field!r}: give a name without a dot")


@dataclass(frozen=True, kw_only=True)
class Planned:
    """A conversion of which all rows are known to fit."""

    to: str
    """Name of the format."""
    rows: Rows
    facts: Survey
    """Statistics of the rows as they will be written."""
    options: Options
    notes: list[str]
    """What a person should know: what is changed, and what the target may stumble over later."""


_Lines = Callable[[Block, text.Target], "text.Lines"]
_Write = Callable[[Planned, Path], None]


@dataclass(frozen=True, kw_only=True)
class _Format:
    limits: Limits
    lines: _Lines | None = None
    """For formats of lines, which can also go to a pipe."""
    write: _Write | None = None
    """For the others."""
    modules: tuple[str, ...] = ()
    """What must be installed; the extra has the name of the format."""
    kind: FileKind = LINES
    """How a file of this format is recognised before it is replaced."""


def plan(paths: Sequence[Path], *, to: str, options: Options | None = None) -> Planned:
    """Go through all rows and check them against what the target takes; write nothing.

    Args:
        paths: Files of codes and folders of shards, one after the other.
        to: Name of the format, one of `FORMATS`.
        options: How to write them.

    Raises:
        UsageError: No such format, or options that do not fit.
        InputError: Codes that cannot be read, or that the target does not take.
    """
    if to not in FORMATS:
        raise UsageError(f"`to` must be one of {', '.join(FORMATS)}, not {to}")
    require_extra(to, *FORMATS[to].modules)
    options = options or Options()
    rows, limits = Rows(paths), FORMATS[to].limits
    facts = survey(rows)
    notes = []
    if _must_split(facts, options.sign, limits):
        rows, facts = Rows(paths, is_split=True), facts.split()
        reason = '`sign="split"`' if limits.is_signed else f"{to} takes no negative values"
        notes.append(
            f"{facts.latent_dim} latents become {facts.columns} columns, [max(z, 0); max(-z, 0)]:"
            f" {reason}. Split queries alike: their dot product is never below that of the codes"
        )
    check(to, limits, facts)
    planned = Planned(to=to, rows=rows, facts=facts, options=options, notes=notes)
    notes += _notes(planned)
    return planned


def check_target(to: str, out: Path, paths: Sequence[Path], *, force: bool) -> None:
    """Check that a conversion may be written, with the files beside it; see `check_output`.

    Args:
        to: Name of the format.
        out: File to write.
        paths: The codes.
        force: Whether files of this format that exist may be replaced.
    """
    if to not in FORMATS:
        return  # `plan` says so
    check_output(out, FORMATS[to].kind, force=force, inputs=paths)
    if to == "bigann":
        check_output(ids_path(out), LINES, force=force, inputs=paths)


def write_file(planned: Planned, out: Path, *, report: Progress | None = None) -> None:
    """Write a conversion, whole or not at all. Raises InputError where that fails."""
    chosen = FORMATS[planned.to]
    if chosen.write is not None:
        chosen.write(planned, out)
        return
    with atomic_file(out) as file:
        write_lines(planned, file, report=report)


def write_lines(planned: Planned, file: BinaryIO, *, report: Progress | None = None) -> None:
    """Write the lines of a conversion to a file or a pipe, block by block.

    Raises:
        UsageError: The format has no lines.
    """
    lines = _lines_of(planned.to)
    target = text.Target(
        latent_dim=planned.facts.latent_dim,
        columns=planned.facts.columns,
        field=planned.options.field,
        scale=planned.options.scale,
    )
    for block in planned.rows:
        file.write("".join(lines(block, target)).encode())
        if report is not None:
            report.update(block.start + len(block.ids))


def require_lines(to: str) -> None:
    """Raise UsageError for a format that cannot go to a pipe."""
    if to in FORMATS:
        _lines_of(to)


def _lines_of(to: str) -> _Lines:
    lines = FORMATS[to].lines
    if lines is None:
        raise UsageError(f"{to} cannot go to a pipe: give `out`")
    return lines


def _must_split(facts: Survey, sign: Sign, limits: Limits) -> bool:
    """Decide from what the codes are, not from which values they happen to hold.

    So every file of one model gets the same columns. Only of codes that do not say what they are
    the values decide.
    """
    if sign == "error" and facts.negative_rows:
        raise InputError(
            f"{facts.negative_rows} of {facts.rows} rows hold negative values, and"
            ' `sign="error"` refuses them. Leave `sign` out, or encode with `view="gamma"`.'
            " Nothing was written."
        )
    if sign == "split" and facts.is_split:
        raise UsageError('`sign="split"`: these codes are split already. Leave it out.')
    if sign != "auto" or limits.is_signed or facts.is_split:
        return sign == "split"
    return facts.negative_rows > 0 or facts.meta.get("view") in SIGNED_VIEWS


def _notes(planned: Planned) -> list[str]:
    facts, notes = planned.facts, []
    if planned.to == "pgvector" and facts.long_rows:
        notes.append(
            f"{facts.long_rows} rows have more than {LONG_ROW} entries, which the type takes and an"
            f" HNSW index refuses. For one, encode with `max_active={LONG_ROW}`"
        )
    if planned.to == "anserini":
        notes += _rounding_notes(planned)
        if facts.spaced_ids:
            notes.append(f"{facts.spaced_ids} ids hold white space, where a TREC run file splits")
    if planned.to == "npz" and facts.repeated_id is not None:
        notes.append(f"the id {facts.repeated_id!r} is there more than once")
    return notes


def _rounding_notes(planned: Planned) -> list[str]:
    scale = planned.options.scale
    if planned.facts.largest * scale > _INT32_MAX:
        raise InputError(
            f"`scale={scale:g}`: the largest value {planned.facts.largest:.3g} becomes more than"
            f" {_INT32_MAX}. Give a smaller one. Nothing was written."
        )
    lost = sum(
        int((text.integer_weights(block.codes.data, scale) == 0).sum()) for block in planned.rows
    )
    share = lost / max(planned.facts.entries, 1)
    return [
        f"weights are values x {scale:g}, rounded; {lost} of {planned.facts.entries} entries"
        f" ({share:.2%}) round to 0 and are left out"
    ]


def _write_npz(planned: Planned, out: Path) -> None:
    facts, compress = planned.facts, planned.options.compress
    if not planned.rows.is_split:
        parts = list(chain.from_iterable(map(part_paths, planned.rows.paths)))
        join_codes(parts, out, facts.meta, compress=compress)
        return
    whole = gather(planned.rows, facts)
    write_codes(
        out,
        whole.codes,
        whole.ids,
        whole.meta,
        gamma=whole.gamma,
        sigma=whole.sigma,
        compress=compress,
    )


def _write_bigann(planned: Planned, out: Path) -> None:
    with atomic_file(ids_path(out)) as file:
        write_ids(file, planned.rows)
    with atomic_file(out) as file:
        write_bigann(file, planned.rows, planned.facts)


def ids_path(out: Path) -> Path:
    """Return where the ids of a BigANN file go: `codes.csr` gives `codes.ids.jsonl`."""
    return out.with_name(f"{out.stem}.ids.jsonl")


def _write_parquet(planned: Planned, out: Path) -> None:
    with atomic_file(out) as file:
        write_parquet(file, planned.rows, planned.facts)


def _write_h5ad(planned: Planned, out: Path) -> None:
    with atomic_file(out) as file:
        write_h5ad(Path(file.name), planned.rows, planned.facts)


_LUCENE: Final = Limits(
    is_signed=False,
    min_value=SMALLEST_NORMAL,
    has_unique_ids=True,
    min_id_bytes=1,
    max_id_bytes=512,
)

FORMATS: Final[dict[str, _Format]] = {
    "jsonl": _Format(limits=Limits(is_signed=True), lines=text.jsonl),
    "parquet": _Format(
        limits=Limits(is_signed=True),
        write=_write_parquet,
        modules=("pyarrow",),
        kind=PARQUET,
    ),
    "npz": _Format(
        limits=Limits(is_signed=True, has_text_ids=False), write=_write_npz, kind=CODES_FILE
    ),
    "h5ad": _Format(
        limits=Limits(is_signed=True, has_unique_ids=True),
        write=_write_h5ad,
        modules=("anndata",),
        kind=HDF5,
    ),
    "bigann": _Format(
        limits=Limits(is_signed=True, has_text_ids=False, max_columns=_INT32_MAX),
        write=_write_bigann,
        kind=BIGANN,
    ),
    "anserini": _Format(
        limits=Limits(is_signed=False, has_unique_ids=True, min_id_bytes=1), lines=text.anserini
    ),
    "elasticsearch": _Format(limits=_LUCENE, lines=text.elasticsearch),
    "opensearch": _Format(limits=replace(_LUCENE, max_columns=2**16), lines=text.opensearch),
    "pgvector": _Format(
        limits=Limits(is_signed=True, max_entries=16_000, max_columns=10**9), lines=text.pgvector
    ),
    "qdrant": _Format(
        limits=Limits(is_signed=True, has_unique_ids=True, max_columns=2**32), lines=text.qdrant
    ),
}
"""Every format by its name."""
