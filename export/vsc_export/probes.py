"""Probes: inputs with known codes in a bundle, encoded again whenever it is opened.

They are drawn, not taken from the training data: a bundle shows nobody's images.
"""

import hashlib
import io
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from vsc_export.settings import run_encoder
from vsc_serve.bundle import ENCODER, Precision, Probe
from vsc_serve.codes import dense_to_csr, threshold_logit
from vsc_serve.images import PixelSpec, read_pixels
from vsc_serve.options import GUARD_BAND
from vsc_serve.session import Session, open_session
from vsc_training.model import VSC, DataSpec

_SIDE: Final = 96
_COUNT: Final = 3
_CANDIDATES: Final = 60
_FILLED_SHARES: Final = (1.0, 0.5, 0.25, 0.1)
"""Shares of an image that blots fill, in turn: a model of strokes on black sees none when full."""
_MARGIN: Final[dict[Precision, float]] = {
    "float32": 10 * GUARD_BAND,
    "fp16": 2e-2,
    "int8": 5e-2,
}
"""A probe with a spike this close to the threshold would fail on another engine for no reason."""


class _Candidate(NamedTuple):
    """A drawn input and its probe."""

    content: bytes
    probe: Probe


def write_probes(
    model: VSC, data: DataSpec, folder: Path, tau: float, precision: Precision
) -> list[Probe]:
    """Write probes whose spikes all lie well away from the threshold, with active latents if any.

    Args:
        model: The trained model.
        data: What a row of the encoder is; behind a backbone not what the model is fitted to.
        folder: Holds the encoder.
        tau: Spike threshold of the encoder.
        precision: Precision of its layers.
    """
    session = open_session(folder / ENCODER, device="cpu")
    probes = []
    for content, probe in _choose(_candidates(session, model, data, tau, precision)):
        path = folder / probe.file
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
        probes.append(probe)
    return probes


def _choose(candidates: Iterator[_Candidate]) -> list[_Candidate]:
    """Return the first with active latents; where there are too few, the first without as well."""
    empty: list[_Candidate] = []

    def active() -> Iterator[_Candidate]:
        for candidate in candidates:
            if candidate.probe.indices:
                yield candidate
            else:
                empty.append(candidate)

    chosen = list(islice(active(), _COUNT))
    return chosen + empty[: _COUNT - len(chosen)]


def _candidates(
    session: Session, model: VSC, data: DataSpec, tau: float, precision: Precision
) -> Iterator[_Candidate]:
    """Draw inputs and encode them; those with a spike near the threshold are left out."""
    limit = threshold_logit(tau)
    for number in range(_CANDIDATES):
        name, content = _draw_probe(model, data, np.random.default_rng((1, number)), number)
        rows = _read_rows(content, data.pixel_spec)
        code, logit = run_encoder(session, data.modality, rows, 1)
        if np.abs(logit - limit).min() <= _MARGIN[precision]:
            continue
        codes = dense_to_csr(code)
        probe = Probe(
            file=f"probes/{name}",
            pixels_sha256=hashlib.sha256(rows.tobytes()).hexdigest(),
            indices=codes.indices.tolist(),
            values=codes.data.astype(float).tolist(),
        )
        yield _Candidate(content, probe)


def _draw_probe(
    model: VSC, data: DataSpec, rng: np.random.Generator, number: int
) -> tuple[str, bytes]:
    """Return file name and content of one probe: blurred blots as JPEG or PNG, or a vector."""
    if data.modality == "vector":
        center, scale = model.center.numpy(), float(model.scale)
        vector = center + scale * rng.normal(size=data.shape)
        return f"{number}.f32", vector.astype(np.float32).tobytes()
    blots = rng.integers(0, 256, (6, 6, 3), dtype=np.uint8)
    is_there = rng.random((6, 6, 1)) < _FILLED_SHARES[number // 2 % len(_FILLED_SHARES)]
    image = Image.fromarray(blots * is_there.astype(np.uint8)).resize(
        (_SIDE, _SIDE * 3 // 4), Image.Resampling.BICUBIC
    )
    kind = "JPEG" if number % 2 == 0 else "PNG"
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return f"{number}.{'jpg' if kind == 'JPEG' else 'png'}", buffer.getvalue()


def _read_rows(content: bytes, spec: PixelSpec | None) -> NDArray[Any]:
    if spec is None:
        return np.frombuffer(content, np.float32)[None]
    return read_pixels(content, spec)[None]
