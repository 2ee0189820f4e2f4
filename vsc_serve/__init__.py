"""Sparse codes for images and embeddings, from Variational Sparse Coding models.

    from vsc_serve import Encoder

    encoder = Encoder.open("model/")
    codes = encoder.encode(["cat.jpg", "dog.jpg"])  # scipy.sparse.csr_array, one row each

Names are imported when they are first used, so that `vsc --help` does not load scipy.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from vsc_serve.codes import CodeFile, read_codes, write_codes
    from vsc_serve.decoder import Decoder
    from vsc_serve.encoder import Encoder
    from vsc_serve.errors import VscError
    from vsc_serve.images import PixelSpec
    from vsc_serve.pipeline import stream

_HOMES = {
    "CodeFile": "codes",
    "Decoder": "decoder",
    "Encoder": "encoder",
    "PixelSpec": "images",
    "VscError": "errors",
    "read_codes": "codes",
    "stream": "pipeline",
    "write_codes": "codes",
}

__all__ = [
    "CodeFile",
    "Decoder",
    "Encoder",
    "PixelSpec",
    "VscError",
    "__version__",
    "read_codes",
    "stream",
    "write_codes",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
