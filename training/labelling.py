"""The stages up to the pseudo-masks: CAMs -> affinities -> random walk -> masks, measured where truth is."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from multisa.runtime.bundle import LabelParameters
from multisa.runtime.records import record_to_dict
from multisa.training.affinity import make_affinity_labels, train_affinity, walk_cams
from multisa.training.config import TrainConfig
from multisa.training.data import DataSet
from multisa.training.stages import (
    BASELINE,
    CAM,
    cam_stages,
    label_parameters,
    measured_maps,
    measured_masks,
    pseudo_masks_stage,
)
from multisa.training.workspace import Stage, Workspace

# Names of the rows of the results, in their order.
PLAIN_CAM, MULTI_SA_CAM, RANDOM_WALK = "CAM, k = 0", "Multi-SA CAM", "+ random walk"
DENSE_CRF, CLASS_GAINS, AS_CONFIGURED = "+ dense CRF", "+ gains of classes", "as configured"


@dataclass(frozen=True)
class Measured:
    """What one stage scores on the train list."""

    name: str
    background: float  # score of the background class
    scores: Mapping[str, Any]  # "miou" and "iou" of each class, in percent


@dataclass(frozen=True)
class Labelled:
    """Pseudo-masks of the weak list, and all that they were made with."""

    data_digest: str  # of what was trained on
    cam: Stage
    cams: Stage  # its maps
    walked: Stage
    label: LabelParameters  # as used for the masks
    masks: Stage
    measured: tuple[Measured, ...]  # empty without masks in the data set


def label_photographs(
    space: Workspace, config: TrainConfig, dataset: DataSet, *, paper_protocol: bool = False
) -> Labelled:
    """Run every stage up to the pseudo-masks that is not made already.

    Without masks in the data set nothing is measured, and the plain CAM (which is only measured) is left out.
    With `paper_protocol` the masks of the paper (dense CRF, one background score that the train masks choose)
    are measured, too, whatever the run's own are; else only beside those with gains chosen on these masks.
    """
    weak = dataset.weak_digest()
    truth = dataset.masks_digest(dataset.train) if dataset.train else None
    measured: list[Measured] = []

    def measure(name: str, maps: Stage) -> Stage | None:
        if truth is None:
            return None
        stage = measured_maps(space, maps, config, dataset, truth)
        best = stage.results["best"]
        measured.append(Measured(name, best["background"], best))
        return stage

    if config.cam_baseline and truth:
        _, plain = cam_stages(space, replace(config.cam, taps=()), config, dataset, weak, BASELINE)
        measure(PLAIN_CAM, plain)
    cam, cams = cam_stages(space, config.cam, config, dataset, weak, CAM)
    measure(MULTI_SA_CAM, cams)
    walked = _walked(space, config, dataset, cams)
    measured_walk = measure(RANDOM_WALK, walked)
    as_paper = _as_paper(config)
    beside = config.background_from == "train-masks-per-class" or (paper_protocol and config != as_paper)
    if truth and beside:
        # Only measured, beside the run's own masks: one background score for all classes.
        one_score = label_parameters(space, as_paper, dataset, walked, measured_walk, "calibration-plain")
        made = pseudo_masks_stage(
            space, config, one_score, dataset, dataset.train, walked, "pseudo-masks-plain"
        )
        scores = measured_masks(space, made, dataset, truth).results
        measured.append(Measured(DENSE_CRF, one_score.background, scores))
    label = label_parameters(space, config, dataset, walked, measured_walk, "calibration")
    masks = pseudo_masks_stage(space, config, label, dataset, dataset.weak, walked, "pseudo-masks")
    if truth:
        scores = measured_masks(space, masks, dataset, truth).results
        measured.append(Measured(_name_of(label, beside), label.background, scores))
    return Labelled(weak, cam, cams, walked, label, masks, tuple(measured))


def _walked(space: Workspace, config: TrainConfig, dataset: DataSet, cams: Stage) -> Stage:
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
    inputs = {k: v for k, v in record_to_dict(config.label).items() if k.startswith("walk_")}
    return space.stage(
        "walk",
        inputs,
        [cams, affinity],
        lambda folder: walk_cams(config, dataset, cams, affinity, folder),
    )


def _as_paper(config: TrainConfig) -> TrainConfig:
    """The configuration with the paper's protocol for masks."""
    label = replace(config.label, class_gain=(), use_crf=True)
    return replace(config, background_from="train-masks", label=label)


def _name_of(label: LabelParameters, beside: bool) -> str:
    if label.class_gain:
        return CLASS_GAINS
    return AS_CONFIGURED if beside else DENSE_CRF
