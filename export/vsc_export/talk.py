"""Lines for people about a bundle that is written: how it compares, what it is, what comes next."""

from pathlib import Path
from typing import TYPE_CHECKING

from vsc_serve.console import say

if TYPE_CHECKING:
    from vsc_export.options import ExportOptions
    from vsc_export.parity import Parity
    from vsc_export.write import Exported


def write_model(run: Path, out: Path, options: "ExportOptions", file: Path | None) -> "Exported":
    """Export a run, behind a backbone where a file of one is given, and say how it compares."""
    if file is None:
        from vsc_export.write import export_bundle

        done = export_bundle(run, out, options)
    else:
        done = _export_behind(file, run, out, options)
    say("parity", parity_line(done.parity))
    return done


def say_written(done: "Exported") -> None:
    """Say what was written."""
    manifest = done.manifest
    size = sum(path.stat().st_size for path in done.path.rglob("*") if path.is_file())
    say(
        "wrote",
        f"{done.path}  {manifest.name}, J={manifest.latent_dim}, tau={manifest.tau:g},"
        f" {size / 1e6:.1f} MB",
    )


def say_next(done: "Exported") -> None:
    """Say how the bundle is used."""
    takes = "images/" if done.manifest.modality == "image" else "vectors.npy"
    say("next", f"vsc encode {takes} --out codes.npz --model {done.path}")


def parity_line(parity: "Parity") -> str:
    """Return how a bundle compares with its run, in one line."""
    total = sum(parity.rows.values())
    if parity.precision == "float32":
        found = (
            f"{parity.flips_outside_band} spikes flipped outside the band,"
            f" {parity.flips_inside_band} inside, values within {parity.max_value_error:.1e}"
        )
    else:
        kept = parity.fidelity
        found = (
            f"supports agree to {kept.support_jaccard:.4f}, neighbour recall@10"
            f" {kept.neighbour_recall:.3f}"
        )
    return (
        f"{total} inputs x {len(parity.comparisons)} settings: {found}"
        f"  ({parity.near_threshold_share:.3%} of spikes near the threshold)"
    )


def _export_behind(file: Path, run: Path, out: Path, options: "ExportOptions") -> "Exported":
    """Export with a backbone in front, and say how the whole compares with its parts."""
    from vsc_export.backbone import export_with_backbone

    done = export_with_backbone(run, out, file, options)
    found = done.end_to_end
    assert found is not None  # only an export without a backbone has none
    same = "the same bytes" if found.bytes_equal else "not the same in every bit"
    say(
        "backbone",
        f"{sum(found.rows.values())} images x {len(found.comparisons)} settings, from pixels to"
        f" codes: {found.flips_outside_band} spikes flipped outside the band of"
        f" {found.rule.tolerance.guard_band:g}, {found.flips_inside_band} inside, values within"
        f" {found.max_value_error:.1e}; codes are {same} at every batch size",
    )
    return done
