"""Graphs on TensorRT 10 and 11 and on TensorRT-RTX, from the plans that `multisa build` has made.

    with open_tensorrt(bundle, CAM) as engine:
        outputs = engine.run(image)                   # NumPy arrays
        there = engine.run_on_device(image)           # arrays of the device, for multisa.kernels

This runs plans and makes none: a bundle without one for this GPU is EngineUnavailable.
"""

import logging
import re
import threading
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy.typing as npt

from multisa.kernels.cuda.calls import DeviceArray
from multisa.kernels.cuda.pycuda_context import PrimaryContext
from multisa.runtime.bundle import ENGINES_FOLDER, Bundle
from multisa.runtime.engines.contract import IMAGE, PRECISIONS, GraphContract, UInt8, check_image, graph_file
from multisa.runtime.engines.coverage import uncovered_shape
from multisa.runtime.engines.plans import PlanCache, Profile, StoredPlan
from multisa.runtime.engines.tensorrt_lane import Lane, LoadedPlan
from multisa.runtime.engines.tensorrt_library import (
    DTYPES,
    LIBRARIES,
    StartedLibrary,
    check_library_name,
    default_gpu,
    import_library,
    start_library,
)
from multisa.runtime.errors import BundleError, EngineError, EngineUnavailable, UsageError
from multisa.runtime.images import MINIMUM_SIDE

# Where a library says that the bytes are not of its making: another format, version, or kind of GPU.
_NOT_ITS_PLAN = re.compile(
    r"serializ|magic ?tag|version tag|not compatible with this version|incompatible (device|version)",
    re.IGNORECASE,
)
_LOGGER = logging.getLogger("multisa.runtime.tensorrt")


def open_tensorrt(
    bundle: Bundle,
    contract: GraphContract,
    *,
    precision: str = "fp32",
    library: str | None = None,
    cache: Path | None = None,
    long_side: int | None = None,
    may_heal: bool = True,
) -> "TensorRTEngine":
    """Load the plan of a bundle's graph for the first GPU.

    `library` is one of LIBRARIES, or None for the first that is here and has a plan; `cache` is a folder of
    plans besides the bundle's own. With `long_side` a plan is passed over unless it takes every photograph up
    to there. Damaged plans are put aside if it `may_heal`. Raises UsageError for a precision the bundle does
    not have or an unknown library, EngineUnavailable without driver, pycuda, library or plan, EngineError for
    a plan that breaks the contract or finds no memory.
    """
    digest = _digest_of_graph(bundle, contract, precision)
    if library is not None:
        check_library_name(library)
    gpu = default_gpu()  # before any library: TensorRT ends the process where there is no driver
    target = "sm{}{}".format(*gpu.compute_capability)
    own = bundle.path / ENGINES_FOLDER
    caches = [PlanCache(folder) for folder in ((own,) if cache is None else (cache, own))]
    causes, remedies = [], []
    for name in LIBRARIES if library is None else (library,):
        build = _build_command(bundle, contract, precision, target, name, cache)
        try:
            there = import_library(name)
            wanted = {"onnx_sha256": digest, "library": name, "target": target}
            found = [
                (plans, plan)
                for plans in caches
                for plan in plans.find(**wanted, library_version=there.version)
            ]
            if not found:
                raise EngineUnavailable(f"{there}: no plan for {target} ({gpu.name})", remedy=build)
            opening = _Opening(contract, start_library(there, gpu), gpu, build, long_side, may_heal)
            return opening.first(found)
        except EngineUnavailable as error:
            causes.append(error.cause)
            remedies.append(str(error).removeprefix(error.cause).removeprefix(": "))
    remedy = "; or ".join(filter(None, dict.fromkeys(remedies)))
    raise EngineUnavailable("; ".join(causes), remedy=remedy)


class _RefusedError(Exception):
    """A plan that the library refuses; the message is what it says."""


class TensorRTEngine:
    """A plan on a GPU, through pycuda; each of its profiles is a `Lane`, made when it is first used."""

    def __init__(
        self,
        plan: bytes,
        contract: GraphContract,
        *,
        started: StartedLibrary,
        gpu: PrimaryContext,
        remedy: str,
        sha256: str,
    ) -> None:
        """Load the plan's bytes, which must be verified (their `sha256`): TensorRT runs the code in them.

        `remedy` is the command that builds the plan. Raises EngineUnavailable when the library refuses it,
        EngineError when it breaks the contract.
        """
        library, log = started.library, started.log
        self.name, self.contract = library.name, contract
        self._remedy, self._sha256 = remedy, sha256
        with gpu.active():
            log.clear()  # of other calls
            engine = started.runtime.deserialize_cuda_engine(plan)
            if engine is None:
                raise EngineUnavailable(f"{library.name} cannot load the plan: {log.take()}")
            outputs = _kept_outputs(engine, contract, library.module)
            self._profiles = _profiles(engine, contract)
        self._plan = LoadedPlan(contract.name, started, gpu, engine, outputs)
        self._lanes: dict[int, Lane] = {}
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
        """Run on uint8 [N, H, W, 3] RGB; the outputs by name, as in the contract. Raises EngineError."""
        lane = self._lane_for(image)
        try:
            return lane.run(image)
        except self._plan.gpu.errors as error:
            raise self._failure(error) from error

    def run_on_device(self, image: UInt8) -> dict[str, DeviceArray]:
        """Run on uint8 [N, H, W, 3] RGB without waiting; the outputs stay on the device. Raises EngineError.

        They are ready in the order of the default stream, on which `multisa.kernels` works, and remain good
        after the engine was closed.
        """
        lane = self._lane_for(image)
        try:
            return lane.run_on_device(image)
        except self._plan.gpu.errors as error:
            raise self._failure(error) from error

    def close(self) -> None:
        """Wait for calls under way and give the GPU's memory back; `run` is an error afterwards."""
        with self._opening:  # a lane that is being made is closed, too
            self._finalizer()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _lane_for(self, image: UInt8) -> Lane:
        check_image(image, self.contract.name)
        batch, height, width, _ = image.shape
        fitting = [index for index, p in enumerate(self._profiles) if p.covers((batch, height, width))]
        if not fitting:
            listed = ", ".join(map(str, self._profiles))
            size = f"{batch}x{height}x{width}"
            bucket = f"1x{min(height, MINIMUM_SIDE)}x{min(width, MINIMUM_SIDE)}:{size}:{size}"
            raise EngineError(
                f"{self.contract.name}: got an image of {size} (batch x height x width), "
                f"expected one of the plan's profiles (min:opt:max) {listed}; build one that fits: "
                f"{self._remedy} --profile {bucket}"
            )
        # The kernels of a profile are chosen for its optimum, so the narrowest one knows this size best.
        index = min(fitting, key=lambda index: _pixels(self._profiles[index].maximum))
        with self._opening:
            if not self._finalizer.alive:
                raise EngineError(f"{self.contract.name}: the engine is closed, expected an open one")
            if index not in self._lanes:
                try:
                    self._lanes[index] = Lane(self._plan, index)
                except self._plan.gpu.errors as error:
                    raise self._failure(error) from error
            return self._lanes[index]

    def _failure(self, error: Exception) -> EngineError:
        said = self._plan.started.log.take()
        return EngineError(f"{self.contract.name}: cannot be run on {self._plan.gpu.name}: {error} ({said})")


def _close(plan: LoadedPlan, lanes: dict[int, Lane]) -> None:
    """Close what an engine has opened; the library needs the context to be current for that."""
    with plan.gpu.active():
        for lane in lanes.values():
            lane.close()
        plan.engine = None


@dataclass(frozen=True)
class _Opening:
    """Loads the best plan that can be loaded."""

    contract: GraphContract
    started: StartedLibrary
    gpu: PrimaryContext
    remedy: str
    long_side: int | None
    may_heal: bool

    def first(self, found: Sequence[tuple[PlanCache, StoredPlan]]) -> TensorRTEngine:
        """Load the best of `found`; raises EngineUnavailable with why each one cannot be."""
        causes = []
        for plans, stored in sorted(found, key=lambda pair: self._rank(pair[1])):
            missing = uncovered_shape(stored.key.profiles, self.long_side) if self.long_side else None
            if missing is not None:
                size = "x".join(map(str, missing))
                causes.append(f"{stored.path}: no profile for {size} (batch x height x width)")
                continue
            try:
                engine = self._load(stored)
            except (_RefusedError, BundleError) as error:
                causes.append(f"{stored.path}: {error}{self._put_aside(plans, stored, str(error))}")
                continue
            except OSError as error:
                causes.append(f"{stored.path}: cannot be read: {error.strerror}")
                continue
            self._tell(stored)
            return engine
        raise EngineUnavailable("; ".join(causes), remedy=self.remedy)

    def _load(self, stored: StoredPlan) -> TensorRTEngine:
        try:
            return TensorRTEngine(
                stored.read(),
                self.contract,
                started=self.started,
                gpu=self.gpu,
                remedy=self.remedy,
                sha256=stored.sha256,
            )
        except EngineUnavailable as error:
            said = error.cause.lower()
            if "out of memory" in said:
                raise EngineError(f"{self.contract.name}: {error}; free memory of {self.gpu.name}") from error
            if "driver version is insufficient" in said:
                cause = f"{self.contract.name}: {error}"
                raise EngineUnavailable(cause, remedy="update the NVIDIA driver") from error
            raise _RefusedError(str(error)) from error

    def _put_aside(self, plans: PlanCache, stored: StoredPlan, reason: str) -> str:
        """Where the bytes are at fault, and nothing else is; what could not be done."""
        is_damaged = "damaged" in reason or _NOT_ITS_PLAN.search(reason)
        if not (is_damaged and self.may_heal):
            return ""
        try:
            plans.quarantine(stored, reason)
        except OSError as error:
            return f" (and cannot be put aside: {error.strerror})"
        return ""

    def _rank(self, plan: StoredPlan) -> tuple[int, int, str]:
        """Plans tuned on this very GPU first, then those for any, then those with most profiles."""
        places = (self.gpu.name, "")
        place = places.index(plan.key.gpu) if plan.key.gpu in places else len(places)
        return place, -len(plan.key.profiles), plan.key.digest

    def _tell(self, stored: StoredPlan) -> None:
        name, gpu = self.contract.name, self.gpu.name
        if stored.key.gpu not in ("", gpu):
            _LOGGER.warning(
                "%s: the plan was tuned on %s and runs on %s, which may be slow: %s",
                name, stored.key.gpu, gpu, self.remedy,
            )  # fmt: skip
        _LOGGER.info("%s: %s on %s", name, stored.path, gpu)


def _digest_of_graph(bundle: Bundle, contract: GraphContract, precision: str) -> str:
    if precision not in PRECISIONS:
        raise UsageError(f"precision: got {precision!r}, expected one of {', '.join(PRECISIONS)}")
    files = bundle.manifest.files
    name = graph_file(contract, precision)
    if name not in files:
        has = [p for p in PRECISIONS if graph_file(contract, p) in files]
        raise UsageError(
            f"{bundle.path}: got precision {precision} for {contract.name}, expected {' or '.join(has)}; "
            f"make it: multisa convert {bundle.path} --precision {precision}"
        )
    return files[name].sha256


def _build_command(
    bundle: Bundle, contract: GraphContract, precision: str, target: str, library: str, cache: Path | None
) -> str:
    command = f"multisa build {bundle.path} --target {target} --graph {contract.name} --library {library}"
    if precision != "fp32":
        command += f" --precision {precision}"
    return command if cache is None else f"{command} --cache {cache}"


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
        raise EngineError(f"{contract.name}: got a plan of {found}, expected {expected}")
    return {name: dtypes[name] for name in contract.outputs}


def _profiles(engine: Any, contract: GraphContract) -> tuple[Profile, ...]:
    profiles = []
    for index in range(engine.num_optimization_profiles):
        shapes = [tuple(shape) for shape in engine.get_tensor_profile_shape(IMAGE, index)]
        try:
            sizes = [(batch, height, width) for batch, height, width, channels in shapes if channels == 3]
            profiles.append(Profile(*sizes))
        except (TypeError, ValueError) as error:
            raise EngineError(
                f"{contract.name}: profile {index}: got {shapes}, expected three of [N, H, W, 3]"
            ) from error
    return tuple(profiles)


def _pixels(shape: tuple[int, int, int]) -> int:
    batch, height, width = shape
    return batch * height * width
