"""What a run of the training pipeline leaves behind: `run.json`, with its settings, stages and results."""

import json
from dataclasses import dataclass, field
from pathlib import Path

from multisa.runtime.bundle import LabelParameters, SegmenterLabelParameters
from multisa.runtime.errors import UsageError
from multisa.runtime.records import record_from_dict
from multisa.training.config import TrainConfig
from multisa.training.data import Dataset

RUN_RECORD = "run.json"
MOST_COLUMNS = 10  # classes beside each other in the table; more are wider than most terminals

# Names of the rows of the results, in their order.
PLAIN_CAM = "CAM, k = 0"
MULTI_SA_CAM = "Multi-SA CAM"
RANDOM_WALK = "+ random walk"
DENSE_CRF = "+ dense CRF"
WITHOUT_TRUTH = "+ dense CRF, no mask used"
AS_CONFIGURED = "+ dense CRF, background as configured"
WITH_GAINS = "+ dense CRF, gains as configured"
WITHOUT_CRF = "pseudo-masks without dense CRF"
ROUND = "+ round"  # and its number, from 1
SEGMENTER = "DeepLabV3+ on pseudo-masks"
SUPERVISED = "DeepLabV3+ on ground truth"


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
    corrected: int = 0  # those trained on with a corrected mask


def count_images(dataset: Dataset) -> ImageCounts:
    """Count the images of each list of a data set."""
    return ImageCounts(len(dataset.train_images), len(dataset.train), len(dataset.val), len(dataset.corrections))


@dataclass(frozen=True)
class RunRecord:
    """Settings and results of a finished run: `run.json`, all that export needs beside the checkpoints."""

    config: TrainConfig
    classes: tuple[str, ...]  # background first
    palette: tuple[tuple[int, int, int], ...]
    images: ImageCounts
    data_digest: str  # of what was trained on
    label: LabelParameters  # as used for the pseudo-masks of the walk
    segmenter_label: SegmenterLabelParameters  # of the labels that the deployed segmenter makes
    score_thresholds: tuple[float, ...]  # one for each foreground class
    betas: tuple[float, ...]
    rows: tuple[Row, ...]  # empty when the data set has no masks
    stages: tuple[StageRecord, ...]
    seconds: float
    torch: str
    threads: int
    # Path -> SHA-256 of what the networks started from: files of weights, and bundle.json of `init_from`.
    files: dict[str, str] = field(default_factory=dict)

    def folder(self, root: Path, name: str) -> Path:
        """Folder of the stage `name` of this run."""
        return root / next(stage.folder for stage in self.stages if stage.name == name)

    def format_table(self) -> str:
        """The table of mIoU per stage and class, in percent; many classes are rows, and the stages have numbers."""
        if not self.rows:
            return "no masks in this data set: nothing was measured"
        if len(self.classes) > MOST_COLUMNS:
            return self._long_table()
        names = [name[:10] for name in self.classes]
        width = max(len(row.stage) for row in self.rows) + 2
        header = "".join(f"{name:>11}" for name in names)
        lines = [f"{'stage':<{width}}{'list':<7}{'mIoU':>7}  {header}"]
        for row in self.rows:
            ious = "".join(f"{'-' if value is None else f'{value:.2f}':>11}" for value in row.iou)
            lines.append(f"{row.stage:<{width}}{row.measured_on:<7}{row.miou:>7.2f}  {ious}")
        return "\n".join(lines)

    def _long_table(self) -> str:
        stage, name = (max(map(len, texts)) for texts in ([row.stage for row in self.rows], self.classes))
        lines = [f"     {'stage':<{stage}}  list      mIoU"]
        lines += [f"{n:>3}  {r.stage:<{stage}}  {r.measured_on:<5}  {r.miou:>7.2f}" for n, r in enumerate(self.rows, 1)]
        lines += ["", f"{'IoU of class':<{name}}" + "".join(f"{n:>7}" for n in range(1, len(self.rows) + 1))]
        for label, *ious in zip(self.classes, *(row.iou for row in self.rows), strict=True):
            lines.append(f"{label:<{name}}" + "".join("      -" if iou is None else f"{iou:>7.2f}" for iou in ious))
        return "\n".join(lines)

    def format_minutes(self) -> str:
        """Minutes by stage, the longest first; stages of less than half a minute together."""
        longest = sorted(dict.fromkeys(self.stages), key=lambda stage: -stage.seconds)
        shown = [f"{stage.name} {stage.seconds / 60:.0f}" for stage in longest if stage.seconds >= 30]
        return f"{self.seconds / 60:.0f} minutes in total: {', '.join([*shown, 'others less than 1 each'])}"


def load_run(output: Path) -> RunRecord:
    """Read the `run.json` that `train` wrote. Raises UsageError for a folder without a finished run."""
    path = output / RUN_RECORD
    if not path.is_file():
        raise UsageError(f"{path}: missing; expected the output folder of a finished `multisa train`")
    try:
        return record_from_dict(RunRecord, json.loads(path.read_text(encoding="utf-8")), str(path))
    except ValueError as error:
        raise UsageError(f"{error}; run `multisa train` again with this version") from error
