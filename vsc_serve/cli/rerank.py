"""The second stage of `vsc search`: what it needs, and what it makes of the first stage's rows."""

from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

from vsc_serve.cli.options import Device, find_model
from vsc_serve.errors import UsageError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from vsc_serve.index.base import Searchable
    from vsc_serve.index.exact import Hit, SharedFeature
    from vsc_serve.index.rerank import Candidates

Rerank = Literal["none", "linear", "decoded"]

Explanation = tuple["list[SharedFeature]", float]
"""Features, and what belongs to none of them."""


class SecondStage(Protocol):
    """Scores the rows of a first stage again."""

    def rerank(
        self, candidates: "Candidates", queries: "NDArray[np.float32]", top: int
    ) -> "list[list[Hit]]":
        """Return the best of each query's candidates. `queries` are as `Encoder.targets`."""

    def explain(self, hits: "list[Hit]", query: "NDArray[np.float32]") -> list[Explanation]:
        """Say what makes up the scores of a query's hits."""


def check_depth(rerank: Rerank, candidates: int | None, top: int, *, explain: bool) -> int:
    """Return how many rows of the first stage are wanted. Raises UsageError."""
    from vsc_serve.index.rerank import CANDIDATES

    if rerank == "none":
        if candidates is not None:
            raise UsageError("--candidates is for a second stage: give --rerank linear too")
        return top
    if explain and rerank == "decoded":
        raise UsageError(
            "--explain: a score of --rerank decoded is no sum over features. Leave one of them out,"
            " or use --rerank linear."
        )
    depth = max(CANDIDATES, top) if candidates is None else candidates
    if depth < top:
        raise UsageError(
            f"--candidates {depth}: the second stage chooses among so many rows, and --top asks for"
            f" {top} of them. Give at least {top}."
        )
    return depth


def open_stage(
    rerank: Rerank, path: Path, rows: "Searchable", model: Path | None, device: Device
) -> SecondStage | None:
    """Open what scores rows again; None for none.

    Raises:
        BundleError: The bundle has no linear map, or is damaged.
        UsageError: The rows hold other values than slab means.
    """
    if rerank == "none":
        return None
    view = rows.meta.get("view", "mean")
    if view != "mean" or rows.meta.get("sign") is not None:
        raise UsageError(
            f"--rerank {rerank}: {path} holds the view {view}"
            f"{', split by sign' if rows.meta.get('sign') else ''}, and only slab means (or"
            " refitted values) can be decoded. Encode the rows with --view mean."
        )
    return _open(rerank, rows, find_model(model), device)


def _open(rerank: Rerank, rows: "Searchable", bundle: Path, device: Device) -> SecondStage:
    from vsc_serve.bundle import open_bundle
    from vsc_serve.cli.options import refuse_other_model
    from vsc_serve.decoder import Decoder
    from vsc_serve.index.rerank import DecodedStage, LinearStage
    from vsc_serve.linear_map import read_linear_map

    opened = open_bundle(bundle)
    refuse_other_model(rows, opened.manifest.digest, bundle)
    if rerank == "linear":
        return LinearStage(rows.rows, read_linear_map(opened))
    return DecodedStage(rows.rows, Decoder.open(bundle, device=device))


def refuse_codes(rerank: Rerank, of_what: str, instead: str) -> None:
    """Raise UsageError for queries of which only the codes are there, if there is a second stage.

    Args:
        rerank: The second stage.
        of_what: The queries.
        instead: What to give.
    """
    if rerank != "none":
        raise UsageError(
            f"--rerank {rerank}: compares what is asked itself with rows, and of {of_what} only"
            f" codes are there. Give {instead}, or leave --rerank out."
        )
