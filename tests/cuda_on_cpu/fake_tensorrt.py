"""A fake TensorRT on the CPU: ONNX Runtime runs its engines, on the driver of driver_on_cpu.cpp.

    module = make_library("tensorrt", "11.4.0.106")          # what `import tensorrt` would return
    data = make_engine(onnx_bytes, [((1, 64, 64), (1, 128, 128), (2, 256, 256))])

Each class has the name of the real one and no public member that the real one lacks, so that code which runs
here calls nothing that does not exist (test_runtime_tensorrt.py compares them). Calls in an order that
TensorRT forbids return False, as in TensorRT; undefined behaviour is reported in `Runtime._broken_rules`.
"""

import ctypes
import enum
import json
import threading
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any, ClassVar

import numpy as np
import onnxruntime

_HOST_FUNCTION = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
_NUMPY = {"tensor(uint8)": "UINT8", "tensor(float)": "FLOAT", "tensor(float16)": "HALF"}
ACTIVATION_BYTES = 1 << 12

Shape = tuple[int, int, int]


def make_engine(model: bytes, profiles: list[tuple[Shape, Shape, Shape]], **changes: Any) -> bytes:
    """An engine for `make_library`: a line of JSON, then the graph. `changes` break it on purpose."""
    return json.dumps({"profiles": profiles, **changes}).encode() + b"\n" + model


class DataType(enum.Enum):
    FLOAT, HALF, INT8, INT32, BOOL, UINT8, INT64 = range(7)


class TensorIOMode(enum.Enum):
    NONE, INPUT, OUTPUT = range(3)


class TensorLocation(enum.Enum):
    DEVICE, HOST = range(2)


class ExecutionContextAllocationStrategy(enum.Enum):
    STATIC, ON_PROFILE_CHANGE, USER_MANAGED = range(3)


class CudaGraphStrategy(enum.Enum):
    DISABLED, WHOLE_GRAPH_CAPTURE = range(2)


class ILogger:
    class Severity(enum.Enum):
        INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = range(5)

    def log(self, severity: Any, msg: str) -> None:
        raise NotImplementedError


class _Driver:
    """The driver, called as the library would."""

    def __init__(self) -> None:
        self._calls = ctypes.CDLL("libcuda.so.1")

    def has_context(self) -> bool:
        context = ctypes.c_void_p()
        return self._calls.cuCtxGetCurrent(ctypes.byref(context)) == 0 and bool(context.value)

    def is_capturing(self, stream: int) -> bool:
        status = ctypes.c_int()
        self._calls.cuStreamIsCapturing(ctypes.c_void_p(stream), ctypes.byref(status))
        return bool(status.value)

    def queue(self, stream: int, function: Any) -> bool:
        return self._calls.cuLaunchHostFunc(ctypes.c_void_p(stream), function, None) == 0


class IRuntimeConfig:
    cuda_graph_strategy = CudaGraphStrategy.DISABLED
    _strategy = ExecutionContextAllocationStrategy.STATIC

    def set_execution_context_allocation_strategy(self, strategy: ExecutionContextAllocationStrategy) -> None:
        self._strategy = strategy


class Runtime:
    _broken_rules: ClassVar[list[str]]  # for tests, set by make_library
    _engine: ClassVar[type["ICudaEngine"]]

    def __init__(self, logger: ILogger) -> None:
        self._logger, self._driver = logger, _Driver()
        assert self._driver.has_context(), "TensorRT was started without a current context"

    def deserialize_cuda_engine(self, serialized_engine: bytes) -> "ICudaEngine | None":
        header, newline, model = serialized_engine.partition(b"\n")
        try:
            facts = json.loads(header)
        except ValueError:
            facts = {"refused": "Serialization assertion magicTag failed."}
        if "refused" in facts or not newline:
            self._logger.log(ILogger.Severity.ERROR, facts["refused"])
            return None
        self._logger.log(ILogger.Severity.INFO, "loaded")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        return self._engine(self, facts, onnxruntime.InferenceSession(model, options))


class ICudaEngine:
    def __init__(self, runtime: Runtime, facts: dict[str, Any], session: Any) -> None:
        self._runtime, self._facts, self._session = runtime, facts, session
        self._inputs = {tensor.name: tensor for tensor in session.get_inputs()}
        self._tensors = self._inputs | {tensor.name: tensor for tensor in session.get_outputs()}
        self._in_use: set[int] = set()  # addresses of activations that a running context has
        self._shapes: dict[tuple[int, ...], dict[str, list[int]]] = {}

    @property
    def num_io_tensors(self) -> int:
        return len(self._tensors)

    @property
    def num_optimization_profiles(self) -> int:
        return len(self._facts["profiles"])

    def get_tensor_name(self, index: int) -> str:
        return list(self._tensors)[index]

    def get_tensor_mode(self, name: str) -> TensorIOMode:
        return TensorIOMode.INPUT if name in self._inputs else TensorIOMode.OUTPUT

    def get_tensor_dtype(self, name: str) -> DataType:
        return DataType[_NUMPY[self._tensors[name].type]]

    def get_tensor_shape(self, name: str) -> list[int]:
        return [-1] * len(self._tensors[name].shape)

    def get_tensor_location(self, name: str) -> TensorLocation:
        return TensorLocation.HOST if name == self._facts.get("on_host") else TensorLocation.DEVICE

    def get_tensor_profile_shape(self, name: str, profile_index: int) -> list[list[int]]:
        assert name in self._inputs
        return [[*shape, 3] for shape in self._facts["profiles"][profile_index]]

    def get_device_memory_size_for_profile_v2(self, profile_index: int) -> int:
        return ACTIVATION_BYTES * (profile_index + 1)

    def create_execution_context(
        self, strategy: ExecutionContextAllocationStrategy = ExecutionContextAllocationStrategy.STATIC
    ) -> "IExecutionContext":
        return IExecutionContext(self, self._runtime, strategy)


class _RtxEngine(ICudaEngine):
    def create_runtime_config(self) -> IRuntimeConfig:
        return IRuntimeConfig()

    def create_execution_context(self, runtime_config: IRuntimeConfig) -> "IExecutionContext":  # type: ignore
        strategy = runtime_config._strategy
        records = runtime_config.cuda_graph_strategy is CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
        return IExecutionContext(self, self._runtime, strategy, by_itself=records)


class IExecutionContext:
    def __init__(
        self,
        engine: ICudaEngine,
        runtime: Runtime,
        strategy: ExecutionContextAllocationStrategy,
        by_itself: bool = False,
    ) -> None:
        self._engine, self._runtime, self._by_itself = engine, runtime, by_itself
        self._lock = threading.Lock()
        self._needs_memory = strategy is ExecutionContextAllocationStrategy.USER_MANAGED
        self._memory = self._profile = -1
        self._shape: tuple[int, ...] = ()
        self._addresses: dict[str, int] = {}
        self._changes = self._settled = 0  # how often it changed; at which change it last ran
        self._functions: list[Any] = []  # what the driver may still call

    def set_optimization_profile_async(self, profile_index: int, stream_handle: int) -> bool:
        with self._alone():
            self._profile, self._shape = profile_index, ()
            return self._holds(0 <= profile_index < self._engine.num_optimization_profiles, "profile")

    def set_device_memory(self, memory: int, size: int) -> None:
        with self._alone():
            wanted = self._engine.get_device_memory_size_for_profile_v2(self._profile)
            if self._needs_memory and self._profile >= 0 and size >= wanted and memory % 256 == 0:
                self._memory = memory

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        with self._alone():
            low, _, high = self._engine.get_tensor_profile_shape(name, self._profile)
            fits = self._profile >= 0 and len(shape) == 4
            fits = fits and all(a <= b <= c for a, b, c in zip(low, shape, high, strict=True))
            if fits and tuple(shape) != self._shape:
                self._shape, self._changes = tuple(shape), self._changes + 1
            return self._holds(fits, f"{name}: {shape} is not in profile {self._profile}")

    def infer_shapes(self) -> list[str]:
        return [] if self._shape else ["image"]

    def get_tensor_shape(self, name: str) -> list[int]:
        if not self._shape:
            return [-1]
        known = self._engine._shapes
        if self._shape not in known:
            names = [tensor.name for tensor in self._engine._session.get_outputs()]
            outputs = self._engine._session.run(names, {"image": np.zeros(self._shape, np.uint8)})
            known[self._shape] = {n: list(o.shape) for n, o in zip(names, outputs, strict=True)}
        return known[self._shape][name]

    def set_tensor_address(self, name: str, memory: int) -> bool:
        with self._alone():
            if memory != self._addresses.get(name):
                self._addresses[name], self._changes = memory, self._changes + 1
            return self._holds(name in self._engine._tensors and memory != 0, f"address of {name}")

    def execute_async_v3(self, stream_handle: int) -> bool:
        with self._alone():
            missing = set(self._engine._tensors) - set(self._addresses)
            ready = bool(stream_handle) and self._shape and not missing
            ready = ready and (not self._needs_memory or self._memory >= 0)
            if not self._holds(bool(ready), f"enqueueV3: not ready, no address of {sorted(missing)}"):
                return False
            capturing = self._runtime._driver.is_capturing(stream_handle)
            settled = self._settled == self._changes and not self._by_itself
            if capturing and not self._holds(settled, "enqueueV3: cannot be captured"):
                return False
            if capturing and self._engine._facts.get("not_capturable"):
                return self._holds(False, "enqueueV3: a loop cannot be captured")
            self._settled = self._changes
            change, shape, addresses = self._changes, self._shape, dict(self._addresses)

            def compute(_: Any) -> None:
                if change != self._changes and capturing:
                    self._runtime._broken_rules.append("a context was changed after its graph was captured")
                self._compute(shape, addresses)

            self._functions.append(_HOST_FUNCTION(compute))
            return self._runtime._driver.queue(stream_handle, self._functions[-1])

    def _compute(self, shape: tuple[int, ...], addresses: dict[str, int]) -> None:
        engine = self._engine
        activations = self._memory if self._needs_memory else -id(self)
        if activations in engine._in_use:
            self._runtime._broken_rules.append("two contexts ran in the same memory")
        engine._in_use.add(activations)
        image = np.ctypeslib.as_array((ctypes.c_uint8 * int(np.prod(shape))).from_address(addresses["image"]))
        names = [name for name in engine._tensors if name != "image"]
        for name, output in zip(names, engine._session.run(names, {"image": image.reshape(shape)}), strict=True):
            data = np.ascontiguousarray(output)
            ctypes.memmove(addresses[name], data.ctypes.data, data.nbytes)
        engine._in_use.discard(activations)

    def _alone(self) -> Any:
        """Report a context that is used by two threads at once, or without a current CUDA context."""
        if not self._runtime._driver.has_context():
            self._runtime._broken_rules.append("a call without a current CUDA context")
        if self._lock.locked():
            self._runtime._broken_rules.append("a context was used by two threads at once")
        return self._lock

    def _holds(self, condition: bool, message: str) -> bool:
        if not condition:
            self._runtime._logger.log(ILogger.Severity.ERROR, f"IExecutionContext: {message}")
        return condition


SHARED = {
    kind.__name__: kind
    for kind in (
        DataType,
        TensorIOMode,
        TensorLocation,
        ExecutionContextAllocationStrategy,
        ILogger,
        Runtime,
        ICudaEngine,
        IExecutionContext,
    )
}
RTX = SHARED | {"CudaGraphStrategy": CudaGraphStrategy, "IRuntimeConfig": IRuntimeConfig, "ICudaEngine": _RtxEngine}


def interface(name: str) -> dict[str, type]:
    """The classes of a library by their names there: "tensorrt", or "tensorrt_rtx", which has more."""
    return RTX if name == "tensorrt_rtx" else SHARED


def make_library(name: str, version: str) -> ModuleType:
    """What importing `name` would return."""
    module = ModuleType(name)
    module.__spec__ = ModuleSpec(name, None, origin="tests")
    classes = interface(name)

    class LibraryRuntime(Runtime):
        _broken_rules: ClassVar[list[str]] = []
        _engine = classes["ICudaEngine"]

    vars(module).update(classes, Runtime=LibraryRuntime, __version__=version)
    return module
