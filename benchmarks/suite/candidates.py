"""What is measured: the backends of the runtime, and PyTorch in the ways people run it."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from multisa.benchmarks.worker_process import WorkerFailedError, WorkerProcess
from multisa.runtime.backends.base import CONTRACTS, GraphContract
from multisa.runtime.backends.registry import BACKENDS, BackendRequest, backend_precisions, select_backend
from multisa.runtime.bundle import Bundle, load_bundle
from multisa.runtime.errors import UsageError
from multisa.runtime.progress import Progress, log

Row = dict[str, Any]

EAGER = "pytorch-eager"
CHANNELS_LAST = "pytorch-channels-last-autocast"
COMPILED = "pytorch-compile"
SETTLE_SECONDS = 0.3  # until the thread pools of the previous measurement have stopped spinning
PYTORCH = (EAGER, CHANNELS_LAST, COMPILED)


@dataclass(frozen=True)
class Candidate:
    """One way to run a graph: the backend or PyTorch mode, its precision, and its device."""

    backend: str
    precision: str
    device: str  # "cpu" or "cuda"

    @property
    def title(self) -> str:
        """Name in messages."""
        return f"{self.backend} {self.precision}" + (" on the GPU" if self.device == "cuda" else "")

    @property
    def is_ours(self) -> bool:
        """Whether a backend of the runtime runs it."""
        return self.backend in BACKENDS

    def row(self, *, is_default: bool) -> Row:
        """The first keys of its row in the report."""
        return {**asdict(self), "default": is_default, "problem": None}


@dataclass(eq=False)
class Measured:
    """A candidate and its measurements so far."""

    candidate: Candidate
    row: Row
    worker: WorkerProcess | None = None
    rates: list[float] = field(default_factory=list)  # images per second, one per round

    def start(self, stack: ExitStack, problem: str, make: Callable[..., object], *arguments: object) -> None:
        """Start its process, which `stack` ends; the reason why there is none becomes the row's "problem"."""
        try:
            if problem:
                raise WorkerFailedError(problem)
            self.worker = stack.enter_context(WorkerProcess.started_twice(make, *arguments))
            self.row["startup_seconds"] = round(self.worker.start_seconds, 3)
        except WorkerFailedError as error:
            self.row["problem"] = str(error)
            log.info(f"{self.candidate.title}: skipped: {error}")


M = TypeVar("M", bound=Measured)


def run_alternately(
    measured: Sequence[M], step: Callable[[M], object], bar: Progress, *, is_curve: bool = False
) -> None:
    """One step of all candidates without a problem; one that fails gets it, a curve among its "notes"."""
    for each in measured:
        if each.row["problem"] is None:
            time.sleep(SETTLE_SECONDS)
            try:
                step(each)
            except WorkerFailedError as error:
                name = getattr(step, "__name__", "").strip("_").replace("_", " ")
                log.info(f"{each.candidate.title}: {name}: {error}")
                if is_curve:
                    each.row.setdefault("notes", []).append(f"{name}: {error}")
                else:
                    each.row["problem"] = str(error)
        bar.advance()


REFERENCE = Candidate("onnxruntime-cpu", "fp32", "cpu")  # the labels of the others are compared with its


def list_candidates(bundle: Bundle, contract: GraphContract, backends: Sequence[str], *, gpu: bool) -> list[Candidate]:
    """Every candidate of `backends` (all where it is empty), the reference first.

    Backends that need a GPU are listed without one too, so that the report says why they are missing. PyTorch
    runs on the CPU, and also on the GPU where there is one. Raises UsageError for an unknown backend.
    """
    known = (*BACKENDS, *PYTORCH)
    unknown = [name for name in backends if name not in known]
    if unknown:
        raise UsageError(f"got the backend {unknown[0]!r}, expected some of {', '.join(known)}")
    wanted = set(backends or known)
    listed = [each for each in _all(bundle, contract, gpu=gpu) if each.backend in wanted]
    return sorted(listed, key=lambda candidate: candidate != REFERENCE)


def _all(bundle: Bundle, contract: GraphContract, *, gpu: bool) -> Iterator[Candidate]:
    for name, kind in BACKENDS.items():
        precisions = backend_precisions(bundle, contract, name)
        if kind.needs_gpu and not gpu:
            precisions = precisions[:1]  # one row is enough to say why
        for precision in precisions:
            if precision == "fp16" and not kind.needs_gpu:
                continue  # no CPU computes in fp16: it is converted to fp32 in memory, and slower
            yield Candidate(name, precision, "cuda" if kind.needs_gpu else "cpu")
    for device in ("cpu", "cuda") if gpu else ("cpu",):
        yield Candidate(EAGER, "fp32", device)
        # The types that autocast uses by default.
        yield Candidate(CHANNELS_LAST, "bf16" if device == "cpu" else "fp16", device)
        yield Candidate(COMPILED, "fp32", device)


def baseline_of(candidate: Candidate, ran: Sequence[Candidate]) -> Candidate:
    """What a candidate's speed is compared with: PyTorch eager on its device, else the first that ran."""
    eager = Candidate(EAGER, "fp32", candidate.device)
    return eager if eager in ran else ran[0]


def auto_candidate(bundle: Path, graph: str, engine_cache: Path | None) -> Candidate | None:
    """What "auto" chooses on this machine, asked in its own process; None where nothing runs."""
    try:
        with WorkerProcess(_Auto, bundle, graph, engine_cache) as worker:
            return Candidate(*worker.call("chosen"))
    except WorkerFailedError:
        return None


class _Auto:
    """Opens what "auto" chooses for one graph."""

    def __init__(self, bundle: Path, graph: str, engine_cache: Path | None) -> None:
        contract = next(contract for contract in CONTRACTS if contract.name == graph)
        self._choice = select_backend(load_bundle(bundle), contract, BackendRequest(engine_cache=engine_cache))

    def chosen(self) -> tuple[str, str, str]:
        name = self._choice.backend.name
        return name, self._choice.precision, "cuda" if BACKENDS[name].needs_gpu else "cpu"
