"""Graphs on OpenVINO, on the CPU: fp32, int8, and the segmenter in bf16 where the processor multiplies that.

`multisa segment photos -o out --backend openvino --precision bf16`
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
    match_contract,
)
from multisa.runtime.backends.onnx_checks import check_onnx
from multisa.runtime.errors import BackendError, BackendUnavailable
from multisa.runtime.system import usable_cpus

# Precision -> that of the graph's file. fp16 is not here: OpenVINO multiplies it more slowly than fp32.
GRAPHS = {"fp32": "fp32", "bf16": "fp32", "int8": "int8"}
# What is for some graphs alone. In bf16 OpenVINO 2026.4 gives other scores of cam, from 0 to 1, to the same
# image each time; affinities alone would be of no use.
ONLY = {"bf16": (SEGMENTER,)}

INSTALL = "pip install openvino, which runs graphs on CPUs"

_DEVICE = "CPU"
_TELEMETRY = "openvino_telemetry"
_DTYPES = {"u8": "uint8", "f32": "float32"}
# The first calls into the binding come one after the other. Two at once hang: one holds the guard of a C++
# static while it waits for the interpreter's lock, the other holds the lock while it waits for the guard.
_FIRST_CALL = threading.Lock()
_ERRORS = (RuntimeError, ValueError, OSError)  # what OpenVINO raises, of whatever is wrong


class OpenVinoBackend(Closeable):
    """OpenVINO on the CPU.

    `model` is a path or the bytes of an ONNX file that was verified, in the precision GRAPHS names. A call of
    `run` takes `threads` threads; as many calls as the processors have room for run side by side. Without
    `contract` the graph must keep any one of CONTRACTS. Raises BackendUnavailable without openvino, or where
    the processor does not multiply bf16 and that is asked for; BackendError for a graph that cannot be loaded
    or breaks the contract.
    """

    name = "openvino"
    _binding_is_ready = False  # of the process, like what it tells of

    def __init__(
        self,
        model: Path | bytes,
        *,
        threads: int = 1,
        contract: GraphContract | None = None,
        precision: str = "fp32",
    ) -> None:
        if precision not in GRAPHS:
            raise BackendError(f"got the precision {precision!r}, expected one of {', '.join(GRAPHS)}")
        core = _open_core(precision)
        label = model.name if isinstance(model, Path) else (contract.name if contract else "graph")
        try:
            data = model.read_bytes() if isinstance(model, Path) else model
            check_onnx(data, label)
            graph = core.read_model(data)
            self.contract = match_contract(
                _signatures(graph.inputs), _signatures(graph.outputs), contract, label
            )
            if self.contract not in ONLY.get(precision, CONTRACTS):
                names = " or ".join(contract.name for contract in ONLY[precision])
                raise BackendError(f"{label}: got the precision {precision}, expected it for {names} alone")
            compiled = core.compile_model(graph, _DEVICE, _settings(threads, precision))
        except _ERRORS as error:
            raise BackendError(f"{label}: cannot be loaded: {_cause(error)}") from error
        self._compiled: Any = compiled
        # A request is for one call at a time; what it has learnt of a size is kept for the next call.
        self._idle: list[Any] = []

    def run(self, image: UInt8) -> dict[str, npt.NDArray[Any]]:
        """Run on uint8 [N, H, W, 3] RGB; the outputs by name, as in the contract. Raises BackendError."""
        compiled, idle = self._compiled, self._idle
        if compiled is None:
            raise BackendError(f"{self.contract.name}: the engine is closed, expected an open one")
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
            # Shared with the request, whose next call writes there.
            outputs = {name: np.array(found[name]) for name in self.contract.outputs}
        except _ERRORS as error:
            raise BackendError(f"{self.contract.name}: cannot be run: {_cause(error)}") from error
        idle.append(request)
        return outputs

    def close(self) -> None:
        """Give the graph's memory back; `run` is an error afterwards."""
        self._compiled, self._idle = None, []


def import_openvino() -> Any:
    """The module openvino, imported without its telemetry. Raises BackendUnavailable."""
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
    """Hide a package that `import openvino` does without where it is not there.

    With it the import alone sends an event to a service and keeps an id of the user in the home folder.
    """
    if _TELEMETRY in sys.modules:  # not ours to hide
        yield
        return
    sys.modules[_TELEMETRY] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules[_TELEMETRY]


def _open_core(precision: str) -> Any:
    """What loads graphs, on a processor that has the precision."""
    openvino = import_openvino()
    try:
        core = openvino.Core()
        can = core.get_property(_DEVICE, "OPTIMIZATION_CAPABILITIES")
    except _ERRORS as error:
        raise BackendUnavailable(f"openvino has no CPU here: {_cause(error)}", remedy=INSTALL) from error
    if precision == "bf16" and "BF16" not in can:
        raise BackendUnavailable(
            f"openvino: this processor does not multiply bf16, it has {', '.join(can)}",
            remedy="choose the precision fp32 or int8",
        )
    return core


def _settings(threads: int, precision: str) -> dict[str, Any]:
    streams = max(1, usable_cpus() // threads)
    return {
        "PERFORMANCE_HINT": "THROUGHPUT",
        "NUM_STREAMS": streams,
        "INFERENCE_NUM_THREADS": streams * threads,
        # fp32 is fp32; left to itself, OpenVINO takes bf16 where the processor has it.
        "INFERENCE_PRECISION_HINT": "bf16" if precision == "bf16" else "f32",
        # Every process would take the first processors.
        "ENABLE_CPU_PINNING": False,
        # Images come in many sizes; what is kept of each is megabytes, and saves no time that was seen.
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
    """The line of an error that says something: OpenVINO's begin with places in its sources."""
    lines = [line.strip() for line in str(error).splitlines()]
    telling = [line for line in lines if line and not line.startswith("Exception from ")]
    return telling[0] if telling else type(error).__name__
