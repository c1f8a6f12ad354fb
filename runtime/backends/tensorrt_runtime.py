"""The TensorRT libraries: TensorRT 10 and 11, and TensorRT-RTX, which share one Python interface.

    library = import_library(TENSORRT_RTX)              # needs no driver; enough to build ahead of time
    started = start_library(library, default_gpu())     # runs plans

Nothing is imported before it is asked for, and a library is not started before the driver has answered:
TensorRT's runtime, made where there is no driver, ends the process with a segmentation fault.
"""

import functools
import importlib
import importlib.util
import logging
import threading
from collections import deque
from dataclasses import dataclass
from typing import Any

from multisa.kernels.cuda.pycuda_context import DeviceUnavailableError, PrimaryContext
from multisa.runtime.errors import BackendUnavailable, UsageError

TENSORRT, TENSORRT_RTX = "tensorrt", "tensorrt-rtx"
LIBRARIES = (TENSORRT, TENSORRT_RTX)  # in the order they are tried

# The bindings, which the wheels install under the second name, are all that is needed; the package around
# them, where it is there, passes their names on under the first.
_MODULES = {
    TENSORRT: ("tensorrt", "tensorrt_bindings"),
    TENSORRT_RTX: ("tensorrt_rtx", "tensorrt_rtx_bindings"),
}
_INSTALL = {
    TENSORRT: "pip install tensorrt-cu13",
    TENSORRT_RTX: "pip install tensorrt-rtx-cu13-bindings tensorrt-rtx-cu13-libs",
}
_OLDEST = {TENSORRT: 10, TENSORRT_RTX: 1}  # major versions; from 10 on graphs carry their own types
# NumPy's names of the libraries' types; a tensor of any other type breaks every contract.
DTYPES = {"FLOAT": "float32", "HALF": "float16", "UINT8": "uint8", "INT32": "int32", "INT64": "int64"}
_KEPT_MESSAGES = 64  # errors, and as many warnings
_TOLD_ERRORS = 8
_LOGGER = logging.getLogger("multisa.runtime.tensorrt")


@dataclass(frozen=True)
class Library:
    """A library that was imported."""

    name: str  # one of LIBRARIES
    module: Any
    version: str

    @property
    def is_rtx(self) -> bool:
        """Whether it builds ahead of time, for GPUs by their compute capability, and records by itself."""
        return self.name == TENSORRT_RTX

    @property
    def major(self) -> int:
        """Major version, which decides what the interface has; the names in a binding mislead."""
        return int(self.version.split(".")[0])

    def __str__(self) -> str:
        """Name and version."""
        return f"{self.name} {self.version}"


class LibraryLog:
    """What a library has said went wrong; its calls only return False or None. Any thread may use it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._errors: deque[str] = deque(maxlen=_KEPT_MESSAGES)
        self._warnings: deque[str] = deque(maxlen=_KEPT_MESSAGES)

    @property
    def errors(self) -> tuple[str, ...]:
        """Errors since the log was cleared, the oldest of very many forgotten."""
        with self._lock:
            return tuple(self._errors)

    @property
    def warnings(self) -> tuple[str, ...]:
        """Warnings since the log was cleared, the oldest of very many forgotten."""
        with self._lock:
            return tuple(self._warnings)

    def add_error(self, message: str) -> None:
        """Keep an error."""
        with self._lock:
            self._errors.append(message.strip())

    def add_warning(self, message: str) -> None:
        """Keep a warning."""
        with self._lock:
            self._warnings.append(message.strip())

    def clear(self) -> None:
        """Forget what was said."""
        with self._lock:
            self._errors.clear()
            self._warnings.clear()

    def take(self) -> str:
        """Return the last errors on one line, and forget what was said."""
        with self._lock:
            last = list(self._errors)[-_TOLD_ERRORS:]
            self._errors.clear()
            self._warnings.clear()
        return "; ".join(" ".join(message.split()) for message in last) or "no reason given"


@dataclass(frozen=True)
class TensorRTRuntime:
    """A library that runs plans."""

    library: Library
    runtime: Any  # its IRuntime, which must outlive what it has loaded
    log: LibraryLog


def check_library_name(name: str) -> None:
    """Raise UsageError unless `name` is one of LIBRARIES."""
    if name not in LIBRARIES:
        raise UsageError(f"library: got {name!r}, expected {' or '.join(LIBRARIES)}")


def import_library(name: str) -> Library:
    """Import a library by its name, one of LIBRARIES; this needs no driver.

    Raises UsageError for another name, BackendUnavailable when it is not installed, cannot be loaded, or is
    too old.
    """
    check_library_name(name)
    remedy = _INSTALL[name]
    found = [module for module in _MODULES[name] if _is_there(module)]
    if not found:
        raise BackendUnavailable(f"{name} is not installed", remedy=remedy)
    try:
        module = importlib.import_module(found[0])
    except (ImportError, OSError) as error:
        raise BackendUnavailable(
            f"{name} is installed and cannot be loaded ({error})", remedy=f"with its libraries: {remedy}"
        ) from error
    version = str(getattr(module, "__version__", "unknown"))
    major = version.split(".")[0]
    if not major.isdigit() or int(major) < _OLDEST[name]:
        raise BackendUnavailable(
            f"{name}: got version {version}, expected {_OLDEST[name]} or newer", remedy=remedy
        )
    return Library(name, module, version)


@functools.lru_cache(maxsize=1)
def default_gpu() -> PrimaryContext:
    """The first GPU, opened once. Raises BackendUnavailable without pycuda, a driver or a GPU."""
    try:
        return PrimaryContext()
    except DeviceUnavailableError as error:
        cause, _, remedy = str(error).partition("; ")
        raise BackendUnavailable(f"TensorRT cannot run: {cause}", remedy=remedy) from error


@functools.lru_cache(maxsize=len(LIBRARIES))
def start_library(library: Library, gpu: PrimaryContext) -> TensorRTRuntime:
    """Start a library once in this process; `gpu` shows that a driver is there.

    Raises BackendUnavailable when it does not start.
    """
    logger, log = library_log(library.module)
    with gpu.active():
        try:
            runtime = library.module.Runtime(logger)
        except (TypeError, RuntimeError) as error:  # how the bindings report a null pointer
            said = f"{error}; {log.take()}"
            raise BackendUnavailable(
                f"{library}: does not start on {gpu.name}: {said}", remedy="update the driver"
            ) from error
    return TensorRTRuntime(library, runtime, log)


@functools.cache
def library_log(module: Any) -> tuple[Any, LibraryLog]:
    """Return the library's logger and what it keeps, for builds and runs alike; all goes to `logging` too.

    A library holds on to the first logger it is given for as long as it is loaded, so there is one in a
    process and it never goes away.
    """
    log = LibraryLog()
    severities = module.ILogger.Severity

    class Logger(module.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            module.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            level = logging.DEBUG
            if severity in (severities.ERROR, severities.INTERNAL_ERROR):
                log.add_error(message)  # it becomes an exception, which says it once
            elif severity == severities.WARNING:
                log.add_warning(message)
                level = logging.WARNING
            _LOGGER.log(level, "%s", message)

    return Logger(), log


def _is_there(module_name: str) -> bool:
    try:
        specification = importlib.util.find_spec(module_name)
    except ValueError:  # imported already, without a specification
        return True
    # Type stubs leave a folder of this name with no module in it.
    return specification is not None and specification.origin is not None
