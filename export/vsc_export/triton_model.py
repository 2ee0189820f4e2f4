"""Triton's Python backend: images (or vectors) to sparse codes, as padded rows.

`vsc export --triton` copies this file as `model.py`; nothing else imports it. The server's Python
needs numpy and onnxruntime. For images as encoded bytes it needs vsc-serve as well, whose own
preprocessing is then called, so that they give the codes they give everywhere.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import onnxruntime
import triton_python_backend_utils as pb_utils  # type: ignore[import-not-found]  # the server has it
from numpy.typing import NDArray

_PADDING: Final = -1
"""Index of a place that holds nothing."""


class Rows(NamedTuple):
    """What one request asks for."""

    rows: NDArray[Any]
    """Pixels, uint8, (images, height, width, channels); or vectors, float32."""
    limits: NDArray[np.float32]
    """Threshold on the spike logit of each row."""


class TritonPythonModel:
    """One instance of the model: a process of the server."""

    def initialize(self, args: dict[str, str]) -> None:
        """Open the graph on this instance's device; after an error the server serves no model.

        Args:
            args: Folder, version and configuration, as the server gives them.
        """
        parameters = json.loads(args["model_config"])["parameters"]
        stored = {name: value["string_value"] for name, value in parameters.items()}
        self._limit = threshold_logit(float(stored["vsc_tau"]))
        self._modality = stored["vsc_modality"]
        self._pixel_spec = json.loads(stored["vsc_pixel_spec"])
        folder = Path(args["model_repository"]) / args["model_version"]
        self._session = open_session(folder / "encoder.onnx", args, int(stored["vsc_threads"]))

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """Answer the requests that the server has batched, each with its codes or its error."""
        asked = [self._try(self._read, request) for request in requests]
        good = [one for one in asked if isinstance(one, Rows)]
        dense = iter(self._encode(good))
        return [self._respond(next(dense) if isinstance(one, Rows) else one) for one in asked]

    def _read(self, request: Any) -> Rows:
        rows, content, tau = (
            pb_utils.get_input_tensor_by_name(request, name)
            for name in (self._modality, "image_bytes", "tau")
        )
        if (rows is None) == (content is None):
            raise ValueError(f"give one of the inputs {self._modality} and image_bytes")
        pixels = self._decode(content.as_numpy()) if rows is None else rows.as_numpy()
        if tau is None:
            return Rows(pixels, np.full(len(pixels), self._limit))
        taus = tau.as_numpy().ravel().tolist()
        return Rows(pixels, np.array([threshold_logit(one) for one in taus], np.float32))

    def _decode(self, content: NDArray[np.object_]) -> NDArray[np.uint8]:
        """Turn encoded images into pixels, with the function that training used."""
        try:
            from vsc_serve.images import PixelSpec, read_pixels
        except ImportError as error:
            raise ValueError(
                f"image_bytes needs vsc-serve in the server's Python ({error}): pip install"
                " vsc-serve there, or send pixels as image"
            ) from error
        spec = PixelSpec.from_json(self._pixel_spec)
        return np.stack([read_pixels(image, spec) for image in content.ravel()])

    def _encode(self, asked: Sequence[Rows]) -> list[Any]:
        """Return the dense codes of each request, or its error; one run for each threshold."""
        if not asked:
            return []
        rows, limits = (np.concatenate(parts) for parts in zip(*asked, strict=True))
        dense: NDArray[np.float32] | None = None
        for limit in np.unique(limits):
            chosen = limits == limit
            feeds = {self._modality: rows[chosen], "tau_logit": np.array(limit)}
            (codes,) = self._session.run(["code"], feeds)
            dense = np.empty((len(rows), codes.shape[1]), np.float32) if dense is None else dense
            dense[chosen] = codes
        assert dense is not None
        return np.split(dense, np.cumsum([len(one.rows) for one in asked])[:-1])

    def _respond(self, result: Any) -> Any:
        padded = result if isinstance(result, pb_utils.TritonError) else self._try(pad, result)
        if isinstance(padded, pb_utils.TritonError):
            return pb_utils.InferenceResponse(error=padded)
        names = ("indices", "values", "count")
        return pb_utils.InferenceResponse(
            [pb_utils.Tensor(name, array) for name, array in zip(names, padded, strict=True)]
        )

    def _try(self, function: Any, argument: Any) -> Any:
        """Return what the function returns, or its error for the client who asked."""
        try:
            return function(argument)
        except Exception as error:  # noqa: BLE001  # one bad request must not fail its batch
            return pb_utils.TritonError(str(error))


def threshold_logit(tau: float) -> np.float32:
    """Return ln(tau / (1 - tau)), computed in float64 and rounded once, as vsc-serve does."""
    if not 0.0 < tau < 1.0:
        raise ValueError(f"tau must be above 0 and below 1, not {tau}")
    return np.float32(np.log(np.float64(tau)) - np.log1p(-np.float64(tau)))


def pad(dense: NDArray[np.float32]) -> tuple[NDArray[Any], ...]:
    """Turn dense codes into rows of the same length, that of the row with most entries.

    Args:
        dense: Codes, shape (rows, latents).

    Returns:
        Indices, rising and then -1, int32, (rows, length); values, and 0 where the index is -1,
        float32, (rows, length); entries of each row, int32, (rows, 1). Nothing is left out.
    """
    if not np.isfinite(dense).all():
        raise ValueError("the model gives values that are not finite (NaN or infinity)")
    row, column = np.nonzero(dense)
    count = np.bincount(row, minlength=len(dense))
    place = np.arange(len(row)) - np.repeat(np.cumsum(count) - count, count)
    shape = (len(dense), max(1, int(count.max(initial=0))))
    indices, values = np.full(shape, _PADDING, np.int32), np.zeros(shape, np.float32)
    indices[row, place] = column
    values[row, place] = dense[row, column]
    return indices, values, count.astype(np.int32)[:, None]


def open_session(path: Path, args: dict[str, str], threads: int) -> "onnxruntime.InferenceSession":
    """Open the graph on the instance's device. A GPU that does not load is an error."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.use_deterministic_compute = True
    options.log_severity_level = 3
    wanted: list[Any] = ["CPUExecutionProvider"]
    if args["model_instance_kind"] == "GPU":
        wanted.insert(0, ("CUDAExecutionProvider", {"device_id": args["model_instance_device_id"]}))
    session = onnxruntime.InferenceSession(str(path), options, providers=wanted)
    if len(wanted) > 1 and session.get_providers()[0] != "CUDAExecutionProvider":
        raise RuntimeError(
            "a GPU instance was asked for, but onnxruntime did not load CUDA. Install"
            " onnxruntime-gpu in the server's Python, or set KIND_CPU in config.pbtxt."
        )
    return session
