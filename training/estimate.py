"""Estimate what a training takes, from a few steps and images on this machine.

Every network does a few training steps on random pixels, and every other stage runs on a few images of the data
set with these untrained networks. Both are scaled to the number of images and epochs. The sizes of maps and
checkpoints are exact; those of masks are scaled by their pixels.
"""

import time
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor, nn

from multisa.runtime.imaging.decode import read_mask, working_size
from multisa.runtime.progress import console, log, pluralize
from multisa.runtime.system import usable_cpus
from multisa.training.affinity_net import affinity_loss, head_stride, pair_targets
from multisa.training.augment import AugmentedImages
from multisa.training.backbones import Backbone
from multisa.training.config import AffinityConfig, CamConfig, ExecutionConfig, SegmenterConfig, TrainConfig
from multisa.training.data import Dataset, Item, spread
from multisa.training.data_check import Estimate, Size
from multisa.training.distributed import alone, world_size
from multisa.training.frozen_norm import folded_norms
from multisa.training.inference import keep_freed_memory, torch_device
from multisa.training.loop import CHECKPOINT, autocast_for, save_checkpoint
from multisa.training.models import create_model, with_taps
from multisa.training.multi_sa import multilabel_soft_margin
from multisa.training.segmenter import SEGMENTER_STRIDE, segmentation_loss
from multisa.training.stage_cache import Stage
from multisa.training.stage_functions import (
    compute_cams,
    evaluate_segmenter,
    make_affinity_labels,
    make_pseudo_masks,
    measure_maps,
    relabel,
    walk_cams,
)
from multisa.training.stages import planned_stages
from multisa.training.thresholds import BACKGROUND_OFFSETS, BACKGROUND_SAMPLE, around, choose_background

CPU_BATCH = 2  # images of a step where a step of the whole batch would take longer than STEP_SECONDS
STEP_SECONDS = 5.0
STEPS = 3  # the fastest counts
LOADED = 8  # samples that are loaded to measure loading
CAM_STRIDE = 4  # image pixels per cell of the stored activation maps
NPY_HEADER = 128  # bytes
RECORD = 90  # bytes that stage.json needs for a file
# Kinds of stages, by the first of these parts that their name has.
KINDS = {
    "-yen": "", "-balance": "", "-measured": "measured", "-val": "val", "calibration": "calibration", "-maps": "maps",
    "cam-baseline": "baseline", "cam": "cam", "affinity-labels": "labels", "affinity": "affinity", "walk": "walk",
    "pseudo-masks": "masks", "teacher": "teacher", "relabelled": "relabelled", "segmenter": "segmenter",
    "supervised": "segmenter",
}  # fmt: skip

Network = CamConfig | AffinityConfig | SegmenterConfig


@dataclass(frozen=True)
class _Counts:
    """How many networks and images a run works on."""

    baseline: bool  # also trains the plain CAM
    paper_masks: bool  # also makes the paper's pseudo-masks
    calibrated: int  # images for which background scores are tried
    rounds: int  # teachers that are trained, each of which labels all train images
    segmenters: int  # trained and evaluated: on labels and, if asked for, on masks, with each seed

    @classmethod
    def of(cls, config: TrainConfig, dataset: Dataset) -> "_Counts":
        train = len(dataset.train)
        measured = bool(train)
        paper_masks = measured and config.paper_rows and config != config.with_paper_masks()
        chosen = config.background_from == "train-masks" and config.label.use_crf
        tried = len(dataset.train[:: max(-(-train // BACKGROUND_SAMPLE), 1)])
        return cls(
            baseline=measured and config.paper_rows,
            paper_masks=paper_masks,
            calibrated=tried * (chosen + paper_masks),
            rounds=config.relabel.rounds,
            segmenters=(1 + (measured and bool(dataset.val) and config.supervised)) * (1 + len(config.more_seeds)),
        )


def estimate_training(config: TrainConfig, dataset: Dataset, sizes: Mapping[str, Size]) -> Estimate | None:
    """Estimate time and disk of `multisa.training.train`, in about half a minute for `lite0` on two CPU cores.

    sizes: (H, W) of each image by id (`DatasetReport.sizes`). Returns None, with a warning, if the memory of the
    GPU does not suffice. Raises BackendUnavailable as `train` does.
    """
    log.info("estimating the training: every network and stage runs on a few images")
    config = replace(config, cam=with_taps(config.cam))
    device = torch_device(config)
    keep_freed_memory()  # as the training does
    counts = _Counts.of(config, dataset)
    n, train, val = len(dataset.train_images), len(dataset.train), len(dataset.val)
    images = {
        "maps": n + train * counts.baseline,
        "labels": n,
        "walk": n,
        "masks": n + train * counts.paper_masks,
        "relabelled": n * counts.rounds,
        # maps, walked maps, and masks
        "measured": train * (3 + counts.baseline + counts.paper_masks + counts.rounds),
        "calibration": counts.calibrated,
        "val": val * counts.segmenters,
    }
    processes = world_size()
    shared = replace(config.execution, accumulate=config.execution.accumulate * processes)
    try:
        with alone(), console(quiet=True), TemporaryDirectory() as folder:
            part = replace(config, execution=shared)  # what one process computes of a batch at a time
            trained, checkpoints = _training(part, dataset, counts, Path(folder), device)
            per_image, per_pixel = _other_stages(config, dataset, counts, Path(folder))
    except torch.cuda.OutOfMemoryError:
        log.warning("the memory of the GPU does not suffice: lower batch_size or crop, or raise execution.accumulate")
        return None
    if device.type == "cuda":
        trained = {name: value / processes for name, value in trained.items()}
    seconds = trained | {kind: per_image.get(kind, 0.0) * count for kind, count in images.items()}
    disk = checkpoints + _file_bytes(config, dataset, counts, sizes, per_pixel)
    kinds = {name: _kind(name) for name in planned_stages(config, dataset)}
    shares = Counter(kinds.values())
    stages = {name: seconds.get(kind, 0.0) / shares[kind] for name, kind in kinds.items()}
    return Estimate(sum(seconds.values()), disk, machine_name(device), stages)


def machine_name(device: torch.device) -> str:
    """What trains, in words: the GPU, or how many CPU cores."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else pluralize(usable_cpus(), "CPU core")


def _kind(stage: str) -> str:
    """What a stage is measured as here, by its name; "" if it takes no time worth to measure."""
    return next(kind for part, kind in KINDS.items() if part in stage)


def _training(
    config: TrainConfig, dataset: Dataset, counts: _Counts, root: Path, device: torch.device
) -> tuple[dict[str, float], int]:
    """Seconds of the trainings by network, and bytes of their checkpoints; leaves a checkpoint of each in `root`."""
    n, n_classes, cores = len(dataset.train_images), len(dataset.class_names), usable_cpus()
    # A supervised segmenter takes as many steps as the other.
    parts: dict[str, tuple[Network, int]] = {
        "cam": (config.cam, 1),
        "baseline": (replace(config.cam, taps=()), int(counts.baseline)),
        "affinity": (config.affinity, 1),
        "teacher": (config.relabel.teacher, counts.rounds),
        "segmenter": (config.segmenter, counts.segmenters),
    }
    seconds, size = {}, 0
    for name, (part, times) in parts.items():
        if not times:
            continue
        schedule = part.schedule
        step, checkpoint = _measured_step(part, config.execution, n_classes, root / name / CHECKPOINT, device)
        samples = AugmentedImages(spread(dataset.train_images, LOADED), schedule, config, n_classes=n_classes)
        started = time.perf_counter()
        for index in range(len(samples)):
            samples[index]
        loading = (time.perf_counter() - started) / len(samples)
        # The loading processes share the CPU cores with the steps, except where a GPU does those.
        on_gpu = device.type == "cuda"
        image = max(step, loading / min(config.workers, cores)) if on_gpu else step + loading / cores
        batch = min(schedule.batch_size, n)
        seconds[name] = times * image * (n // batch) * batch * schedule.epochs
        size += times * checkpoint
    return seconds, size


def _measured_step(
    part: Network, execution: ExecutionConfig, n_classes: int, checkpoint: Path, device: torch.device
) -> tuple[float, int]:
    """Seconds of a training step per image of its batch, and bytes of the checkpoint, which is written."""
    schedule = part.schedule
    whole = -(-schedule.batch_size // execution.accumulate)  # images that are computed together
    network = untrained(part, n_classes).to(device)
    backbone = network.backbone
    assert isinstance(backbone, Backbone)
    backbone.freeze(schedule.frozen_levels)
    optimiser = torch.optim.SGD([p for p in network.parameters() if p.requires_grad], lr=1e-6, momentum=0.9)

    def step(batch: int) -> float:
        started = time.perf_counter()
        optimiser.zero_grad(set_to_none=True)
        with device, autocast_for(execution.precision, device):
            loss = training_loss(part, network, batch=batch, n_classes=n_classes)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(network.parameters(), schedule.clip_norm)
        optimiser.step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - started

    seconds = 0.0
    with folded_norms(backbone) if schedule.freeze_batch_norm else nullcontext():
        for batch in (whole,) if device.type == "cuda" else (min(CPU_BATCH, whole), whole):
            if seconds * batch < STEP_SECONDS:
                # The first step allocates, and others may be slowed down by other programs.
                seconds = min(step(batch) for _ in range(STEPS)) / batch
    save_checkpoint(checkpoint, network, optimiser, {"losses": [0.12345678901234567] * schedule.epochs})
    return seconds, checkpoint.stat().st_size


def untrained(part: Network, n_classes: int) -> nn.Module:
    """The network of a part of the configuration, with random weights."""
    if isinstance(part, AffinityConfig):
        return create_model(replace(part, weights="none"))
    return create_model(replace(part, weights="none"), n_classes)


def training_loss(part: Network, network: nn.Module, *, batch: int, n_classes: int) -> Tensor:
    """The loss that a network is trained with, of random pixels and targets on torch's default device."""
    crop = part.schedule.crop
    image = torch.randint(0, 256, (batch, crop, crop, 3), dtype=torch.uint8)
    normalised = network.backbone.normalise(image)  # type: ignore[operator,union-attr]
    if isinstance(part, CamConfig):
        return multilabel_soft_margin(network(normalised), torch.ones((batch, n_classes - 1)))
    side = -(-crop // head_stride(part.head)) if isinstance(part, AffinityConfig) else crop
    mask = torch.randint(0, n_classes, (batch, side, side), dtype=torch.uint8)
    if isinstance(part, SegmenterConfig):
        return segmentation_loss(network(normalised), mask)
    radius = part.training_radius
    return affinity_loss(network(normalised, radius), *pair_targets(mask, radius))


def _other_stages(config: TrainConfig, dataset: Dataset, counts: _Counts, root: Path) -> tuple[dict[str, float], float]:
    """Seconds per image of each stage that trains nothing, and bytes per pixel of a mask.

    Every stage runs on a larger and a smaller sample, and their difference counts: what a stage does once, such
    as reading its network, would otherwise be multiplied by the number of images.
    """
    samples = [(_sample(dataset, count * config.workers), root / str(count)) for count in (3, 1)]

    def stage(name: str, folder: Path = root) -> Stage:
        (folder / name).mkdir(parents=True, exist_ok=True)
        return Stage(name, folder / name, "")

    def per_image(work: Callable[[Dataset, Path], object]) -> float:
        taken = []
        for sample, folder in samples:
            started = time.perf_counter()
            work(sample, folder)
            taken.append(time.perf_counter() - started)
        return max(taken[0] - taken[1], 0.0) / (2 * config.workers)

    def maps(d: Dataset, f: Path) -> object:
        return compute_cams(config.cam, config, d, d.train_images, stage("cam"), stage("maps", f).folder)

    def masks(d: Dataset, f: Path) -> object:
        return make_pseudo_masks(config, config.label, d, d.train_images, stage("walk", f), stage("masks", f).folder)

    def labels(d: Dataset, f: Path) -> object:
        chosen = replace(config, affinity_labels=around(config.label.background, config.affinity_labels))
        return make_affinity_labels(chosen, d, stage("maps", f), stage("labels", f).folder)

    seconds = {
        "maps": per_image(maps),
        "labels": per_image(labels),
        "walk": per_image(
            lambda d, f: walk_cams(config, d, stage("maps", f), stage("affinity"), stage("walk", f).folder)
        ),
        "masks": per_image(masks),
    }
    if dataset.train:
        seconds["measured"] = per_image(lambda d, f: measure_maps(config, d, stage("maps", f), f))
    if counts.rounds:
        teacher = config.relabel.teacher
        seconds["relabelled"] = per_image(
            lambda d, f: relabel(
                teacher, config.segmenter_label, config, d, stage("teacher"), stage("relabelled", f).folder
            )
        )
    if counts.calibrated:
        label = config.with_paper_masks().label
        seconds["calibration"] = per_image(
            lambda d, f: choose_background(
                config, label, d, stage("walk", f), label.background, stage("calibration", f).folder
            )
        )
    if dataset.val:
        seconds["val"] = per_image(
            lambda d, f: evaluate_segmenter(config.segmenter, config, d, stage("segmenter"), stage("val", f).folder)
        )
    written = [*root.glob("*/masks/*.png"), *root.glob("*/labels/*.png")]
    return seconds, sum(path.stat().st_size for path in written) / sum(read_mask(path).size for path in written)


def _file_bytes(
    config: TrainConfig, dataset: Dataset, counts: _Counts, sizes: Mapping[str, Size], per_pixel: float
) -> int:
    """Bytes of all maps and masks, and of their entries in stage.json; per_pixel: bytes of a mask."""
    n_classes = len(dataset.class_names)
    walk_stride = head_stride(config.affinity.head)
    files: list[float] = [NPY_HEADER + 8 * len(BACKGROUND_OFFSETS) * n_classes**2] * counts.calibrated

    def working(item: Item) -> Size:
        return working_size(*sizes[item.id], config.long_side)

    def maps(item: Item, stride: int, *, background: bool = False) -> int:  # half precision
        height, width = working(item)
        return NPY_HEADER + 2 * (len(item.classes) + background) * -(-height // stride) * -(-width // stride)

    def mask(item: Item) -> float:
        height, width = working(item)
        return per_pixel * height * width

    scores = NPY_HEADER + 2 * (n_classes - 1)
    for item in dataset.train_images:
        files += [maps(item, CAM_STRIDE), scores, mask(item), maps(item, walk_stride), mask(item)]
        files += [maps(item, SEGMENTER_STRIDE, background=True), mask(item)] * counts.rounds
    for item in dataset.train:
        files += [maps(item, CAM_STRIDE), scores] if counts.baseline else []
        files += [mask(item)] if counts.paper_masks else []
    files += [mask(item) for item in dataset.val] * counts.segmenters
    return round(sum(files)) + RECORD * len(files)


def _sample(dataset: Dataset, count: int) -> Dataset:
    """`count` images of each list that is not empty, with ids of their own: short lists repeat."""

    def chosen(items: tuple[Item, ...]) -> tuple[Item, ...]:
        some = spread(items, count)
        return tuple(replace(some[i % len(some)], id=f"sample{i}") for i in range(count)) if some else ()

    trained_on = chosen(dataset.train or dataset.train_images)
    return replace(dataset, train_images=trained_on, train=trained_on if dataset.train else (), val=chosen(dataset.val))
