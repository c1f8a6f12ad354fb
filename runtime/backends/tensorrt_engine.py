"""A built TensorRT engine on a GPU, as a backend: what `open_tensorrt` returns."""

import threading
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import numpy.typing as npt

from multisa.kernels.cuda.calls import DeviceArray
from multisa.kernels.cuda.pycuda_context import PrimaryContext
from multisa.runtime.backends.base import IMAGE, Closeable, GraphContract, UInt8, check_image, closed_error
from multisa.runtime.backends.engine_cache import Profile
from multisa.runtime.backends.tensorrt_context import ExecutionContext, LoadedEngine
from multisa.runtime.backends.tensorrt_runtime import DTYPES, TensorRTRuntime
from multisa.runtime.errors import BackendError, BackendUnavailable
from multisa.runtime.imaging.decode import MINIMUM_SIDE


class TensorRTBackend(Closeable):
    """An engine on a GPU, through pycuda. Each profile gets an `ExecutionContext` when it is first used."""

    def __init__(
        self,
        data: bytes,
        contract: GraphContract,
        *,
        runtime: TensorRTRuntime,
        gpu: PrimaryContext,
        remedy: str,
        sha256: str,
    ) -> None:
        """Load a serialised engine.

        data: the engine's bytes, verified against `sha256`: TensorRT executes the code in them. remedy: the
        command that builds the engine, for error messages. Raises BackendUnavailable if the library refuses
        the engine, BackendError if it breaks the contract.
        """
        library = runtime.library
        self.name = library.name
        self.contract = contract
        self._remedy = remedy
        self._sha256 = sha256
        with gpu.active():
            runtime.log.clear()  # of messages of other calls
            engine = runtime.handle.deserialize_cuda_engine(data)
            if engine is None:
                raise BackendUnavailable(f"{library.name} cannot load the engine: {runtime.log.take()}")
            outputs = _check_tensors(engine, contract, library.module)
            self._profiles = _profiles(engine, contract)
        self._loaded = LoadedEngine(contract.name, runtime, gpu, engine, outputs)
        self._contexts: dict[int, ExecutionContext] = {}  # by profile
        self._lock = threading.Lock()  # held while contexts are created, and by `close`
        self._finalizer = weakref.finalize(self, _close, self._loaded, self._contexts)

    @property
    def profiles(self) -> Sequence[Profile]:
        """The image sizes that the engine was built for."""
        return self._profiles

    @property
    def detail(self) -> dict[str, Any]:
        """GPU, library, engine and its profiles, for run.json."""
        return {
            "gpu": self._loaded.gpu.name,
            "library": str(self._loaded.runtime.library),
            "plan_sha256": self._sha256,
            "profiles": [str(profile) for profile in self._profiles],
        }

    def run(self, image: UInt8) -> dict[str, npt.NDArray[Any]]:
        """Run on uint8 [N, H, W, 3] RGB; return the contract's outputs by name. Raises BackendError."""
        check_image(image, self.contract.name)
        context = self._context_for(image.shape)
        try:
            return context.run(image)
        except self._loaded.gpu.errors as error:
            raise self._failure(error) from error

    def run_on_device(self, image: UInt8) -> dict[str, DeviceArray]:
        """Run on uint8 [N, H, W, 3] RGB without waiting; the outputs stay on the GPU. Raises BackendError.

        They are ready in the order of the default stream, on which `multisa.kernels` works, and stay valid
        after the backend was closed.
        """
        check_image(image, self.contract.name)
        context = self._context_for(image.shape)
        try:
            return context.run_on_device(image)
        except self._loaded.gpu.errors as error:
            raise self._failure(error) from error

    def queue(
        self, image: int, shape: tuple[int, ...], stream: int, outputs: Mapping[str, DeviceArray]
    ) -> dict[str, DeviceArray]:
        """Queue a run on `stream`, without waiting. Raises BackendError.

        image: device address of uint8 RGB `shape` [N, H, W, 3]. outputs: arrays to write to, where shape and
        dtype match; other outputs get new arrays.
        """
        context = self._context_for(shape)
        try:
            return context.queue(image, shape, stream, outputs)
        except self._loaded.gpu.errors as error:
            raise self._failure(error) from error

    def close(self) -> None:
        """Wait for running calls and release the GPU's memory; `run` raises afterwards."""
        with self._lock:  # so that a context being created in another thread is closed, too
            self._finalizer()

    def _context_for(self, image: tuple[int, ...]) -> ExecutionContext:
        """The context of the narrowest profile that covers `image` [N, H, W, 3], created if necessary."""
        batch, height, width, _ = image
        fitting = [index for index, p in enumerate(self._profiles) if p.covers((batch, height, width))]
        if not fitting:
            listed = ", ".join(map(str, self._profiles))
            size = f"{batch}x{height}x{width}"
            bucket = f"1x{min(height, MINIMUM_SIDE)}x{min(width, MINIMUM_SIDE)}:{size}:{size}"
            raise BackendError(
                f"{self.contract.name}: got an image of {size} (batch x height x width), "
                f"expected one of the engine's profiles (min:opt:max) {listed}; build one that fits: "
                f"{self._remedy} --profile {bucket}"
            )
        # The kernels of a profile are tuned for its optimum, so the narrowest profile fits this size best.
        index = min(fitting, key=lambda index: _pixels(self._profiles[index].maximum))
        with self._lock:
            if not self._finalizer.alive:
                raise closed_error(self.contract.name)
            if index not in self._contexts:
                try:
                    self._contexts[index] = ExecutionContext(self._loaded, index)
                except self._loaded.gpu.errors as error:
                    raise self._failure(error) from error
            return self._contexts[index]

    def _failure(self, error: Exception) -> BackendError:
        messages = self._loaded.runtime.log.take()
        return BackendError(
            f"{self.contract.name}: cannot be run on {self._loaded.gpu.name}: {error} ({messages})"
        )


def _close(loaded: LoadedEngine, contexts: dict[int, ExecutionContext]) -> None:
    """Release everything of a backend; the library needs the CUDA context to be current for that."""
    with loaded.gpu.active():
        for context in contexts.values():
            context.close()
        loaded.engine = None


def _check_tensors(engine: Any, contract: GraphContract, module: Any) -> dict[str, str]:
    """Return NumPy's dtype name of each output. Raises BackendError unless the tensors match the contract."""
    found: dict[str, str] = {}
    dtypes: dict[str, str] = {}
    for name in (engine.get_tensor_name(index) for index in range(engine.num_io_tensors)):
        kind = engine.get_tensor_dtype(name).name
        dtypes[name] = DTYPES.get(kind, kind)
        is_input = engine.get_tensor_mode(name) == module.TensorIOMode.INPUT
        on_device = engine.get_tensor_location(name) == module.TensorLocation.DEVICE
        found[name] = (
            f"{'input' if is_input else 'output'} {dtypes[name]} of rank "
            f"{len(tuple(engine.get_tensor_shape(name)))}{'' if on_device else ', on the host'}"
        )
    expected = {IMAGE: "input uint8 of rank 4"}
    expected |= {n: f"output {t.dtype} of rank {len(t.axes)}" for n, t in contract.outputs.items()}
    if found != expected:
        raise BackendError(f"{contract.name}: got an engine of {found}, expected {expected}")
    return {name: dtypes[name] for name in contract.outputs}


def _profiles(engine: Any, contract: GraphContract) -> tuple[Profile, ...]:
    profiles = []
    for index in range(engine.num_optimization_profiles):
        shapes = [tuple(shape) for shape in engine.get_tensor_profile_shape(IMAGE, index)]
        try:
            sizes = [(batch, height, width) for batch, height, width, channels in shapes if channels == 3]
            profiles.append(Profile(*sizes))
        except (TypeError, ValueError) as error:
            raise BackendError(
                f"{contract.name}: profile {index}: got {shapes}, expected three of [N, H, W, 3]"
            ) from error
    return tuple(profiles)


def _pixels(shape: tuple[int, int, int]) -> int:
    batch, height, width = shape
    return batch * height * width
