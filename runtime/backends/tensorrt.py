"""Run graphs on TensorRT 10 and 11 and on TensorRT-RTX, from the engines that `multisa build` has built.

    with open_tensorrt(bundle, CAM) as backend:
        outputs = backend.run(image)                  # NumPy arrays
        on_device = backend.run_on_device(image)      # device arrays, for multisa.kernels

This module builds no engines: a bundle without one for this GPU is BackendUnavailable.
"""

import logging
import re
import threading
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy.typing as npt

from multisa.kernels.cuda.calls import DeviceArray
from multisa.kernels.cuda.pycuda_context import PrimaryContext
from multisa.runtime.backends.base import (
    IMAGE,
    PRECISIONS,
    Closeable,
    GraphContract,
    UInt8,
    check_image,
    closed_error,
    graph_file,
)
from multisa.runtime.backends.engine_cache import EngineCache, Profile, StoredEngine, uncovered_shape
from multisa.runtime.backends.tensorrt_context import ExecutionContext, LoadedEngine
from multisa.runtime.backends.tensorrt_runtime import (
    DTYPES,
    LIBRARIES,
    TensorRTRuntime,
    check_library_name,
    default_gpu,
    import_library,
    start_runtime,
)
from multisa.runtime.bundle import ENGINES_FOLDER, Bundle
from multisa.runtime.errors import BackendError, BackendUnavailable, BundleError, UsageError
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
        return BackendError(f"{self.contract.name}: cannot be run on {self._loaded.gpu.name}: {error} ({messages})")


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


# How a library reports bytes that it did not write, or another version of it did. It must not match the name
# of the library's own call, deserializeCudaEngine, which many other messages contain.
_NOT_ITS_ENGINE = re.compile(
    r"\bserialization\b|magic ?tag|version tag|not compatible with this version", re.IGNORECASE
)
_LOGGER = logging.getLogger("multisa.runtime.tensorrt")


@dataclass(frozen=True)
class TensorRTOptions:
    """Which engine `open_tensorrt` loads."""

    precision: str = "fp32"  # one of PRECISIONS that the bundle has
    library: str | None = None  # one of LIBRARIES; None: the first that is installed and has an engine
    engine_cache: Path | None = None  # searched before the bundle's own cache
    long_side: int | None = None  # skip engines that do not take every image up to this size; None: any engine
    may_repair: bool = True  # whether damaged engines are moved to quarantine


def open_tensorrt(bundle: Bundle, contract: GraphContract, options: TensorRTOptions | None = None) -> TensorRTBackend:
    """Load the best engine of a bundle's graph for the first GPU.

    Raises UsageError for an unknown library or a precision that the bundle lacks; BackendUnavailable without
    driver, pycuda, library or engine; BackendError for an engine that breaks the contract or does not fit
    into the GPU's memory.
    """
    options = options or TensorRTOptions()
    digest = _digest_of_graph(bundle, contract, options.precision)
    if options.library is not None:
        check_library_name(options.library)
    gpu = default_gpu()  # before any library: TensorRT ends the process if there is no driver
    target = "sm{}{}".format(*gpu.compute_capability)
    own = bundle.path / ENGINES_FOLDER
    folders = (own,) if options.engine_cache is None else (options.engine_cache, own)
    causes, remedies = [], []
    for name in LIBRARIES if options.library is None else (options.library,):
        command = _build_command(bundle, contract, options, target, name)
        try:
            library = import_library(name)
            wanted = {"onnx_sha256": digest, "library": name, "target": target}
            found = [
                (cache, stored)
                for cache in map(EngineCache, folders)
                for stored in cache.find(**wanted, library_version=library.version)
            ]
            if not found:
                raise BackendUnavailable(f"{library}: no engine for {target} ({gpu.name})", remedy=command)
            return _EngineLoader(contract, options, start_runtime(library, gpu), gpu, command).load_best(found)
        except OSError as error:
            causes.append(f"{error.filename}: cannot be read: {error.strerror}")
        except BackendUnavailable as error:
            causes.append(error.cause)
            remedies.append(str(error).removeprefix(error.cause).removeprefix(": "))
    remedy = "; or ".join(filter(None, dict.fromkeys(remedies)))
    raise BackendUnavailable("; ".join(causes), remedy=remedy)


class _RefusedError(Exception):
    """The library refuses an engine; the message quotes it."""


@dataclass(frozen=True)
class _EngineLoader:
    """Loads the best of several stored engines."""

    contract: GraphContract
    options: TensorRTOptions
    runtime: TensorRTRuntime
    gpu: PrimaryContext
    remedy: str  # the command that builds a fitting engine

    def load_best(self, found: Sequence[tuple[EngineCache, StoredEngine]]) -> TensorRTBackend:
        """Load the best engine that can be loaded. Raises BackendUnavailable with the problem of each one."""
        causes = []
        long_side = self.options.long_side
        for cache, stored in sorted(found, key=lambda pair: self._rank(pair[1])):
            missing = uncovered_shape(stored.key.profiles, long_side) if long_side else None
            if missing is not None:
                size = "x".join(map(str, missing))
                causes.append(f"{stored.path}: no profile for {size} (batch x height x width)")
                continue
            try:
                backend = self._load(stored)
            except (_RefusedError, BundleError) as error:
                causes.append(f"{stored.path}: {error}{self._quarantine(cache, stored, str(error))}")
                continue
            except OSError as error:
                causes.append(f"{stored.path}: cannot be read: {error.strerror}")
                continue
            self._log(stored)
            return backend
        raise BackendUnavailable("; ".join(causes), remedy=self.remedy)

    def _load(self, stored: StoredEngine) -> TensorRTBackend:
        try:
            return TensorRTBackend(
                stored.read(),
                self.contract,
                runtime=self.runtime,
                gpu=self.gpu,
                remedy=self.remedy,
                sha256=stored.sha256,
            )
        except BackendUnavailable as error:
            cause = error.cause.lower()
            if "out of memory" in cause:
                raise BackendError(f"{self.contract.name}: {error}; free memory of {self.gpu.name}") from error
            if "driver version is insufficient" in cause:
                raise BackendUnavailable(f"{self.contract.name}: {error}", remedy="update the NVIDIA driver") from error
            raise _RefusedError(str(error)) from error

    def _quarantine(self, cache: EngineCache, stored: StoredEngine, reason: str) -> str:
        """Move an engine to quarantine if its bytes are at fault; return a note if that fails, else ""."""
        is_damaged = "damaged" in reason or _NOT_ITS_ENGINE.search(reason)
        if not (is_damaged and self.options.may_repair):
            return ""
        try:
            cache.quarantine(stored, reason)
        except OSError as error:
            return f" (and cannot be moved to quarantine: {error.strerror})"
        return ""

    def _rank(self, stored: StoredEngine) -> tuple[int, int, str]:
        """Engines tuned on this GPU model first, then those built for any, then the most profiles."""
        models = (self.gpu.name, "")
        place = models.index(stored.key.gpu) if stored.key.gpu in models else len(models)
        return place, -len(stored.key.profiles), stored.key.digest

    def _log(self, stored: StoredEngine) -> None:
        name, gpu = self.contract.name, self.gpu.name
        if stored.key.gpu not in ("", gpu):
            _LOGGER.warning(
                "%s: the engine was tuned on %s and may be slow on %s: %s",
                name, stored.key.gpu, gpu, self.remedy,
            )  # fmt: skip
        _LOGGER.debug("%s: %s on %s", name, stored.path, gpu)


def _digest_of_graph(bundle: Bundle, contract: GraphContract, precision: str) -> str:
    """SHA-256 of the graph's file. Raises UsageError if the bundle has none in this precision."""
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


def _build_command(bundle: Bundle, contract: GraphContract, options: TensorRTOptions, target: str, library: str) -> str:
    command = f"multisa build {bundle.path} --target {target} --graph {contract.name} --library {library}"
    if options.precision != "fp32":
        command += f" --precision {options.precision}"
    return command if options.engine_cache is None else f"{command} --engine-cache {options.engine_cache}"
