"""All stages in order: weak labels -> CAMs -> affinities -> pseudo-masks -> segmenter -> table."""

import json
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from multisa.runtime.errors import UsageError
from multisa.runtime.files import write_json_atomically
from multisa.runtime.postprocess import LabelParameters
from multisa.runtime.records import record_from_dict, record_to_dict
from multisa.training.affinity import make_affinity_labels, train_affinity, walk_cams
from multisa.training.calibration import calibrate
from multisa.training.cams import compute_cams, measure_maps, train_cam
from multisa.training.checks import check_run
from multisa.training.config import CamConfig, TrainConfig
from multisa.training.data import DataSet, Item
from multisa.training.evaluation import score_masks
from multisa.training.segmentation import (
    evaluate_segmenter,
    make_pseudo_masks,
    train_segmenter,
)
from multisa.training.workspace import Stage, Workspace

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
    """Run every stage that is not made already and write `root/run.json`.

    Without masks in the data set nothing is measured, and the plain CAM (which is only measured) is left out.
    """
    check_run(config, dataset)
    space = Workspace(root)
    weak = dataset.weak_digest()
    truth = dataset.masks_digest(dataset.train) if dataset.train else None
    baseline = None
    if config.cam_baseline and truth:
        plain = replace(config.cam, taps=())
        _, maps = _cam_stages(space, plain, config, dataset, weak, "cam-baseline")
        baseline = _measure_maps(space, maps, config, dataset, truth)
    cam, cams = _cam_stages(space, config.cam, config, dataset, weak, "cam")
    measured_cams = _measure_maps(space, cams, config, dataset, truth)
    labels = space.stage(
        "affinity-labels",
        record_to_dict(config.affinity_labels),
        [cams],
        lambda folder: make_affinity_labels(config, dataset, cams, folder),
    )
    affinity = space.stage(
        "affinity",
        record_to_dict(config.affinity),
        [labels],
        lambda folder: train_affinity(config, dataset, labels, folder),
    )
    walk_inputs = {k: v for k, v in record_to_dict(config.label).items() if k.startswith("walk_")}
    walked = space.stage(
        "walk",
        walk_inputs,
        [cams, affinity],
        lambda folder: walk_cams(config, dataset, cams, affinity, folder),
    )
    measured_walk = _measure_maps(space, walked, config, dataset, truth)
    measured_masks: list[tuple[LabelParameters, Stage]] = []
    if config.background_from == "train-masks-per-class" and truth:
        # Only measured, beside the masks with gains: the paper's protocol, one background score for all.
        one_score = replace(config, background_from="train-masks")
        parameters = _label_parameters(space, one_score, dataset, walked, measured_walk, "calibration-plain")
        made = _masks(space, config, parameters, dataset, dataset.train, walked, "pseudo-masks-plain")
        measured_masks.append((parameters, _measure_masks(space, made, dataset, truth)))
    label = _label_parameters(space, config, dataset, walked, measured_walk, "calibration")
    masks = _masks(space, config, label, dataset, dataset.weak, walked, "pseudo-masks")
    if truth:
        measured_masks.append((label, _measure_masks(space, masks, dataset, truth)))
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
    record = RunRecord(
        config=config,
        classes=dataset.class_names,
        palette=dataset.palette,
        photographs=Photographs(len(dataset.weak), len(dataset.train), len(dataset.val)),
        data_digest=weak,
        label=label,
        score_thresholds=tuple(cams.results["score_thresholds"]),
        betas=tuple(cam.results["betas"]),
        rows=tuple(_rows(baseline, measured_cams, measured_walk, measured_masks, val or None)),
        stages=tuple(StageRecord(s.name, s.folder.name, s.digest, round(s.seconds, 1)) for s in space.stages),
        seconds=round(sum(stage.seconds for stage in space.stages), 1),
        torch=torch.__version__,
        threads=torch.get_num_threads(),
    )
    write_json_atomically(root / RUN_RECORD, record_to_dict(record))
    return record


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


def _cam_stages(
    space: Workspace, cam: CamConfig, config: TrainConfig, dataset: DataSet, weak: str, name: str
) -> tuple[Stage, Stage]:
    inputs = {
        "data": weak,
        "cam": {key: value for key, value in record_to_dict(cam).items() if key != "scales"},
        "seed": config.seed,
        "long_side": config.long_side,
    }
    trained = space.stage(name, inputs, [], lambda folder: train_cam(cam, config, dataset, folder))
    # The baseline is only measured; it has no other use for maps of photographs without masks.
    items = dataset.train if name == "cam-baseline" else dataset.weak
    maps = space.stage(
        f"{name}-maps",
        {"scales": list(cam.scales), "items": [item.id for item in items]},
        [trained],
        lambda folder: compute_cams(cam, config, dataset, items, trained, folder),
    )
    return trained, maps


def _measure_maps(
    space: Workspace, maps: Stage, config: TrainConfig, dataset: DataSet, truth: str | None
) -> Stage | None:
    if truth is None:
        return None
    return space.stage(
        f"{maps.name}-measured",
        {"truth": truth, "background": config.label.background},
        [maps],
        lambda folder: measure_maps(maps.folder, config, dataset),
    )


def _masks(
    space: Workspace,
    config: TrainConfig,
    label: LabelParameters,
    dataset: DataSet,
    items: tuple[Item, ...],
    walked: Stage,
    name: str,
) -> Stage:
    # The weak list is part of what the walked maps were made from; any other list is not.
    chosen = {} if items == dataset.weak else {"items": [item.id for item in items]}
    return space.stage(
        name,
        {**chosen, **record_to_dict(label)},
        [walked],
        lambda folder: make_pseudo_masks(config, label, dataset, items, walked, folder),
    )


def _measure_masks(space: Workspace, masks: Stage, dataset: DataSet, truth: str) -> Stage:
    return space.stage(
        f"{masks.name}-measured",
        {"truth": truth},
        [masks],
        lambda folder: score_masks(masks.folder, dataset.train, len(dataset.class_names)),
    )


def _label_parameters(
    space: Workspace,
    config: TrainConfig,
    dataset: DataSet,
    walked: Stage,
    measured_walk: Stage | None,
    name: str,
) -> LabelParameters:
    if config.background_from == "config" or measured_walk is None:
        return config.label
    background = measured_walk.results["best"]["background"]
    chosen = space.stage(
        name,
        {"label": record_to_dict(config.label), "from": config.background_from},
        [walked, measured_walk],
        lambda folder: calibrate(config, dataset, walked, background, folder),
    ).results
    return replace(config.label, background=chosen["background"], class_gain=tuple(chosen["class_gain"]))


def _rows(
    baseline: Stage | None,
    cams: Stage | None,
    walked: Stage | None,
    masks: list[tuple[LabelParameters, Stage]],
    val: Stage | None,
) -> list[Row]:
    measured = [
        (title, stage.results["best"])
        for title, stage in (("CAM, k = 0", baseline), ("Multi-SA CAM", cams), ("+ random walk", walked))
        if stage
    ]
    for label, stage in masks:
        title = "+ gains of classes" if label.class_gain else "+ dense CRF"
        measured.append((title, {"background": label.background, **stage.results}))
    rows = [
        Row(f"{title} (background {scores['background']:.2f})", "train", scores["miou"], tuple(scores["iou"]))
        for title, scores in measured
    ]
    if val:
        rows.append(Row("DeepLabV3+ on pseudo-masks", "val", val.results["miou"], tuple(val.results["iou"])))
    return rows
