"""Run graphs on TensorRT 10 and 11 and on TensorRT-RTX, from the engines that `multisa build` has built.

    with open_tensorrt(bundle, CAM) as backend:
        outputs = backend.run(image)                  # NumPy arrays
        on_device = backend.run_on_device(image)      # device arrays, for multisa.kernels

This module builds no engines: a bundle without one for this GPU is BackendUnavailable.
"""

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from multisa.kernels.cuda.pycuda_context import PrimaryContext
from multisa.runtime.backends.base import PRECISIONS, GraphContract, graph_file
from multisa.runtime.backends.engine_cache import EngineCache, StoredEngine, uncovered_shape
from multisa.runtime.backends.tensorrt_engine import TensorRTBackend
from multisa.runtime.backends.tensorrt_runtime import (
    LIBRARIES,
    TensorRTRuntime,
    check_library_name,
    default_gpu,
    import_library,
    start_runtime,
)
from multisa.runtime.bundle import ENGINES_FOLDER, Bundle
from multisa.runtime.errors import BackendError, BackendUnavailable, BundleError, UsageError

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
    long_side: int | None = (
        None  # skip engines that do not take every image up to this size; None: any engine
    )
    may_repair: bool = True  # whether damaged engines are moved to quarantine


def open_tensorrt(
    bundle: Bundle, contract: GraphContract, options: TensorRTOptions | None = None
) -> TensorRTBackend:
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
            return _EngineLoader(contract, options, start_runtime(library, gpu), gpu, command).load_best(
                found
            )
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
                raise BackendError(
                    f"{self.contract.name}: {error}; free memory of {self.gpu.name}"
                ) from error
            if "driver version is insufficient" in cause:
                raise BackendUnavailable(
                    f"{self.contract.name}: {error}", remedy="update the NVIDIA driver"
                ) from error
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


def _build_command(
    bundle: Bundle, contract: GraphContract, options: TensorRTOptions, target: str, library: str
) -> str:
    command = f"multisa build {bundle.path} --target {target} --graph {contract.name} --library {library}"
    if options.precision != "fp32":
        command += f" --precision {options.precision}"
    return command if options.engine_cache is None else f"{command} --engine-cache {options.engine_cache}"
