"""Graphs on ONNX Runtime, on the CPU or on an NVIDIA GPU through its CUDA execution provider."""

import contextlib
import importlib.util
import io
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
    match_contract,
)
from multisa.runtime.backends.onnx_checks import check_onnx
from multisa.runtime.errors import BackendError, BackendUnavailable

Provider = Literal["cpu", "cuda"]

# Two packages are one module, so the one that is there has to make room for the other.
INSTALL_CUDA = 'pip uninstall -y onnxruntime && pip install "onnxruntime-gpu[cuda,cudnn]"'

_ERRORS_ONLY = 3  # ONNX Runtime's log severity
_PROVIDERS: dict[Provider, tuple[str, dict[str, str]]] = {
    "cpu": ("CPUExecutionProvider", {}),
    "cuda": (
        "CUDAExecutionProvider",
        {
            "use_tf32": "0",  # fp32 is fp32, as the parity gate measured it
            # The default times every algorithm for every new size, and images come in many sizes.
            "cudnn_conv_algo_search": "HEURISTIC",
        },
    ),
}
_ORT_DTYPES = {"tensor(uint8)": "uint8", "tensor(float)": "float32"}
# What ONNX Runtime raises about the graph itself, whatever runs it.
_OF_THE_GRAPH = ("InvalidProtobuf", "InvalidGraph", "InvalidArgument", "NotImplemented")


class OnnxRuntimeBackend(Closeable):
    """ONNX Runtime with one execution provider: "cpu", or "cuda" for the first NVIDIA GPU.

    `model` is a path or the bytes of a file that was verified; `threads` are those of the CPU. Without
    `contract` the graph must keep any one of CONTRACTS. Raises BackendUnavailable without onnxruntime, or
    where the provider asked for is not the one that runs; BackendError for a graph that cannot be loaded or
    breaks the contract.
    """

    def __init__(
        self,
        model: Path | bytes,
        *,
        threads: int = 1,
        contract: GraphContract | None = None,
        provider: Provider = "cpu",
    ) -> None:
        if provider not in _PROVIDERS:
            raise BackendError(f"got the provider {provider!r}, expected {' or '.join(get_args(Provider))}")
        self.name = f"onnxruntime-{provider}"
        runtime = _import_onnxruntime()
        self._errors: tuple[type[Exception], ...] = _runtime_errors(runtime)
        label = model.name if isinstance(model, Path) else (contract.name if contract else "graph")
        options = runtime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.log_severity_level = _ERRORS_ONLY
        # Images come in many sizes; a memory plan kept for each of them would grow with the corpus.
        options.enable_mem_pattern = False
        said = _prepare_cuda(runtime) if provider == "cuda" else ""
        try:
            data = model.read_bytes() if isinstance(model, Path) else model
            check_onnx(data, label)
            # With the fallback, what fails on the GPU would run on the CPU, said by a line on stdout alone.
            session = runtime.InferenceSession(
                data, options, providers=[_PROVIDERS[provider]], enable_fallback=0
            )
        except self._errors as error:
            if provider == "cuda" and type(error).__name__ not in (*_OF_THE_GRAPH, "OSError"):
                raise _no_cuda(f"{label}: {_first_line(error)}") from error
            raise BackendError(f"{label}: cannot be loaded: {_first_line(error)}") from error
        running, expected = session.get_providers()[0], _PROVIDERS[provider][0]
        if running != expected:
            cause = f"got the provider {running}, expected {expected}"
            raise _no_cuda(f"{cause} ({said})" if said else cause)
        self.contract = match_contract(
            _signatures(session.get_inputs()), _signatures(session.get_outputs()), contract, label
        )
        self._session: Any = session

    def run(self, image: UInt8) -> dict[str, npt.NDArray[Any]]:
        """Run on uint8 [N, H, W, 3] RGB; the outputs by name, as in the contract. Raises BackendError."""
        if self._session is None:
            raise BackendError(f"{self.contract.name}: the engine is closed, expected an open one")
        check_image(image, self.contract.name)
        names = list(self.contract.outputs)
        try:
            outputs = self._session.run(names, {IMAGE: np.ascontiguousarray(image)})
        except self._errors as error:
            raise BackendError(f"{self.contract.name}: cannot be run: {_first_line(error)}") from error
        return dict(zip(names, outputs, strict=True))

    def close(self) -> None:
        """Give the session's memory back; `run` is an error afterwards."""
        self._session = None


def _import_onnxruntime() -> Any:
    if importlib.util.find_spec("onnxruntime") is None:
        raise BackendUnavailable(
            "onnxruntime is not installed", remedy="pip install onnxruntime, which runs graphs"
        )
    try:
        import onnxruntime
    except ImportError as error:
        raise BackendUnavailable(f"onnxruntime cannot be imported: {_first_line(error)}") from error
    onnxruntime.disable_telemetry_events()
    return onnxruntime


def _prepare_cuda(runtime: Any) -> str:
    """Load CUDA and cuDNN from their packages; what could not be, in the words of ONNX Runtime."""
    providers = runtime.get_available_providers()
    if _PROVIDERS["cuda"][0] not in providers:
        raise _no_cuda(f"onnxruntime {runtime.__version__} here has {', '.join(providers)}")
    said = io.StringIO()
    with contextlib.redirect_stdout(said):  # it prints; results are what belongs on stdout
        runtime.preload_dlls()
    return next(iter(said.getvalue().splitlines()), "")


def _no_cuda(cause: str) -> BackendUnavailable:
    return BackendUnavailable(f"onnxruntime-cuda: {cause}", remedy=INSTALL_CUDA)


def _runtime_errors(runtime: Any) -> tuple[type[Exception], ...]:
    # ONNX Runtime's exceptions share no base but Exception; they live in its extension module.
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
