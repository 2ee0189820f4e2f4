"""Sparse codes for images and embeddings, from Variational Sparse Coding models.

    from vsc_serve import Encoder

    encoder = Encoder.open("model/")
    codes = encoder.encode(["cat.jpg", "dog.jpg"])  # scipy.sparse.csr_array, one row each

Names are imported when they are first used, so that `vsc --help` does not load scipy.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any
from warnings import warn

__version__ = "0.1.0"

if TYPE_CHECKING:
    from vsc_serve.codes import (
        CodeFile,
        CodeRows,
        Codes,
        DecisionStatistics,
        read_codes,
        write_codes,
    )
    from vsc_serve.compaction import BatchFacts, Compaction, EncodedBatch, GraphOutputs
    from vsc_serve.decoder import Decoder
    from vsc_serve.domain import GroupStatistics, ReferenceStatistics
    from vsc_serve.encoder import Encoder, ImageLike
    from vsc_serve.errors import (
        BundleError,
        CheckFailed,
        DeviceError,
        ExportError,
        InputError,
        Interrupted,
        Kind,
        SourceUnavailable,
        UsageError,
        VscError,
    )
    from vsc_serve.images import Fit, PixelSpec, Resample
    from vsc_serve.linear_map import LinearMap
    from vsc_serve.manifest import GraphSignature, Manifest, Modality, Precision, Probe
    from vsc_serve.options import EncodeOptions, Thresholds, View
    from vsc_serve.pipeline import Batch, stream
    from vsc_serve.session import Device, Session
    from vsc_serve.sources import Ids

_HOMES = {
    "Batch": "pipeline",
    "BatchFacts": "compaction",
    "BundleError": "errors",
    "CheckFailed": "errors",
    "CodeFile": "codes",
    "CodeRows": "codes",
    "Codes": "codes",
    "Compaction": "compaction",
    "DecisionStatistics": "codes",
    "Decoder": "decoder",
    "Device": "session",
    "DeviceError": "errors",
    "EncodeOptions": "options",
    "EncodedBatch": "compaction",
    "Encoder": "encoder",
    "ExportError": "errors",
    "Fit": "images",
    "GraphOutputs": "compaction",
    "GraphSignature": "manifest",
    "GroupStatistics": "domain",
    "Ids": "sources",
    "InputError": "errors",
    "Interrupted": "errors",
    "Kind": "errors",
    "LinearMap": "linear_map",
    "Manifest": "manifest",
    "Modality": "manifest",
    "ImageLike": "encoder",
    "PixelSpec": "images",
    "Precision": "manifest",
    "Probe": "manifest",
    "ReferenceStatistics": "domain",
    "Resample": "images",
    "Session": "session",
    "SourceUnavailable": "errors",
    "Thresholds": "options",
    "UsageError": "errors",
    "View": "options",
    "VscError": "errors",
    "read_codes": "codes",
    "stream": "pipeline",
    "write_codes": "codes",
}

__all__ = [
    "Batch",
    "BatchFacts",
    "BundleError",
    "CheckFailed",
    "CodeFile",
    "CodeRows",
    "Codes",
    "Compaction",
    "DecisionStatistics",
    "Decoder",
    "Device",
    "DeviceError",
    "EncodeOptions",
    "EncodedBatch",
    "Encoder",
    "ExportError",
    "Fit",
    "GraphOutputs",
    "GraphSignature",
    "GroupStatistics",
    "Ids",
    "ImageLike",
    "InputError",
    "Interrupted",
    "Kind",
    "LinearMap",
    "Manifest",
    "Modality",
    "PixelSpec",
    "Precision",
    "Probe",
    "ReferenceStatistics",
    "Resample",
    "Session",
    "SourceUnavailable",
    "Thresholds",
    "UsageError",
    "View",
    "VscError",
    "__version__",
    "read_codes",
    "stream",
    "write_codes",
]


_OLD_NAMES = {"Picture": "ImageLike"}
"""Names that work for one more release, and what they are called now."""


def __getattr__(name: str) -> Any:
    if name in _OLD_NAMES:
        warn(f"vsc_serve.{name} is now {_OLD_NAMES[name]}", DeprecationWarning, stacklevel=2)
        name = _OLD_NAMES[name]
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
