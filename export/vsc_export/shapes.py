"""Run every graph at several batch sizes before anything is written: names, types, shapes.

An exporter that fixes the batch size, or mistakes the shape of a bias, makes files that look right.
"""

from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from vsc_export.compaction import CSR_OUTPUTS
from vsc_export.graphs import DECODER_OUTPUTS, ENCODER_OUTPUTS, example_rows
from vsc_serve.bundle import DECODER, ENCODER, ENCODER_CSR
from vsc_serve.errors import ExportError, VscError
from vsc_serve.session import Session, open_session
from vsc_training.model import VSC, DataSpec

BATCHES: Final = (0, 1, 2, 7, 33)

_GRAPHS: Final = {
    ENCODER: ENCODER_OUTPUTS,
    ENCODER_CSR: CSR_OUTPUTS,
    DECODER: DECODER_OUTPUTS,
}
_CSR_TYPES: Final = [np.dtype(np.float32), np.dtype(np.int32), np.dtype(np.int32)]


def check_shapes(model: VSC, folder: Path, data: DataSpec | None = None) -> None:
    """Run the graphs of a folder on batches of `BATCHES`.

    Args:
        model: What was exported.
        folder: Holds the graphs.
        data: What the encoders take; None takes what the model does. What is in front of a model
            need not run on no rows at all.

    Raises:
        ExportError: One does not run, or gives other outputs than it should; which and at what
            batch size.
    """
    sessions = {name: open_session(folder / name, device="cpu", threads=1) for name in _GRAPHS}
    latent_dim, shape = model.recipe.latent_dim, model.data.shape
    taken = data or model.data
    for count in BATCHES if data is None else BATCHES[1:]:
        rows: dict[str, NDArray[Any]] = {taken.modality: example_rows(taken, count).numpy()}
        code = _run(sessions[ENCODER], ENCODER, count, rows)
        _check(ENCODER, count, code, [np.dtype(np.float32)] * 4, [(count, latent_dim)] * 4)
        parts = _run(sessions[ENCODER_CSR], ENCODER_CSR, count, rows)
        found = (int((code[0] != 0).sum()),)
        _check(ENCODER_CSR, count, parts, _CSR_TYPES, [found, found, (count,)])
        drawn = _run(sessions[DECODER], DECODER, count, {"code": code[0]})
        _check(DECODER, count, drawn, [np.dtype(np.float32)], [(count, *shape)])


def _run(
    session: Session, name: str, count: int, feeds: dict[str, NDArray[Any]]
) -> list[NDArray[Any]]:
    try:
        return session.run(_GRAPHS[name], feeds)
    except VscError:
        raise
    except Exception as error:  # onnxruntime raises its own classes, and RuntimeError
        raise ExportError(
            f"{name}: does not run on a batch of {count} ({str(error).splitlines()[0][:200]})."
            " Nothing was written."
        ) from error


def _check(
    name: str,
    count: int,
    found: list[NDArray[Any]],
    types: list[np.dtype[Any]],
    shapes: list[tuple[int, ...]],
) -> None:
    for output, array, dtype, shape in zip(_GRAPHS[name], found, types, shapes, strict=True):
        if (array.dtype, array.shape) != (dtype, shape):
            raise ExportError(
                f"{name}: on a batch of {count}, {output} is {array.dtype} {array.shape} and should"
                f" be {dtype} {shape}. Nothing was written."
            )
