"""Open ONNX files with onnxruntime, on the device that was asked for or not at all.

This is the one module that touches onnxruntime. Everything above it needs only the `Session`
protocol, so tests can hand in a fake.
"""

import logging
import os
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, Final, Literal, NamedTuple, Protocol

from numpy.typing import NDArray

from vsc_serve.bundle import Bundle
from vsc_serve.cuda import PinnedArray, forbid_tf32, has_driver, provider_options
from vsc_serve.errors import BundleError, DeviceError
from vsc_serve.external_data import check_external_files

if TYPE_CHECKING:
    import onnxruntime

logger = logging.getLogger(__name__)

Device = Literal["auto", "cpu", "cuda"]

CUDA_PROVIDER: Final = "CUDAExecutionProvider"
CPU_PROVIDER: Final = "CPUExecutionProvider"

_INSTALL_HINT: Final = "pip install 'vsc-serve[cpu]' (or 'vsc-serve[gpu]' on an NVIDIA machine)"


class Session(Protocol):
    """A computation graph that can be run."""

    @property
    def engine(self) -> str:
        """What computes, for people and provenance: `onnxruntime 1.31.1 cpu`."""

    def run(self, outputs: Sequence[str], feeds: Mapping[str, NDArray[Any]]) -> list[NDArray[Any]]:
        """Compute the named outputs from the named inputs; there may be more rows than given."""


class Port(NamedTuple):
    """An input or output of a graph."""

    name: str
    """Its name."""
    type: str
    """Its type, as onnxruntime writes it: `tensor(float)`."""
    shape: Sequence[int | str | None]
    """Its shape; a dimension that is free has a name, or none."""


class OnnxSession:
    """A Session on onnxruntime."""

    def __init__(self, session: "onnxruntime.InferenceSession", engine: str) -> None:
        self._session = session
        self._engine = engine

    @property
    def engine(self) -> str:
        """Name and version of the engine, and its device."""
        return self._engine

    @property
    def inputs(self) -> list[Port]:
        """Inputs that have no default."""
        return [Port(one.name, one.type, one.shape) for one in self._session.get_inputs()]

    @property
    def outputs(self) -> list[Port]:
        """Outputs."""
        return [Port(one.name, one.type, one.shape) for one in self._session.get_outputs()]

    def run(self, outputs: Sequence[str], feeds: Mapping[str, NDArray[Any]]) -> list[NDArray[Any]]:
        """Compute the named outputs. Safe to call from several threads."""
        results: list[NDArray[Any]] = self._session.run(list(outputs), dict(feeds))
        return results

    def run_bound(
        self, outputs: Sequence[str], feeds: Mapping[str, NDArray[Any]]
    ) -> list[NDArray[Any]]:
        """Compute the named outputs through bindings, which spares copies on the way to a GPU."""
        from onnxruntime import OrtValue

        binding = self._session.io_binding()
        for name, value in feeds.items():
            # Not `bind_cpu_input`, which does not know inputs that have a default, as tau has.
            binding.bind_ortvalue_input(name, OrtValue.ortvalue_from_numpy(value))
        for name in outputs:
            binding.bind_output(name)
        self._session.run_with_iobinding(binding)
        results: list[NDArray[Any]] = binding.copy_outputs_to_cpu()
        return results


class BoundSession:
    """A Session that computes batches of few sizes, from memory that stays where it is.

    The kernels a GPU uses depend on the shape. With one shape for all batches, the row of an image
    is the same whatever is computed with it; with a few, no shape is new after the first rounds.
    What a batch lacks is filled up with zeros; `compaction` drops what belongs to those rows.

    Args:
        session: What computes.
        batch_sizes: Rows of a batch: the smallest that is large enough is taken.
    """

    def __init__(self, session: OnnxSession, *batch_sizes: int) -> None:
        self._session = session
        self._batch_sizes = sorted(batch_sizes)
        self._staging: dict[str, PinnedArray] = {}

    @property
    def engine(self) -> str:
        """Name and version of the engine, and its device."""
        return self._session.engine

    def run(self, outputs: Sequence[str], feeds: Mapping[str, NDArray[Any]]) -> list[NDArray[Any]]:
        """Compute the named outputs of at most the largest batch. For one thread at a time.

        The outputs are those of a whole batch: also of the rows that it was filled up with.
        """
        return self._session.run_bound(
            outputs, {name: self._stage(name, value) for name, value in feeds.items()}
        )

    def _stage(self, name: str, value: NDArray[Any]) -> NDArray[Any]:
        """Copy rows to the start of a batch that stays where it is, in memory the GPU can reach."""
        if not value.ndim:
            return value
        if name not in self._staging:
            shape = (self._batch_sizes[-1], *value.shape[1:])
            is_pinned = self.engine.endswith("cuda")
            self._staging[name] = PinnedArray(shape, value.dtype, is_pinned=is_pinned)
        size = next(size for size in self._batch_sizes if size >= len(value))
        batch = self._staging[name].array[:size]
        batch[: len(value)] = value
        batch[len(value) :] = 0
        return batch


class SessionPool:
    """A Session for several threads: each takes a `BoundSession` while it computes.

    Two are enough to keep a GPU busy: while one computes, the other copies.

    Args:
        session: What computes.
        batch_sizes: Rows of a batch, as `BoundSession` takes them.
        lanes: How many threads compute at a time; others wait.
    """

    def __init__(self, session: OnnxSession, *batch_sizes: int, lanes: int = 2) -> None:
        self._engine = session.engine
        self._free: SimpleQueue[BoundSession] = SimpleQueue()
        for _ in range(lanes):
            self._free.put(BoundSession(session, *batch_sizes))

    @property
    def engine(self) -> str:
        """Name and version of the engine, and its device."""
        return self._engine

    def run(self, outputs: Sequence[str], feeds: Mapping[str, NDArray[Any]]) -> list[NDArray[Any]]:
        """Compute the named outputs, as `BoundSession.run` does."""
        bound = self._free.get()
        try:
            return bound.run(outputs, feeds)
        finally:
            self._free.put(bound)


def open_session(
    path: Path,
    *,
    device: Device = "auto",
    threads: int = 0,
    device_id: int = 0,
    allows_tf32: bool = False,
) -> OnnxSession:
    """Open an ONNX file.

    Args:
        path: The `.onnx` file; its external data lies in the same folder.
        device: `cuda` fails where CUDA cannot be used, `auto` falls back to the CPU.
        threads: Threads inside one operator on the CPU; 0 lets onnxruntime choose.
        device_id: Which GPU, where there are several.
        allows_tf32: Whether a GPU may round factors to TF32: faster, and other codes.

    Returns:
        The session.

    Raises:
        DeviceError: onnxruntime is not installed, or CUDA was asked for and does not load.
        BundleError: The file is not a graph onnxruntime can load, or takes weights from elsewhere.
    """
    ort = _import_onnxruntime()
    _check_files(path)
    if device == "cpu" or (device == "auto" and not cuda_is_there()):
        return _open_on_cpu(ort, path, threads)
    try:
        options = provider_options(device_id, allows_tf32=allows_tf32)
        if not allows_tf32:
            forbid_tf32()
        return _open_on_cuda(ort, path, threads, options)
    except DeviceError as error:
        if device == "cuda":
            raise
        logger.warning("using the CPU: %s", error)
        return _open_on_cpu(ort, path, threads)


def open_graph(
    bundle: Bundle, name: str, *, device: Device = "auto", threads: int = 0, device_id: int = 0
) -> OnnxSession:
    """Open a graph of a bundle, whose digest is right and whose shapes are the manifest's.

    Args:
        bundle: The bundle.
        name: The graph's file: `encoder.onnx`.
        device: As in `open_session`, which also says what is raised.
        threads: The same.
        device_id: The same.
    """
    path, manifest = bundle.path / name, bundle.manifest
    if name not in manifest.files:
        raise BundleError(f"{path}: not a part of this bundle. Export again.")
    session = open_session(path, device=device, threads=threads, device_id=device_id)
    shapes = manifest.graph_shapes
    for port in (*session.inputs, *session.outputs):
        if port.name in shapes and not _fits(port.shape, shapes[port.name]):
            raise BundleError(
                f"{path}: {port.name} has shape {list(port.shape)}, but the manifest says"
                f" {['batch', *shapes[port.name]]}. Export again."
            )
    return session


def _fits(shape: Sequence[int | str | None], expected: Sequence[int]) -> bool:
    """Compare the dimensions after the batch; a graph need not say them."""
    if not shape:
        return True
    pairs = zip(shape[1:], expected, strict=False)
    return len(shape) == len(expected) + 1 and all(
        found == wanted for found, wanted in pairs if isinstance(found, int)
    )


def _check_files(path: Path) -> None:
    """Refuse a graph that takes weights from outside its folder; the engine is asked afterwards."""
    try:
        check_external_files(path)
    except (OSError, ValueError) as error:
        raise BundleError(f"{path}: cannot be loaded ({error}). Export again.") from error


def _open_on_cpu(ort: Any, path: Path, threads: int) -> OnnxSession:
    try:
        session = _load(ort, path, [CPU_PROVIDER], threads)
    except Exception as error:  # onnxruntime raises its own classes, and RuntimeError
        raise BundleError(
            f"{path}: onnxruntime cannot load it ({_first_line(error)}). Export again."
        ) from error
    return OnnxSession(session, f"onnxruntime {ort.__version__} cpu")


def _open_on_cuda(ort: Any, path: Path, threads: int, options: dict[str, str]) -> OnnxSession:
    if CUDA_PROVIDER not in ort.get_available_providers():
        raise DeviceError(
            '`device="cuda"`: the installed onnxruntime has no CUDA. Run: pip uninstall -y'
            " onnxruntime && pip install 'vsc-serve[gpu]', or use `device='cpu'`."
        )
    if hasattr(ort, "preload_dlls"):
        ort.preload_dlls()
    try:
        # What is left for the CPU is the arithmetic of shapes: threads would only wait, spinning.
        session = _load(ort, path, [(CUDA_PROVIDER, options), CPU_PROVIDER], threads or 1)
    except Exception as error:  # onnxruntime raises its own classes, and RuntimeError
        _open_on_cpu(ort, path, threads)  # raises where the file is at fault, and not the device
        raise DeviceError(_why_no_cuda(_first_line(error))) from error
    if session.get_providers()[0] != CUDA_PROVIDER:  # onnxruntime went on without, and said nothing
        raise DeviceError(_why_no_cuda("its libraries did not load"))
    return OnnxSession(session, f"onnxruntime {ort.__version__} cuda")


def _load(
    ort: Any, path: Path, providers: Sequence[str | tuple[str, dict[str, str]]], threads: int
) -> "onnxruntime.InferenceSession":
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.use_deterministic_compute = True
    options.log_severity_level = 4  # what goes wrong is raised, in one line
    # Without a fallback: it would go on without the GPU, and say so on stdout.
    return ort.InferenceSession(str(path), options, providers=list(providers), enable_fallback=0)


def cuda_is_there() -> bool:
    """Tell whether the CUDA provider and an NVIDIA driver are both on this machine."""
    return CUDA_PROVIDER in _import_onnxruntime().get_available_providers() and has_driver()


def installed_flavours() -> dict[str, str]:
    """Return the installed packages that give the module `onnxruntime`, with their versions."""
    found = {}
    for name in ("onnxruntime", "onnxruntime-gpu"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _import_onnxruntime() -> Any:
    flavours = installed_flavours()
    if len(flavours) > 1:
        raise DeviceError(
            "onnxruntime and onnxruntime-gpu are both installed and overwrite each other."
            " Run: pip uninstall -y onnxruntime onnxruntime-gpu, then install one of them again."
        )
    # From 1.32 on onnxruntime reports its use to its maker; whoever wants that may set 0.
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    try:
        import onnxruntime
    except ImportError as error:
        raise DeviceError(f"onnxruntime is not installed. Run: {_INSTALL_HINT}") from error
    return onnxruntime


def _why_no_cuda(reason: str) -> str:
    return (
        f"`device='cuda'`: CUDA cannot be used: {reason} (CUDA 13, cuDNN 9 and an NVIDIA driver are"
        " needed). Run: pip install 'vsc-serve[gpu]' and check nvidia-smi, or use `device='cpu'`."
    )


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
