"""All stages in order: image-level labels -> CAMs -> affinities -> pseudo-masks -> segmenter -> results.

Mistakes in the configuration or the data set are found before the first stage (`check_run`).
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from multisa.runtime.bundle import LabelParameters
from multisa.runtime.errors import DatasetError, ImageError, UsageError
from multisa.runtime.files import write_json_atomically
from multisa.runtime.imaging.decode import read_mask
from multisa.runtime.imaging.png import IGNORE_INDEX
from multisa.runtime.progress import log
from multisa.runtime.records import record_from_dict, record_to_dict
from multisa.training.backbones import check_weights
from multisa.training.config import TrainConfig
from multisa.training.data import Dataset, Item
from multisa.training.models import create_model
from multisa.training.stage_cache import StageCache
from multisa.training.stage_functions import evaluate_segmenter, train_segmenter
from multisa.training.stages import RunStages, make_pseudo_labels

SEGMENTER = "DeepLabV3+ on pseudo-masks"  # name of the row of the results
RUN_RECORD = "run.json"


@dataclass(frozen=True)
class StageRecord:
    """One finished stage of a run."""

    name: str
    folder: str  # below the run's folder
    digest: str
    seconds: float


@dataclass(frozen=True)
class Row:
    """One line of the results table, in percent."""

    stage: str
    measured_on: str  # the list: train or val
    miou: float
    iou: tuple[float | None, ...]  # one for each class, None where it does not occur


@dataclass(frozen=True)
class ImageCounts:
    """How many images each list of the data set has."""

    train_images: int  # trained on, with image-level labels
    train: int  # those of them with masks, which the pseudo-masks are measured on
    val: int


def count_images(dataset: Dataset) -> ImageCounts:
    """Count the images of each list of a data set."""
    return ImageCounts(len(dataset.train_images), len(dataset.train), len(dataset.val))


@dataclass(frozen=True)
class RunRecord:
    """Settings and results of a finished run: `run.json`, all that export needs beside the checkpoints."""

    config: TrainConfig
    classes: tuple[str, ...]  # background first
    palette: tuple[tuple[int, int, int], ...]
    images: ImageCounts
    data_digest: str  # of what was trained on
    label: LabelParameters  # as used for the pseudo-masks
    score_thresholds: tuple[float, ...]  # one for each foreground class
    betas: tuple[float, ...]
    rows: tuple[Row, ...]  # empty when the data set has no masks
    stages: tuple[StageRecord, ...]
    seconds: float
    torch: str
    threads: int

    def folder(self, root: Path, name: str) -> Path:
        """Folder of the stage `name` of this run."""
        return root / next(stage.folder for stage in self.stages if stage.name == name)

    def format_table(self) -> str:
        """The table of mIoU per stage and class, in percent."""
        if not self.rows:
            return "no masks in this data set: nothing was measured"
        names = [name[:10] for name in self.classes]
        width = max(len(row.stage) for row in self.rows) + 2
        header = "".join(f"{name:>11}" for name in names)
        lines = [f"{'stage':<{width}}{'list':<7}{'mIoU':>7}  {header}"]
        for row in self.rows:
            ious = "".join(f"{'-' if value is None else f'{value:.2f}':>11}" for value in row.iou)
            lines.append(f"{row.stage:<{width}}{row.measured_on:<7}{row.miou:>7.2f}  {ious}")
        return "\n".join(lines)


def train(config: TrainConfig, dataset: Dataset, output: Path) -> RunRecord:
    """Run every stage that is not finished yet in the folder `output`, and write `output/run.json`.

    What `multisa train` does: class activation network, affinities, pseudo-masks and segmenter, in that
    order, each in a folder of its own. After an interruption the same call resumes; stages whose inputs did
    not change are skipped. When the data set has no masks, nothing is measured. Progress is reported on
    stderr.

    `config.workers` processes load the samples. They import the calling script, which must therefore keep
    this call below `if __name__ == "__main__":`.

    Raises UsageError for a configuration that does not fit the data set or the networks, and DatasetError for
    ground truth that cannot be used, both before any training; CheckpointError for a damaged checkpoint;
    BackendUnavailable for `device="cuda"` without a GPU; MultisaError when a loss is not finite.
    """
    record = run_stages(config, dataset, output)
    write_json_atomically(output / RUN_RECORD, record_to_dict(record))
    return record


def run_stages(config: TrainConfig, dataset: Dataset, output: Path) -> RunRecord:
    """Run every stage as `train` does, without writing `run.json`."""
    check_run(config, dataset)
    cache = StageCache(output)
    stages = RunStages(cache, config, dataset)
    labels = make_pseudo_labels(stages)
    work = partial(train_segmenter, config, dataset, labels.masks, labels.cam)
    segmenter = cache.stage("segmenter", record_to_dict(config.segmenter), [labels.masks], work)
    rows = [
        Row(f"{m.name} (background {m.background:.2f})", "train", m.scores["miou"], tuple(m.scores["iou"]))
        for m in labels.measured
    ]
    if dataset.val:
        truth = {"truth": dataset.masks_digest(dataset.val)}
        work = partial(evaluate_segmenter, config, dataset, segmenter)
        scores = cache.stage("val", truth, [segmenter], work).results
        rows.append(Row(SEGMENTER, "val", scores["miou"], tuple(scores["iou"])))
    return RunRecord(
        config=config,
        classes=dataset.class_names,
        palette=dataset.palette,
        images=count_images(dataset),
        data_digest=stages.images_digest,
        label=labels.label,
        score_thresholds=tuple(labels.cams.results["score_thresholds"]),
        betas=tuple(labels.cam.results["betas"]),
        rows=tuple(rows),
        stages=tuple(StageRecord(s.name, s.folder.name, s.digest, round(s.seconds, 1)) for s in cache.stages),
        seconds=round(sum(stage.seconds for stage in cache.stages), 1),
        torch=torch.__version__,
        threads=torch.get_num_threads(),
    )


def load_run(output: Path) -> RunRecord:
    """Read the `run.json` that `train` wrote. Raises UsageError for a folder without a finished run."""
    path = output / RUN_RECORD
    if not path.is_file():
        raise UsageError(f"{path}: missing; expected the output folder of a finished `multisa train`")
    try:
        return record_from_dict(RunRecord, json.loads(path.read_text(encoding="utf-8")), str(path))
    except ValueError as error:
        raise UsageError(f"{error}; run `multisa train` again with this version") from error


def check_run(config: TrainConfig, dataset: Dataset) -> None:
    """Check a configuration against the networks it names and against the data set.

    Raises UsageError for the configuration, DatasetError for the ground truth.
    """
    _check_label(config, dataset)
    check_networks(config, len(dataset.class_names))
    check_ground_truth((*dataset.train, *dataset.val), len(dataset.class_names))


def check_networks(config: TrainConfig, n_classes: int) -> None:
    """Build the three networks without memory for weights; n_classes counts the background.

    Raises UsageError for a backbone, weights, taps or a head that do not exist or do not fit together.
    """
    for part in (config.cam, config.affinity, config.segmenter):
        check_weights(part.backbone, part.weights)
    with torch.device("meta"):
        create_model(replace(config.cam, weights="none"), n_classes)
        create_model(replace(config.affinity, weights="none"))
        create_model(replace(config.segmenter, weights="none"), n_classes)


def check_ground_truth(items: Iterable[Item], n_classes: int) -> None:
    """Raise DatasetError, naming the file, for a mask that cannot be read or holds an id without a class."""
    for item in items:
        if item.mask is None:
            continue
        try:
            mask = read_mask(item.mask)
        except ImageError as error:
            raise DatasetError(str(error)) from error
        highest = int(mask[mask != IGNORE_INDEX].max(initial=0))
        if highest >= n_classes:
            raise DatasetError(
                f"{item.mask}: got class id {highest}, expected 0..{n_classes - 1} or {IGNORE_INDEX}; name "
                f"every class in classes.txt, or write {IGNORE_INDEX} (ignored) for the others"
            )


def _check_label(config: TrainConfig, dataset: Dataset) -> None:
    gains = config.label.class_gain
    foreground = len(dataset.class_names) - 1
    if len(gains) not in (0, foreground):
        raise UsageError(
            f"label.class_gain: got {len(gains)} numbers, expected {foreground}, one for each foreground "
            "class, or none"
        )
    if gains and config.background_from == "train-masks-per-class":
        raise UsageError(
            f"label.class_gain: got {list(gains)}, expected none with background_from=train-masks-per-class, "
            "which chooses them: leave out one of the two"
        )
    if config.background_from != "config" and not dataset.train:
        log.info(
            f"background_from={config.background_from}: the train list has no masks to choose on, "
            f"so label.background {config.label.background:g} is used"
        )
