"""Run one optimisation profile of a TensorRT engine: context, stream, buffers and captured CUDA graphs."""

import logging
import threading
from collections import OrderedDict, deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from multisa.kernels.cuda.calls import DeviceArray
from multisa.kernels.cuda.pycuda_context import PinnedBuffer, PrimaryContext, PycudaBuffer
from multisa.runtime.backends.base import IMAGE, UInt8, closed_error
from multisa.runtime.backends.tensorrt_runtime import TensorRTRuntime
from multisa.runtime.errors import BackendError

MAX_GRAPHS = 8  # captured graphs per profile; each holds a context of the library
RECENT_CALLS = 64  # a shape is captured when it occurs twice within so many calls
DEFAULT_STREAM = 0

Shape = tuple[int, ...]
_LOGGER = logging.getLogger("multisa.runtime.tensorrt")


@dataclass
class LoadedEngine:
    """A deserialised engine, and where it runs."""

    graph: str  # name of the contract, for messages
    runtime: TensorRTRuntime
    gpu: PrimaryContext
    engine: Any  # ICudaEngine; None once closed
    outputs: Mapping[str, str]  # tensor -> NumPy's name of its dtype

    def require(self, done: bool, call: str) -> None:
        """Raise BackendError with the library's own messages unless its `call` succeeded."""
        if not done:
            name = self.runtime.library.name
            raise BackendError(f"{self.graph}: {name} refused {call}: {self.runtime.log.take()}")


@dataclass(frozen=True)
class _Call:
    """The shapes of one call."""

    image: Shape
    outputs: Mapping[str, Shape]

    @property
    def image_bytes(self) -> int:
        return int(np.prod(self.image))


@dataclass(frozen=True)
class _CapturedGraph:
    """A CUDA graph of one call, and the context it was captured from, which must not change afterwards."""

    call: _Call
    context: Any
    executable: int  # CUgraphExec


@dataclass(frozen=True)
class _Memory:
    """Device and pinned host memory of one input or output."""

    device: PycudaBuffer
    host: PinnedBuffer


class ExecutionContext:
    """One optimisation profile of an engine, with a stream and buffers of its own.

    TensorRT needs one context for each profile in use, and a context serves one call at a time. So calls on
    one profile take turns behind a lock, and calls on different profiles run in parallel. A pool of contexts
    for one profile would multiply their memory for work that the GPU serialises anyway.

    A shape that recurs is captured as a CUDA graph: upload, network and downloads become one launch. A graph
    depends on its context's shapes and addresses, so it gets a context of its own; all contexts of a profile
    share the memory of the activations. TensorRT-RTX swaps kernels for faster ones at run time and captures
    graphs by itself.
    """

    def __init__(self, loaded: LoadedEngine, profile: int) -> None:
        """Create the stream and the context. Raises BackendError, or one of `loaded.gpu.errors`."""
        self._loaded = loaded
        self._profile = profile
        self._driver = loaded.gpu.driver
        self._lock = threading.Lock()
        self._memory: dict[str, _Memory] = {}  # by tensor
        self._activations: PycudaBuffer | None = None
        self._graphs: OrderedDict[Shape, _CapturedGraph] = OrderedDict()  # least recently used first
        self._recent: deque[Shape] = deque(maxlen=RECENT_CALLS)
        self._captures = not loaded.runtime.library.is_rtx
        with loaded.gpu.active():
            self._stream = self._driver.create_stream()
            try:
                self._context = self._new_context()
            except BaseException:
                self._driver.destroy_stream(self._stream)
                raise

    def run(self, image: UInt8) -> dict[str, npt.NDArray[Any]]:
        """Run on uint8 [N, H, W, 3] and wait; return host arrays by name."""
        with self._lock, self._loaded.gpu.active():
            self._wait_for_last_call()
            graph = self._graphs.get(image.shape)
            if graph is not None:
                self._graphs.move_to_end(image.shape)
                call = graph.call
                self._stage(image)
                self._driver.launch_graph(graph.executable, self._stream)
            else:
                call = self._prepare(self._context, image.shape)
                self._stage(image)
                self._queue(self._context, call)
            self._driver.synchronise(self._stream)
            outputs = {name: self._output(name, shape) for name, shape in call.outputs.items()}
            if graph is None and self._captures and image.shape in self._recent:
                self._try_capture(image.shape)
            self._recent.append(image.shape)
            return outputs

    def run_on_device(self, image: UInt8) -> dict[str, DeviceArray]:
        """Queue a run on uint8 [N, H, W, 3]; return device arrays, ready in the order of the default stream.

        They own their memory, so later calls do not overwrite them.
        """
        with self._lock, self._loaded.gpu.active():
            self._wait_for_last_call()
            call = self._prepare(self._context, image.shape)
            arrays = {name: self._array_for(name, shape, {}) for name, shape in call.outputs.items()}
            for name, array in arrays.items():
                self._set_address(self._context, name, array.pointer)
            self._stage(image)
            self._execute(self._context, call)
            self._driver.queue_after(DEFAULT_STREAM, self._stream)
            return arrays

    def queue(
        self, image: int, shape: Shape, stream: int, outputs: Mapping[str, DeviceArray]
    ) -> dict[str, DeviceArray]:
        """Queue a run on `stream`; see `TensorRTBackend.queue`."""
        with self._lock, self._loaded.gpu.active():
            self._check_open()
            call = self._shapes_of(self._context, shape)
            arrays = {name: self._array_for(name, size, outputs) for name, size in call.outputs.items()}
            self._set_address(self._context, IMAGE, image)
            for name, array in arrays.items():
                self._set_address(self._context, name, array.pointer)
            # All calls of this profile share the activations, so its own stream has to wait for this call,
            # too.
            self._driver.queue_after(stream, self._stream)
            queued = self._context.execute_async_v3(stream)
            self._driver.queue_after(self._stream, stream)
            self._loaded.require(queued, "execute_async_v3")
            return arrays

    def close(self) -> None:
        """Wait for queued work and release everything; `run` raises afterwards."""
        with self._lock, self._loaded.gpu.active():
            if self._context is None:
                return
            self._driver.synchronise(self._stream)
            self._drop_graphs()
            self._context = None
            self._memory.clear()
            self._activations = None
            self._driver.destroy_stream(self._stream)

    def _wait_for_last_call(self) -> None:
        """Wait until the image of an earlier `run_on_device` has left the pinned memory."""
        self._check_open()
        self._driver.synchronise(self._stream)

    def _check_open(self) -> None:
        if self._context is None:
            raise closed_error(self._loaded.graph)

    def _new_context(self) -> Any:
        """Create a context with the memory that this profile needs, not the largest one."""
        loaded = self._loaded
        engine = loaded.engine
        library = loaded.runtime.library
        strategies = library.module.ExecutionContextAllocationStrategy
        if library.is_rtx:
            config = engine.create_runtime_config()
            config.cuda_graph_strategy = library.module.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
            config.set_execution_context_allocation_strategy(strategies.ON_PROFILE_CHANGE)
            context = engine.create_execution_context(config)
        else:
            context = engine.create_execution_context(strategies.USER_MANAGED)
        loaded.require(context is not None, "create_execution_context")
        chosen = context.set_optimization_profile_async(self._profile, self._stream)
        loaded.require(chosen, f"set_optimization_profile_async({self._profile})")
        self._driver.synchronise(self._stream)
        if not library.is_rtx:
            if self._activations is None:
                size = int(engine.get_device_memory_size_for_profile_v2(self._profile))
                self._activations = loaded.gpu.allocate(size)
            context.set_device_memory(self._activations.pointer, self._activations.size)
        return context

    def _array_for(self, name: str, shape: Shape, outputs: Mapping[str, DeviceArray]) -> DeviceArray:
        """The array of `outputs` if shape and dtype match, else a new one."""
        dtype = np.dtype(self._loaded.outputs[name])
        given = outputs.get(name)
        if given is not None and (given.shape, given.dtype) == (shape, dtype):
            return given
        return DeviceArray(self._loaded.gpu, shape, dtype.type)

    def _shapes_of(self, context: Any, image: Shape) -> _Call:
        """Set the input shape of a context and infer the shapes of its outputs."""
        loaded = self._loaded
        loaded.require(context.set_input_shape(IMAGE, image), f"set_input_shape({IMAGE}, {list(image)})")
        missing = context.infer_shapes()
        if missing:
            raise BackendError(
                f"{loaded.graph}: the engine needs {missing} to infer its shapes, expected {IMAGE} alone"
            )
        outputs = {name: tuple(context.get_tensor_shape(name)) for name in loaded.outputs}
        for name, shape in outputs.items():
            if min(shape) < 1:
                raise BackendError(f"{loaded.graph}: {name}: got the shape {list(shape)}, expected sizes above 0")
        return _Call(image, outputs)

    def _prepare(self, context: Any, image: Shape) -> _Call:
        """Set shapes and addresses of a call in a context."""
        call = self._shapes_of(context, image)
        self._reserve(IMAGE, call.image_bytes)
        for name, shape in call.outputs.items():
            self._reserve(name, self._bytes(name, shape))
        for name, memory in self._memory.items():
            self._set_address(context, name, memory.device.pointer)
        return call

    def _reserve(self, name: str, size: int) -> None:
        """Ensure `size` bytes on both sides; moving the memory invalidates captured graphs."""
        if name in self._memory and self._memory[name].device.size >= size:
            return
        self._drop_graphs()
        self._memory.pop(name, None)  # released before more is allocated
        gpu = self._loaded.gpu
        self._memory[name] = _Memory(gpu.allocate(size), gpu.allocate_pinned(size))

    def _set_address(self, context: Any, name: str, address: int) -> None:
        self._loaded.require(context.set_tensor_address(name, address), f"set_tensor_address({name})")

    def _stage(self, image: UInt8) -> None:
        """Copy the image, contiguous or not, to pinned memory."""
        np.copyto(self._memory[IMAGE].host.array[: image.nbytes].reshape(image.shape), image)

    def _execute(self, context: Any, call: _Call) -> None:
        """Queue the upload of the staged image, and the network."""
        memory = self._memory[IMAGE]
        self._driver.upload(memory.device.pointer, memory.host.pointer, call.image_bytes, self._stream)
        self._loaded.require(context.execute_async_v3(self._stream), "execute_async_v3")

    def _queue(self, context: Any, call: _Call) -> None:
        """Queue a whole call: upload, network and downloads to pinned memory."""
        self._execute(context, call)
        for name, shape in call.outputs.items():
            memory, size = self._memory[name], self._bytes(name, shape)
            self._driver.download(memory.host.pointer, memory.device.pointer, size, self._stream)

    def _output(self, name: str, shape: Shape) -> npt.NDArray[Any]:
        """Copy an output out of pinned memory."""
        data = self._memory[name].host.array[: self._bytes(name, shape)]
        return data.view(self._loaded.outputs[name]).reshape(shape).copy()

    def _bytes(self, name: str, shape: Shape) -> int:
        return int(np.prod(shape)) * np.dtype(self._loaded.outputs[name]).itemsize

    def _try_capture(self, image: Shape) -> None:
        """Capture the call of a shape as a CUDA graph; if that fails, stop capturing."""
        failures: tuple[type[Exception], ...] = (BackendError, *self._loaded.gpu.errors)
        try:
            context = self._new_context()
            call = self._prepare(context, image)
            self._queue(context, call)  # a context's first call initialises it and cannot be captured
            self._driver.synchronise(self._stream)
            executable = self._capture(context, call)
        except failures as error:
            self._captures = False
            _LOGGER.warning("%s: calls are not captured as CUDA graphs: %s", self._loaded.graph, error)
            return
        self._graphs[image] = _CapturedGraph(call, context, executable)
        if len(self._graphs) > MAX_GRAPHS:
            self._driver.destroy_graph(self._graphs.popitem(last=False)[1].executable)

    def _capture(self, context: Any, call: _Call) -> int:
        self._driver.begin_capture(self._stream)
        try:
            self._queue(context, call)
        except BaseException:
            self._driver.abandon_capture(self._stream)
            raise
        return self._driver.instantiate(self._driver.end_capture(self._stream))

    def _drop_graphs(self) -> None:
        while self._graphs:
            self._driver.destroy_graph(self._graphs.popitem()[1].executable)
