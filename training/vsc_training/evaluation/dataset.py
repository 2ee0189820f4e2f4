"""Rows to evaluate, as the model that is evaluated sees them, with labels and factors."""

import hashlib
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from vsc_serve.errors import InputError, UsageError
from vsc_serve.images import read_images
from vsc_serve.sources import find_sources
from vsc_training.backbone import Backbone
from vsc_training.data import Examples, embed_examples, find_images, load_examples
from vsc_training.model import DataSpec

REFERENCE_COUNT: Final = 10_000
"""Most references of neighbours and probe."""
QUERY_COUNT: Final = 5_000
"""Most queries."""


@dataclass(frozen=True)
class Labelled:
    """Examples with classes as texts, so that class folders and numbers in a file compare."""

    path: Path
    """Where they come from."""
    examples: Examples
    """Rows in the shape that the model takes. Its own labels are not used."""
    labels: NDArray[np.str_] | None
    """Class of each row: the name of its folder, or the number in the file."""

    def __len__(self) -> int:
        return len(self.examples.rows)

    def digests(self, numbers: NDArray[np.intp]) -> list[bytes]:
        """Return a digest of the content of some rows."""
        rows = self.examples.rows
        return [hashlib.blake2b(rows[i].tobytes(), digest_size=16).digest() for i in numbers]


@dataclass(frozen=True)
class SearchSets:
    """References and queries of neighbours and probe: no row of one is in the other."""

    reference: NDArray[Any]
    """Rows to search and to fit the probe on, shape (references, *shape)."""
    reference_labels: NDArray[np.str_]
    """Their classes."""
    queries: NDArray[Any]
    """Rows to look for, shape (queries, *shape)."""
    query_labels: NDArray[np.str_]
    """Their classes."""
    copies: int
    """References left out because a query has the same content."""


class NothingToSearch(Exception):
    """The data allow no references and queries; the message says why. Not an error of the user."""


@dataclass(frozen=True)
class Factors:
    """True factors of each row, as far as they differ between the rows."""

    values: NDArray[np.float64]
    """Values, NaN where a factor has no effect, shape (images, factors)."""
    names: list[str]
    """Their names."""
    presence: NDArray[np.float64]
    """1 where an attribute is there, else 0, shape (images, attributes)."""
    attributes: list[str]
    """Their names."""


def load_labelled(path: Path, data: DataSpec, backbone: Backbone | None = None) -> Labelled:
    """Read rows for a model that exists.

    Images of a folder are cut and resized to what the model takes. Arrays must have its shape.

    Args:
        path: A folder of images, or an `.npz` or `.npy` file.
        data: What the model was fitted to.
        backbone: What embeds images, for a model of embeddings.

    Raises:
        UsageError: Nothing there, or the backbone is not the model's.
        InputError: Rows of another kind or shape, or not readable.
    """
    if path.is_dir() and backbone is not None:
        return _embed_folder(path, data, backbone)
    if path.is_dir():
        return _load_folder(path, data)
    examples = load_examples(path)
    if examples.spec.shape != data.shape:
        raise InputError(
            f"{path}: found {_describe(examples.spec)}, but the model was fitted to"
            f" {_describe(data)}. Give data of that shape{_hint(data)}."
        )
    labels = None if examples.labels is None else examples.labels.astype(np.str_)
    return Labelled(path, replace(examples, spec=data), labels)


def choose_search_sets(
    measured: Labelled, known: Labelled | None, *, least: int, seed: int
) -> SearchSets:
    """Choose up to 10,000 references and 5,000 queries by the seed.

    Args:
        measured: Data of the queries.
        known: Data of the references. None splits `measured` by the content of its rows, half for
            each, so that copies stay on one side.
        least: References that are needed.
        seed: Seed of the choice.

    Raises:
        NothingToSearch: No labels, one class, or too few rows.
        InputError: `known` has no labels, or other classes.
    """
    if measured.labels is None:
        raise NothingToSearch(
            f"{measured.path} has no labels (class folders, or `labels` in an .npz)"
        )
    source = known or measured
    labels = _labels_like(source, measured.labels, measured.path)
    if known is None:
        reference_rows, query_rows = measured.examples.split(0.5)
    else:
        reference_rows, query_rows = np.arange(len(known)), np.arange(len(measured))
    queries = choose_rows(query_rows, QUERY_COUNT, seed)
    chosen = choose_rows(reference_rows, REFERENCE_COUNT, seed)
    asked = set(measured.digests(queries))
    is_copy = np.array([digest in asked for digest in source.digests(chosen)], np.bool_)
    reference = chosen[~is_copy]
    if len(reference) < least or len(queries) == 0:
        raise NothingToSearch(
            f"{len(queries)} queries and {len(reference)} references that are no copies of them,"
            f" of 1 and {least} that are needed"
        )
    if len(np.unique(labels[reference])) < 2:
        raise NothingToSearch("the references are of one class")
    return SearchSets(
        source.examples.rows[reference],
        labels[reference],
        measured.examples.rows[queries],
        measured.labels[queries],
        int(is_copy.sum()),
    )


def choose_rows(rows: NDArray[np.intp], count: int, seed: int) -> NDArray[np.intp]:
    """Return at most `count` of the rows, chosen by the seed, in rising order."""
    if len(rows) <= count:
        return rows
    return np.sort(np.random.default_rng(seed).choice(rows, count, replace=False))


def load_factors(path: Path, ids: Sequence[str]) -> Factors:
    """Read the factors of the rows with these ids from a `factors.npz`.

    The file holds `ids`, `values` (images, factors) and `spikes` (whether a factor has an effect),
    and may hold `names` and `attributes` of the factors. Without `spikes` all factors count
    everywhere. What is the same in all these rows is left out.

    Args:
        path: The file.
        ids: Ids of the rows, in their order.

    Raises:
        InputError: The file cannot be used, or lacks some of the ids.
    """
    stored = _read_factors(path)
    places = {name: place for place, name in enumerate(stored["ids"].tolist())}
    missing = [name for name in ids if name not in places]
    if missing:
        raise InputError(
            f"{path}: no factors for {len(missing)} of {len(ids)} images, the first {missing[0]!r}"
            f" (its ids are like {next(iter(places), '')!r})."
            " Give the factors that were made with these images."
        )
    rows = np.array([places[name] for name in ids], np.intp)
    values = stored["values"][rows].astype(np.float64)
    spikes = stored["spikes"][rows].astype(np.bool_)
    return _assemble(path, values, spikes, stored)


def _embed_folder(path: Path, data: DataSpec, backbone: Backbone) -> Labelled:
    if backbone.spec.dim != data.input_dim or data.backbone not in (None, backbone.spec):
        given = f"{backbone.spec.dim} dimensions, sha256 {backbone.spec.sha256[:12]}"
        raise UsageError(
            f"`backbone`: not the one of this model, which was fitted to {_describe(data)};"
            f" given {given}. Give the file that it was trained with."
        )
    examples = embed_examples(path, find_images(path), backbone, lambda _done: None)
    return Labelled(path, replace(examples, spec=data), _folder_names(examples.ids))


def _load_folder(path: Path, data: DataSpec) -> Labelled:
    if data.pixel_spec is None:
        raise InputError(
            f"{path}: a folder, but the model was fitted to {_describe(data)}."
            " Give an .npy or .npz file of such vectors, or `backbone` with what embeds images."
        )
    sources = list(find_sources([str(path)]))
    pixels, ids, bad = read_images(sources, data.pixel_spec)
    if not ids:
        raise InputError(
            f"{path}: none of {len(sources)} image files can be read; the first: {bad[0].id}:"
            f" {bad[0].reason}"
        )
    return Labelled(path, Examples(pixels, ids, data, None, bad), _folder_names(ids))


def _labels_like(source: Labelled, others: NDArray[np.str_], path: Path) -> NDArray[np.str_]:
    """Return the labels of the references. Raises InputError unless some are among the others."""
    if source.labels is None:
        raise InputError(
            f"{source.path}: no labels, but {path} has some."
            " Give a reference with class folders or `labels`, or none."
        )
    found, wanted = np.unique(source.labels), np.unique(others)
    if not np.isin(found, wanted).any():
        raise InputError(
            f"{source.path}: its classes ({', '.join(found[:3])}, ...) and those of {path}"
            f" ({', '.join(wanted[:3])}, ...) have none in common."
            " Give a reference with the same classes."
        )
    return source.labels


def _folder_names(ids: Sequence[str]) -> NDArray[np.str_] | None:
    """Return the first folder of each id; None unless every image lies in one."""
    if any("/" not in name for name in ids):
        return None
    return np.array([name.split("/")[0] for name in ids])


def _read_factors(path: Path) -> dict[str, NDArray[Any]]:
    try:
        with np.load(path, allow_pickle=False) as file:
            stored = {name: file[name] for name in file.files}
    except FileNotFoundError:
        raise UsageError(f"{path}: no such file. Check the path given for factors.") from None
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, AttributeError) as error:
        raise InputError(f"{path}: not readable as numpy data ({error}).") from error
    values = stored.get("values", np.empty(0))
    stored.setdefault("spikes", np.ones(values.shape, np.bool_))
    is_whole = (
        values.ndim == 2
        and stored["spikes"].shape == values.shape
        and stored.get("ids", np.empty(0)).shape == (len(values),)
    )
    if not is_whole or values.dtype.kind not in "fiub":
        found = ", ".join(f"{name} {array.dtype} {array.shape}" for name, array in stored.items())
        raise InputError(
            f"{path}: expected ids (images), values and spikes (images, factors); found {found}."
        )
    return stored


def _assemble(
    path: Path,
    values: NDArray[np.float64],
    spikes: NDArray[np.bool_],
    stored: dict[str, NDArray[Any]],
) -> Factors:
    """Put NaN where a factor has no effect, and keep what differs between the rows."""
    count = values.shape[1]
    names = _names(stored, "names", [f"factor {number}" for number in range(count)])
    of_factor = _names(stored, "attributes", names)
    firsts = [of_factor.index(name) for name in dict.fromkeys(of_factor)]
    firsts = [number for number in firsts if 0 < spikes[:, number].sum() < len(spikes)]
    values = np.where(spikes, values, np.nan)
    kept = [number for number in range(count) if len(_known(values[:, number])) > 1]
    if not kept:
        raise InputError(f"{path}: every factor is the same in all {len(values)} images.")
    return Factors(
        values[:, kept],
        [names[number] for number in kept],
        spikes[:, firsts].astype(np.float64),
        [of_factor[number] for number in firsts],
    )


def _known(column: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.unique(column[~np.isnan(column)])


def _names(stored: dict[str, NDArray[Any]], key: str, default: list[str]) -> list[str]:
    found = stored.get(key)
    is_usable = found is not None and found.shape == (len(default),)
    return [str(name) for name in found] if found is not None and is_usable else default


def _describe(data: DataSpec) -> str:
    if data.pixel_spec is None:
        return f"vectors of {data.input_dim}"
    spec = data.pixel_spec
    colour = "grey" if spec.channels == 1 else "RGB"
    return f"{colour} images of {spec.width}x{spec.height}"


def _hint(data: DataSpec) -> str:
    return ", or a folder of images, which are resized" if data.pixel_spec else ""
