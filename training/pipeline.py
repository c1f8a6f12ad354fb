"""All stages in order: image-level labels -> CAMs -> affinities -> pseudo-masks -> segmenter -> results.

Mistakes in the configuration or the data set are found before the first stage (`check_run`).
"""

import json
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

from multisa.runtime.bundle import LabelParameters
from multisa.runtime.errors import UsageError
from multisa.runtime.files import read_json_object, sha256_of_bytes, write_json_atomically
from multisa.runtime.progress import log
from multisa.runtime.records import record_to_dict
from multisa.training.backbones import layout_of
from multisa.training.config import SegmenterConfig, TrainConfig
from multisa.training.data import Dataset, log_findings
from multisa.training.data_check import DatasetReport, check_dataset
from multisa.training.distributed import on_main, process_group, rank, world_size
from multisa.training.estimate import estimate_training, machine_name
from multisa.training.inference import torch_device
from multisa.training.loop import check_execution
from multisa.training.models import create_model, with_taps
from multisa.training.run_record import RUN_RECORD, SEGMENTER, SUPERVISED, Row, RunRecord, StageRecord, count_images
from multisa.training.runs import run_lock
from multisa.training.stage_cache import MARKER, StageCache
from multisa.training.stages import RunStages, make_pseudo_labels, planned_stages
from multisa.training.start import check_start, start_files
from multisa.training.trackers import check_trackers
from multisa.training.transforms import apply_transforms
from multisa.training.watch import Plan, RunWatch
from multisa.training.weights import check_weights, is_file, weights_identity

PLAN = "plan.json"  # in the run folder: the estimate of the training
# Images times epochs of all networks, below which a training is not much longer than its estimate would take.
LEAST_SAMPLES = 2000


def train(config: TrainConfig, dataset: Dataset, output: Path, *, discard_edits: bool = False) -> RunRecord:
    """Run every stage that is not finished yet in the folder `output`, and write `output/run.json`.

    What `multisa train` does: class activation network, affinities, pseudo-masks and segmenter, in that
    order, each in a folder of its own. After an interruption the same call resumes; stages whose inputs did
    not change are skipped. A file of a finished stage that was changed since ends the run, and is made again with
    `discard_edits`. When the data set has no masks, nothing is measured. Progress is reported on
    stderr.

    `config.workers` processes load the samples. They import the calling script, which must therefore keep
    this call below `if __name__ == "__main__":`. Processes that torchrun started train together, each calling this.

    Raises, before any training, UsageError for a configuration that does not fit the data set or the networks
    and for an output folder inside the data set, and DatasetError for images or ground truth that cannot be
    used; later UsageError for a changed file, CheckpointError for a damaged checkpoint, BackendUnavailable for a
    device or precision that is not there, and MultisaError when a loss is not finite.
    """
    with process_group(config.device):
        record = run_stages(config, dataset, output, discard_edits=discard_edits)
        on_main(lambda: write_json_atomically(output / RUN_RECORD, record_to_dict(record)))
    return record


def run_stages(config: TrainConfig, dataset: Dataset, output: Path, *, discard_edits: bool = False) -> RunRecord:
    """Run every stage as `train` does, without writing `run.json`."""
    report = on_main(partial(check_run, config, dataset, output))
    config = replace(config, cam=with_taps(config.cam))
    with ExitStack() as stack:

        def lock() -> None:
            stack.enter_context(run_lock(output))

        on_main(lock)
        plan = on_main(partial(plan_run, config, dataset, output, report))
        watch = stack.enter_context(RunWatch(config, dataset, output, plan)) if rank() == 0 else None
        cache = StageCache(output, watch, discard_edits=discard_edits)
        return _run_all(RunStages(cache, config, dataset, watch), cache)


def plan_run(config: TrainConfig, dataset: Dataset, output: Path, report: DatasetReport) -> Plan:
    """The stages of a run with an estimate of their seconds.

    The estimate is made once for the same settings, data and machine, and kept in `plan.json`. A small training has
    none.
    """
    machine = machine_name(torch_device(config))
    settings = {k: v for k, v in record_to_dict(config).items() if k not in ("name", "trackers", "val_every")}
    data = [[item.id, item.classes, report.sizes[item.id]] for item in (*dataset.train_images, *dataset.val)]
    about = [settings, dataset.class_names, data, machine, world_size()]
    identity = sha256_of_bytes(json.dumps(about).encode())
    stored, names = read_json_object(output / PLAN), planned_stages(config, dataset)
    is_known = stored.get("identity") == identity
    if not is_known:
        epochs = sum(network.schedule.epochs for network in config.networks().values())
        is_small = len(dataset.train_images) * epochs < LEAST_SAMPLES
        estimate = None if is_small else estimate_training(config, dataset, report.sizes)
        stored = {"identity": identity, "seconds": estimate.stages if estimate else {}}
        write_json_atomically(output / PLAN, stored)
    done = [name for name in names if is_known and any(output.glob(f"{name}-{'[0-9a-f]' * 10}/{MARKER}"))]
    return Plan(machine, {name: stored["seconds"].get(name, 0.0) for name in names}, frozenset(done), identity)


def _run_all(stages: RunStages, cache: StageCache) -> RunRecord:
    config, dataset = stages.config, stages.dataset
    labels = make_pseudo_labels(stages)
    targets, measured = stages.relabelled(labels)
    rows = [
        Row(m.name if m.background is None else f"{m.name} (background {m.background:.2f})", "train", *m.figures)
        for m in (*labels.measured, *measured)
    ]
    for seed in (config.seed, *config.more_seeds):
        trained = [(SEGMENTER, stages.segmenter(targets, labels.cam, seed))]
        if config.supervised and dataset.train and dataset.val:
            trained.append((SUPERVISED, stages.supervised_segmenter(labels.cam, seed)))
        for name, stage in trained if dataset.val else []:
            scores = stages.measured_segmenter(stage).results
            title = name if seed == config.seed else f"{name}, seed {seed}"
            rows.append(Row(title, "val", scores["miou"], tuple(scores["iou"])))
    return RunRecord(
        config=config,
        classes=dataset.class_names,
        palette=dataset.palette,
        images=count_images(dataset),
        data_digest=stages.images_digest,
        label=labels.label,
        segmenter_label=stages.segmenter_label(targets, soft=config.relabel.rounds > 0),
        score_thresholds=tuple(labels.cams.results["score_thresholds"]),
        betas=tuple(labels.cam.results["betas"]),
        rows=tuple(rows),
        stages=tuple(StageRecord(s.name, s.folder.name, s.digest, round(s.seconds, 1)) for s in cache.stages),
        seconds=round(sum(stage.seconds for stage in cache.stages), 1),
        torch=torch.__version__,
        threads=torch.get_num_threads(),
        files={**weight_files(config), **start_files(config)},
    )


def check_run(config: TrainConfig, dataset: Dataset, output: Path | None = None) -> DatasetReport:
    """Check a configuration against the networks it names and against the data set, and every file of that.

    With `output`, the run folder, files that were checked for it before are not decoded again. Raises UsageError
    for the configuration and for an output folder inside the data set, DatasetError for files that cannot be used.
    """
    if output and output.resolve().is_relative_to(dataset.root.resolve()):
        raise UsageError(
            f"{output}: is inside the data set {dataset.root}, expected a folder outside it, because the masks of the "
            "run would be images of the data set; choose another folder with -o"
        )
    _check_label(config, dataset)
    check_trackers(config)
    check_networks(config, len(dataset.class_names))
    for network in config.networks().values():
        check_execution(config.execution, network.schedule, len(dataset.train_images), torch_device(config))
    check_start(config, dataset.class_names)
    report = check_dataset(dataset, output)
    report.require_usable()
    log_findings(report.findings[len(dataset.findings) :])
    return report


def check_networks(config: TrainConfig, n_classes: int) -> None:
    """Build the networks of a run without memory for weights, and log the taps; n_classes counts the background.

    Raises UsageError for a backbone, weights, taps, a head, frozen levels or augmentations that do not exist or do not
    fit together.
    """
    parts = config.networks()
    for part in parts.values():
        # Those of a segmenter that starts from the CAM network are not read.
        unread = isinstance(part, SegmenterConfig) and part.start_from_cam and not config.init_from
        if not unread or is_file(part.weights):
            check_weights(part.backbone, part.weights)
    for name, part in parts.items():
        with torch.device("meta"):
            backbone = create_model(replace(part, weights="none"), n_classes).backbone
        if part.schedule.frozen_levels > len(backbone.strides):
            raise UsageError(
                f"{name}.schedule.frozen_levels: got {part.schedule.frozen_levels}, expected at most "
                f"{len(backbone.strides)}, the levels of {part.backbone}: lower it"
            )
        crop = part.schedule.crop
        image, mask = np.zeros((crop, crop, 3), np.uint8), np.zeros((crop, crop), np.uint8)
        apply_transforms(tuple(part.schedule.augment), image, mask, seed=0)
    taps = with_taps(config.cam).taps or ()
    origin = "chosen from the model; cam.taps changes them" if config.cam.taps is None else "as configured"
    log.info(f"cam: {config.cam.backbone}, {layout_of(config.cam.backbone).describe(taps)}, {origin}")


def weight_files(config: TrainConfig) -> dict[str, str]:
    """Path -> SHA-256 of every file of weights that a configuration names."""
    parts = config.networks().values()
    return {p.weights: weights_identity(p.weights).removeprefix("sha256:") for p in parts if is_file(p.weights)}


def _check_label(config: TrainConfig, dataset: Dataset) -> None:
    gains = config.label.class_gain
    foreground = len(dataset.class_names) - 1
    if len(gains) not in (0, foreground):
        raise UsageError(
            f"label.class_gain: got {len(gains)} numbers, expected {foreground}, one for each foreground class, or none"
        )
    if gains and config.background_from == "yen":
        raise UsageError(
            f"label.class_gain: got {list(gains)}, expected none with background_from=yen, which chooses them: "
            "leave out one of the two"
        )
    default = LabelParameters().background
    if config.background_from == "yen" and config.label.background != default:
        raise UsageError(
            f"label.background: got {config.label.background:g}, expected the default, {default:g}, with "
            "background_from=yen, which chooses it: leave it out, or set background_from=config"
        )
    ratio = config.segmenter_label.background_ratio
    if config.balance_background and ratio != 1:
        raise UsageError(
            f"segmenter_label.background_ratio: got {ratio:g}, expected the default, 1, with balance_background=true, "
            "which chooses it: leave it out, or set balance_background=false"
        )
    if config.background_from == "train-masks" and not dataset.train:
        log.info(
            "background_from=train-masks: the train list has no masks to choose on, "
            f"so label.background {config.label.background:g} is used"
        )
