"""Run graphs on ONNX Runtime: on the CPU, or on an NVIDIA GPU through its CUDA execution provider."""

import contextlib
import io
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt

from multisa.runtime.backends.base import (
    IMAGE,
    Closeable,
    GraphContract,
    UInt8,
    check_image,
    closed_error,
    match_contract,
)
from multisa.runtime.backends.onnx_checks import check_onnx
from multisa.runtime.errors import BackendError, BackendUnavailable

Provider = Literal["cpu", "cuda"]

# onnxruntime and onnxruntime-gpu install the same module, so only one of them may be installed.
INSTALL_CUDA = 'pip uninstall -y onnxruntime && pip install "onnxruntime-gpu[cuda,cudnn]"'

# ONNX Runtime reads it once, while it is imported.
_NO_TELEMETRY = "ORT_DISABLE_TELEMETRY"
_ERRORS_ONLY = 3  # ONNX Runtime's log severity
_PROVIDERS: dict[Provider, tuple[str, dict[str, str]]] = {
    "cpu": ("CPUExecutionProvider", {}),
    "cuda": (
        "CUDAExecutionProvider",
        {
            "use_tf32": "0",  # full fp32, as measured by the parity gate
            # The default benchmarks every algorithm for each new input size, and images come in many sizes.
            "cudnn_conv_algo_search": "HEURISTIC",
        },
    ),
}
_ORT_DTYPES = {"tensor(uint8)": "uint8", "tensor(float)": "float32"}
# ONNX Runtime's exceptions about the graph itself, whatever the provider.
_GRAPH_ERRORS = ("InvalidProtobuf", "InvalidGraph", "InvalidArgument", "NotImplemented")


class OnnxRuntimeBackend(Closeable):
    """A graph on ONNX Runtime with one execution provider: "cpu", or "cuda" for the first NVIDIA GPU."""

    def __init__(
        self,
        model: Path | bytes,
        *,
        threads: int = 1,
        contract: GraphContract | None = None,
        provider: Provider = "cpu",
    ) -> None:
        """Load the graph.

        model: path of an ONNX file, or the bytes of one that was verified. threads: CPU threads per call.
        contract: what the graph must satisfy, any of CONTRACTS by default. Raises BackendUnavailable if
        onnxruntime is missing or falls back to another provider; BackendError if the graph cannot be loaded
        or breaks the contract.
        """
        if provider not in _PROVIDERS:
            raise BackendError(f"got the provider {provider!r}, expected {' or '.join(get_args(Provider))}")
        self.name = f"onnxruntime-{provider}"
        runtime = import_onnxruntime()
        self._errors: tuple[type[Exception], ...] = _runtime_errors(runtime)
        label = model.name if isinstance(model, Path) else (contract.name if contract else "graph")
        options = runtime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.log_severity_level = _ERRORS_ONLY
        # It would keep a memory plan for each input size, which grows with the source.
        options.enable_mem_pattern = False
        load_problem = _prepare_cuda(runtime) if provider == "cuda" else ""
        try:
            data = model.read_bytes() if isinstance(model, Path) else model
            check_onnx(data, label)
            # With the fallback, a failure on the GPU would silently move the graph to the CPU.
            session = runtime.InferenceSession(data, options, providers=[_PROVIDERS[provider]], enable_fallback=0)
        except self._errors as error:
            if provider == "cuda" and type(error).__name__ not in (*_GRAPH_ERRORS, "OSError"):
                raise _no_cuda(f"{label}: {_first_line(error)}") from error
            raise BackendError(f"{label}: cannot be loaded: {_first_line(error)}") from error
        running, expected = session.get_providers()[0], _PROVIDERS[provider][0]
        if running != expected:
            cause = f"got the provider {running}, expected {expected}"
            raise _no_cuda(f"{cause} ({load_problem})" if load_problem else cause)
        self.contract = match_contract(
            _signatures(session.get_inputs()), _signatures(session.get_outputs()), contract, label
        )
        self._session: Any = session

    def run(self, image: UInt8) -> dict[str, npt.NDArray[Any]]:
        """Run on uint8 [N, H, W, 3] RGB; return the contract's outputs by name. Raises BackendError."""
        session = self._session  # `close` may be called by another thread
        if session is None:
            raise closed_error(self.contract.name)
        check_image(image, self.contract.name)
        names = list(self.contract.outputs)
        try:
            outputs = session.run(names, {IMAGE: np.ascontiguousarray(image)})
        except self._errors as error:
            raise BackendError(f"{self.contract.name}: cannot be run: {_first_line(error)}") from error
        return dict(zip(names, outputs, strict=True))

    def close(self) -> None:
        """Release the session; `run` raises afterwards."""
        self._session = None


def import_onnxruntime() -> Any:
    """Import onnxruntime without its telemetry, unless ORT_DISABLE_TELEMETRY is set. Raises BackendUnavailable.

    From 1.29 on, ONNX Runtime on Linux writes a device id and a database of events to the cache folder of the
    home, and sends the events. `disable_telemetry_events` does not prevent that.
    """
    # Unset again right after the import: the environment belongs to the program that uses this library.
    is_ours = _NO_TELEMETRY not in os.environ and "onnxruntime" not in sys.modules
    if is_ours:
        os.environ[_NO_TELEMETRY] = "1"
    try:
        import onnxruntime
    except ImportError as error:
        is_absent = isinstance(error, ModuleNotFoundError) and error.name == "onnxruntime"
        cause = "is not installed" if is_absent else f"cannot be imported: {_first_line(error)}"
        raise BackendUnavailable(f"onnxruntime {cause}", remedy="pip install onnxruntime") from error
    finally:
        if is_ours:
            os.environ.pop(_NO_TELEMETRY, None)
    with contextlib.suppress(AttributeError):  # a damaged package lacks more, which its caller reports
        onnxruntime.disable_telemetry_events()
    return onnxruntime


def _prepare_cuda(runtime: Any) -> str:
    """Load CUDA and cuDNN from their packages; return ONNX Runtime's message if that fails, else ""."""
    providers = runtime.get_available_providers()
    if _PROVIDERS["cuda"][0] not in providers:
        raise _no_cuda(f"onnxruntime {runtime.__version__} here has {', '.join(providers)}")
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):  # it prints, and stdout is for results
        runtime.preload_dlls()
    return next(iter(printed.getvalue().splitlines()), "")


def _no_cuda(cause: str) -> BackendUnavailable:
    return BackendUnavailable(f"onnxruntime-cuda: {cause}", remedy=INSTALL_CUDA)


def _runtime_errors(runtime: Any) -> tuple[type[Exception], ...]:
    # ONNX Runtime's exceptions share no base class but Exception; its extension module defines them.
    state = runtime.capi.onnxruntime_pybind11_state
    own = [kind for kind in vars(state).values() if isinstance(kind, type) and issubclass(kind, Exception)]
    return (*own, RuntimeError, ValueError, OSError)


def _signatures(tensors: Iterable[Any]) -> dict[str, str]:
    return {tensor.name: _signature(tensor) for tensor in tensors}


def _signature(tensor: Any) -> str:
    return f"{_ORT_DTYPES.get(tensor.type, tensor.type)} of rank {len(tensor.shape)}"


def _first_line(error: BaseException) -> str:
    lines = str(error).splitlines()
    return lines[0] if lines else type(error).__name__
