"""The training loop of all networks: SGD, poly schedule, a checkpoint after every epoch, exact resuming."""

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from multisa.runtime.errors import MultisaError
from multisa.runtime.progress import Progress, log
from multisa.training.checkpoint import load_checkpoint, save_checkpoint
from multisa.training.config import Schedule


@dataclass(frozen=True)
class LoopOptions:
    """What surrounds a schedule: where it writes, its seed and its processes."""

    checkpoint: Path
    seed: int
    workers: int
    title: str


def train_network(
    model: nn.Module,
    faster: Sequence[tuple[float, Iterable[nn.Parameter]]],
    dataset: Dataset[Any],
    step: Callable[[Any], Tensor],
    schedule: Schedule,
    options: LoopOptions,
) -> list[float]:
    """Train `model` in place and return the mean loss of every epoch.

    faster: (factor, parameters) pairs; these learn at `schedule.learning_rate` times the factor, all others
    at the rate itself, and those with requires_grad False not at all. step: maps a batch of `dataset` to the
    loss. Interrupted and called again, it goes on after the last whole epoch, to the same result: order,
    augmentation and dropout of an epoch depend only on the seed and the epoch.
    """
    optimiser = _optimiser(model, faster, schedule)
    losses: list[float] = []
    if options.checkpoint.exists():
        losses = load_checkpoint(options.checkpoint, model, optimiser)["losses"]
    steps_per_epoch = _steps_per_epoch(len(dataset), schedule)  # type: ignore[arg-type]
    base_rates = [group["lr"] for group in optimiser.param_groups]
    for epoch in range(len(losses), schedule.epochs):
        _set_training_mode(model, schedule)
        torch.manual_seed(options.seed * 1_000_003 + epoch)
        total, started = 0.0, time.perf_counter()
        batches = _batches(dataset, schedule, options, epoch)
        with Progress(steps_per_epoch, f"{options.title} {epoch + 1}/{schedule.epochs}", "step") as bar:
            for index, batch in enumerate(batches):
                done = (epoch * steps_per_epoch + index) / (schedule.epochs * steps_per_epoch)
                for group, base in zip(optimiser.param_groups, base_rates, strict=True):
                    group["lr"] = base * (1 - done) ** schedule.poly_power
                optimiser.zero_grad(set_to_none=True)
                loss = step(batch)
                value = loss.item()
                if not math.isfinite(value):
                    raise MultisaError(f"{options.title}: the loss became {value}; lower learning_rate")
                loss.backward()  # type: ignore[no-untyped-call]
                nn.utils.clip_grad_norm_(model.parameters(), schedule.clip_norm)
                optimiser.step()
                total += value
                bar.advance(note=f"loss {value:.3f}")
        losses.append(total / steps_per_epoch)
        seconds = time.perf_counter() - started
        log.info(
            f"{options.title}: epoch {epoch + 1}/{schedule.epochs}, loss {losses[-1]:.4f}, {seconds:.0f} s"
        )
        save_checkpoint(options.checkpoint, model, optimiser, {"losses": losses})
    model.eval()
    return losses


def _optimiser(
    model: nn.Module, faster: Sequence[tuple[float, Iterable[nn.Parameter]]], schedule: Schedule
) -> torch.optim.SGD:
    factors = {id(parameter): factor for factor, parameters in faster for parameter in parameters}
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
    backbone = getattr(model, "backbone", None)
    if schedule.freeze_batch_norm and isinstance(backbone, nn.Module):
        backbone.eval()
    # What learns nothing stays as it is, statistics included: a frozen backbone must not drift.
    for module in model.modules():
        parameters = list(module.parameters())
        if parameters and not any(parameter.requires_grad for parameter in parameters):
            module.eval()


def _steps_per_epoch(size: int, schedule: Schedule) -> int:
    # The last, incomplete batch is left out (another one every epoch), unless it is the only one.
    return max(size // schedule.batch_size, 1)


def _batches(dataset: Dataset[Any], schedule: Schedule, options: LoopOptions, epoch: int) -> Iterator[Any]:
    set_epoch = getattr(dataset, "set_epoch", None)
    if set_epoch is not None:
        set_epoch(epoch)
    generator = torch.Generator().manual_seed(options.seed * 7919 + epoch)
    size = len(dataset)  # type: ignore[arg-type]
    return iter(
        DataLoader(
            dataset,
            batch_size=min(schedule.batch_size, size),
            shuffle=True,
            drop_last=True,
            num_workers=options.workers,
            generator=generator,
            multiprocessing_context="fork" if options.workers else None,
        )
    )
