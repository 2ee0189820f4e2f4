"""What `vsc search` is asked: images, rows, features, or a file of many queries."""

from collections.abc import Generator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal, NamedTuple

from vsc_serve.cli.options import Device, find_model, refuse_other_model
from vsc_serve.cli.rerank import Rerank, refuse_codes
from vsc_serve.errors import UsageError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from vsc_serve.bundle import Manifest
    from vsc_serve.codes import CodeFile, CodeRows
    from vsc_serve.encoder import Encoder
    from vsc_serve.index.base import Searchable
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
    rows: "Searchable"
    rule: Rule
    model: Path | None
    device: Device
    rerank: Rerank = "none"
    """Second stage, which needs what is asked itself beside its code."""


@dataclass(frozen=True)
class Wish:
    """What the rows that are found are to be like."""

    likes: list[str] = field(default_factory=list)
    """Images, or ids of rows."""
    unlikes: list[str] = field(default_factory=list)
    has: list[int] = field(default_factory=list)
    """Features that must be active."""
    has_not: list[int] = field(default_factory=list)
    """Features that must not."""

    @property
    def name(self) -> str:
        """Name of the query, for people."""
        words = [*self.likes, *(f"feature {one}" for one in self.has if not self.likes)]
        return " and ".join(words) + "".join(f", not {one}" for one in self.unlikes)

    def to_json(self) -> dict[str, Any]:
        """Return what is wished for programs; one image or row alone as text."""
        alone = len(self.likes) == 1 and not self.unlikes
        like = {"like": self.likes[0] if alone else self.likes} if self.likes else {}
        lists = {"unlike": self.unlikes, "has": self.has, "not": self.has_not}
        return like | {name: given for name, given in lists.items() if given}


class Asked(NamedTuple):
    """Queries, in order."""

    rule: _Rule
    how: str
    """How they were made, for people."""
    batches: "Generator[Batch, None, None]"
    """Codes and ids, and what could not be read; lazily."""
    themselves: frozenset[int] = frozenset()
    """Rows that are asked with."""
    are_rows: bool = False
    """Whether queries are codes of rows, made as those that are searched."""


def ask_wish(index: Index, wish: Wish, among: "NDArray[np.bool_] | None") -> Asked:
    """Ask what is like images (by their files) or rows (by their ids), or has features.

    Args:
        index: What is searched.
        wish: What is wished.
        among: The rows with the features that are wished, if any are.

    Raises:
        VscError: It cannot be asked.
    """
    if not wish.likes:
        return _ask_features(index, wish, among)
    likes = [_ask_like(index, one, "--like") for one in wish.likes]
    unlikes = [_ask_like(index, one, "--unlike") for one in wish.unlikes]
    return _combined(index, wish, likes, unlikes) if len([*likes, *unlikes]) > 1 else likes[0]


def _combined(index: Index, wish: Wish, likes: list[Asked], unlikes: list[Asked]) -> Asked:
    """Put several queries together; see `index.combine`."""
    from vsc_serve.codes import CodeRows
    from vsc_serve.index.combine import combine

    refuse_codes(index.rerank, "several images or rows together", "one --like")
    parts = [*likes, *unlikes]
    codes = [next(one.batches).rows.codes for one in parts]
    rows = CodeRows(codes=combine(codes[: len(likes)], codes[len(likes) :]))
    how = f"the mean of {len(likes)}" + (f" minus the mean of {len(unlikes)}" if unlikes else "")
    rules = {one.rule for one in parts}
    return Asked(
        "wide" if "wide" in rules else "symmetric",
        f"{how}, each of length 1; {', '.join(sorted({one.how for one in parts}))}",
        _one(rows, wish.name),
        frozenset().union(*(one.themselves for one in parts)),
    )


def _ask_features(index: Index, wish: Wish, among: "NDArray[np.bool_] | None") -> Asked:
    from vsc_serve.codes import CodeRows
    from vsc_serve.index.combine import feature_query

    refuse_codes(index.rerank, "features", "an image to --like")
    if not wish.has or among is None:
        raise UsageError("--unlike and --not leave rows out: give --like, --has or --queries too")
    rows = CodeRows(codes=feature_query(index.rows, wish.has, among))
    how = "1 for each feature, with the sign that it mostly has"
    return Asked("symmetric", how, _one(rows, wish.name))


def _ask_like(index: Index, like: str, option: str) -> Asked:
    """Ask what is like a row (by its id) or an image file. Raises VscError."""
    path = Path(like)
    row = None if path.is_file() else index.rows.row_of(like)
    if row is not None:
        return _ask_row(index, like, row, option)
    if not path.exists():
        raise UsageError(f"{option} {like}: no such file, and no row has that id")
    encoder = _encoder(index, like, option)
    options = _options(index, encoder.manifest)
    rows = encoder.encode_rows(encoder.read([path]), options)
    return _asked(index, options, encoder.manifest, _one(rows, like))


def _encoder(index: Index, like: str, option: str) -> "Encoder":
    from vsc_serve.encoder import Encoder

    bundle = find_model(index.model)
    encoder = Encoder.open(bundle, device=index.device)
    refuse_other_model(index.rows, encoder.manifest.digest, bundle)
    if encoder.manifest.modality == "vector":
        raise UsageError(
            f"{option} {like}: model {encoder.manifest.name} encodes vectors, not images. Give them"
            f" to --queries as an .npy file, or the id of a row to {option}."
        )
    return encoder


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


def _ask_row(index: Index, like: str, row: int, option: str) -> Asked:
    from vsc_serve.codes import CodeRows

    refuse_codes(index.rerank, f"the row {like}", "its image file to --like")
    if index.rule == "wide":
        raise UsageError(
            f"--query wide: of the row {like} only the stored code is there. Give its image file"
            f" to {option}, or leave --query out."
        )
    rows = CodeRows(codes=index.rows.rows[[row]])
    how = "symmetric: the stored code of a row"
    return Asked("symmetric", how, _one(rows, like), frozenset([row]))


def _ask_codes(index: Index, path: Path) -> Asked:
    from vsc_serve.codes import read_codes
    from vsc_serve.index.queries import check_queries

    refuse_codes(index.rerank, str(path), "the images or vectors themselves to --queries")
    queries = read_codes(path)
    facts = {"latents": index.rows.rows.shape[1], **index.rows.meta}
    check_queries(path, queries, index.path, facts)
    found: _Rule = "wide" if queries.meta.get("view") == "query" else "symmetric"
    if index.rule not in ("auto", found):
        raise UsageError(
            f"--query {index.rule}: the codes in {path} are {found} queries. Leave --query out, or"
            " give the images or vectors themselves to --queries."
        )
    are_rows = found == "symmetric"
    return Asked(found, f"{found}: the codes in {path}", _cut(queries), are_rows=are_rows)


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
    why = f" (wide ones are for slab means, with tau from {WIDE_FROM:g} or --max-active)"
    how = f"symmetric: as the rows were made, tau {tau:g}{why if index.rule == 'auto' else ''}"
    return Asked("symmetric", how, batches)
