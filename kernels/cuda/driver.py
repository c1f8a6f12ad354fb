"""The calls of the CUDA driver that pycuda does not offer: streams, launches on a caller's stream, graphs.

pycuda wraps only streams that it created, destroys them only in the thread that created them, and has no
graphs. These functions call the libcuda that pycuda has loaded. Contexts and memory remain with pycuda.
"""

import ctypes
from collections.abc import Sequence
from typing import Any

import numpy as np

from multisa.kernels.cuda.device import Argument, Dim3

LIBRARY = "libcuda.so.1"
# Relaxed: the first launch of a kernel may load its code, which stricter modes forbid during a capture.
CAPTURE_MODE_RELAXED = 2
NUM_REGS = 4  # CUfunction_attribute
NON_BLOCKING = 1  # CU_STREAM_NON_BLOCKING: the stream and the default stream do not wait for each other
DISABLE_TIMING = 2  # CU_EVENT_DISABLE_TIMING
BLOCKING_SYNC = 1  # CU_EVENT_BLOCKING_SYNC: a thread that waits for the event releases its core

_pointer = ctypes.c_void_p
_int = ctypes.c_int
_unsigned = ctypes.c_uint
_size = ctypes.c_size_t
_SIGNATURES: dict[str, list[Any]] = {
    "cuModuleLoadData": [_pointer, ctypes.c_char_p],
    "cuModuleUnload": [_pointer],
    "cuModuleGetFunction": [_pointer, _pointer, ctypes.c_char_p],
    "cuFuncGetAttribute": [_pointer, _int, _pointer],
    "cuLaunchKernel": [_pointer, *[_unsigned] * 7, _pointer, _pointer, _pointer],
    "cuMemsetD32Async": [ctypes.c_uint64, _unsigned, _size, _pointer],
    "cuMemcpyHtoDAsync_v2": [ctypes.c_uint64, _pointer, _size, _pointer],
    "cuMemcpyDtoHAsync_v2": [_pointer, ctypes.c_uint64, _size, _pointer],
    "cuStreamCreate": [_pointer, _unsigned],
    "cuStreamDestroy_v2": [_pointer],
    "cuStreamSynchronize": [_pointer],
    "cuStreamWaitEvent": [_pointer, _pointer, _unsigned],
    "cuEventCreate": [_pointer, _unsigned],
    "cuEventRecord": [_pointer, _pointer],
    "cuEventSynchronize": [_pointer],
    "cuEventDestroy_v2": [_pointer],
    "cuStreamBeginCapture_v2": [_pointer, _int],
    "cuStreamEndCapture": [_pointer, _pointer],
    "cuGraphInstantiateWithFlags": [_pointer, _pointer, ctypes.c_ulonglong],
    "cuGraphDestroy": [_pointer],
    "cuGraphLaunch": [_pointer, _pointer],
    "cuGraphExecDestroy": [_pointer],
    "cuGetErrorString": [_int, _pointer],
}


class DriverError(RuntimeError):
    """A call of the CUDA driver failed."""


class Driver:
    """Thin, typed calls; handles are plain integers. Every call raises DriverError if the driver fails.

    All except the constructor need a current context.
    """

    def __init__(self) -> None:
        """Bind to the driver's library. Raises DriverError if there is none."""
        try:
            library = ctypes.CDLL(LIBRARY)
            self._calls = {name: getattr(library, name) for name in _SIGNATURES}
        except (OSError, AttributeError) as error:
            raise DriverError(f"{LIBRARY}: {error}; install or update the NVIDIA driver") from error
        for name, signature in _SIGNATURES.items():
            self._calls[name].argtypes = signature
            self._calls[name].restype = _int

    def load_module(self, image: bytes) -> int:
        """Load a fat binary and return the module."""
        module = ctypes.c_void_p()
        self._call("cuModuleLoadData", ctypes.byref(module), image)
        return _handle(module)

    def unload_module(self, module: int) -> None:
        self._call("cuModuleUnload", module)

    def function(self, module: int, name: str) -> int:
        """Load the code of a kernel of the module and return the kernel."""
        function = ctypes.c_void_p()
        registers = ctypes.c_int()
        self._call("cuModuleGetFunction", ctypes.byref(function), module, name.encode())
        # Reading an attribute makes the driver load the code now rather than at the first launch.
        self._call("cuFuncGetAttribute", ctypes.byref(registers), NUM_REGS, function)
        return _handle(function)

    def launch(
        self, function: int, grid: Dim3, block: Dim3, arguments: Sequence[Argument], shared_bytes: int, stream: int
    ) -> None:
        """Queue a launch; the driver copies the arguments before this returns."""
        values = [np.array(a if isinstance(a, np.generic) else np.uint64(a)) for a in arguments]
        pointers = (ctypes.c_void_p * len(values))(*(value.ctypes.data for value in values))
        self._call("cuLaunchKernel", function, *grid, *block, shared_bytes, stream, pointers, None)

    def fill(self, target: int, value: int, count: int, stream: int) -> None:
        self._call("cuMemsetD32Async", target, value, count, stream)

    def upload(self, target: int, source: int, size: int, stream: int) -> None:
        """Queue a copy of `size` bytes from pinned host memory to the device."""
        self._call("cuMemcpyHtoDAsync_v2", target, source, size, stream)

    def download(self, target: int, source: int, size: int, stream: int) -> None:
        """Queue a copy of `size` bytes from the device to pinned host memory."""
        self._call("cuMemcpyDtoHAsync_v2", target, source, size, stream)

    def create_stream(self) -> int:
        """Return a new stream that does not wait for the default stream."""
        stream = ctypes.c_void_p()
        self._call("cuStreamCreate", ctypes.byref(stream), NON_BLOCKING)
        return _handle(stream)

    def destroy_stream(self, stream: int) -> None:
        """Destroy a stream. The driver still finishes its queued work."""
        self._call("cuStreamDestroy_v2", stream)

    def queue_after(self, later: int, earlier: int) -> None:
        """Let future work on `later` wait for the work queued on `earlier` so far. Does not wait itself."""
        event = self.create_event()
        try:
            self.record_event(event, earlier)
            self._call("cuStreamWaitEvent", later, event, 0)
        finally:
            self.destroy_event(event)  # the driver frees it once it has completed

    def create_event(self) -> int:
        """Return a new event that a thread can wait for."""
        event = ctypes.c_void_p()
        self._call("cuEventCreate", ctypes.byref(event), DISABLE_TIMING | BLOCKING_SYNC)
        return _handle(event)

    def record_event(self, event: int, stream: int) -> None:
        """Make the event complete when all work queued on the stream so far is done."""
        self._call("cuEventRecord", event, stream)

    def synchronise_event(self, event: int) -> None:
        """Wait until the event is complete. Returns at once if it was never recorded."""
        self._call("cuEventSynchronize", event)

    def destroy_event(self, event: int) -> None:
        self._call("cuEventDestroy_v2", event)

    def synchronise(self, stream: int) -> None:
        """Wait until all work queued on the stream is done."""
        self._call("cuStreamSynchronize", stream)

    def begin_capture(self, stream: int) -> None:
        """Record future work on the stream instead of running it. Not for stream 0."""
        self._call("cuStreamBeginCapture_v2", stream, CAPTURE_MODE_RELAXED)

    def end_capture(self, stream: int) -> int:
        """End the recording and return its graph."""
        graph = ctypes.c_void_p()
        self._call("cuStreamEndCapture", stream, ctypes.byref(graph))
        return _handle(graph)

    def abandon_capture(self, stream: int) -> None:
        """End a failed recording and discard its graph."""
        graph = ctypes.c_void_p()
        # Not checked: the status repeats that the recording failed.
        self._calls["cuStreamEndCapture"](stream, ctypes.byref(graph))
        if graph.value:
            self._call("cuGraphDestroy", graph)

    def instantiate(self, graph: int) -> int:
        """Return an executable graph, and destroy the graph itself."""
        executable = ctypes.c_void_p()
        try:
            self._call("cuGraphInstantiateWithFlags", ctypes.byref(executable), graph, 0)
        finally:
            self._call("cuGraphDestroy", graph)
        return _handle(executable)

    def launch_graph(self, executable: int, stream: int) -> None:
        self._call("cuGraphLaunch", executable, stream)

    def destroy_graph(self, executable: int) -> None:
        self._call("cuGraphExecDestroy", executable)

    def _call(self, name: str, *arguments: Any) -> None:
        """Call the driver; raise DriverError with the driver's text for a status other than 0."""
        status = self._calls[name](*arguments)
        if status:
            text = ctypes.c_char_p()
            self._calls["cuGetErrorString"](status, ctypes.byref(text))
            message = text.value.decode() if text.value else "unknown error"
            raise DriverError(f"{name}: {message} (CUDA error {status})")


def _handle(pointer: ctypes.c_void_p) -> int:
    """Return the address in a handle that the driver has written."""
    return pointer.value or 0
