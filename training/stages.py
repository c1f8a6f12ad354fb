"""The stages up to the pseudo-masks: CAMs -> affinities -> random walk -> masks, measured where masks exist.

Every stage is defined here once, with its name and the inputs that identify it, so that a stage which one
command has finished is found by all others.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

from multisa.runtime.bundle import LabelParameters
from multisa.runtime.records import record_to_dict
from multisa.training.config import CamConfig, TrainConfig
from multisa.training.data import Dataset, Item
from multisa.training.stage_cache import Stage, StageCache
from multisa.training.stage_functions import (
    compute_cams,
    make_affinity_labels,
    make_pseudo_masks,
    measure_maps,
    measure_masks,
    train_affinity,
    train_cam,
    walk_cams,
)
from multisa.training.thresholds import choose_thresholds

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

    def pseudo_masks(
        self, label: LabelParameters, items: tuple[Item, ...], walked: Stage, name: str
    ) -> Stage:
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
