"""The model card: what a bundle's README.md says, from the figures that were measured."""

from vsc_export.verify import GUARD_BAND, Parity
from vsc_serve.bundle import Manifest
from vsc_training.checkpoint import RunState


def model_card(state: RunState, manifest: Manifest, parity: Parity) -> str:
    """Return the text of the model card."""
    figures = state.figures
    takes = str(manifest.pixel_spec) if manifest.pixel_spec else f"vectors of {manifest.input_dim}"
    flips = sum(comparison.flips_inside_band for comparison in parity.comparisons)
    largest = max(comparison.max_value_error for comparison in parity.comparisons)
    return f"""# {manifest.name}

A Variational Sparse Coding model (Tonolini, Jensen, Murray-Smith, UAI 2019), exported by vsc-serve.

    vsc encode images/ --out codes.npz --model .

| what | value |
|---|---|
| input | {takes} |
| latents | {manifest.latent_dim} |
| spike threshold tau | {manifest.tau:g} (callers may override it) |
| active latents asked for | {state.recipe.active:.1f} per example (alpha {manifest.alpha:g}) |
| active latents measured | {figures["active"]:.1f} per example |
| live latents | {figures["live"]} of {figures["latents"]} (on for at least 0.1 % of the examples) |
| always on | {figures["always_on"]} (on for more than 99 %) |
| empty codes | {figures["empty_share"]:.2%} |
| squared error per example | {figures["squared_error"]:.2f}, from the deterministic code |
| elbo | {figures["elbo"]:.1f} nats per example, hard spikes |
| training | {state.step} steps of {state.recipe.batch_size}, data {state.data_fingerprint} |

Measured on {figures["images"]} examples that were not trained on, at tau 0.5.

## Parity with the trained model

{len(parity.comparisons)} comparisons with the checkpoint in float64 (batch sizes, thread counts):
no spike differs outside the guard band of {GUARD_BAND:g} around the threshold, {flips} inside it;
values differ by at most {largest:.1e}. {parity.near_threshold_share:.3%} of all spike decisions lie
inside the band: another engine may take those differently. Details are in `parity.json`.

## Meant for

Sparse codes of pictures like those it was trained on: search by likeness, deduplication, analysis
of features.

## Limits

It knows what its training data looked like and no names of things: it does not match text, and
pictures of another kind are described with features that do not fit them. Codes of two models
cannot be compared.
"""
