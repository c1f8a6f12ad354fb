"""Several processes that train together, with PyTorch's own collectives: gloo between CPUs, NCCL between GPUs.

    torchrun --nproc-per-node 4 -m multisa.training train --data VOC2012      # or: multisa train --devices 4 ..

Every process runs the same program. Work is divided by rank; rank 0 writes what belongs to all. Without such a launcher
there is one process of rank 0, and every function here is as cheap as it looks.
"""

import logging
import os
import sys
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed, nn

from multisa.runtime.errors import BackendUnavailable, Interrupted, MultisaError
from multisa.runtime.progress import console, log
from multisa.runtime.system import usable_cpus

Result = TypeVar("Result")

# What torchrun and other launchers tell every process.
_VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
# How long a rank waits for the slowest one. The launcher ends all of them when one dies, so this never ends a wait
# that is worth it.
_PATIENCE = timedelta(days=7)
_CPU = torch.device("cpu")

_IS_ALONE = False  # within `alone`


def rank() -> int:
    """The number of this process among those that train together, from 0."""
    return distributed.get_rank() if _is_open() else 0


def world_size() -> int:
    """How many processes train together."""
    return distributed.get_world_size() if _is_open() else 1


def local_rank() -> int:
    """The number of this process on its machine, from 0: the GPU it uses."""
    return int(os.environ.get("LOCAL_RANK", 0)) if _is_open() else 0


@contextmanager
def process_group(device: str = "auto") -> Iterator[None]:
    """Join the processes that a launcher such as torchrun started; does nothing in a process that it did not start.

    device: as in `TrainConfig`. Within the block, ranks other than 0 show errors only, and the processes of a machine
    share its CPU cores. Raises BackendUnavailable if a machine has fewer GPUs than processes.
    """
    if _is_open() or not all(name in os.environ for name in _VARIABLES):
        yield
        return
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    on_gpus = device != "cpu" and torch.cuda.is_available()
    if on_gpus and torch.cuda.device_count() < processes:
        raise BackendUnavailable(
            f"got {processes} processes on this machine, expected at most one for each GPU, and it has "
            f"{torch.cuda.device_count()}: start fewer, or set device=cpu"
        )
    distributed.init_process_group("cpu:gloo,cuda:nccl" if on_gpus else "gloo", timeout=_PATIENCE)
    threads, level = torch.get_num_threads(), log.level
    try:
        if on_gpus:
            torch.cuda.set_device(local_rank())
        torch.set_num_threads(max(usable_cpus() // processes, 1))
        if rank() == 0:
            log.info(f"{world_size()} processes train together")
            yield
        else:
            log.setLevel("ERROR")
            with console(quiet=True):
                yield
    finally:
        log.setLevel(level)
        torch.set_num_threads(threads)
        distributed.destroy_process_group()


@contextmanager
def alone() -> Iterator[None]:
    """Within the block, this process is the only one: for work of one rank, for which no other waits in between."""
    global _IS_ALONE  # as the process group is one of the process
    before, _IS_ALONE = _IS_ALONE, True
    try:
        yield
    finally:
        _IS_ALONE = before


def barrier() -> None:
    """Wait until every rank is here."""
    sum_over_ranks(torch.zeros(1))


def sum_over_ranks(values: Tensor) -> Tensor:
    """The sum of `values` over all ranks, on each of them; without gradient."""
    if world_size() == 1:
        return values
    total = values.detach().clone()
    with _as_error_of_ours():
        distributed.all_reduce(total)
    return total


def sum_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Add up the gradients of all ranks. A parameter without gradient must be one on every rank."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if world_size() == 1 or not gradients:
        return
    total = sum_over_ranks(torch.cat([gradient.flatten() for gradient in gradients]))
    start = 0
    for gradient in gradients:
        gradient.copy_(total[start : start + gradient.numel()].view_as(gradient))
        start += gradient.numel()


def on_main(work: Callable[[], Result]) -> Result:
    """Run `work` on rank 0 and return its result on every rank.

    Where it raises a MultisaError, rank 0 raises that, and the other ranks exit with its code and without a message.
    """
    if world_size() == 1:
        return work()
    outcome: list[Any] = [None, 0]
    error: MultisaError | None = None
    if rank() == 0:
        try:
            outcome[0] = work()
        except MultisaError as raised:
            error, outcome[1] = raised, raised.exit_code
    with _as_error_of_ours():
        distributed.broadcast_object_list(outcome, 0, device=_CPU)
    if error is not None:
        raise error
    if outcome[1]:
        raise SystemExit(outcome[1])
    result: Result = outcome[0]
    return result


def launch(processes: int, arguments: Sequence[str]) -> None:
    """Run `python -m multisa.training ARGUMENTS` in so many processes of this machine that train together.

    Raises SystemExit with the exit code of the process that failed first, which has shown its error; Interrupted when a
    signal ends it, or this process, after the others are ended, too.
    """
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    again = "run the same command again to resume"
    settings = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
    )
    # Processes show their own errors.
    logging.getLogger("torch.distributed.elastic.multiprocessing.api").setLevel("CRITICAL")
    try:
        elastic_launch(settings, sys.executable)("-m", "multisa.training", *arguments)
    except ChildFailedError as error:
        # A process that was killed comes first: the others fail because of it.
        number, failure = min(error.failures.items(), key=lambda each: (each[1].exitcode >= 0, each[1].timestamp))
        if failure.exitcode < 0:
            message = (
                f"rank {number}: ended by signal {-failure.exitcode}, which is 9 where memory did not suffice; {again}"
            )
            raise Interrupted(message, signal=-failure.exitcode) from error
        raise SystemExit(failure.exitcode) from error
    except SignalException as error:
        raise Interrupted(f"interrupted; {again}", signal=error.sigval) from error


@contextmanager
def _as_error_of_ours() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # of gloo and NCCL, when the other end is gone
        raise MultisaError(f"rank {rank()}: another process has ended, see its error ({error})") from error


def _is_open() -> bool:
    return distributed.is_available() and distributed.is_initialized() and not _IS_ALONE
