"""Which engine runs a graph of a bundle: the one asked for, or the first of ENGINES that is there.

choice = choose_engine(load_bundle(path), SEGMENTER)
choice.engine.run(image), choice.reason
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

from multisa.runtime.backends import openvino
from multisa.runtime.backends.base import (
    CONTRACTS,
    PRECISIONS,
    DetailedEngine,
    Engine,
    GraphContract,
    graph_file,
    how_to_convert,
)
from multisa.runtime.backends.gpus import probe_gpus
from multisa.runtime.backends.onnxruntime import OnnxRuntimeEngine, Provider
from multisa.runtime.bundle import Bundle
from multisa.runtime.errors import EngineError, EngineUnavailable, UsageError
from multisa.runtime.progress import say

AUTO = "auto"

# Which a GPU prefers, of those the bundle has; the CPU runs fp32, for which fp16 is no gain.
_GPU_PRECISIONS = ("fp16", "fp32")


@dataclass(frozen=True)
class EngineRequest:
    """What was asked for; AUTO leaves it to `choose_engine`."""

    engine: str = AUTO
    precision: str = AUTO
    plans: Path | None = None  # where TensorRT's plans are looked for, besides the bundle's own
    may_heal: bool = True  # whether damaged plans are put aside


@dataclass(frozen=True)
class Choice:
    """An open engine for one graph, and why it is this one."""

    graph: str
    engine: Engine
    precision: str
    reason: str

    def to_json(self) -> dict[str, Any]:
        """For the record of a run."""
        record = {"engine": self.engine.name, "precision": self.precision, "reason": self.reason}
        return record | ({"detail": self.engine.detail} if isinstance(self.engine, DetailedEngine) else {})


Opener = Callable[[Bundle, GraphContract, str, EngineRequest, int], Engine]


@dataclass(frozen=True)
class EngineKind:
    """How an engine is opened for (bundle, contract, precision, request, CPU threads), and what it needs."""

    open: Opener
    needs_gpu: bool
    runs_plans: bool = False  # which may be at fault where the graph is not
    # Those it computes in, each with the precision of the file that the graph is read from.
    precisions: Mapping[str, str] = field(default_factory=lambda: {p: p for p in PRECISIONS})
    only: Mapping[str, Sequence[GraphContract]] = field(default_factory=dict)  # of a precision: its graphs


def _open_onnxruntime(
    provider: Provider,
    bundle: Bundle,
    contract: GraphContract,
    precision: str,
    request: EngineRequest,
    threads: int,
) -> Engine:
    graph = bundle.read_file(graph_file(contract, precision))
    return OnnxRuntimeEngine(graph, threads=threads, contract=contract, provider=provider)


def _open_openvino(
    bundle: Bundle, contract: GraphContract, precision: str, request: EngineRequest, threads: int
) -> Engine:
    graph = bundle.read_file(graph_file(contract, openvino.GRAPHS[precision]))
    return openvino.OpenVinoEngine(graph, threads=threads, contract=contract, precision=precision)


def _open_tensorrt(
    library: Literal["tensorrt", "tensorrt-rtx"],
    bundle: Bundle,
    contract: GraphContract,
    precision: str,
    request: EngineRequest,
    threads: int,  # of the CPU, which a plan has no use for
) -> Engine:
    from multisa.runtime.backends.tensorrt import open_tensorrt

    # Left to itself a run must not fail on its third photograph; who asks for a plan knows its profiles.
    long_side = bundle.manifest.parameters.long_side if request.engine == AUTO else None
    return open_tensorrt(
        bundle,
        contract,
        precision=precision,
        library=library,
        cache=request.plans,
        long_side=long_side,
        may_heal=request.may_heal,
    )


# In the order "auto" tries them.
ENGINES: dict[str, EngineKind] = {
    "tensorrt": EngineKind(partial(_open_tensorrt, "tensorrt"), needs_gpu=True, runs_plans=True),
    "tensorrt-rtx": EngineKind(partial(_open_tensorrt, "tensorrt-rtx"), needs_gpu=True, runs_plans=True),
    "onnxruntime-cuda": EngineKind(partial(_open_onnxruntime, "cuda"), needs_gpu=True),
    "onnxruntime-cpu": EngineKind(partial(_open_onnxruntime, "cpu"), needs_gpu=False),
    # Last: in fp32, which is what "auto" runs on a CPU, ONNX Runtime is the faster one.
    "openvino": EngineKind(_open_openvino, needs_gpu=False, precisions=openvino.GRAPHS, only=openvino.ONLY),
}
ALL_PRECISIONS = tuple(dict.fromkeys(p for kind in ENGINES.values() for p in kind.precisions))
_WITHOUT_GPU = " or ".join(name for name, kind in ENGINES.items() if not kind.needs_gpu)


def open_engine(
    bundle: Bundle, contract: GraphContract, *, threads: int = 1, engine: str = AUTO, precision: str = AUTO
) -> Engine:
    """Load the bundle's graph that keeps `contract`; `choose_engine` without the reason."""
    return choose_engine(bundle, contract, EngineRequest(engine, precision), threads=threads).engine


def choose_engine(
    bundle: Bundle, contract: GraphContract, request: EngineRequest | None = None, *, threads: int = 1
) -> Choice:
    """Open the engine asked for on the bundle's graph that keeps `contract`, or the first that is there.

    Precision "auto" is fp16 on a GPU where the bundle has it, else fp32. Raises UsageError for an engine that
    does not exist, or a precision that it does not compute in or the bundle lacks, EngineUnavailable where
    the engine cannot run here, EngineError for a graph that cannot be loaded; "auto" passes over a plan that
    cannot be.
    """
    request = request or EngineRequest()
    _check_request(bundle, contract, request)
    names = tuple(ENGINES) if request.engine == AUTO else (request.engine,)
    passed_over: list[EngineError | EngineUnavailable] = []
    # The GPU first: without a driver some libraries cannot even be imported, or end the process.
    without_gpu = probe_gpus().problem if ENGINES[names[0]].needs_gpu else ""
    if without_gpu:
        passed_over.append(EngineUnavailable(without_gpu))
        names = tuple(name for name in names if not ENGINES[name].needs_gpu)
    for name in names:
        for precision in _precisions(bundle, contract, request, name):
            try:
                engine = ENGINES[name].open(bundle, contract, precision, request, threads)
            except EngineUnavailable as error:
                passed_over.append(error)
                continue
            except EngineError as error:
                if request.engine != AUTO or not ENGINES[name].runs_plans:
                    raise
                passed_over.append(error)
                continue
            return Choice(contract.name, engine, precision, _reason(request, passed_over))
    causes = "; ".join(dict.fromkeys(map(str, passed_over)))
    if request.engine == AUTO:
        raise EngineUnavailable(f"no engine can run {contract.name} here: {causes}")
    remedy = f": choose {_WITHOUT_GPU}, or a machine with an NVIDIA GPU and its driver" if without_gpu else ""
    raise EngineUnavailable(f"{request.engine} cannot run {contract.name} here: {causes}{remedy}")


@contextmanager
def chosen_engines(
    bundle: Bundle, contracts: Sequence[GraphContract], request: EngineRequest | None = None
) -> Iterator[tuple[Choice, ...]]:
    """Open an engine for each contract, say on stderr which and why, and close them at the end."""
    with ExitStack() as stack:
        choices = []
        for contract in contracts:
            choice = choose_engine(bundle, contract, request)
            stack.callback(choice.engine.close)
            choices.append(choice)
        for line in describe_choices(choices):
            say(line)
        yield tuple(choices)


def describe_choices(choices: Sequence[Choice]) -> list[str]:
    """A line for people about each engine that was chosen, graphs of the same one together."""
    graphs: dict[tuple[str, str, str], list[str]] = {}
    for choice in choices:
        same = (choice.engine.name, choice.precision, choice.reason)
        graphs.setdefault(same, []).append(choice.graph)
    return [
        f"{', '.join(of)}: on {name}, {precision} ({reason})"
        for (name, precision, reason), of in graphs.items()
    ]


def bundle_precisions(bundle: Bundle, contract: GraphContract) -> tuple[str, ...]:
    """Precisions of one graph that the bundle has a file in, in the order of PRECISIONS."""
    return tuple(p for p in PRECISIONS if graph_file(contract, p) in bundle.manifest.files)


def engine_precisions(bundle: Bundle, contract: GraphContract, engine: str) -> tuple[str, ...]:
    """Precisions that an engine computes one graph of the bundle in; for AUTO those of all ENGINES."""
    has = bundle_precisions(bundle, contract)
    kinds = [kind for name, kind in ENGINES.items() if engine in (AUTO, name)]
    return tuple(
        dict.fromkeys(
            precision
            for kind in kinds
            for precision, of_file in kind.precisions.items()
            if of_file in has and contract in kind.only.get(precision, CONTRACTS)
        )
    )


def _check_request(bundle: Bundle, contract: GraphContract, request: EngineRequest) -> None:
    if request.engine != AUTO and request.engine not in ENGINES:
        raise UsageError(f"got the engine {request.engine!r}, expected {AUTO} or one of {', '.join(ENGINES)}")
    if request.precision not in (AUTO, *ALL_PRECISIONS):
        raise UsageError(
            f"got the precision {request.precision!r}, expected {AUTO} or one of {', '.join(ALL_PRECISIONS)}"
        )
    if request.precision == AUTO:
        return
    able = [name for name, kind in ENGINES.items() if request.precision in kind.precisions]
    if request.engine not in (AUTO, *able):
        raise UsageError(
            f"{request.engine} computes in {', '.join(ENGINES[request.engine].precisions)}, got --precision "
            f"{request.precision}: choose one of those, or --engine {' or '.join(able)}"
        )
    if request.precision not in engine_precisions(bundle, contract, request.engine):
        raise UsageError(
            f"{bundle.path}: has {contract.name} in {' and '.join(bundle_precisions(bundle, contract))}, got "
            f"--precision {request.precision}: {how_to_convert(bundle.path, contract, request.precision)}"
        )


def _precisions(
    bundle: Bundle, contract: GraphContract, request: EngineRequest, name: str
) -> tuple[str, ...]:
    if request.precision != AUTO:
        return tuple(p for p in engine_precisions(bundle, contract, name) if p == request.precision)
    if not ENGINES[name].needs_gpu:
        return ("fp32",)
    return tuple(p for p in _GPU_PRECISIONS if p in bundle_precisions(bundle, contract))


def _reason(request: EngineRequest, passed_over: Sequence[EngineError | EngineUnavailable]) -> str:
    """Why it is this engine: the first clause of every cause; `multisa doctor` tells all, and what to do."""
    if request.engine != AUTO:
        return "asked for"
    causes = [error.cause if isinstance(error, EngineUnavailable) else str(error) for error in passed_over]
    clauses = dict.fromkeys(cause.partition("; ")[0].partition(", expected ")[0] for cause in causes)
    return f"auto: {'; '.join(clauses)}" if clauses else "auto"
