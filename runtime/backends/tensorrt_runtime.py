"""Import and start the TensorRT libraries: TensorRT 10 and 11, and TensorRT-RTX, which share one Python API.

    library = import_library(TENSORRT_RTX)              # needs no driver; enough to build ahead of time
    runtime = start_runtime(library, default_gpu())     # runs engines

Libraries are imported on first use, and started only after the driver has answered: creating TensorRT's
runtime without a driver ends the process with a segmentation fault.
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

# The bindings (second name) are all that is needed. The full package (first name) re-exports them.
_MODULES = {TENSORRT: ("tensorrt", "tensorrt_bindings"), TENSORRT_RTX: ("tensorrt_rtx", "tensorrt_rtx_bindings")}
_INSTALL = {
    TENSORRT: "pip install tensorrt-cu13",
    TENSORRT_RTX: "pip install tensorrt-rtx-cu13-bindings tensorrt-rtx-cu13-libs",
}
_OLDEST = {TENSORRT: 10, TENSORRT_RTX: 1}  # major versions; since 10, networks can be strongly typed
# TensorRT's data types -> NumPy's names; a tensor of any other type breaks every contract.
DTYPES = {"FLOAT": "float32", "HALF": "float16", "UINT8": "uint8", "INT32": "int32", "INT64": "int64"}
_KEPT_MESSAGES = 64  # errors, and as many warnings
_SHOWN_ERRORS = 8  # of the kept ones, in an exception
_LOGGER = logging.getLogger("multisa.runtime.tensorrt")


@dataclass(frozen=True)
class Library:
    """An imported TensorRT library."""

    name: str  # one of LIBRARIES
    module: Any
    version: str

    @property
    def is_rtx(self) -> bool:
        """Whether it is TensorRT-RTX, which builds without a GPU and captures CUDA graphs by itself."""
        return self.name == TENSORRT_RTX

    @property
    def major(self) -> int:
        """Major version, which decides what the API offers; the names in the bindings do not tell."""
        return int(self.version.split(".")[0])

    def __str__(self) -> str:
        """Name and version."""
        return f"{self.name} {self.version}"


class LibraryLog:
    """What a library has logged; its failing calls only return False or None. Thread-safe."""

    def __init__(self) -> None:
        """Start empty."""
        self._lock = threading.Lock()
        self._errors: deque[str] = deque(maxlen=_KEPT_MESSAGES)
        self._warnings: deque[str] = deque(maxlen=_KEPT_MESSAGES)

    @property
    def errors(self) -> tuple[str, ...]:
        """The last errors since the log was cleared, at most 64."""
        with self._lock:
            return tuple(self._errors)

    @property
    def warnings(self) -> tuple[str, ...]:
        """The last warnings since the log was cleared, at most 64."""
        with self._lock:
            return tuple(self._warnings)

    def add_error(self, message: str) -> None:
        """Store an error."""
        with self._lock:
            self._errors.append(message.strip())

    def add_warning(self, message: str) -> None:
        """Store a warning."""
        with self._lock:
            self._warnings.append(message.strip())

    def clear(self) -> None:
        """Drop all errors and warnings."""
        with self._lock:
            self._errors.clear()
            self._warnings.clear()

    def take(self) -> str:
        """Return the last errors on one line, and clear the log."""
        with self._lock:
            last = list(self._errors)[-_SHOWN_ERRORS:]
            self._errors.clear()
            self._warnings.clear()
        return "; ".join(" ".join(message.split()) for message in last) or "no reason given"


@dataclass(frozen=True)
class TensorRTRuntime:
    """A started library, which can load engines."""

    library: Library
    handle: Any  # its IRuntime, which must outlive the engines it has loaded
    log: LibraryLog


def check_library_name(name: str) -> None:
    """Raise UsageError unless `name` is one of LIBRARIES."""
    if name not in LIBRARIES:
        raise UsageError(f"library: got {name!r}, expected {' or '.join(LIBRARIES)}")


def import_library(name: str) -> Library:
    """Import a library by name, one of LIBRARIES. Needs no driver.

    Raises UsageError for another name; BackendUnavailable if it is not installed, cannot be loaded or is too
    old.
    """
    check_library_name(name)
    remedy = _INSTALL[name]
    found = [module for module in _MODULES[name] if _is_installed(module)]
    if not found:
        raise BackendUnavailable(f"{name} is not installed", remedy=remedy)
    try:
        module = importlib.import_module(found[0])
    except (ImportError, OSError) as error:
        raise BackendUnavailable(
            f"{name} is installed but cannot be loaded ({error})", remedy=f"install it with its libraries: {remedy}"
        ) from error
    version = str(getattr(module, "__version__", "unknown"))
    major = version.split(".")[0]
    if not major.isdigit() or int(major) < _OLDEST[name]:
        raise BackendUnavailable(f"{name}: got version {version}, expected {_OLDEST[name]} or newer", remedy=remedy)
    return Library(name, module, version)


@functools.lru_cache(maxsize=1)
def default_gpu() -> PrimaryContext:
    """Open the first GPU, once per process. Raises BackendUnavailable without pycuda, a driver or a GPU."""
    try:
        return PrimaryContext()
    except DeviceUnavailableError as error:
        cause, _, remedy = str(error).partition("; ")
        raise BackendUnavailable(f"TensorRT cannot run: {cause}", remedy=remedy) from error


@functools.lru_cache(maxsize=len(LIBRARIES))
def start_runtime(library: Library, gpu: PrimaryContext) -> TensorRTRuntime:
    """Start a library, once per process; an open `gpu` proves that there is a driver.

    Raises BackendUnavailable if it does not start.
    """
    logger, log = library_log(library.module)
    with gpu.active():
        try:
            handle = library.module.Runtime(logger)
        except (TypeError, RuntimeError) as error:  # how the bindings report a null pointer
            raise BackendUnavailable(
                f"{library}: does not start on {gpu.name}: {error}; {log.take()}", remedy="update the driver"
            ) from error
    return TensorRTRuntime(library, handle, log)


@functools.cache
def library_log(module: Any) -> tuple[Any, LibraryLog]:
    """Return the library's logger and the log it fills, for builds and runs; messages also go to `logging`.

    A library uses the first logger it is given for as long as it is loaded, so there is one per process, kept
    forever.
    """
    log = LibraryLog()
    severities = module.ILogger.Severity

    class Logger(module.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            module.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            level = logging.DEBUG
            if severity in (severities.ERROR, severities.INTERNAL_ERROR):
                log.add_error(message)  # becomes an exception, so it is not logged as an error too
            elif severity == severities.WARNING:
                log.add_warning(message)
                level = logging.WARNING
            _LOGGER.log(level, "%s", message)

    return Logger(), log


def _is_installed(module_name: str) -> bool:
    try:
        spec = importlib.util.find_spec(module_name)
    except ValueError:  # already imported, without a spec
        return True
    # Type stubs install a folder of this name that contains no module.
    return spec is not None and spec.origin is not None
