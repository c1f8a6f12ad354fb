"""Who is measured: our engines, and PyTorch as people run it."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from multisa.benchmarks.suite.guest import Guest, GuestFailedError
from multisa.runtime.backends.base import CONTRACTS, GraphContract
from multisa.runtime.backends.registry import BACKENDS, BackendRequest, backend_precisions, select_backend
from multisa.runtime.bundle import Bundle, load_bundle
from multisa.runtime.errors import UsageError

EAGER, CHANNELS_LAST, COMPILED = "pytorch-eager", "pytorch-channels-last-autocast", "pytorch-compile"
PYTORCH = (EAGER, CHANNELS_LAST, COMPILED)
CPU_ENGINE = "onnxruntime-cpu"


@dataclass(frozen=True)
class Contender:
    """One way to run a graph: the engine or the way of PyTorch, its precision, and where it computes."""

    backend: str
    precision: str
    device: str  # "cpu" or "cuda"

    @property
    def title(self) -> str:
        """For people, and for folders."""
        return f"{self.backend} {self.precision}" + (" on the GPU" if self.device == "cuda" else "")

    @property
    def is_ours(self) -> bool:
        """Does an engine of the runtime run it?"""
        return self.backend in BACKENDS

    def row(self, *, is_default: bool) -> dict[str, Any]:
        """What its row of the report begins with."""
        return {
            "engine": self.backend,
            "precision": self.precision,
            "device": self.device,
            "default": is_default,
            "problem": None,
        }


REFERENCE = Contender(CPU_ENGINE, "fp32", "cpu")  # whose labels the others' are compared with


def contenders(
    bundle: Bundle, contract: GraphContract, engines: Sequence[str], *, gpu: bool
) -> list[Contender]:
    """Every contender of `engines` (all where it is empty), the reference first.

    Engines that need a GPU are listed without one, too: the report says why they are missing. PyTorch runs on
    the CPU, and on the GPU where there is one. Raises UsageError for an engine that does not exist.
    """
    known = (*BACKENDS, *PYTORCH)
    unknown = [name for name in engines if name not in known]
    if unknown:
        raise UsageError(f"got the engine {unknown[0]!r}, expected some of {', '.join(known)}")
    wanted = set(engines or known)
    listed = [c for c in _all(bundle, contract, gpu=gpu) if c.backend in wanted]
    return sorted(listed, key=lambda contender: contender != REFERENCE)


def _all(bundle: Bundle, contract: GraphContract, *, gpu: bool) -> Iterator[Contender]:
    for name, kind in BACKENDS.items():
        precisions = backend_precisions(bundle, contract, name)
        if kind.needs_gpu and not gpu:
            precisions = precisions[:1]  # a line that says why is enough
        for precision in precisions:
            if precision == "fp16" and not kind.needs_gpu:
                continue  # twice the size in memory again, and slower: no CPU computes in it
            yield Contender(name, precision, "cuda" if kind.needs_gpu else "cpu")
    for device in ("cpu", "cuda") if gpu else ("cpu",):
        yield Contender(EAGER, "fp32", device)
        # Autocast's own choices of a type: bfloat16 on CPUs, float16 on GPUs.
        yield Contender(CHANNELS_LAST, "bf16" if device == "cpu" else "fp16", device)
        yield Contender(COMPILED, "fp32", device)


def baseline_of(contender: Contender, ran: Sequence[Contender]) -> Contender:
    """Whose speed others' is compared with: PyTorch eager on the same device, else the first that ran."""
    eager = Contender(EAGER, "fp32", contender.device)
    return eager if eager in ran else ran[0]


def auto_contender(bundle: Path, graph: str, plans: Path | None) -> Contender | None:
    """What "auto" chooses on this machine, asked in a process of its own; None where nothing runs."""
    try:
        with Guest(_Auto, bundle, graph, plans) as guest:
            backend, precision = guest.call("chosen")
    except GuestFailedError:
        return None
    return Contender(backend, precision, "cuda" if BACKENDS[backend].needs_gpu else "cpu")


class _Auto:
    """Opens what "auto" chooses for one graph."""

    def __init__(self, bundle: Path, graph: str, plans: Path | None) -> None:
        contract = next(contract for contract in CONTRACTS if contract.name == graph)
        choice = select_backend(load_bundle(bundle), contract, BackendRequest(plans=plans))
        self._chosen = (choice.backend.name, choice.precision)
        choice.backend.close()

    def chosen(self) -> tuple[str, str]:
        """Engine and precision."""
        return self._chosen
