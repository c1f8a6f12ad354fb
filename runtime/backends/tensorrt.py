"""Graphs on TensorRT 10 and 11 and on TensorRT-RTX, from the plans that `multisa build` has made.

    with open_tensorrt(bundle, CAM) as engine:
        outputs = engine.run(image)                   # NumPy arrays
        there = engine.run_on_device(image)           # arrays of the device, for multisa.kernels

This runs plans and makes none: a bundle without one for this GPU is BackendUnavailable.
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
    start_library,
)
from multisa.runtime.bundle import ENGINES_FOLDER, Bundle
from multisa.runtime.errors import BackendError, BackendUnavailable, BundleError, UsageError

# Where a library says that the bytes are not of its making: another format or version. The name of its own
# call, deserializeCudaEngine, is in many other messages.
_NOT_ITS_PLAN = re.compile(
    r"\bserialization\b|magic ?tag|version tag|not compatible with this version", re.IGNORECASE
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
    may_repair: bool = True,
) -> TensorRTBackend:
    """Load the plan of a bundle's graph for the first GPU.

    `library` is one of LIBRARIES, or None for the first that is here and has a plan; `cache` is a folder of
    plans besides the bundle's own. With `long_side` a plan is passed over unless it takes every image up
    to there. Damaged plans are put aside if it `may_repair`. Raises UsageError for a precision the bundle does
    not have or an unknown library, BackendUnavailable without driver, pycuda, library or plan, BackendError for
    a plan that breaks the contract or finds no memory.
    """
    digest = _digest_of_graph(bundle, contract, precision)
    if library is not None:
        check_library_name(library)
    gpu = default_gpu()  # before any library: TensorRT ends the process where there is no driver
    target = "sm{}{}".format(*gpu.compute_capability)
    own = bundle.path / ENGINES_FOLDER
    caches = [EngineCache(folder) for folder in ((own,) if cache is None else (cache, own))]
    causes, remedies = [], []
    for name in LIBRARIES if library is None else (library,):
        build = _build_command(bundle, contract, precision, target, name, cache)
        try:
            there = import_library(name)
            wanted = {"onnx_sha256": digest, "library": name, "target": target}
            found = [
                (engine_cache, plan)
                for engine_cache in caches
                for plan in engine_cache.find(**wanted, library_version=there.version)
            ]
            if not found:
                raise BackendUnavailable(f"{there}: no plan for {target} ({gpu.name})", remedy=build)
            opening = _Opening(contract, start_library(there, gpu), gpu, build, long_side, may_repair)
            return opening.first(found)
        except OSError as error:
            causes.append(f"{error.filename}: cannot be read: {error.strerror}")
        except BackendUnavailable as error:
            causes.append(error.cause)
            remedies.append(str(error).removeprefix(error.cause).removeprefix(": "))
    remedy = "; or ".join(filter(None, dict.fromkeys(remedies)))
    raise BackendUnavailable("; ".join(causes), remedy=remedy)


class _RefusedError(Exception):
    """A plan that the library refuses; the message is what it says."""


@dataclass(frozen=True)
class _Opening:
    """Loads the best plan that can be loaded."""

    contract: GraphContract
    started: TensorRTRuntime
    gpu: PrimaryContext
    remedy: str
    long_side: int | None
    may_repair: bool

    def first(self, found: Sequence[tuple[EngineCache, StoredEngine]]) -> TensorRTBackend:
        """Load the best of `found`; raises BackendUnavailable with why each one cannot be."""
        causes = []
        for engine_cache, stored in sorted(found, key=lambda pair: self._rank(pair[1])):
            missing = uncovered_shape(stored.key.profiles, self.long_side) if self.long_side else None
            if missing is not None:
                size = "x".join(map(str, missing))
                causes.append(f"{stored.path}: no profile for {size} (batch x height x width)")
                continue
            try:
                engine = self._load(stored)
            except (_RefusedError, BundleError) as error:
                causes.append(f"{stored.path}: {error}{self._quarantine(engine_cache, stored, str(error))}")
                continue
            except OSError as error:
                causes.append(f"{stored.path}: cannot be read: {error.strerror}")
                continue
            self._tell(stored)
            return engine
        raise BackendUnavailable("; ".join(causes), remedy=self.remedy)

    def _load(self, stored: StoredEngine) -> TensorRTBackend:
        try:
            return TensorRTBackend(
                stored.read(),
                self.contract,
                started=self.started,
                gpu=self.gpu,
                remedy=self.remedy,
                sha256=stored.sha256,
            )
        except BackendUnavailable as error:
            said = error.cause.lower()
            if "out of memory" in said:
                raise BackendError(
                    f"{self.contract.name}: {error}; free memory of {self.gpu.name}"
                ) from error
            if "driver version is insufficient" in said:
                cause = f"{self.contract.name}: {error}"
                raise BackendUnavailable(cause, remedy="update the NVIDIA driver") from error
            raise _RefusedError(str(error)) from error

    def _quarantine(self, engine_cache: EngineCache, stored: StoredEngine, reason: str) -> str:
        """Where the bytes are at fault, and nothing else is; what could not be done."""
        is_damaged = "damaged" in reason or _NOT_ITS_PLAN.search(reason)
        if not (is_damaged and self.may_repair):
            return ""
        try:
            engine_cache.quarantine(stored, reason)
        except OSError as error:
            return f" (and cannot be put aside: {error.strerror})"
        return ""

    def _rank(self, plan: StoredEngine) -> tuple[int, int, str]:
        """Plans tuned on this very GPU first, then those for any, then those with most profiles."""
        places = (self.gpu.name, "")
        place = places.index(plan.key.gpu) if plan.key.gpu in places else len(places)
        return place, -len(plan.key.profiles), plan.key.digest

    def _tell(self, stored: StoredEngine) -> None:
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
    return command if cache is None else f"{command} --engine-cache {cache}"
