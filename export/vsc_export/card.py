"""The model card: what a bundle's README.md says, from the metrics that were measured."""

from typing import NamedTuple

from vsc_export.operating_points import Rows, TauPoint
from vsc_export.parity import Parity
from vsc_export.search_points import SearchPoint
from vsc_serve.bundle import Manifest
from vsc_serve.index.rerank import CANDIDATES
from vsc_serve.options import GUARD_BAND
from vsc_training.checkpoint import RunState


class Points(NamedTuple):
    """Operating points, and the rows that they were measured on."""

    trade_off: list[TauPoint]
    """What each setting of tau costs and keeps."""
    search: list[SearchPoint]
    """What a search finds at each of them."""
    measured: Rows


def model_card(
    state: RunState,
    manifest: Manifest,
    parity: Parity,
    points: Points,
    about: str = "",
) -> str:
    """Return the text of the model card.

    Args:
        state: What the run says.
        manifest: What the bundle says.
        parity: How the bundle compares with the run.
        points: What each setting of tau costs, keeps and finds.
        about: What its maker says of it; stands before the metrics.
    """
    metrics = state.metrics
    takes = str(manifest.pixel_spec) if manifest.pixel_spec else f"vectors of {manifest.input_dim}"
    return f"""# {manifest.name}

A Variational Sparse Coding model (Tonolini, Jensen, Murray-Smith, UAI 2019), exported by vsc-serve.
{_about_text(about)}
    vsc encode images/ --out codes.npz --model .

| what | value |
|---|---|
| input | {takes} |
| latents | {manifest.latent_dim} |
| spike threshold tau | {manifest.tau:g} (callers may override it) |
| precision | {manifest.precision}{_precision_note(manifest)} |
| active latents asked for | {state.recipe.active:.1f} per example (alpha {manifest.alpha:g}) |
| active latents measured | {metrics["active"]:.1f} per example |
| live latents | {metrics["live"]} of {metrics["latents"]} (on for at least 0.1 % of the examples) |
| always on | {metrics["always_on"]} (on for more than 99 %) |
| empty codes | {metrics["empty_share"]:.2%} |
| squared error per example | {metrics["squared_error"]:.2f}, from the deterministic code |
| elbo | {metrics["elbo"]:.1f} nats per example, hard spikes |
| training | {state.step} steps of {state.recipe.batch_size}, data {state.data_fingerprint} |

Measured on {metrics["images"]} examples that were not trained on, at tau 0.5.

## Operating points

{_trade_off_table(points.trade_off, manifest.tau, points.measured)}

## Search

{_search_table(points.search, manifest.tau)}

## Parity with the trained model

{_parity_text(parity)}

## Meant for

Sparse codes of images like those it was trained on: search by likeness, deduplication, analysis
of features.

## Limits

It knows what its training data looked like and no names of things: it does not match text, and
images of another kind are described with features that do not fit them. Codes of two models
cannot be compared.
"""


def _about_text(about: str) -> str:
    """Return the maker's words as a paragraph of their own; nothing where there are none."""
    return f"\n{about.strip()}\n" if about.strip() else ""


def _precision_note(manifest: Manifest) -> str:
    return "" if manifest.precision == "float32" else "; the spike head is float32"


def _trade_off_table(trade_off: list[TauPoint], own_tau: float, measured: Rows) -> str:
    """Return the table of tau with the bundle's own in bold, and what its columns are."""
    has_labels = trade_off[0].knn is not None
    lines = [
        "| tau | active | search cost | neighbour recall@10 | squared error |"
        + (" kNN |" if has_labels else ""),
        "|---|---|---|---|---|" + ("---|" if has_labels else ""),
    ]
    for point in trade_off:
        tau = _bold(point.tau, own_tau)
        knn = f" {point.knn:.3f} |" if point.knn is not None else ""
        lines.append(
            f"| {tau} | {point.active:.1f} | {point.search_cost:.2f} | {point.neighbour_recall:.3f}"
            f" | {point.squared_error:.2f} |{knn}"
        )
    definitions = (
        f"On {len(measured.rows)} rows of {measured.source}. Search cost: postings that a query is"
        " expected to\ntouch per row, sum_j f_j^2. Neighbour recall@10: of the ten nearest rows in"
        " the data itself (cosine,\ncentred), the share that are among the ten nearest by their"
        " codes."
    )
    knn = "\nkNN: share whose class is that of most of ten neighbours." if has_labels else ""
    return "\n".join(lines) + "\n\n" + definitions + knn


def _search_table(search: list[SearchPoint], own_tau: float) -> str:
    """Return the table of what a search finds, and what its columns are."""
    has_map = search[0].second_stage is not None
    lines = [
        "| tau | tau of queries | search cost | neighbour recall@10 |"
        + (" second stage |" if has_map else ""),
        "|---|---|---|---|" + ("---|" if has_map else ""),
    ]
    for point in search:
        second = f" {point.second_stage:.3f} |" if point.second_stage is not None else ""
        lines.append(
            f"| {_bold(point.tau, own_tau)} | {point.query_tau:g} | {point.search_cost:.2f}"
            f" | {point.recall:.3f} |{second}"
        )
    text = (
        "On the same rows, with queries that keep more latents than what is stored (sqrt(gamma) mu"
        " above a\nthreshold of their own). Neighbours here are those of a dense index of the data:"
        " cosine, not centred."
    )
    return "\n".join(lines) + "\n\n" + text + _second_stage_text(search, own_tau)


def _second_stage_text(search: list[SearchPoint], own_tau: float) -> str:
    own = next(point for point in search if point.tau == own_tau)
    if own.refitted is None:
        return "\nThere is no linear map: it would be most of the bundle."
    return (
        f"\nSecond stage: the best {CANDIDATES} are scored again by the linear map (`vsc search"
        f" --rerank linear`); with refitted\nvalues (`vsc encode --refit`) it finds"
        f" {own.refitted:.3f} at tau {own_tau:g}."
    )


def _bold(tau: float, own_tau: float) -> str:
    return f"**{tau:g}**" if tau == own_tau else f"{tau:g}"


def _parity_text(parity: Parity) -> str:
    kept = parity.fidelity
    compared = (
        f"{len(parity.comparisons)} comparisons with the checkpoint in float64 (batch sizes, thread"
        " counts, orders):\n"
    )
    if parity.precision == "float32":
        found = (
            f"no spike differs outside the guard band of {GUARD_BAND:g} around the threshold,"
            f" {parity.flips_inside_band} inside it;\nvalues differ by at most"
            f" {parity.max_value_error:.1e}. "
        )
    else:
        found = (
            f"{kept.flipped_share:.2e} of the spikes differ, the supports agree to"
            f" {kept.support_jaccard:.4f} (Jaccard),\nand {kept.neighbour_recall:.3f} of the ten"
            " nearest neighbours are kept. "
        )
    return (
        f"{compared}{found}{parity.near_threshold_share:.3%} of the spike decisions on real rows"
        " lie\ninside the band: another engine may take those differently. Details are in"
        " `parity.json`."
    )
