"""All stages in order: image-level labels -> CAMs -> affinities -> pseudo-masks -> segmenter -> results.

Every stage is defined here once, with its name and the inputs that identify it, so that a stage which one
command has finished is found by all others. Mistakes in the configuration or the data set are found before
the first stage (`check_run`).
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch

from multisa.runtime.bundle import LabelParameters
from multisa.runtime.errors import UsageError
from multisa.runtime.files import write_json_atomically
from multisa.runtime.progress import log
from multisa.runtime.records import record_from_dict, record_to_dict
from multisa.training.backbones import check_weights
from multisa.training.config import CamConfig, TrainConfig
from multisa.training.data import Dataset, Item, log_findings
from multisa.training.data_check import check_dataset
from multisa.training.models import create_model
from multisa.training.stage_cache import Stage, StageCache
from multisa.training.stage_functions import (
    compute_cams,
    evaluate_segmenter,
    make_affinity_labels,
    make_pseudo_masks,
    measure_maps,
    measure_masks,
    train_affinity,
    train_cam,
    train_segmenter,
    walk_cams,
)
from multisa.training.thresholds import choose_thresholds

RUN_RECORD = "run.json"

# Stage names: the network of the run, and networks with other taps, or none, that are measured or shown
# beside it.
CAM = "cam"
BASELINE = "cam-baseline"

# Names of the rows of the results, in their order.
PLAIN_CAM = "CAM, k = 0"
MULTI_SA_CAM = "Multi-SA CAM"
RANDOM_WALK = "+ random walk"
DENSE_CRF = "+ dense CRF"
CLASS_GAINS = "+ gains of classes"
AS_CONFIGURED = "as configured"
SEGMENTER = "DeepLabV3+ on pseudo-masks"


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

    Raises, before any training, UsageError for a configuration that does not fit the data set or the networks
    and for an output folder inside the data set, and DatasetError for images or ground truth that cannot be
    used; later CheckpointError for a damaged checkpoint, BackendUnavailable for `device="cuda"` without a GPU,
    and MultisaError when a loss is not finite.
    """
    record = run_stages(config, dataset, output)
    write_json_atomically(output / RUN_RECORD, record_to_dict(record))
    return record


def run_stages(config: TrainConfig, dataset: Dataset, output: Path) -> RunRecord:
    """Run every stage as `train` does, without writing `run.json`."""
    check_run(config, dataset, output)
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


def check_run(config: TrainConfig, dataset: Dataset, output: Path | None = None) -> None:
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
    check_networks(config, len(dataset.class_names))
    report = check_dataset(dataset, output)
    report.require_usable()
    log_findings(report.findings[len(dataset.findings) :])


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


def _check_label(config: TrainConfig, dataset: Dataset) -> None:
    gains = config.label.class_gain
    foreground = len(dataset.class_names) - 1
    if len(gains) not in (0, foreground):
        raise UsageError(
            f"label.class_gain: got {len(gains)} numbers, expected {foreground}, one for each foreground class, or none"
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


@dataclass(frozen=True)
class RunStages:
    """The stages of a run. Each method returns finished stages, and runs those that are not in the cache."""

    cache: StageCache
    config: TrainConfig
    dataset: Dataset

    @cached_property
    def images_digest(self) -> str:
        """Digest of what the networks train on."""
        return self.dataset.train_images_digest()

    @cached_property
    def masks_digest(self) -> str:
        """Digest of the train list with its masks, which maps and pseudo-masks are measured on."""
        return self.dataset.masks_digest(self.dataset.train)

    def cam_network(self, cam: CamConfig, name: str) -> Stage:
        """Train a CAM network; name: CAM or BASELINE."""
        inputs = {
            "data": self.images_digest,
            "cam": {key: value for key, value in record_to_dict(cam).items() if key != "scales"},
            "seed": self.config.seed,
            "long_side": self.config.long_side,
        }
        return self.cache.stage(name, inputs, [], partial(train_cam, cam, self.config, self.dataset))

    def cam_maps(self, cam: CamConfig, name: str) -> tuple[Stage, Stage]:
        """Train a CAM network and compute its maps; returns both stages."""
        trained = self.cam_network(cam, name)
        # A baseline is only measured, so images without masks need no maps.
        items = self.dataset.train if name == BASELINE else self.dataset.train_images
        inputs = {"scales": list(cam.scales), "items": [item.id for item in items]}
        work = partial(compute_cams, cam, self.config, self.dataset, items, trained)
        return trained, self.cache.stage(f"{name}-maps", inputs, [trained], work)

    def measured_maps(self, maps: Stage) -> Stage:
        """Score maps on the train list: results as of `ThresholdSweep.results`."""
        inputs = {"truth": self.masks_digest, "background": self.config.label.background}
        work = partial(measure_maps, self.config, self.dataset, maps)
        return self.cache.stage(f"{maps.name}-measured", inputs, [maps], work)

    def walked_maps(self, cams: Stage) -> Stage:
        """Train AffinityNet on labels from the maps and spread the maps along its affinities."""
        config, dataset, cache = self.config, self.dataset, self.cache
        work = partial(make_affinity_labels, config, dataset, cams)
        labels = cache.stage("affinity-labels", record_to_dict(config.affinity_labels), [cams], work)
        work = partial(train_affinity, config, dataset, labels)
        affinity = cache.stage("affinity", record_to_dict(config.affinity), [labels], work)
        walk = {key: value for key, value in record_to_dict(config.label).items() if key.startswith("walk_")}
        work = partial(walk_cams, config, dataset, cams, affinity)
        return cache.stage("walk", walk, [cams, affinity], work)

    def label_parameters(self, walked: Stage, measured_walk: Stage | None, name: str) -> LabelParameters:
        """Parameters of the pseudo-masks: as configured, or chosen on masks if `background_from` says so."""
        config = self.config
        if config.background_from == "config" or measured_walk is None:
            return config.label
        inputs = {"label": record_to_dict(config.label), "from": config.background_from}
        background = measured_walk.results["best"]["background"]
        work = partial(choose_thresholds, config, self.dataset, walked, background)
        chosen = self.cache.stage(name, inputs, [walked, measured_walk], work).results
        return replace(config.label, background=chosen["background"], class_gain=tuple(chosen["class_gain"]))

    def pseudo_masks(self, label: LabelParameters, items: tuple[Item, ...], walked: Stage, name: str) -> Stage:
        """Make the masks of `items` from the walked maps."""
        # The walked maps depend on the train images already; any other list is an input of its own.
        others = {} if items == self.dataset.train_images else {"items": [item.id for item in items]}
        work = partial(make_pseudo_masks, self.config, label, self.dataset, items, walked)
        return self.cache.stage(name, {**others, **record_to_dict(label)}, [walked], work)

    def measured_masks(self, masks: Stage) -> Stage:
        """Score masks on the train list: results "miou" and "iou", in percent."""
        work = partial(measure_masks, self.dataset, masks)
        return self.cache.stage(f"{masks.name}-measured", {"truth": self.masks_digest}, [masks], work)


@dataclass(frozen=True)
class Measurement:
    """Scores of one stage on the train list."""

    name: str  # of the row
    background: float  # score of the background class
    scores: Mapping[str, Any]  # "miou" and "iou" of each class, in percent


@dataclass(frozen=True)
class PseudoLabels:
    """Pseudo-masks of the train images, and everything they were made with."""

    cam: Stage
    cams: Stage  # the maps of `cam`
    walked: Stage
    label: LabelParameters  # as used for the masks
    masks: Stage
    measured: tuple[Measurement, ...]  # empty when the data set has no masks


def make_pseudo_labels(stages: RunStages, *, paper_protocol: bool = False) -> PseudoLabels:
    """Run every stage up to the pseudo-masks that is not finished yet.

    When the data set has no masks, nothing is measured, and the plain CAM (which is only measured) is left
    out. The paper's protocol (dense CRF, one background score chosen on the train masks) is measured in
    addition to the run's own masks when those have class gains chosen on the same masks; with
    `paper_protocol`, whenever those follow any other protocol.
    """
    config, dataset = stages.config, stages.dataset
    measured: list[Measurement] = []

    def measure(name: str, maps: Stage) -> Stage | None:
        if not dataset.train:
            return None
        stage = stages.measured_maps(maps)
        best = stage.results["best"]
        measured.append(Measurement(name, best["background"], best))
        return stage

    if config.cam_baseline and dataset.train:
        _, plain = stages.cam_maps(replace(config.cam, taps=()), BASELINE)
        measure(PLAIN_CAM, plain)
    cam, cams = stages.cam_maps(config.cam, CAM)
    measure(MULTI_SA_CAM, cams)
    walked = stages.walked_maps(cams)
    measured_walk = measure(RANDOM_WALK, walked)
    paper_label = replace(config.label, class_gain=(), use_crf=True)
    as_paper = replace(config, background_from="train-masks", label=paper_label)
    both = config.background_from == "train-masks-per-class" or (paper_protocol and config != as_paper)
    if both and dataset.train:
        paper_stages = replace(stages, config=as_paper)
        paper_label = paper_stages.label_parameters(walked, measured_walk, "calibration-plain")
        paper_masks = stages.pseudo_masks(paper_label, dataset.train, walked, "pseudo-masks-plain")
        scores = stages.measured_masks(paper_masks).results
        measured.append(Measurement(DENSE_CRF, paper_label.background, scores))
    label = stages.label_parameters(walked, measured_walk, "calibration")
    masks = stages.pseudo_masks(label, dataset.train_images, walked, "pseudo-masks")
    if dataset.train:
        scores = stages.measured_masks(masks).results
        name = CLASS_GAINS if label.class_gain else AS_CONFIGURED if both else DENSE_CRF
        measured.append(Measurement(name, label.background, scores))
    return PseudoLabels(cam, cams, walked, label, masks, tuple(measured))
