"""One step of the optimiser and one inference of every stage of the paper's presets, at their own crop and batch.

    python benchmarks/paper_steps.py                                   # hours on two CPU cores
    python benchmarks/paper_steps.py --presets paper-resnet50 --set cam.schedule.crop=64 --set long_side=64

Every stage runs in a process of its own, on synthetic images of VOC's size with 21 classes and with random weights,
which take as long as trained ones. Trainings compute a batch in parts of --part images. Measured: the peak memory of
the process, and the seconds of the stage with all it does (network, loading, step or inference, files). Multiply-adds
are counted on tensors without memory. The hours on a GPU are an estimate from these, not a measurement. Writes
benchmarks/results/paper_steps.json.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

from multisa.benchmarks.harness import environment, make_parser, peak_memory_mib, save_results
from multisa.benchmarks.synthetic_images import image_bytes
from multisa.runtime.imaging.decode import working_size
from multisa.training.annotations.base import MaskFile
from multisa.training.config import AffinityConfig, CamConfig, Schedule, SegmenterConfig, TrainConfig, load_config
from multisa.training.data import VOC_CLASSES, Dataset, Item
from multisa.training.estimate import training_loss, untrained
from multisa.training.multi_sa import MultiScaleCAM
from multisa.training.segmenter import SegmentImages
from multisa.training.stage_cache import Stage
from multisa.training.stage_functions import (
    SegmenterTraining,
    compute_cams,
    evaluate_segmenter,
    make_affinity_labels,
    make_pseudo_masks,
    train_affinity,
    train_cam,
    train_segmenter,
    walk_cams,
)

PRESETS = ("paper-resnet50", "paper-resnet101", "paper-resnest101")
TRAININGS = ("cam", "affinity", "segmenter")
STAGES = ("cam", "cam-maps", "affinity-labels", "affinity", "walk", "pseudo-masks", "segmenter", "segmenter-val")
NETWORK_OF = {"cam-maps": "cam", "walk": "affinity", "segmenter-val": "segmenter"}  # of stages that train none
HEIGHT, WIDTH = 375, 500  # of most images of VOC
TRAIN_IMAGES = 10_582  # of VOC's train_aug
# For the estimate: dense bf16 of the data sheet, and a share of it that such trainings reach.
GPU, GPU_FLOPS, GPU_SHARE = "NVIDIA A100", 312e12, 0.3


def configuration(preset: str, overrides: Sequence[str]) -> TrainConfig:
    """The preset with random weights and one epoch."""
    ours = [f"{network}.{value}" for network in TRAININGS for value in ("weights=none", "schedule.epochs=1")]
    return load_config(preset, [*ours, *overrides])


def synthetic_data(root: Path, count: int) -> Dataset:
    """`count` images of VOC's size with a class and a mask each."""
    items = []
    for index in range(count):
        class_id = 1 + index % (len(VOC_CLASSES) - 1)
        image, mask = root / f"{index}.jpg", root / f"{index}.png"
        Image.fromarray(image_bytes(HEIGHT, WIDTH)).rotate(index).save(image)
        shape = Image.new("L", (WIDTH, HEIGHT))
        shape.paste(class_id, (100, 80, 300, 280))
        shape.save(mask)
        items.append(Item(str(index), image, (class_id,), MaskFile(mask)))
    return Dataset(root, VOC_CLASSES, tuple(items), (), tuple(items[:1]))


def work_of(stage: str, config: TrainConfig, root: Path) -> Callable[[], object]:
    """What the stage does once: a step on a whole batch, or one image. `root` holds the folders of the stages."""
    stages = {name: Stage(name, root / name, "") for name in (*STAGES, "data")}
    for name in (stage, "data"):
        stages[name].folder.mkdir(exist_ok=True)
    labels, folder = stages["data"], stages[stage].folder
    batch = synthetic_data(labels.folder, getattr(config, stage).schedule.batch_size if stage in TRAININGS else 1)
    training = SegmenterTraining("DeepLabV3+", batch.train_images, None, masks=labels.folder)
    work: dict[str, Callable[[], object]] = {
        "cam": partial(train_cam, config.cam, config, batch, folder),
        "cam-maps": partial(compute_cams, config.cam, config, batch, batch.train_images, stages["cam"], folder),
        "affinity-labels": partial(make_affinity_labels, config, batch, stages["cam-maps"], folder),
        "affinity": partial(train_affinity, config, batch, labels, folder),
        "walk": partial(walk_cams, config, batch, stages["cam-maps"], stages["affinity"], folder),
        "pseudo-masks": partial(
            make_pseudo_masks, config, config.label, batch, batch.train_images, stages["walk"], folder
        ),
        "segmenter": partial(train_segmenter, config.segmenter, training, config, batch, folder),
        "segmenter-val": partial(evaluate_segmenter, config.segmenter, config, batch, stages["segmenter"], folder),
    }
    return work[stage]


def multiply_adds(stage: str, config: TrainConfig) -> int | None:
    """Of the networks of a stage: forward and backward of a batch, or the inference of one image."""
    if stage not in (*TRAININGS, *NETWORK_OF):
        return None
    part: CamConfig | AffinityConfig | SegmenterConfig = getattr(config, NETWORK_OF.get(stage, stage))
    height, width = working_size(HEIGHT, WIDTH, config.long_side)
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        network = untrained(part, len(VOC_CLASSES))
        if stage in TRAININGS:
            training_loss(part, network, batch=1, n_classes=len(VOC_CLASSES)).backward()  # type: ignore[no-untyped-call]
            return int(counter.get_total_flops()) // 2 * part.schedule.batch_size
        image = torch.empty(1, height, width, 3, dtype=torch.uint8)
        with torch.no_grad():
            if isinstance(part, CamConfig):
                MultiScaleCAM(network, scales=part.scales)(image)
            elif isinstance(part, AffinityConfig):
                network(network.backbone.normalise(image), config.label.walk_radius)  # type: ignore[operator,union-attr]
            else:
                SegmentImages(network)(image)  # type: ignore[arg-type]
    return int(counter.get_total_flops()) // 2


def measure(stage: str, config: TrainConfig, root: Path, part: int) -> dict[str, Any]:
    """Run one stage in this process; its peak memory is that of the process."""
    schedule = getattr(config, stage).schedule if stage in TRAININGS else Schedule(batch_size=1)
    config = replace(config, execution=replace(config.execution, accumulate=max(schedule.batch_size // part, 1)))
    work = work_of(stage, config, root)
    started = time.perf_counter()
    work()
    seconds = time.perf_counter() - started
    counted = multiply_adds(stage, config)
    return {
        "batch": schedule.batch_size,
        "parts": config.execution.accumulate,
        "seconds": round(seconds, 3),
        "peak_memory_mib": peak_memory_mib(),
        "gmultiply_adds": round(counted / 1e9, 1) if counted is not None else None,
    }


def estimated_hours(preset: str, stages: dict[str, dict[str, Any]]) -> float:
    """Hours of a whole training on VOC on GPU, from the multiply-adds of the networks alone."""
    config = load_config(preset)
    total = 0.0
    for name, measured in stages.items():
        if name in TRAININGS:
            schedule = getattr(config, name).schedule
            total += measured["gmultiply_adds"] / measured["batch"] * TRAIN_IMAGES * schedule.epochs
        elif name in ("cam-maps", "walk"):
            total += measured["gmultiply_adds"] * TRAIN_IMAGES
    return round(2e9 * total / (GPU_FLOPS * GPU_SHARE) / 3600, 3)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure every stage of the presets, each in a process of its own."""
    parser = make_parser(__doc__)
    parser.add_argument("--presets", nargs="+", choices=PRESETS, default=PRESETS, metavar="NAME")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change a value of the presets")
    parser.add_argument("--part", type=int, default=2, help="images of a part of a batch: 2")
    parser.add_argument("--one", nargs=2, metavar=("STAGE", "FOLDER"), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.one:
        config = configuration(options.presets[0], options.set)
        print(json.dumps(measure(options.one[0], config, Path(options.one[1]), options.part)))
        return
    results: dict[str, Any] = {"environment": environment("torch", "timm"), "changed": options.set, "presets": {}}
    given = [f"--part={options.part}", *(f"--set={override}" for override in options.set)]
    for preset in options.presets:
        stages = {}
        with tempfile.TemporaryDirectory() as folder:
            for stage in STAGES:
                command = [sys.executable, __file__, "--presets", preset, *given, "--one", stage, folder]
                printed = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
                stages[stage] = json.loads(printed.splitlines()[-1])
                print(f"{preset}, {stage}: {stages[stage]}", file=sys.stderr)
        hours = None if options.set else estimated_hours(preset, stages)
        estimate = {"gpu": GPU, "flops": GPU_FLOPS, "assumed_share": GPU_SHARE, "hours": hours, "is_measured": False}
        results["presets"][preset] = {"stages": stages, "estimate_of_a_training_on_voc": estimate}
    save_results("paper_steps", results, options.results)


if __name__ == "__main__":
    main()
