"""The contracts of a bundle's graphs, and the protocols of the backends that run them.

A backend runs one graph: ONNX Runtime, OpenVINO or TensorRT. `registry.py` chooses between them.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self, runtime_checkable

import numpy as np
import numpy.typing as npt

from multisa.runtime.errors import BackendError

IMAGE = "image"  # the only input of every graph

UInt8 = npt.NDArray[np.uint8]

# Precisions of graph files. `multisa export` writes fp32; `multisa convert` adds the others beside it.
# A backend may compute in further precisions that have no file of their own, see `BackendKind`.
PRECISIONS = ("fp32", "fp16", "int8")


@dataclass(frozen=True)
class TensorContract:
    """One output of a graph."""

    dtype: str  # NumPy's name
    axes: str  # one letter per axis: the rank, and the shape in messages


@dataclass(frozen=True)
class GraphContract:
    """A graph with the input `image`, uint8 [N, H, W, 3] RGB, and exactly these outputs."""

    name: str
    outputs: dict[str, TensorContract]


CAM = GraphContract("cam", {"cam": TensorContract("float32", "NChw"), "scores": TensorContract("float32", "NC")})
AFFINITY = GraphContract("affinity", {"affinity": TensorContract("float32", "NPhw")})
SEGMENTER = GraphContract("segmenter", {"probabilities": TensorContract("float32", "NChw")})
CONTRACTS = (CAM, AFFINITY, SEGMENTER)


def graph_file(contract: GraphContract, precision: str = "fp32") -> str:
    """File name of a graph in a bundle: cam.onnx, cam.fp16.onnx."""
    return f"{contract.name}.onnx" if precision == "fp32" else f"{contract.name}.{precision}.onnx"


def how_to_convert(bundle: Path, contract: GraphContract, precision: str) -> str:
    """What to do when a bundle lacks a graph in `precision`, for error messages."""
    if precision in ("int8", "bf16") and contract != SEGMENTER:
        return f"only the segmenter exists in {precision}, expected fp32 or fp16"
    return f"create a bundle that has it: multisa convert {bundle} --precision {precision} --images DIR -o NEW_BUNDLE"


class Backend(Protocol):
    """Runs one graph. A context manager; `run` may be called from several threads at once."""

    @property
    def name(self) -> str:
        """Name for messages and records: "onnxruntime-cpu"."""

    def run(self, image: UInt8) -> dict[str, npt.NDArray[Any]]:
        """Run on uint8 [N, H, W, 3] RGB; return the outputs by name. Raises BackendError."""

    def close(self) -> None:
        """Release the graph and its memory."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None: ...


@runtime_checkable
class DeviceBackend(Protocol):
    """A backend that can leave its outputs on the GPU, where `multisa.kernels` reads them."""

    def run_on_device(self, image: UInt8) -> dict[str, Any]:
        """Like `Backend.run`, without waiting; return arrays with `__cuda_array_interface__`."""


@runtime_checkable
class AsyncBackend(DeviceBackend, Protocol):
    """A backend that runs on the caller's CUDA stream, from device memory to device memory."""

    def queue(self, image: int, shape: tuple[int, ...], stream: int, outputs: Mapping[str, Any]) -> dict[str, Any]:
        """Queue a run on the uint8 image of `shape` [N, H, W, 3] at device address `image`; do not wait.

        Returns device arrays (`calls.DeviceArray`) by name; arrays of `outputs` are reused where shape and
        dtype match.
        """


@runtime_checkable
class DetailedBackend(Protocol):
    """A backend that has details to record beyond its name."""

    @property
    def detail(self) -> dict[str, Any]:
        """Details for run.json, as JSON values."""


class Closeable(ABC):
    """Mixin: a context manager that calls `close` on exit."""

    @abstractmethod
    def close(self) -> None:
        """Release all resources; calling it again does nothing."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def closed_error(graph: str) -> BackendError:
    """The error of a call after `close`."""
    return BackendError(f"{graph}: the backend is closed, expected an open one")


def check_image(image: UInt8, graph: str) -> None:
    """Raise BackendError unless `image` is uint8 [N, H, W, 3] and not empty."""
    if image.dtype != np.uint8 or image.ndim != 4 or image.shape[3] != 3 or image.size == 0:
        raise BackendError(f"{graph}: got {image.dtype} {list(image.shape)}, expected uint8 [N, H, W, 3]")


def match_contract(
    inputs: Mapping[str, str], outputs: Mapping[str, str], contract: GraphContract | None, graph: str
) -> GraphContract:
    """Return the contract that a graph satisfies: `contract` if given, else the first match in CONTRACTS.

    inputs, outputs: "float32 of rank 4" by tensor name. graph: prefix of error messages. Raises BackendError
    when nothing matches.
    """
    if inputs != {IMAGE: "uint8 of rank 4"}:
        raise BackendError(f"{graph}: got the inputs {inputs}, expected {IMAGE}: uint8 of rank 4")
    candidates = (contract,) if contract else CONTRACTS
    for candidate in candidates:
        if outputs == {name: f"{t.dtype} of rank {len(t.axes)}" for name, t in candidate.outputs.items()}:
            return candidate
    wanted = " or ".join(
        f"{c.name} ({', '.join(f'{n}: {t.dtype} [{t.axes}]' for n, t in c.outputs.items())})" for c in candidates
    )
    raise BackendError(f"{graph}: got the outputs {outputs}, expected {wanted}")
