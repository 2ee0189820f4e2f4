"""What `vsc search` is asked: an image, a row, a file of queries, or whatever can be encoded."""

from collections.abc import Generator
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal, NamedTuple

from vsc_serve.cli.options import Device, find_model, refuse_other_model
from vsc_serve.cli.rerank import Rerank, refuse_codes
from vsc_serve.errors import UsageError

if TYPE_CHECKING:
    from vsc_serve.bundle import Manifest
    from vsc_serve.codes import CodeFile, CodeRows
    from vsc_serve.options import EncodeOptions
    from vsc_serve.pipeline import Batch

Rule = Literal["auto", "wide", "symmetric"]
"""The same as `index.queries.QueryRule`; a test compares them."""

_Rule = Literal["wide", "symmetric"]

_BLOCK: Final = 1024
"""Queries of a file that are answered together."""


class Index(NamedTuple):
    """Rows to search, and how queries of them are encoded where they must be."""

    path: Path
    rows: "CodeFile"
    rule: Rule
    model: Path | None
    device: Device
    rerank: Rerank = "none"
    """Second stage, which needs what is asked itself beside its code."""


class Asked(NamedTuple):
    """Queries, in order."""

    rule: _Rule
    how: str
    """How they were made, for people."""
    batches: "Generator[Batch, None, None]"
    """Codes and ids, and what could not be read; lazily."""


def ask_like(index: Index, like: str) -> Asked:
    """Ask what is like a row (by its id) or an image file. Raises VscError."""
    from vsc_serve.encoder import Encoder

    path = Path(like)
    if like in index.rows.ids and not path.is_file():
        return _ask_row(index, like)
    if not path.exists():
        raise UsageError(f"--like {like}: no such file, and no row has that id")
    bundle = find_model(index.model)
    encoder = Encoder.open(bundle, device=index.device)
    refuse_other_model(index.rows, encoder.manifest.digest, bundle)
    if encoder.manifest.modality == "vector":
        raise UsageError(
            f"--like {like}: model {encoder.manifest.name} encodes vectors, not images. Give them"
            " to --queries as an .npy file, or the id of a row to --like."
        )
    options = _options(index, encoder.manifest)
    rows = encoder.encode_rows(encoder.read([path]), options)
    return _asked(index, options, encoder.manifest, _one(rows, like))


def ask_many(index: Index, given: str) -> Asked:
    """Ask with the queries of a file, or with what `vsc encode` takes. Raises VscError."""
    from vsc_serve.bundle import open_bundle
    from vsc_serve.pipeline import stream

    if _holds_codes(Path(given)):
        return _ask_codes(index, Path(given))
    bundle = find_model(index.model)
    manifest = open_bundle(bundle).manifest
    refuse_other_model(index.rows, manifest.digest, bundle)
    options = _options(index, manifest)
    batches = stream(bundle, [given], options, device=index.device)
    return _asked(index, options, manifest, batches)


def _options(index: Index, manifest: "Manifest") -> "EncodeOptions":
    """Return how queries are encoded; for a second stage what they are comes along."""
    from dataclasses import replace

    from vsc_serve.index.queries import query_options

    options = query_options(index.rows.meta, manifest, index.rule)
    return replace(options, targets=index.rerank != "none")


def _ask_row(index: Index, like: str) -> Asked:
    from vsc_serve.codes import CodeRows

    refuse_codes(index.rerank, f"the row {like}", "its image file to --like")
    if index.rule == "wide":
        raise UsageError(
            f"--query wide: of the row {like} only the stored code is there. Give its image file"
            " to --like, or leave --query out."
        )
    code = index.rows.codes[[index.rows.ids.index(like)]]
    rows = CodeRows(codes=code)
    return Asked("symmetric", "symmetric: the stored code of a row", _one(rows, like))


def _ask_codes(index: Index, path: Path) -> Asked:
    from vsc_serve.codes import read_codes
    from vsc_serve.index.queries import check_queries

    refuse_codes(index.rerank, str(path), "the images or vectors themselves to --queries")
    queries = read_codes(path)
    check_queries(path, queries, index.path, index.rows)
    found: _Rule = "wide" if queries.meta.get("view") == "query" else "symmetric"
    if index.rule not in ("auto", found):
        raise UsageError(
            f"--query {index.rule}: the codes in {path} are {found} queries. Leave --query out, or"
            " give the images or vectors themselves to --queries."
        )
    return Asked(found, f"{found}: the codes in {path}", _cut(queries))


def _holds_codes(path: Path) -> bool:
    """Tell whether a path is a file or folder of codes, and not of pixels or vectors."""
    from vsc_serve.codes import CODES_FILE, is_shard_folder
    from vsc_serve.untrusted import is_folder, is_plain

    if is_folder(path):
        return is_shard_folder(path)
    try:
        return is_plain(path) and CODES_FILE.recognises(path)
    except OSError:  # whoever reads it as an array says why it cannot be read
        return False


def _cut(queries: "CodeFile") -> "Generator[Batch, None, None]":
    from vsc_serve.codes import CodeRows
    from vsc_serve.pipeline import Batch

    for start in range(0, len(queries.ids), _BLOCK):
        block = slice(start, start + _BLOCK)
        yield Batch(CodeRows(codes=queries.codes[block]), queries.ids[block], [])


def _one(rows: "CodeRows", name: str) -> "Generator[Batch, None, None]":
    from vsc_serve.pipeline import Batch

    yield Batch(rows, [name], [])


def _asked(
    index: Index,
    options: "EncodeOptions",
    manifest: "Manifest",
    batches: "Generator[Batch, None, None]",
) -> Asked:
    """Say which queries are asked, and what asks otherwise."""
    from vsc_serve.index.queries import WIDE_FROM

    tau, stored_tau = options.thresholds(manifest)
    if stored_tau is not None:
        how = (
            f"wide: sqrt(gamma) mu where gamma > {tau:g} (rows: mu where gamma > {stored_tau:g});"
            " --query symmetric asks as the rows were made"
        )
        return Asked("wide", how, batches)
    why = f" (wide ones are for all slab means of rows with tau from {WIDE_FROM:g})"
    how = f"symmetric: as the rows were made, tau {tau:g}{why if index.rule == 'auto' else ''}"
    return Asked("symmetric", how, batches)
