"""Running one optimisation profile of a TensorRT plan: context, stream, buffers and recorded calls."""

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
from multisa.runtime.backends.base import IMAGE, UInt8
from multisa.runtime.backends.tensorrt_runtime import TensorRTRuntime
from multisa.runtime.errors import BackendError

RECORDINGS_KEPT = 8  # of one profile; each holds a context of the library
SHAPES_REMEMBERED = 64  # a shape is recorded when it comes again among so many calls
DEFAULT_STREAM = 0

Shape4 = tuple[int, ...]
_LOGGER = logging.getLogger("multisa.runtime.tensorrt")


@dataclass
class LoadedEngine:
    """A plan that the library has taken, and where it runs."""

    graph: str
    started: TensorRTRuntime
    gpu: PrimaryContext
    engine: Any  # ICudaEngine; None once closed
    outputs: Mapping[str, str]  # NumPy's name of the dtype by tensor

    def require(self, done: bool, call: str) -> None:
        """Raise BackendError with the library's own words when a call of it has not returned True."""
        if not done:
            name, said = self.started.library.name, self.started.log.take()
            raise BackendError(f"{self.graph}: {name} refused {call}: {said}")


@dataclass(frozen=True)
class _Call:
    """The shapes of a call."""

    image: Shape4
    outputs: Mapping[str, Shape4]

    @property
    def image_bytes(self) -> int:
        return int(np.prod(self.image))


@dataclass(frozen=True)
class _CapturedGraph:
    """A CUDA graph of one call and the context it came from, which must not change after that."""

    call: _Call
    context: Any
    executable: int


@dataclass(frozen=True)
class _Memory:
    """The memory of one input or output, on both sides."""

    device: PycudaBuffer
    host: PinnedBuffer


class ExecutionContext:
    """Calls on one profile take turns; calls on different profiles run beside each other.

    TensorRT asks for one context for each profile that is in use at the same time, and a context may serve
    one call at a time. A lane therefore has a context and a lock. A pool of contexts for one profile would
    need their memory several times over for work that one GPU does one after the other anyway.

    A shape that comes again is recorded as a CUDA graph: upload, network and downloads become one launch. A
    graph depends on its context's shapes and addresses, so it has a context of its own; all contexts of a
    lane share the memory of the activations. TensorRT-RTX replaces kernels by faster ones as it goes, and
    records by itself.
    """

    def __init__(self, plan: LoadedEngine, profile: int) -> None:
        """Make the stream and the context. Raises BackendError, or one of `plan.gpu.errors`."""
        self._plan, self._profile = plan, profile
        self._driver = plan.gpu.driver
        self._turn = threading.Lock()
        self._memory: dict[str, _Memory] = {}
        self._activations: PycudaBuffer | None = None
        self._recordings: OrderedDict[Shape4, _CapturedGraph] = OrderedDict()
        self._recent: deque[Shape4] = deque(maxlen=SHAPES_REMEMBERED)
        self._records = not plan.started.library.is_rtx
        with plan.gpu.active():
            self._stream = self._driver.create_stream()
            try:
                self._context = self._new_context()
            except BaseException:
                self._driver.destroy_stream(self._stream)
                raise

    def run(self, image: UInt8) -> dict[str, npt.NDArray[Any]]:
        """Run on uint8 [N, H, W, 3]; waits, and returns arrays of the host by name."""
        with self._turn, self._plan.gpu.active():
            self._wait_for_the_last()
            recording = self._recordings.get(image.shape)
            if recording is not None:
                self._recordings.move_to_end(image.shape)
                call = recording.call
                self._stage(image)
                self._driver.launch_graph(recording.executable, self._stream)
            else:
                call = self._prepare(self._context, image.shape)
                self._stage(image)
                self._queue(self._context, call)
            self._driver.synchronise(self._stream)
            outputs = {name: self._output(name, shape) for name, shape in call.outputs.items()}
            if recording is None and self._records and image.shape in self._recent:
                self._record(image.shape)
            self._recent.append(image.shape)
            return outputs

    def run_on_device(self, image: UInt8) -> dict[str, DeviceArray]:
        """Queue uint8 [N, H, W, 3]; returns arrays of the device, ready in the order of the default stream.

        They have memory of their own, so no later call writes over them.
        """
        with self._turn, self._plan.gpu.active():
            self._wait_for_the_last()
            call = self._prepare(self._context, image.shape)
            arrays = {name: self._room(name, shape, {}) for name, shape in call.outputs.items()}
            for name, array in arrays.items():
                self._set_address(self._context, name, array.pointer)
            self._stage(image)
            self._execute(self._context, call)
            self._driver.queue_after(DEFAULT_STREAM, self._stream)
            return arrays

    def queue(
        self, image: int, shape: Shape4, stream: int, outputs: Mapping[str, DeviceArray]
    ) -> dict[str, DeviceArray]:
        """Queue uint8 `shape` at the address `image`; outputs go where `outputs` fit, or to new memory."""
        with self._turn, self._plan.gpu.active():
            self._check_open()
            call = self._shapes_of(self._context, shape)
            arrays = {name: self._room(name, size, outputs) for name, size in call.outputs.items()}
            self._set_address(self._context, IMAGE, image)
            for name, array in arrays.items():
                self._set_address(self._context, name, array.pointer)
            # All calls of a lane use the same activations, so its own stream knows of this one, too.
            self._driver.queue_after(stream, self._stream)
            queued = self._context.execute_async_v3(stream)
            self._driver.queue_after(self._stream, stream)
            self._plan.require(queued, "execute_async_v3")
            return arrays

    def close(self) -> None:
        """Wait for what is queued and give everything back; `run` is an error afterwards."""
        with self._turn, self._plan.gpu.active():
            if self._context is None:
                return
            self._driver.synchronise(self._stream)
            self._forget_recordings()
            self._context = None
            self._memory.clear()
            self._activations = None
            self._driver.destroy_stream(self._stream)

    def _wait_for_the_last(self) -> None:
        """After `run_on_device` its image may still be on the way out of the pinned memory."""
        self._check_open()
        self._driver.synchronise(self._stream)

    def _check_open(self) -> None:
        if self._context is None:
            raise BackendError(f"{self._plan.graph}: the engine is closed, expected an open one")

    def _new_context(self) -> Any:
        """Make a context on the lane's profile, with memory for that one and not for the largest."""
        plan, engine, library = self._plan, self._plan.engine, self._plan.started.library
        strategies = library.module.ExecutionContextAllocationStrategy
        if library.is_rtx:
            config = engine.create_runtime_config()
            config.cuda_graph_strategy = library.module.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
            config.set_execution_context_allocation_strategy(strategies.ON_PROFILE_CHANGE)
            context = engine.create_execution_context(config)
        else:
            context = engine.create_execution_context(strategies.USER_MANAGED)
        plan.require(context is not None, "create_execution_context")
        chosen = context.set_optimization_profile_async(self._profile, self._stream)
        plan.require(chosen, f"set_optimization_profile_async({self._profile})")
        self._driver.synchronise(self._stream)
        if not library.is_rtx:
            if self._activations is None:
                size = int(engine.get_device_memory_size_for_profile_v2(self._profile))
                self._activations = plan.gpu.allocate(size)
            context.set_device_memory(self._activations.pointer, self._activations.size)
        return context

    def _room(self, name: str, shape: Shape4, outputs: Mapping[str, DeviceArray]) -> DeviceArray:
        dtype = np.dtype(self._plan.outputs[name])
        given = outputs.get(name)
        if given is not None and (given.shape, given.dtype) == (shape, dtype):
            return given
        return DeviceArray(self._plan.gpu, shape, dtype.type)

    def _shapes_of(self, context: Any, image: Shape4) -> _Call:
        """Give a context the shape of a call, and ask for those of its outputs."""
        plan = self._plan
        plan.require(context.set_input_shape(IMAGE, image), f"set_input_shape({IMAGE}, {list(image)})")
        missing = context.infer_shapes()
        if missing:
            raise BackendError(
                f"{plan.graph}: the plan lacks {missing} to know its shapes, expected {IMAGE} alone"
            )
        outputs = {name: tuple(context.get_tensor_shape(name)) for name in plan.outputs}
        for name, shape in outputs.items():
            if min(shape) < 1:
                raise BackendError(f"{plan.graph}: {name}: got the shape {list(shape)}, expected sizes")
        return _Call(image, outputs)

    def _prepare(self, context: Any, image: Shape4) -> _Call:
        """Give a context the shape and the addresses of a call."""
        call = self._shapes_of(context, image)
        self._reserve(IMAGE, call.image_bytes)
        for name, shape in call.outputs.items():
            self._reserve(name, self._bytes(name, shape))
        for name, memory in self._memory.items():
            self._set_address(context, name, memory.device.pointer)
        return call

    def _reserve(self, name: str, size: int) -> None:
        """See to `size` bytes on both sides; memory that moves makes recordings void."""
        if name in self._memory and self._memory[name].device.size >= size:
            return
        self._forget_recordings()
        self._memory.pop(name, None)  # given back before more is taken
        gpu = self._plan.gpu
        self._memory[name] = _Memory(gpu.allocate(size), gpu.allocate_pinned(size))

    def _set_address(self, context: Any, name: str, address: int) -> None:
        self._plan.require(context.set_tensor_address(name, address), f"set_tensor_address({name})")

    def _stage(self, image: UInt8) -> None:
        """Copy the image, contiguous or not, to where the device takes it from."""
        np.copyto(self._memory[IMAGE].host.array[: image.nbytes].reshape(image.shape), image)

    def _execute(self, context: Any, call: _Call) -> None:
        """Queue the upload of the staged image and the network."""
        memory = self._memory[IMAGE]
        self._driver.upload(memory.device.pointer, memory.host.pointer, call.image_bytes, self._stream)
        self._plan.require(context.execute_async_v3(self._stream), "execute_async_v3")

    def _queue(self, context: Any, call: _Call) -> None:
        """Queue a whole call, up to the outputs in pinned memory."""
        self._execute(context, call)
        for name, shape in call.outputs.items():
            memory, size = self._memory[name], self._bytes(name, shape)
            self._driver.download(memory.host.pointer, memory.device.pointer, size, self._stream)

    def _output(self, name: str, shape: Shape4) -> npt.NDArray[Any]:
        """Copy an output out of the pinned memory."""
        data = self._memory[name].host.array[: self._bytes(name, shape)]
        return data.view(self._plan.outputs[name]).reshape(shape).copy()

    def _bytes(self, name: str, shape: Shape4) -> int:
        return int(np.prod(shape)) * np.dtype(self._plan.outputs[name]).itemsize

    def _record(self, image: Shape4) -> None:
        """Record the call of a shape; where that is not possible, calls go on without."""
        failures: tuple[type[Exception], ...] = (BackendError, *self._plan.gpu.errors)
        try:
            context = self._new_context()
            call = self._prepare(context, image)
            self._queue(context, call)  # a context settles in its first call, which cannot be recorded
            self._driver.synchronise(self._stream)
            executable = self._capture(context, call)
        except failures as error:
            self._records = False
            _LOGGER.warning("%s: calls are not recorded as CUDA graphs: %s", self._plan.graph, error)
            return
        self._recordings[image] = _CapturedGraph(call, context, executable)
        if len(self._recordings) > RECORDINGS_KEPT:
            self._driver.destroy_graph(self._recordings.popitem(last=False)[1].executable)

    def _capture(self, context: Any, call: _Call) -> int:
        self._driver.begin_capture(self._stream)
        try:
            self._queue(context, call)
        except BaseException:
            self._driver.abandon_capture(self._stream)
            raise
        return self._driver.instantiate(self._driver.end_capture(self._stream))

    def _forget_recordings(self) -> None:
        while self._recordings:
            self._driver.destroy_graph(self._recordings.popitem()[1].executable)
