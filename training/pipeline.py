"""All stages in order: image-level labels -> CAMs -> affinities -> pseudo-masks -> segmenter -> results."""

import json
from dataclasses import dataclass
from pathlib import Path

import torch

from multisa.runtime.bundle import LabelParameters
from multisa.runtime.errors import UsageError
from multisa.runtime.files import write_json_atomically
from multisa.runtime.records import record_from_dict, record_to_dict
from multisa.training.checks import check_run
from multisa.training.config import TrainConfig
from multisa.training.data import Dataset
from multisa.training.stage_cache import Stage, StageCache
from multisa.training.stage_functions import evaluate_segmenter, train_segmenter
from multisa.training.stages import PseudoLabels, RunStages, make_pseudo_labels

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
    segmenter = cache.stage(
        "segmenter",
        record_to_dict(config.segmenter),
        [labels.masks],
        lambda folder: train_segmenter(config, dataset, labels.masks, labels.cam, folder),
    )
    val = dataset.val and cache.stage(
        "val",
        {"truth": dataset.masks_digest(dataset.val)},
        [segmenter],
        lambda folder: evaluate_segmenter(config, dataset, segmenter, folder),
    )
    return RunRecord(
        config=config,
        classes=dataset.class_names,
        palette=dataset.palette,
        images=count_images(dataset),
        data_digest=stages.images_digest,
        label=labels.label,
        score_thresholds=tuple(labels.cams.results["score_thresholds"]),
        betas=tuple(labels.cam.results["betas"]),
        rows=tuple(_rows(labels, val or None)),
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


def _rows(labels: PseudoLabels, val: Stage | None) -> list[Row]:
    rows = [
        Row(f"{m.name} (background {m.background:.2f})", "train", m.scores["miou"], tuple(m.scores["iou"]))
        for m in labels.measured
    ]
    if val:
        rows.append(Row(SEGMENTER, "val", val.results["miou"], tuple(val.results["iou"])))
    return rows
