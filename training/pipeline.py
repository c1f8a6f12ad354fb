"""All stages in order: weak labels -> CAMs -> affinities -> pseudo-masks -> segmenter -> table."""

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
from multisa.training.data import DataSet
from multisa.training.labelling import Labelled, label_photographs
from multisa.training.segmentation import evaluate_segmenter, train_segmenter
from multisa.training.workspace import Stage, Workspace

SEGMENTER = "DeepLabV3+ on pseudo-masks"
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
class Photographs:
    """How many photographs each list of the data set has."""

    weak: int  # trained on, by image-level labels
    train: int  # those of them with masks, which measure the pseudo-masks
    val: int


@dataclass(frozen=True)
class RunRecord:
    """What a run made and measured: `run.json`, all that the exporter needs beside the checkpoints."""

    config: TrainConfig
    classes: tuple[str, ...]
    palette: tuple[tuple[int, int, int], ...]
    photographs: Photographs
    data_digest: str  # of what was trained on
    label: LabelParameters  # as used for the pseudo-masks
    score_thresholds: tuple[float, ...]  # one for each foreground class
    betas: tuple[float, ...]
    rows: tuple[Row, ...]
    stages: tuple[StageRecord, ...]
    seconds: float
    torch: str
    threads: int

    def folder(self, root: Path, name: str) -> Path:
        """Folder of the stage `name` of this run."""
        return root / next(stage.folder for stage in self.stages if stage.name == name)


def run_pipeline(config: TrainConfig, dataset: DataSet, root: Path) -> RunRecord:
    """Run every stage that is not made already (`make_run`) and write `root/run.json`."""
    record = make_run(config, dataset, root)
    write_json_atomically(root / RUN_RECORD, record_to_dict(record))
    return record


def make_run(config: TrainConfig, dataset: DataSet, root: Path) -> RunRecord:
    """Run every stage that is not made already.

    Without masks in the data set nothing is measured, and the plain CAM (which is only measured) is left out.
    """
    check_run(config, dataset)
    space = Workspace(root)
    labelled = label_photographs(space, config, dataset)
    masks, cam = labelled.masks, labelled.cam
    segmenter = space.stage(
        "segmenter",
        record_to_dict(config.segmenter),
        [masks],
        lambda folder: train_segmenter(config, dataset, masks, cam, folder),
    )
    val = dataset.val and space.stage(
        "val",
        {"truth": dataset.masks_digest(dataset.val)},
        [segmenter],
        lambda folder: evaluate_segmenter(config, dataset, segmenter, folder),
    )
    return RunRecord(
        config=config,
        classes=dataset.class_names,
        palette=dataset.palette,
        photographs=Photographs(len(dataset.weak), len(dataset.train), len(dataset.val)),
        data_digest=labelled.data_digest,
        label=labelled.label,
        score_thresholds=tuple(labelled.cams.results["score_thresholds"]),
        betas=tuple(cam.results["betas"]),
        rows=tuple(_rows(labelled, val or None)),
        stages=tuple(StageRecord(s.name, s.folder.name, s.digest, round(s.seconds, 1)) for s in space.stages),
        seconds=round(sum(stage.seconds for stage in space.stages), 1),
        torch=torch.__version__,
        threads=torch.get_num_threads(),
    )


def load_run(root: Path) -> RunRecord:
    """Read what `run_pipeline` wrote. Raises UsageError for a folder that holds no finished run."""
    path = root / RUN_RECORD
    if not path.is_file():
        raise UsageError(f"{path}: missing; expected the output folder of a finished `multisa train`")
    try:
        return record_from_dict(RunRecord, json.loads(path.read_text(encoding="utf-8")), str(path))
    except ValueError as error:
        raise UsageError(f"{error}; run `multisa train` again with this version") from error


def format_table(run: RunRecord) -> str:
    """The table of mIoU per stage and class, in percent."""
    if not run.rows:
        return "no masks in this data set: nothing was measured"
    names = [name[:10] for name in run.classes]
    width = max(len(row.stage) for row in run.rows) + 2
    lines = [f"{'stage':<{width}}{'list':<7}{'mIoU':>7}  " + "".join(f"{name:>11}" for name in names)]
    for row in run.rows:
        ious = "".join(f"{'-' if value is None else f'{value:.2f}':>11}" for value in row.iou)
        lines.append(f"{row.stage:<{width}}{row.measured_on:<7}{row.miou:>7.2f}  {ious}")
    return "\n".join(lines)


def _rows(labelled: Labelled, val: Stage | None) -> list[Row]:
    rows = [
        Row(f"{m.name} (background {m.background:.2f})", "train", m.scores["miou"], tuple(m.scores["iou"]))
        for m in labelled.measured
    ]
    if val:
        rows.append(Row(SEGMENTER, "val", val.results["miou"], tuple(val.results["iou"])))
    return rows
