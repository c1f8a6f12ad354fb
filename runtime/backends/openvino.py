"""Run graphs on OpenVINO, on the CPU: fp32, int8, and the segmenter in bf16 if the processor supports it.

`multisa segment images -o out --backend openvino --precision bf16`
"""

import contextlib
import importlib.util
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from multisa.runtime.backends.base import (
    CONTRACTS,
    IMAGE,
    SEGMENTER,
    Closeable,
    GraphContract,
    UInt8,
    check_image,
    closed_error,
    match_contract,
)
from multisa.runtime.backends.onnx_checks import check_onnx
from multisa.runtime.errors import BackendError, BackendUnavailable
from multisa.runtime.system import usable_cpus

# Precision it computes in -> precision of the file it reads. No fp16: OpenVINO is slower in it than in fp32.
FILE_PRECISIONS = {"fp32": "fp32", "bf16": "fp32", "int8": "int8"}
# Known bug in OpenVINO 2026.1 to 2026.3, and perhaps later (openvinotoolkit/openvino issue 37577): on Intel
# processors with AMX, int8 graphs of dynamic shape, like ours, may end the process with a segmentation fault.
# The environment variable ONEDNN_MAX_CPU_ISA, set to an instruction set below AMX, is reported to avoid it.

# Precisions that only some graphs support. In bf16, OpenVINO 2026.4 returns different cam scores for the same
# image in every call, and bf16 affinities are useless without cam.
ONLY = {"bf16": (SEGMENTER,)}

INSTALL = "pip install openvino"

_DEVICE = "CPU"
_TELEMETRY = "openvino_telemetry"
_DTYPES = {"u8": "uint8", "f32": "float32"}
# Serialises the first calls into the binding. Two at once deadlock: one holds the guard of a C++ static while
# it waits for the GIL, the other holds the GIL while it waits for the guard.
_FIRST_CALL = threading.Lock()
_ERRORS = (RuntimeError, ValueError, OSError)  # all that OpenVINO raises, whatever is wrong


class OpenVinoBackend(Closeable):
    """A graph on OpenVINO, on the CPU."""

    name = "openvino"
    _binding_is_ready = False  # shared by all instances: a state of the process

    def __init__(
        self, model: Path | bytes, *, threads: int = 1, contract: GraphContract | None = None, precision: str = "fp32"
    ) -> None:
        """Load the graph.

        model: path of an ONNX file, or the bytes of one that was verified, in the precision that
        FILE_PRECISIONS gives. threads: CPU threads per call of `run`; calls run in parallel up to the number
        of usable CPUs. contract: what the graph must satisfy, any of CONTRACTS by default. Raises
        BackendUnavailable if openvino is missing, or for bf16 if the processor lacks it; BackendError if the
        graph cannot be loaded or breaks the contract.
        """
        if precision not in FILE_PRECISIONS:
            raise BackendError(f"got the precision {precision!r}, expected one of {', '.join(FILE_PRECISIONS)}")
        core = _open_core(precision)
        label = model.name if isinstance(model, Path) else (contract.name if contract else "graph")
        try:
            data = model.read_bytes() if isinstance(model, Path) else model
            check_onnx(data, label)
            graph = core.read_model(data)
            self.contract = match_contract(_signatures(graph.inputs), _signatures(graph.outputs), contract, label)
            if self.contract not in ONLY.get(precision, CONTRACTS):
                names = " or ".join(contract.name for contract in ONLY[precision])
                raise BackendError(f"{label}: got the precision {precision}, expected it for {names} alone")
            compiled = core.compile_model(graph, _DEVICE, _settings(threads, precision))
        except _ERRORS as error:
            raise BackendError(f"{label}: cannot be loaded: {_cause(error)}") from error
        self._compiled: Any = compiled
        # A request serves one call at a time. Reusing it keeps what it has prepared for an input size.
        self._idle: list[Any] = []

    def run(self, image: UInt8) -> dict[str, npt.NDArray[Any]]:
        """Run on uint8 [N, H, W, 3] RGB; return the contract's outputs by name. Raises BackendError."""
        compiled = self._compiled
        idle = self._idle
        if compiled is None:
            raise closed_error(self.contract.name)
        check_image(image, self.contract.name)
        if not self._binding_is_ready:
            with _FIRST_CALL:
                outputs = self._infer(compiled, idle, image)
            OpenVinoBackend._binding_is_ready = True
            return outputs
        return self._infer(compiled, idle, image)

    def _infer(self, compiled: Any, idle: list[Any], image: UInt8) -> dict[str, npt.NDArray[Any]]:
        try:
            try:
                request = idle.pop()
            except IndexError:
                request = compiled.create_infer_request()
            found = request.infer({IMAGE: np.ascontiguousarray(image)}, share_inputs=True, share_outputs=True)
            # Copied: the request's next call writes to the same memory.
            outputs = {name: np.array(found[name]) for name in self.contract.outputs}
        except _ERRORS as error:
            raise BackendError(f"{self.contract.name}: cannot be run: {_cause(error)}") from error
        idle.append(request)
        return outputs

    def close(self) -> None:
        """Release the graph; `run` raises afterwards."""
        self._compiled = None
        self._idle = []


def import_openvino() -> Any:
    """Import openvino without its telemetry. Raises BackendUnavailable."""
    if importlib.util.find_spec("openvino") is None:
        raise BackendUnavailable("openvino is not installed", remedy=INSTALL)
    try:
        with _without_telemetry():
            import openvino
    except (ImportError, *_ERRORS) as error:
        raise BackendUnavailable(f"openvino cannot be imported: {_cause(error)}", remedy=INSTALL) from error
    return openvino


@contextlib.contextmanager
def _without_telemetry() -> Iterator[None]:
    """Make openvino_telemetry look uninstalled while openvino is imported for the first time.

    `import openvino` imports openvino.tools.ovc, which sends an event to a web service and writes a user id
    to the home folder, unless openvino_telemetry cannot be imported: then it uses its own stub. No option of
    OpenVINO 2026.4 turns that off before the import: it only reads the opt-out file in the home folder and
    the variables that mark a CI job. The entry is removed again right after the import, so that the program
    can still import openvino_telemetry; a program that imported either package before us keeps what it has.
    """
    if "openvino" in sys.modules or _TELEMETRY in sys.modules:
        yield
        return
    # None in sys.modules is the import system's documented way to make an import fail.
    sys.modules[_TELEMETRY] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules[_TELEMETRY]


def _open_core(precision: str) -> Any:
    """Return openvino.Core. Raises BackendUnavailable if there is no CPU plugin, or no bf16 support."""
    openvino = import_openvino()
    try:
        core = openvino.Core()
        capabilities = core.get_property(_DEVICE, "OPTIMIZATION_CAPABILITIES")
    except _ERRORS as error:
        raise BackendUnavailable(f"openvino has no CPU here: {_cause(error)}", remedy=INSTALL) from error
    if precision == "bf16" and "BF16" not in capabilities:
        raise BackendUnavailable(
            f"openvino: this processor does not support bf16, got {', '.join(capabilities)}",
            remedy="choose the precision fp32 or int8",
        )
    return core


def _settings(threads: int, precision: str) -> dict[str, Any]:
    streams = max(1, usable_cpus() // threads)
    return {
        "PERFORMANCE_HINT": "THROUGHPUT",
        "NUM_STREAMS": streams,
        "INFERENCE_NUM_THREADS": streams * threads,
        # Explicit fp32: by default OpenVINO computes in bf16 if the processor supports it.
        "INFERENCE_PRECISION_HINT": "bf16" if precision == "bf16" else "f32",
        # With pinning, every process would use the same first cores.
        "ENABLE_CPU_PINNING": False,
        # The cache takes megabytes for each input size, and no speed-up was measured.
        "CPU_RUNTIME_CACHE_CAPACITY": 0,
    }


def _signatures(tensors: list[Any]) -> dict[str, str]:
    return {_name(tensor): _signature(tensor) for tensor in tensors}


def _name(tensor: Any) -> str:
    return min(tensor.get_names(), default="?")


def _signature(tensor: Any) -> str:
    kind, rank = tensor.get_element_type().get_type_name(), tensor.get_partial_shape().rank
    return f"{_DTYPES.get(kind, kind)} of rank {'?' if rank.is_dynamic else rank.get_length()}"


def _cause(error: BaseException) -> str:
    """The first informative line of an error: OpenVINO's begin with locations in its source code."""
    lines = [line.strip() for line in str(error).splitlines()]
    informative = [line for line in lines if line and not line.startswith("Exception from ")]
    return informative[0] if informative else type(error).__name__
