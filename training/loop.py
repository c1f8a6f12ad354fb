"""The training loop of all networks: SGD, poly schedule, a checkpoint after every epoch, exact resuming.

Several processes (distributed.py) compute a share of every batch each, in one or more parts, and add up their gradients
before the optimiser's step. Losses are sums over samples divided by numbers that depend on the targets of the whole
batch, so they do not depend on how a batch is divided.

A checkpoint is one safetensors file: the model's state and the optimiser's momenta as tensors, everything
else as JSON in its metadata. It is written atomically.
"""

import json
import math
import multiprocessing
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from itertools import islice
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, Dataset, RandomSampler

from multisa.runtime.errors import BackendUnavailable, CheckpointError, MultisaError, UsageError
from multisa.runtime.files import write_bytes_atomically
from multisa.runtime.progress import Progress, log
from multisa.training.config import ExecutionConfig, Schedule
from multisa.training.distributed import barrier, rank, sum_gradients, sum_over_ranks, world_size
from multisa.training.frozen_norm import folded_norms
from multisa.training.inference import keep_freed_memory
from multisa.training.synchronised_norm import synchronised_norms

CHECKPOINT = "checkpoint.safetensors"  # file name in the folder of a training stage

# Primes that keep the random streams of different seeds, epochs and ranks apart.
MODEL_SEED_STRIDE = 1_000_003  # dropout
RANK_SEED_STRIDE = 15_485_863  # dropout of each rank
ORDER_SEED_STRIDE = 7919  # order of the samples

_MODEL_PREFIX = "model."
_MOMENTUM_PREFIX = "momentum."
_AVERAGE_PREFIX = "average."
_AVERAGE_UPDATES = "average_updates"
_SCALER = "scaler"  # of the gradients of fp16
_IS_AVERAGE = "is_average"  # of the last checkpoint: the average is the model's state and is not stored again
_REMEDY = "delete it and run `multisa train` again to repeat the stage"


@dataclass(frozen=True)
class Epoch:
    """One finished epoch of a training."""

    number: int  # from 1
    of: int
    step: int  # optimisation steps since the first epoch
    loss: float  # mean over the steps of this epoch
    learning_rate: float  # of the backbone, in the last step
    seconds: float


@dataclass(frozen=True)
class LoopOptions:
    """What a training needs beside its schedule."""

    checkpoint: Path
    seed: int
    workers: int  # processes that load samples; 0 loads them in this process
    title: str  # of the progress bar
    execution: ExecutionConfig = field(default_factory=ExecutionConfig)
    # Called on rank 0 after every epoch, before its checkpoint is written: an epoch that is interrupted there is
    # repeated, and reported again. The model then has the weights that would be kept, the average where there is one.
    after_epoch: Callable[[Epoch], None] | None = None


@dataclass(frozen=True)
class BatchLoss:
    """The loss of some samples of a batch, before they go through the network."""

    normalisers: Tensor  # sums over the targets of these samples that the loss is divided by
    compute: Callable[[Tensor], Tensor]  # from the normalisers of the whole batch to these samples' share of its loss


def train_network(
    model: nn.Module,
    param_groups: Sequence[tuple[float, Iterable[nn.Parameter]]],
    dataset: Dataset[Any],
    step: Callable[[Any], BatchLoss],
    schedule: Schedule,
    options: LoopOptions,
) -> list[float]:
    """Train `model` in place and return the mean loss of every epoch.

    param_groups: (factor, parameters) pairs that learn at `schedule.learning_rate` times the factor. All
    other parameters learn at the rate itself; those with requires_grad False do not learn. step: maps samples
    of `dataset` to their loss. After an interruption the same call resumes at the first unfinished epoch and
    gives the same result: order, augmentation and dropout of an epoch depend only on the seed and the epoch.
    Every rank calls it; another number of ranks changes dropout, and everything else by rounding only.

    Raises MultisaError when the loss is not finite, CheckpointError for a checkpoint that cannot be resumed, and what
    `check_execution` raises.
    """
    keep_freed_memory()
    check_execution(options.execution, schedule, len(dataset), next(model.parameters()).device)  # type: ignore[arg-type]
    optimiser = _optimiser(model, param_groups, schedule)
    update = _Update(model, optimiser, schedule, options)
    average = MovingAverage(model, schedule.ema) if schedule.ema else None
    resumed = load_checkpoint(options.checkpoint, model, optimiser, average) if options.checkpoint.exists() else {}
    losses: list[float] = resumed.get("losses", [])
    update.scaler.load_state_dict(resumed.get(_SCALER, {}))
    barrier()  # nobody writes a checkpoint while another reads it
    frozen = _frozen_norms(model, schedule)
    with ExitStack() as stack:
        if frozen:
            stack.enter_context(folded_norms(frozen))
        if options.execution.batch_norm == "synchronised":
            stack.enter_context(synchronised_norms(model))
        if options.execution.compile:
            getattr(model, "backbone", model).compile()
        for epoch in range(len(losses), schedule.epochs):
            started = time.perf_counter()
            losses.append(_train_epoch(update, average, step, dataset, epoch))
            seconds = time.perf_counter() - started
            meta: dict[str, Any] = {"losses": losses}
            if update.scaler.is_enabled():
                meta[_SCALER] = update.scaler.state_dict()
            if average is not None and len(losses) == schedule.epochs:
                average.copy_to(model)
                meta[_IS_AVERAGE], average = True, None
            if rank() == 0:
                _report(_epoch_of(losses, dataset, schedule, seconds), model, average, options)
                save_checkpoint(options.checkpoint, model, optimiser, meta, average)
            barrier()
    model.eval()
    return losses


def check_execution(execution: ExecutionConfig, schedule: Schedule, n_samples: int, device: torch.device) -> None:
    """Raise BackendUnavailable for a precision `device` lacks, UsageError for more parts of a batch than samples."""
    precision = execution.precision
    if precision == "fp16" and device.type != "cuda":
        raise BackendUnavailable(
            f"execution.precision: got fp16 on {device.type}, expected a GPU for it; set it to bf16 or fp32"
        )
    if precision == "bf16" and device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        name = torch.cuda.get_device_name(device)
        raise BackendUnavailable(f"execution.precision: got bf16, which {name} lacks; set it to fp16 or fp32")
    batch, parts = min(schedule.batch_size, n_samples), world_size() * execution.accumulate
    if batch < parts:
        raise UsageError(
            f"batch_size: got {batch} images for {parts} parts ({world_size()} processes, execution.accumulate "
            f"{execution.accumulate}), expected at least one image for each: raise batch_size or lower the others"
        )


def autocast_for(precision: str, device: torch.device) -> torch.autocast:
    """The context in which layers compute in `ExecutionConfig.precision`."""
    lower = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
    return torch.autocast(device.type, lower, enabled=lower is not None)


class _Update:
    """One step of the optimiser from all parts of a batch, on all ranks."""

    def __init__(self, model: nn.Module, optimiser: torch.optim.SGD, schedule: Schedule, options: LoopOptions) -> None:
        self.model = model
        self.optimiser = optimiser
        self.schedule = schedule
        self.options = options
        self.base_rates = [group["lr"] for group in optimiser.param_groups]
        device, precision = next(model.parameters()).device, options.execution.precision
        self.scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
        self.autocast = autocast_for(precision, device)

    def __call__(self, parts: Sequence[BatchLoss], done: float) -> float:
        """Return the loss of the batch; done: share of all steps before this one, 0..1."""
        for group, base in zip(self.optimiser.param_groups, self.base_rates, strict=True):
            group["lr"] = base * (1 - done) ** self.schedule.poly_power
        normalisers = sum_over_ranks(torch.stack([part.normalisers for part in parts]).sum(0))
        self.optimiser.zero_grad(set_to_none=True)
        losses = []
        for part in parts:
            with self.autocast:
                loss = part.compute(normalisers)
            self.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
            losses.append(loss.detach())
        value = float(sum_over_ranks(torch.stack(losses).sum()))
        if not math.isfinite(value):
            lower = "" if self.options.execution.precision != "fp16" else ", or set execution.precision=bf16"
            raise MultisaError(f"{self.options.title}: the loss became {value}; lower learning_rate{lower}")
        sum_gradients(self.model.parameters())
        self.scaler.unscale_(self.optimiser)
        nn.utils.clip_grad_norm_(self.model.parameters(), self.schedule.clip_norm)
        self.scaler.step(self.optimiser)
        self.scaler.update()
        return value


def _train_epoch(
    update: _Update,
    average: "MovingAverage | None",
    step: Callable[[Any], BatchLoss],
    dataset: Dataset[Any],
    epoch: int,
) -> float:
    """Return the mean loss."""
    schedule, options = update.schedule, update.options
    _set_training_mode(update.model, schedule)
    torch.manual_seed(options.seed * MODEL_SEED_STRIDE + epoch + rank() * RANK_SEED_STRIDE)
    steps = _steps_of(dataset, schedule)
    batches = _batches(dataset, schedule, options, epoch)
    total = 0.0
    with Progress(steps, f"{options.title} {epoch + 1}/{schedule.epochs}", "step") as bar:
        for index in range(steps):
            parts = [step(samples) for samples in islice(batches, options.execution.accumulate)]
            value = update(parts, (epoch * steps + index) / (schedule.epochs * steps))
            if average is not None:
                average.update(update.model)
            total += value
            bar.advance(note=f"loss {value:.3f}")
    return total / steps


def _steps_of(dataset: Dataset[Any], schedule: Schedule) -> int:
    """Steps of an epoch. The incomplete last batch, is dropped unless it is the only one."""
    return max(len(dataset) // schedule.batch_size, 1)  # type: ignore[arg-type]


def _epoch_of(losses: Sequence[float], dataset: Dataset[Any], schedule: Schedule, seconds: float) -> Epoch:
    number, steps = len(losses), _steps_of(dataset, schedule)
    done = (number * steps - 1) / (schedule.epochs * steps)  # before the last step
    rate = schedule.learning_rate * (1 - done) ** schedule.poly_power
    return Epoch(number, schedule.epochs, number * steps, losses[-1], rate, seconds)


def _report(epoch: Epoch, model: nn.Module, average: "MovingAverage | None", options: LoopOptions) -> None:
    log.info(f"{options.title}: epoch {epoch.number}/{epoch.of}, loss {epoch.loss:.4f}, {epoch.seconds:.0f} s")
    if options.after_epoch is not None:
        with average.applied_to(model) if average is not None else nullcontext():
            options.after_epoch(epoch)


class MovingAverage:
    """The exponential moving average of a network's parameters and running statistics."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.updates = 0
        self.state = {key: value.detach().clone() for key, value in model.state_dict().items()}

    def update(self, model: nn.Module) -> None:
        """Move towards the model's state. Early updates count more: the first weights are hardly trained."""
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        for key, value in model.state_dict().items():
            if value.is_floating_point():
                self.state[key].lerp_(value, 1 - decay)
            else:
                self.state[key].copy_(value)

    @contextmanager
    def applied_to(self, model: nn.Module) -> Iterator[None]:
        """Within the block, the model has the average."""
        kept = {key: value.detach().clone() for key, value in model.state_dict().items()}
        self.copy_to(model)
        try:
            yield
        finally:
            model.load_state_dict(kept)

    def copy_to(self, model: nn.Module) -> None:
        """Give the model the average."""
        model.load_state_dict(self.state)


def save_checkpoint(
    path: Path,
    model: nn.Module,
    optimiser: torch.optim.SGD | None,
    meta: Mapping[str, Any],
    average: MovingAverage | None = None,
) -> None:
    """Write the model's state, the optimiser's momenta (by parameter name), the average and `meta` to one file."""
    tensors = {_MODEL_PREFIX + key: value.contiguous() for key, value in model.state_dict().items()}
    if optimiser is not None:
        for name, parameter in model.named_parameters():
            momentum = optimiser.state.get(parameter, {}).get("momentum_buffer")
            if momentum is not None:
                tensors[_MOMENTUM_PREFIX + name] = momentum.contiguous()
    if average is not None:
        tensors |= {_AVERAGE_PREFIX + key: value.contiguous() for key, value in average.state.items()}
        meta = {**meta, _AVERAGE_UPDATES: average.updates}
    write_bytes_atomically(path, safetensors.torch.save(tensors, {"multisa": json.dumps(dict(meta))}))


def load_checkpoint(
    path: Path, model: nn.Module, optimiser: torch.optim.SGD | None = None, average: MovingAverage | None = None
) -> dict[str, Any]:
    """Restore what `save_checkpoint` wrote and return its `meta`; every key must fit the model.

    Raises CheckpointError for a file that is missing, damaged, of another network, or without the average.
    """
    if not path.is_file():
        raise CheckpointError(f"{path}: missing, expected a trained network; run `multisa train` again")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors: dict[str, Tensor] = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except safetensors.SafetensorError as error:
        raise CheckpointError(f"{path}: damaged ({error}); {_REMEDY}") from error
    if "multisa" not in metadata:
        raise CheckpointError(f"{path}: not a multisa checkpoint; {_REMEDY}")
    meta: dict[str, Any] = json.loads(metadata["multisa"])
    try:
        model.load_state_dict(_with_prefix(tensors, _MODEL_PREFIX), strict=True)
    except RuntimeError as error:  # its message lists every key, a page of them
        raise CheckpointError(f"{path}: of another network than the one expected; {_REMEDY}") from error
    if optimiser is not None:
        momenta = _with_prefix(tensors, _MOMENTUM_PREFIX)
        for name, parameter in model.named_parameters():
            if name in momenta:
                optimiser.state[parameter]["momentum_buffer"] = momenta[name].to(parameter.device)
    if average is not None and _IS_AVERAGE not in meta:
        stored = _with_prefix(tensors, _AVERAGE_PREFIX)
        if stored.keys() != average.state.keys() or _AVERAGE_UPDATES not in meta:
            raise CheckpointError(f"{path}: got no whole moving average of the weights, expected one; {_REMEDY}")
        average.updates = meta[_AVERAGE_UPDATES]
        for key, value in stored.items():
            average.state[key].copy_(value)
    return meta


def _with_prefix(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}


def _optimiser(
    model: nn.Module, param_groups: Sequence[tuple[float, Iterable[nn.Parameter]]], schedule: Schedule
) -> torch.optim.SGD:
    factors = {id(parameter): factor for factor, parameters in param_groups for parameter in parameters}
    groups: dict[float, list[nn.Parameter]] = {}
    for parameter in model.parameters():
        if parameter.requires_grad:
            groups.setdefault(factors.get(id(parameter), 1.0), []).append(parameter)
    return torch.optim.SGD(
        [{"params": group, "lr": schedule.learning_rate * factor} for factor, group in groups.items()],
        lr=schedule.learning_rate,
        momentum=schedule.momentum,
        weight_decay=schedule.weight_decay,
    )


def _set_training_mode(model: nn.Module, schedule: Schedule) -> None:
    model.train()
    if frozen := _frozen_norms(model, schedule):
        frozen.eval()
    # Frozen modules keep their statistics, too: a frozen backbone must not drift.
    for module in model.modules():
        parameters = list(module.parameters())
        if parameters and not any(parameter.requires_grad for parameter in parameters):
            module.eval()


def _frozen_norms(model: nn.Module, schedule: Schedule) -> nn.Module | None:
    """The backbone, if its batch norms keep their statistics."""
    backbone = getattr(model, "backbone", None)
    return backbone if schedule.freeze_batch_norm and isinstance(backbone, nn.Module) else None


@dataclass(frozen=True)
class _PartsOfBatches:
    """The parts of each batch that this rank computes: `count` for each, with as many samples each as possible."""

    batches: Iterable[list[int]]
    count: int

    def __iter__(self) -> Iterator[list[int]]:
        parts = world_size() * self.count
        for batch in self.batches:
            for part in range(rank() * self.count, (rank() + 1) * self.count):
                yield batch[part * len(batch) // parts : (part + 1) * len(batch) // parts]


def _batches(dataset: Dataset[Any], schedule: Schedule, options: LoopOptions, epoch: int) -> Iterator[Any]:
    """The samples of this rank, `execution.accumulate` times for each batch; batches are the same for every rank."""
    if hasattr(dataset, "set_epoch"):
        dataset.set_epoch(epoch)
    generator = torch.Generator().manual_seed(options.seed * ORDER_SEED_STRIDE + epoch)
    order = RandomSampler(dataset, generator=generator)  # type: ignore[arg-type]
    size = min(schedule.batch_size, len(dataset))  # type: ignore[arg-type]
    loader = DataLoader(
        dataset,
        batch_sampler=_PartsOfBatches(BatchSampler(order, size, drop_last=True), options.execution.accumulate),
        num_workers=options.workers,
        generator=generator,
        multiprocessing_context=_worker_context() if options.workers else None,
    )
    return iter(loader)


def _worker_context() -> multiprocessing.context.BaseContext:
    """How worker processes start: from a fork server, or by spawning where there is none (Windows).

    Never by forking this process: CUDA does not survive a fork, and a lock that another thread holds at that
    moment stays locked in the child for ever. The fork server is a fresh process without threads at work that
    imports torch once, so that workers still start in milliseconds. Workers get the dataset by pickling it.
    """
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context: ForkServerContext = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["multisa.training.augment"])  # no effect once the server runs
    return context
