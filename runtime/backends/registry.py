"""Which engine runs a graph of a bundle: the one asked for, or the first of ENGINES that is there.

choice = select_backend(load_bundle(path), SEGMENTER)
choice.engine.run(image), choice.reason
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

from multisa.runtime.backends import openvino
from multisa.runtime.backends.base import (
    CONTRACTS,
    PRECISIONS,
    Backend,
    Closeable,
    DetailedBackend,
    GraphContract,
    graph_file,
    how_to_convert,
)
from multisa.runtime.backends.gpus import probe_gpus
from multisa.runtime.backends.onnxruntime import OnnxRuntimeBackend, Provider
from multisa.runtime.bundle import Bundle
from multisa.runtime.errors import BackendError, BackendUnavailable, UsageError
from multisa.runtime.progress import log

AUTO = "auto"

# Which a GPU prefers, of those the bundle has; the CPU runs fp32, for which fp16 is no gain.
_GPU_PRECISIONS = ("fp16", "fp32")


@dataclass(frozen=True)
class BackendRequest:
    """What was asked for; AUTO leaves it to `select_backend`."""

    backend: str = AUTO
    precision: str = AUTO
    engine_cache: Path | None = None  # where TensorRT's plans are looked for, besides the bundle's own
    may_repair: bool = True  # whether damaged plans are put aside


@dataclass(frozen=True)
class SelectedBackend:
    """An open engine for one graph, and why it is this one."""

    graph: str
    backend: Backend
    precision: str
    reason: str

    def to_json(self) -> dict[str, Any]:
        """For the record of a run."""
        record = {"engine": self.backend.name, "precision": self.precision, "reason": self.reason}
        return record | ({"detail": self.backend.detail} if isinstance(self.backend, DetailedBackend) else {})


Opener = Callable[[Bundle, GraphContract, str, BackendRequest, int], Backend]


@dataclass(frozen=True)
class BackendKind:
    """How an engine is opened for (bundle, contract, precision, request, CPU threads), and what it needs."""

    open: Opener
    needs_gpu: bool
    runs_engines: bool = False  # which may be at fault where the graph is not
    # Those it computes in, each with the precision of the file that the graph is read from.
    precisions: Mapping[str, str] = field(default_factory=lambda: {p: p for p in PRECISIONS})
    only: Mapping[str, Sequence[GraphContract]] = field(default_factory=dict)  # of a precision: its graphs


def _open_onnxruntime(
    provider: Provider,
    bundle: Bundle,
    contract: GraphContract,
    precision: str,
    request: BackendRequest,
    threads: int,
) -> Backend:
    graph = bundle.read_file(graph_file(contract, precision))
    return OnnxRuntimeBackend(graph, threads=threads, contract=contract, provider=provider)


def _open_openvino(
    bundle: Bundle, contract: GraphContract, precision: str, request: BackendRequest, threads: int
) -> Backend:
    graph = bundle.read_file(graph_file(contract, openvino.GRAPHS[precision]))
    return openvino.OpenVinoBackend(graph, threads=threads, contract=contract, precision=precision)


def _open_tensorrt(
    library: Literal["tensorrt", "tensorrt-rtx"],
    bundle: Bundle,
    contract: GraphContract,
    precision: str,
    request: BackendRequest,
    threads: int,  # of the CPU, which a plan has no use for
) -> Backend:
    from multisa.runtime.backends.tensorrt import open_tensorrt

    # Left to itself a run must not fail on its third image; who asks for a plan knows its profiles.
    long_side = bundle.manifest.parameters.long_side if request.backend == AUTO else None
    return open_tensorrt(
        bundle,
        contract,
        precision=precision,
        library=library,
        cache=request.engine_cache,
        long_side=long_side,
        may_repair=request.may_repair,
    )


# In the order "auto" tries them.
BACKENDS: dict[str, BackendKind] = {
    "tensorrt": BackendKind(partial(_open_tensorrt, "tensorrt"), needs_gpu=True, runs_engines=True),
    "tensorrt-rtx": BackendKind(partial(_open_tensorrt, "tensorrt-rtx"), needs_gpu=True, runs_engines=True),
    "onnxruntime-cuda": BackendKind(partial(_open_onnxruntime, "cuda"), needs_gpu=True),
    "onnxruntime-cpu": BackendKind(partial(_open_onnxruntime, "cpu"), needs_gpu=False),
    # Last: in fp32, which is what "auto" runs on a CPU, ONNX Runtime is the faster one.
    "openvino": BackendKind(_open_openvino, needs_gpu=False, precisions=openvino.GRAPHS, only=openvino.ONLY),
}
ALL_PRECISIONS = tuple(dict.fromkeys(p for kind in BACKENDS.values() for p in kind.precisions))
_WITHOUT_GPU = " or ".join(name for name, kind in BACKENDS.items() if not kind.needs_gpu)


def open_backend(
    bundle: Bundle, contract: GraphContract, *, threads: int = 1, backend: str = AUTO, precision: str = AUTO
) -> Backend:
    """Load the bundle's graph that keeps `contract`; `select_backend` without the reason."""
    return select_backend(bundle, contract, BackendRequest(backend, precision), threads=threads).backend


def select_backend(
    bundle: Bundle, contract: GraphContract, request: BackendRequest | None = None, *, threads: int = 1
) -> SelectedBackend:
    """Open the engine asked for on the bundle's graph that keeps `contract`, or the first that is there.

    Precision "auto" is fp16 on a GPU where the bundle has it, else fp32. Raises UsageError for an engine that
    does not exist, or a precision that it does not compute in or the bundle lacks, BackendUnavailable where
    the engine cannot run here, BackendError for a graph that cannot be loaded; "auto" passes over a plan that
    cannot be.
    """
    request = request or BackendRequest()
    _check_request(bundle, contract, request)
    names = tuple(BACKENDS) if request.backend == AUTO else (request.backend,)
    skipped: list[BackendError | BackendUnavailable] = []
    # The GPU first: without a driver some libraries cannot even be imported, or end the process.
    without_gpu = probe_gpus().problem if BACKENDS[names[0]].needs_gpu else ""
    if without_gpu:
        skipped.append(BackendUnavailable(without_gpu))
        names = tuple(name for name in names if not BACKENDS[name].needs_gpu)
    for name in names:
        for precision in _precisions(bundle, contract, request, name):
            try:
                backend = BACKENDS[name].open(bundle, contract, precision, request, threads)
            except BackendUnavailable as error:
                skipped.append(error)
                continue
            except BackendError as error:
                if request.backend != AUTO or not BACKENDS[name].runs_engines:
                    raise
                skipped.append(error)
                continue
            return SelectedBackend(contract.name, backend, precision, _reason(request, skipped))
    causes = "; ".join(dict.fromkeys(map(str, skipped)))
    if request.backend == AUTO:
        raise BackendUnavailable(f"no engine can run {contract.name} here: {causes}")
    remedy = f": choose {_WITHOUT_GPU}, or a machine with an NVIDIA GPU and its driver" if without_gpu else ""
    raise BackendUnavailable(f"{request.backend} cannot run {contract.name} here: {causes}{remedy}")


class OpenBackends(Closeable):
    """Open backends, one for each graph; a context manager that closes them."""

    def __init__(self, backends: Sequence[SelectedBackend]) -> None:
        self.backends = tuple(backends)

    def close(self) -> None:
        """Free the memory of all graphs."""
        for selected in self.backends:
            selected.backend.close()


def open_backends(
    bundle: Bundle,
    contracts: Sequence[GraphContract],
    request: BackendRequest | None = None,
    *,
    threads: int = 1,
) -> OpenBackends:
    """Open a backend for each contract and log which one was selected and why. Raises as `select_backend`."""
    with ExitStack() as stack:
        backends = []
        for contract in contracts:
            selected = select_backend(bundle, contract, request, threads=threads)
            stack.callback(selected.backend.close)
            backends.append(selected)
        for line in describe_selection(backends):
            log.info(line)
        stack.pop_all()  # the caller closes them from here on
    return OpenBackends(backends)


def describe_selection(choices: Sequence[SelectedBackend]) -> list[str]:
    """A line for people about each engine that was chosen, graphs of the same one together."""
    graphs: dict[tuple[str, str, str], list[str]] = {}
    for choice in choices:
        same = (choice.backend.name, choice.precision, choice.reason)
        graphs.setdefault(same, []).append(choice.graph)
    return [
        f"{', '.join(of)}: on {name}, {precision} ({reason})"
        for (name, precision, reason), of in graphs.items()
    ]


def bundle_precisions(bundle: Bundle, contract: GraphContract) -> tuple[str, ...]:
    """Precisions of one graph that the bundle has a file in, in the order of PRECISIONS."""
    return tuple(p for p in PRECISIONS if graph_file(contract, p) in bundle.manifest.files)


def backend_precisions(bundle: Bundle, contract: GraphContract, backend: str) -> tuple[str, ...]:
    """Precisions that an engine computes one graph of the bundle in; for AUTO those of all ENGINES."""
    has = bundle_precisions(bundle, contract)
    kinds = [kind for name, kind in BACKENDS.items() if backend in (AUTO, name)]
    return tuple(
        dict.fromkeys(
            precision
            for kind in kinds
            for precision, of_file in kind.precisions.items()
            if of_file in has and contract in kind.only.get(precision, CONTRACTS)
        )
    )


def _check_request(bundle: Bundle, contract: GraphContract, request: BackendRequest) -> None:
    if request.backend != AUTO and request.backend not in BACKENDS:
        raise UsageError(
            f"got the engine {request.backend!r}, expected {AUTO} or one of {', '.join(BACKENDS)}"
        )
    if request.precision not in (AUTO, *ALL_PRECISIONS):
        raise UsageError(
            f"got the precision {request.precision!r}, expected {AUTO} or one of {', '.join(ALL_PRECISIONS)}"
        )
    if request.precision == AUTO:
        return
    able = [name for name, kind in BACKENDS.items() if request.precision in kind.precisions]
    if request.backend not in (AUTO, *able):
        raise UsageError(
            f"{request.backend} computes in {', '.join(BACKENDS[request.backend].precisions)}, got --precision "
            f"{request.precision}: choose one of those, or --backend {' or '.join(able)}"
        )
    if request.precision not in backend_precisions(bundle, contract, request.backend):
        raise UsageError(
            f"{bundle.path}: has {contract.name} in {' and '.join(bundle_precisions(bundle, contract))}, got "
            f"--precision {request.precision}: {how_to_convert(bundle.path, contract, request.precision)}"
        )


def _precisions(
    bundle: Bundle, contract: GraphContract, request: BackendRequest, name: str
) -> tuple[str, ...]:
    if request.precision != AUTO:
        return tuple(p for p in backend_precisions(bundle, contract, name) if p == request.precision)
    if not BACKENDS[name].needs_gpu:
        return ("fp32",)
    return tuple(p for p in _GPU_PRECISIONS if p in bundle_precisions(bundle, contract))


def _reason(request: BackendRequest, skipped: Sequence[BackendError | BackendUnavailable]) -> str:
    """Why it is this engine: the first clause of every cause; `multisa doctor` tells all, and what to do."""
    if request.backend != AUTO:
        return "asked for"
    causes = [error.cause if isinstance(error, BackendUnavailable) else str(error) for error in skipped]
    clauses = dict.fromkeys(cause.partition("; ")[0].partition(", expected ")[0] for cause in causes)
    return f"auto: {'; '.join(clauses)}" if clauses else "auto"
