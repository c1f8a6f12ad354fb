"""A TensorRT plan on a GPU: what `open_tensorrt` gives."""

import threading
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import numpy.typing as npt

from multisa.kernels.cuda.calls import DeviceArray
from multisa.kernels.cuda.pycuda_context import PrimaryContext
from multisa.runtime.backends.base import IMAGE, Closeable, GraphContract, UInt8, check_image
from multisa.runtime.backends.engine_cache import Profile
from multisa.runtime.backends.tensorrt_context import ExecutionContext, LoadedEngine
from multisa.runtime.backends.tensorrt_runtime import DTYPES, TensorRTRuntime
from multisa.runtime.errors import BackendError, BackendUnavailable
from multisa.runtime.imaging.decode import MINIMUM_SIDE


class TensorRTBackend(Closeable):
    """A plan on a GPU, through pycuda; each of its profiles is a `Lane`, made when it is first used."""

    def __init__(
        self,
        plan: bytes,
        contract: GraphContract,
        *,
        started: TensorRTRuntime,
        gpu: PrimaryContext,
        remedy: str,
        sha256: str,
    ) -> None:
        """Load the plan's bytes, which must be verified (their `sha256`): TensorRT runs the code in them.

        `remedy` is the command that builds the plan. Raises BackendUnavailable when the library refuses it,
        BackendError when it breaks the contract.
        """
        library, log = started.library, started.log
        self.name, self.contract = library.name, contract
        self._remedy, self._sha256 = remedy, sha256
        with gpu.active():
            log.clear()  # of other calls
            engine = started.runtime.deserialize_cuda_engine(plan)
            if engine is None:
                raise BackendUnavailable(f"{library.name} cannot load the plan: {log.take()}")
            outputs = _kept_outputs(engine, contract, library.module)
            self._profiles = _profiles(engine, contract)
        self._plan = LoadedEngine(contract.name, started, gpu, engine, outputs)
        self._lanes: dict[int, ExecutionContext] = {}
        self._opening = threading.Lock()
        self._finalizer = weakref.finalize(self, _close, self._plan, self._lanes)

    @property
    def profiles(self) -> Sequence[Profile]:
        """Sizes of the image that the plan was built for."""
        return self._profiles

    @property
    def detail(self) -> dict[str, Any]:
        """GPU, library, plan and its profiles, for the record of a run."""
        return {
            "gpu": self._plan.gpu.name,
            "library": str(self._plan.started.library),
            "plan_sha256": self._sha256,
            "profiles": [str(profile) for profile in self._profiles],
        }

    def run(self, image: UInt8) -> dict[str, npt.NDArray[Any]]:
        """Run on uint8 [N, H, W, 3] RGB; the outputs by name, as in the contract. Raises BackendError."""
        check_image(image, self.contract.name)
        lane = self._lane_for(image.shape)
        try:
            return lane.run(image)
        except self._plan.gpu.errors as error:
            raise self._failure(error) from error

    def run_on_device(self, image: UInt8) -> dict[str, DeviceArray]:
        """Run on uint8 [N, H, W, 3] RGB without waiting; the outputs stay on the device. Raises BackendError.

        They are ready in the order of the default stream, on which `multisa.kernels` works, and remain good
        after the engine was closed.
        """
        check_image(image, self.contract.name)
        lane = self._lane_for(image.shape)
        try:
            return lane.run_on_device(image)
        except self._plan.gpu.errors as error:
            raise self._failure(error) from error

    def queue(
        self, image: int, shape: tuple[int, ...], stream: int, outputs: Mapping[str, DeviceArray]
    ) -> dict[str, DeviceArray]:
        """Queue on `stream` the uint8 RGB image `shape` [N, H, W, 3] at a device address. Raises BackendError.

        Nothing waits. An array of `outputs` that has an output's shape and dtype is written; others are made.
        """
        lane = self._lane_for(shape)
        try:
            return lane.queue(image, shape, stream, outputs)
        except self._plan.gpu.errors as error:
            raise self._failure(error) from error

    def close(self) -> None:
        """Wait for calls under way and give the GPU's memory back; `run` is an error afterwards."""
        with self._opening:  # a lane that is being made is closed, too
            self._finalizer()

    def _lane_for(self, image: tuple[int, ...]) -> ExecutionContext:
        batch, height, width, _ = image
        fitting = [index for index, p in enumerate(self._profiles) if p.covers((batch, height, width))]
        if not fitting:
            listed = ", ".join(map(str, self._profiles))
            size = f"{batch}x{height}x{width}"
            bucket = f"1x{min(height, MINIMUM_SIDE)}x{min(width, MINIMUM_SIDE)}:{size}:{size}"
            raise BackendError(
                f"{self.contract.name}: got an image of {size} (batch x height x width), "
                f"expected one of the plan's profiles (min:opt:max) {listed}; build one that fits: "
                f"{self._remedy} --profile {bucket}"
            )
        # The kernels of a profile are chosen for its optimum, so the narrowest one knows this size best.
        index = min(fitting, key=lambda index: _pixels(self._profiles[index].maximum))
        with self._opening:
            if not self._finalizer.alive:
                raise BackendError(f"{self.contract.name}: the engine is closed, expected an open one")
            if index not in self._lanes:
                try:
                    self._lanes[index] = ExecutionContext(self._plan, index)
                except self._plan.gpu.errors as error:
                    raise self._failure(error) from error
            return self._lanes[index]

    def _failure(self, error: Exception) -> BackendError:
        said = self._plan.started.log.take()
        return BackendError(f"{self.contract.name}: cannot be run on {self._plan.gpu.name}: {error} ({said})")


def _close(plan: LoadedEngine, lanes: dict[int, ExecutionContext]) -> None:
    """Close what an engine has opened; the library needs the context to be current for that."""
    with plan.gpu.active():
        for lane in lanes.values():
            lane.close()
        plan.engine = None


def _kept_outputs(engine: Any, contract: GraphContract, module: Any) -> dict[str, str]:
    """Compare a plan's tensors with the contract; returns NumPy's name of each output's dtype."""
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
        raise BackendError(f"{contract.name}: got a plan of {found}, expected {expected}")
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
