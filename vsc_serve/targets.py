"""Targets: what the decoder is to draw for a row, which refitted values and a second stage compare.

Pixels / 255, the vectors themselves, or behind a backbone the embeddings that it gives.
"""

from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vsc_serve.bundle import EMBEDDING, ENCODER, Manifest
from vsc_serve.compaction import EncodedBatch, GraphOutputs, NotFinite
from vsc_serve.errors import BundleError
from vsc_serve.linear_map import LinearMap
from vsc_serve.options import EncodeOptions


def are_needed(options: EncodeOptions) -> bool:
    """Tell whether rows are encoded with their targets."""
    return options.refit or options.targets


def target_outputs(manifest: Manifest, options: EncodeOptions) -> list[str]:
    """Return what the graph must give for the targets, if options need them. Raises BundleError."""
    if not are_needed(options) or manifest.backbone is None:
        return []
    require_embedding(manifest)
    return [EMBEDDING]


def require_embedding(manifest: Manifest) -> None:
    """Raise BundleError where the graph has a backbone, and does not give its embeddings."""
    outputs = manifest.graphs.get(ENCODER, {}).get("outputs", {})
    if manifest.backbone is not None and EMBEDDING not in outputs:
        raise BundleError(
            f"model {manifest.name}: its encoder does not give the embeddings of its backbone,"
            " which a second stage and refitted values need. Export the run again with this"
            " version."
        )


def targets_of(rows: NDArray[Any], found: GraphOutputs) -> NDArray[np.float32]:
    """Return the targets of a batch, flattened, shape (rows, dimensions).

    Args:
        rows: Pixels or vectors.
        found: What the graph gave for them, and for what a batch was filled up with.
    """
    if EMBEDDING in found:
        embedded: NDArray[np.float32] = found[EMBEDDING][: len(rows)]
        return embedded
    flat = rows.reshape(len(rows), -1).astype(np.float32)
    return flat if rows.dtype.kind == "f" else flat / np.float32(255)


def with_refitted(
    encoded: EncodedBatch, targets: NDArray[np.float32], linear_map: LinearMap
) -> EncodedBatch:
    """Return a batch with refitted values. Raises NotFinite."""
    codes = linear_map.refit(encoded.rows.codes, targets)
    bad = np.flatnonzero(~np.isfinite(codes.data))
    if len(bad):
        raise NotFinite(int(np.searchsorted(codes.indptr, bad[0], "right")) - 1)
    return encoded._replace(rows=replace(encoded.rows, codes=codes))


def with_targets(encoded: EncodedBatch, targets: NDArray[np.float32]) -> EncodedBatch:
    """Return a batch with its targets beside the codes."""
    return encoded._replace(rows=replace(encoded.rows, targets=targets))
