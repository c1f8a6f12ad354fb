"""Select the backend that runs a graph: the requested one, or the first of BACKENDS that works here.

selected = select_backend(load_bundle(path), SEGMENTER)
selected.backend.run(image), selected.reason
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np

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
from multisa.runtime.backends.gpus import GpuProbe, probe_gpus
from multisa.runtime.backends.onnxruntime import OnnxRuntimeBackend, Provider
from multisa.runtime.bundle import Bundle, default_bundle_path, load_bundle
from multisa.runtime.errors import BackendError, BackendUnavailable, MultisaError, UsageError
from multisa.runtime.progress import log
from multisa.runtime.system import processor_features

AUTO = "auto"

# In order of preference. On a CPU "auto" is fp32: fp16 is not faster there.
_GPU_PRECISIONS = ("fp16", "fp32")

# What a broken installation of a backend's package raises.
BROKEN_PACKAGE_ERRORS = (ImportError, OSError, AttributeError, RuntimeError, ValueError)


@dataclass(frozen=True)
class BackendRequest:
    """What the user asks for; AUTO leaves the choice to `select_backend`."""

    backend: str = AUTO  # a key of BACKENDS
    precision: str = AUTO  # one of ALL_PRECISIONS
    engine_cache: Path | None = None  # searched for TensorRT engines before the bundle's own cache
    may_repair: bool = True  # whether damaged engines may be moved to quarantine


@dataclass(frozen=True)
class SelectedBackend:
    """An open backend for one graph, and why it was selected."""

    graph: str  # name of the contract
    backend: Backend
    precision: str
    reason: str  # for run.json: every backend that was skipped, and why
    notice: str = ""  # for people; `reason` when empty

    def to_json(self) -> dict[str, Any]:
        """For run.json."""
        record = {"backend": self.backend.name, "precision": self.precision, "reason": self.reason}
        return record | ({"detail": self.backend.detail} if isinstance(self.backend, DetailedBackend) else {})


@dataclass(frozen=True)
class GraphToOpen:
    """The graph that a backend is to open, and how."""

    bundle: Bundle
    contract: GraphContract
    precision: str  # one of the backend's
    request: BackendRequest
    threads: int  # CPU threads per call

    def read_file(self, file_precision: str) -> bytes:
        """Bytes of the graph's file in `file_precision`, verified."""
        return self.bundle.read_file(graph_file(self.contract, file_precision))


@dataclass(frozen=True)
class BackendKind:
    """How to open a backend, and what it needs."""

    open: Callable[[GraphToOpen], Backend]
    needs_gpu: bool
    runs_engines: bool = False  # runs built TensorRT engines, which may be broken where the graph is not
    # Precisions it computes in -> precision of the file it reads for that.
    precisions: Mapping[str, str] = field(default_factory=lambda: {p: p for p in PRECISIONS})
    only: Mapping[str, Sequence[GraphContract]] = field(default_factory=dict)  # precision -> its only graphs


def _open_onnxruntime(provider: Provider, graph: GraphToOpen) -> Backend:
    return OnnxRuntimeBackend(
        graph.read_file(graph.precision), threads=graph.threads, contract=graph.contract, provider=provider
    )


def _open_openvino(graph: GraphToOpen) -> Backend:
    return openvino.OpenVinoBackend(
        graph.read_file(openvino.FILE_PRECISIONS[graph.precision]),
        threads=graph.threads,
        contract=graph.contract,
        precision=graph.precision,
    )


def _open_tensorrt(library: Literal["tensorrt", "tensorrt-rtx"], graph: GraphToOpen) -> Backend:
    from multisa.runtime.backends.tensorrt import TensorRTOptions, open_tensorrt

    # Under "auto" an engine must take every image, or the run would fail at its third one. Who requests
    # TensorRT explicitly knows the profiles that were built.
    is_auto = graph.request.backend == AUTO
    options = TensorRTOptions(
        precision=graph.precision,
        library=library,
        engine_cache=graph.request.engine_cache,
        long_side=graph.bundle.manifest.parameters.long_side if is_auto else None,
        may_repair=graph.request.may_repair,
    )
    return open_tensorrt(graph.bundle, graph.contract, options)


# In the order "auto" tries them.
BACKENDS: dict[str, BackendKind] = {
    "tensorrt": BackendKind(partial(_open_tensorrt, "tensorrt"), needs_gpu=True, runs_engines=True),
    "tensorrt-rtx": BackendKind(partial(_open_tensorrt, "tensorrt-rtx"), needs_gpu=True, runs_engines=True),
    "onnxruntime-cuda": BackendKind(partial(_open_onnxruntime, "cuda"), needs_gpu=True),
    "onnxruntime-cpu": BackendKind(partial(_open_onnxruntime, "cpu"), needs_gpu=False),
    # Last: "auto" runs fp32 on a CPU, where ONNX Runtime is faster.
    "openvino": BackendKind(_open_openvino, needs_gpu=False, precisions=openvino.FILE_PRECISIONS, only=openvino.ONLY),
}
ALL_PRECISIONS = tuple(dict.fromkeys(p for kind in BACKENDS.values() for p in kind.precisions))
_WITHOUT_GPU = " or ".join(name for name, kind in BACKENDS.items() if not kind.needs_gpu)


def open_backend(
    bundle: Bundle, contract: GraphContract, *, threads: int = 1, backend: str = AUTO, precision: str = AUTO
) -> Backend:
    """Open the bundle's graph of `contract`: `select_backend` without the reason."""
    return select_backend(bundle, contract, BackendRequest(backend, precision), threads=threads).backend


def select_backend(
    bundle: Bundle, contract: GraphContract, request: BackendRequest | None = None, *, threads: int = 1
) -> SelectedBackend:
    """Open the bundle's graph of `contract` in the requested backend, or in the first of BACKENDS that works.

    Precision "auto" means fp16 on a GPU if the bundle has it, else fp32. Under "auto", a backend that is
    unavailable and a TensorRT engine that cannot be loaded are skipped. Raises UsageError for an unknown
    backend, or a precision that the backend or the bundle lacks; BackendUnavailable if the backend cannot run
    here; BackendError if the graph cannot be loaded.
    """
    request = request or BackendRequest()
    _check_request(bundle, contract, request)
    names = tuple(BACKENDS) if request.backend == AUTO else (request.backend,)
    skipped: list[BackendError | BackendUnavailable] = []
    # Check for a GPU first: without a driver, importing some libraries fails or even ends the process.
    probe = probe_gpus() if BACKENDS[names[0]].needs_gpu else GpuProbe()
    if probe.problem:
        skipped.append(BackendUnavailable(probe.problem))
        names = tuple(name for name in names if not BACKENDS[name].needs_gpu)
    for name in names:
        for precision in _precisions(bundle, contract, request, name):
            try:
                backend = BACKENDS[name].open(GraphToOpen(bundle, contract, precision, request, threads))
            except BackendUnavailable as error:
                skipped.append(error)
                continue
            except BackendError as error:
                if request.backend != AUTO or not BACKENDS[name].runs_engines:
                    raise
                skipped.append(error)
                continue
            notice = "no NVIDIA GPU" if probe.is_absent and len(skipped) == 1 else ""
            return SelectedBackend(contract.name, backend, precision, _reason(request, skipped), notice)
    causes = "; ".join(dict.fromkeys(map(str, skipped)))
    if request.backend == AUTO:
        raise BackendUnavailable(f"no backend can run {contract.name} here: {causes}")
    remedy = f": choose {_WITHOUT_GPU}, or a machine with an NVIDIA GPU and its driver" if probe.problem else ""
    raise BackendUnavailable(f"{request.backend} cannot run {contract.name} here: {causes}{remedy}")


class OpenBackends(Closeable):
    """Open backends, one for each graph; a context manager that closes them."""

    def __init__(self, backends: Sequence[SelectedBackend]) -> None:
        self.backends = tuple(backends)

    def close(self) -> None:
        """Free the memory of all graphs."""
        with ExitStack() as stack:  # all of them, even if one fails
            for selected in self.backends:
                stack.callback(selected.backend.close)


def open_backends(
    bundle: Bundle, contracts: Sequence[GraphContract], request: BackendRequest | None = None, *, threads: int = 1
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
        if any(b.backend.name == "onnxruntime-cpu" and b.precision == "int8" for b in backends) and saturates_int8():
            log.warning(
                "int8 is inexact here: this processor has no VNNI, so sums of products saturate, and masks get worse "
                "(3 mIoU for the packaged bundle): use precision fp32"
            )
        stack.pop_all()  # the caller closes them from here on
    return OpenBackends(backends)


def saturates_int8() -> bool:
    """Whether ONNX Runtime's int8 products of unsigned and signed numbers are added up in 16 bits here (AVX2)."""
    features = processor_features()
    return "avx2" in features and not any("vnni" in feature for feature in features)


def describe_selection(selected: Sequence[SelectedBackend]) -> list[str]:
    """One line for people per distinct backend: "cam, affinity: onnxruntime-cpu, fp32 (no NVIDIA GPU)"."""
    graphs: dict[tuple[str, str, str], list[str]] = {}
    for choice in selected:
        same = (choice.backend.name, choice.precision, choice.notice or choice.reason)
        graphs.setdefault(same, []).append(choice.graph)
    return [
        f"{', '.join(names)}: {backend}, {precision} ({why})" for (backend, precision, why), names in graphs.items()
    ]


@dataclass(frozen=True)
class BackendTrial:
    """The result of running one backend on every graph of a bundle."""

    backend: str
    ran: tuple[str, ...]  # graphs and precisions that ran: "cam fp32"
    problem: str = ""  # why the next graph did not run; empty when all did


def try_backend(bundle: Bundle, backend: str, engine_cache: Path | None = None) -> BackendTrial:
    """Run every graph of the bundle once, on a black image of its largest size. Raises nothing."""
    side = bundle.manifest.parameters.long_side
    image = np.zeros((1, side, side, 3), np.uint8)
    request = BackendRequest(backend, engine_cache=engine_cache, may_repair=False)
    ran: list[str] = []
    try:
        for contract in CONTRACTS:
            selected = select_backend(bundle, contract, request)
            with selected.backend as opened:
                opened.run(image)
            ran.append(f"{contract.name} {selected.precision}")
    except (MultisaError, *BROKEN_PACKAGE_ERRORS) as error:
        return BackendTrial(backend, tuple(ran), " ".join(str(error).split()) or type(error).__name__)
    return BackendTrial(backend, tuple(ran))


def available_backends(bundle: Bundle | None = None) -> tuple[str, ...]:
    """Names of the backends that can run the bundle on this machine, in the order of BACKENDS.

    bundle: the packaged one by default. Each backend runs every graph once, which takes seconds. Raises
    BundleError if the packaged bundle is damaged.
    """
    bundle = bundle or load_bundle(default_bundle_path())
    return tuple(name for name in BACKENDS if not try_backend(bundle, name).problem)


def bundle_precisions(bundle: Bundle, contract: GraphContract) -> tuple[str, ...]:
    """Precisions in which the bundle has a file of the graph, in the order of PRECISIONS."""
    return tuple(p for p in PRECISIONS if graph_file(contract, p) in bundle.manifest.files)


def backend_precisions(bundle: Bundle, contract: GraphContract, backend: str) -> tuple[str, ...]:
    """Precisions in which a backend can run the bundle's graph; for AUTO those of all BACKENDS."""
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
    """Raise UsageError for a request that no machine could satisfy."""
    if request.backend != AUTO and request.backend not in BACKENDS:
        raise UsageError(f"got the backend {request.backend!r}, expected {AUTO} or one of {', '.join(BACKENDS)}")
    if request.precision not in (AUTO, *ALL_PRECISIONS):
        raise UsageError(
            f"got the precision {request.precision!r}, expected {AUTO} or one of {', '.join(ALL_PRECISIONS)}"
        )
    if request.precision == AUTO:
        return
    able = [name for name, kind in BACKENDS.items() if request.precision in kind.precisions]
    if request.backend not in (AUTO, *able):
        raise UsageError(
            f"{request.backend} computes in {', '.join(BACKENDS[request.backend].precisions)}, got "
            f"--precision {request.precision}: choose one of those, or --backend {' or '.join(able)}"
        )
    if request.precision not in backend_precisions(bundle, contract, request.backend):
        raise UsageError(
            f"{bundle.path}: has {contract.name} in {' and '.join(bundle_precisions(bundle, contract))}, got "
            f"--precision {request.precision}: {how_to_convert(bundle.path, contract, request.precision)}"
        )


def _precisions(bundle: Bundle, contract: GraphContract, request: BackendRequest, name: str) -> tuple[str, ...]:
    """Precisions to try in backend `name`, best first."""
    if request.precision != AUTO:
        return tuple(p for p in backend_precisions(bundle, contract, name) if p == request.precision)
    if not BACKENDS[name].needs_gpu:
        return ("fp32",)
    return tuple(p for p in _GPU_PRECISIONS if p in bundle_precisions(bundle, contract))


def _reason(request: BackendRequest, skipped: Sequence[BackendError | BackendUnavailable]) -> str:
    """Why this backend: the first clause of each skipped one's error; `multisa doctor` shows them in full."""
    if request.backend != AUTO:
        return "requested"
    causes = [error.cause if isinstance(error, BackendUnavailable) else str(error) for error in skipped]
    clauses = dict.fromkeys(cause.partition("; ")[0].partition(", expected ")[0] for cause in causes)
    return f"auto: {'; '.join(clauses)}" if clauses else "auto"
