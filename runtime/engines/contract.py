"""What a graph of a bundle takes and gives, and what runs one: the protocol that every engine keeps."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self, runtime_checkable

import numpy as np
import numpy.typing as npt

from multisa.runtime.errors import EngineError

IMAGE = "image"  # name of the one input of every graph

UInt8 = npt.NDArray[np.uint8]

# Of a graph's file. The graphs of a bundle are fp32; others lie beside them, made by `multisa convert`.
# What an engine computes in may be another, which has no file: EngineKind of choice.py has those.
PRECISIONS = ("fp32", "fp16", "int8")


@dataclass(frozen=True)
class TensorContract:
    """One output of a graph."""

    dtype: str  # as NumPy spells it
    axes: str  # one letter an axis, for messages and the rank


@dataclass(frozen=True)
class GraphContract:
    """A graph takes `image` uint8 [N, H, W, 3] (RGB) and gives exactly these outputs."""

    name: str
    outputs: dict[str, TensorContract]


CAM = GraphContract(
    "cam", {"cam": TensorContract("float32", "NChw"), "scores": TensorContract("float32", "NC")}
)
AFFINITY = GraphContract("affinity", {"affinity": TensorContract("float32", "NPhw")})
SEGMENTER = GraphContract(
    "segmenter", {"labels": TensorContract("uint8", "NHW"), "confidence": TensorContract("uint8", "NHW")}
)
CONTRACTS = (CAM, AFFINITY, SEGMENTER)


def graph_file(contract: GraphContract, precision: str = "fp32") -> str:
    """Name of a graph's file in a bundle: cam.onnx, cam.fp16.onnx."""
    return f"{contract.name}.onnx" if precision == "fp32" else f"{contract.name}.{precision}.onnx"


def how_to_convert(bundle: Path, contract: GraphContract, precision: str) -> str:
    """What to do about a bundle without a graph in a precision."""
    if precision in ("int8", "bf16") and contract != SEGMENTER:
        return f"only the segmenter is made in {precision}, expected fp32 or fp16"
    return (
        f"make a bundle that has it: multisa convert {bundle} --precision {precision} --images DIR "
        "-o NEW_BUNDLE"
    )


class Engine(Protocol):
    """Runs one graph; a context manager; `run` may be called from several threads at once."""

    @property
    def name(self) -> str:
        """What runs the graph, for people and logs."""

    def run(self, image: UInt8) -> dict[str, npt.NDArray[Any]]:
        """Run on uint8 [N, H, W, 3] RGB; the outputs by name. Raises EngineError."""

    def close(self) -> None:
        """Give the graph's memory back."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None: ...


@runtime_checkable
class DeviceEngine(Protocol):
    """An engine whose outputs can stay where `multisa.kernels` takes them from."""

    def run_on_device(self, image: UInt8) -> dict[str, Any]:
        """Run as `Engine.run` does, without waiting; arrays with `__cuda_array_interface__`."""


@runtime_checkable
class QueuedEngine(DeviceEngine, Protocol):
    """An engine that works on a stream of the caller's, from and into memory of the device."""

    def queue(
        self, image: int, shape: tuple[int, ...], stream: int, outputs: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Queue uint8 `shape` [N, H, W, 3] at a device address, without waiting.

        Returns arrays of the device (`calls.DeviceArray`), those of `outputs` where they fit.
        """


@runtime_checkable
class DetailedEngine(Protocol):
    """An engine that has more to tell than its name."""

    @property
    def detail(self) -> dict[str, Any]:
        """What runs, for the record of a run."""


class ClosedAtExit(ABC):
    """A context manager that closes itself: what every engine is."""

    @abstractmethod
    def close(self) -> None:
        """Give back what is held."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def check_image(image: UInt8, graph: str) -> None:
    """Raise EngineError unless `image` is what every graph takes, uint8 [N, H, W, 3] and not empty."""
    if image.dtype != np.uint8 or image.ndim != 4 or image.shape[3] != 3 or image.size == 0:
        raise EngineError(f"{graph}: got {image.dtype} {list(image.shape)}, expected uint8 [N, H, W, 3]")


def kept_contract(
    inputs: Mapping[str, str], outputs: Mapping[str, str], contract: GraphContract | None, graph: str
) -> GraphContract:
    """The contract that a graph of these tensors keeps: `contract`, or without it the first of CONTRACTS.

    Tensors are "float32 of rank 4", by name. Raises EngineError, beginning with `graph`, where none is kept.
    """
    if inputs != {IMAGE: "uint8 of rank 4"}:
        raise EngineError(f"{graph}: got the inputs {inputs}, expected {IMAGE}: uint8 of rank 4")
    candidates = (contract,) if contract else CONTRACTS
    for candidate in candidates:
        if outputs == {name: f"{t.dtype} of rank {len(t.axes)}" for name, t in candidate.outputs.items()}:
            return candidate
    wanted = " or ".join(
        f"{c.name} ({', '.join(f'{n}: {t.dtype} [{t.axes}]' for n, t in c.outputs.items())})"
        for c in candidates
    )
    raise EngineError(f"{graph}: got the outputs {outputs}, expected {wanted}")
