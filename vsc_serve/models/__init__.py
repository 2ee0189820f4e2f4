"""The model that comes with the package: `vsc encode images/` works without training one."""

from pathlib import Path
from typing import Final

BUILTIN_NAME: Final = "photos32"
"""A small convolutional VSC for colour photographs; its README.md says what it is good for."""


def builtin_model() -> Path:
    """Return the bundle that comes with the package."""
    return Path(__file__).with_name(BUILTIN_NAME)
