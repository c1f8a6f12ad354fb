"""The TensorRT libraries: TensorRT 10 and 11, and TensorRT-RTX, which share one Python interface.

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
from types import ModuleType
from typing import Any

from multisa.kernels.cuda.pycuda_context import DeviceUnavailableError, PrimaryContext
from multisa.runtime.errors import EngineUnavailable

TENSORRT, TENSORRT_RTX = "tensorrt", "tensorrt-rtx"

# The second name is what the wheels with the bindings install; the first, what the package around them adds.
_MODULES = {
    TENSORRT: ("tensorrt", "tensorrt_bindings"),
    TENSORRT_RTX: ("tensorrt_rtx", "tensorrt_rtx_bindings"),
}
_REMEDIES = {
    TENSORRT: "pip install tensorrt-cu13 --extra-index-url https://pypi.nvidia.com",
    TENSORRT_RTX: "pip install 'multisa[rtx]'",
}
_OLDEST = {TENSORRT: 10, TENSORRT_RTX: 1}  # major versions
_KEPT_ERRORS = 8
_LOGGER = logging.getLogger("multisa.runtime.tensorrt")


class ErrorLog:
    """What a library has said went wrong; its calls only return False or None."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._messages: deque[str] = deque(maxlen=_KEPT_ERRORS)

    def add(self, message: str) -> None:
        """Keep a message; the oldest are forgotten."""
        with self._lock:
            self._messages.append(message.strip())

    def take(self) -> str:
        """Return what was said since the last call, on one line."""
        with self._lock:
            text = "; ".join(" ".join(message.split()) for message in self._messages)
            self._messages.clear()
        return text or "no reason given"


@dataclass(frozen=True)
class Library:
    """A library that was started."""

    name: str
    module: Any
    runtime: Any  # its IRuntime
    errors: ErrorLog


@functools.lru_cache(maxsize=1)
def default_gpu() -> PrimaryContext:
    """The first GPU, opened once. Raises EngineUnavailable without pycuda, a driver or a GPU."""
    try:
        return PrimaryContext()
    except DeviceUnavailableError as error:
        raise EngineUnavailable(f"TensorRT cannot run: {error}") from error


def import_library(name: str) -> ModuleType:
    """Import a library by its name, TENSORRT or TENSORRT_RTX; this needs no driver.

    Raises EngineUnavailable when it is not installed, cannot be loaded, or is too old.
    """
    remedy = _REMEDIES[name]
    for module_name in _MODULES[name]:
        specification = _find(module_name)
        # Type stubs leave a folder of that name without a module in it.
        if specification is None or specification.origin is None:
            continue
        try:
            module = importlib.import_module(module_name)
        except (ImportError, OSError) as error:
            raise EngineUnavailable(
                f"{name}: is installed and cannot be loaded ({error}); with its libraries: {remedy}"
            ) from error
        version = str(getattr(module, "__version__", "unknown"))
        major = version.split(".")[0]
        if not major.isdigit() or int(major) < _OLDEST[name]:
            raise EngineUnavailable(
                f"{name}: got version {version}, expected {_OLDEST[name]} or newer: {remedy}"
            )
        return module
    raise EngineUnavailable(f"{name}: is not installed: {remedy}")


@functools.lru_cache(maxsize=len(_MODULES))
def start_library(name: str, gpu: PrimaryContext) -> Library:
    """Start a library once in this process; `gpu` shows that a driver is there.

    Raises EngineUnavailable when it does not start.
    """
    module: Any = import_library(name)
    logger, errors = library_log(module)
    with gpu.active():
        try:
            runtime = module.Runtime(logger)
        except (TypeError, RuntimeError) as error:  # how the bindings report a null pointer
            said = f"{error}; {errors.take()}"
            raise EngineUnavailable(
                f"{name} {module.__version__}: does not start on {gpu.name}: {said}; update the driver"
            ) from error
    return Library(name, module, runtime, errors)


@functools.cache
def library_log(module: Any) -> tuple[Any, ErrorLog]:
    """Return the library's logger and the errors it keeps; its messages go to `logging`.

    A library holds on to the first logger it is given for as long as it is loaded, so there is one in a
    process and it never goes away.
    """
    errors = ErrorLog()
    severity = module.ILogger.Severity
    levels = {
        severity.INTERNAL_ERROR: logging.ERROR,
        severity.ERROR: logging.ERROR,
        severity.WARNING: logging.WARNING,
    }

    class Logger(module.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            module.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            level = levels.get(severity, logging.DEBUG)
            if level == logging.ERROR:
                errors.add(message)
                level = logging.DEBUG  # it becomes an exception, which says it once
            _LOGGER.log(level, "%s", message)

    return Logger(), errors


def _find(module_name: str) -> Any:
    try:
        return importlib.util.find_spec(module_name)
    except ValueError:  # imported, and without a specification
        return None
