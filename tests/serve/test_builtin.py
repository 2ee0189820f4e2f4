"""The model that comes with the package."""

from io import BytesIO

import numpy as np
from PIL import Image

from vsc_serve import Encoder
from vsc_serve.models import builtin_model


def scene(number: int, quality: int) -> bytes:
    """A soft coloured scene as a JPEG; another quality is the same scene saved again."""
    coarse = np.random.default_rng(number).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    image = Image.fromarray(coarse).resize((64, 48), Image.Resampling.BICUBIC)
    buffer = BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def test_an_image_saved_again_is_nearest_to_itself() -> None:
    encoder = Encoder.open(builtin_model(), device="cpu")
    codes = encoder.encode([scene(number, quality) for quality in (95, 30) for number in range(20)])
    rows = codes.toarray()
    rows /= np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-9)
    nearest = (rows[:20] @ rows[20:].T).argmax(axis=1)
    assert (nearest == np.arange(20)).sum() >= 18  # one of these scenes has an empty code


def test_its_card_says_what_it_is_not_for() -> None:
    card = (builtin_model() / "README.md").read_text(encoding="utf-8")
    assert "Not for finding things by what they are" in card
