"""Every stage of a run, defined once with its name and the inputs that identify it.

A stage which one command has finished is therefore found by all others.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from multisa.runtime.bundle import LabelParameters, SegmenterLabelParameters
from multisa.runtime.records import record_to_dict
from multisa.training.balance import background_ratio
from multisa.training.config import CamConfig, SegmenterConfig, TrainConfig
from multisa.training.data import Dataset, Item
from multisa.training.loop import CHECKPOINT
from multisa.training.models import ModelConfig, with_taps
from multisa.training.run_record import (
    AS_CONFIGURED,
    DENSE_CRF,
    MULTI_SA_CAM,
    PLAIN_CAM,
    RANDOM_WALK,
    ROUND,
    WITH_GAINS,
    WITHOUT_CRF,
    WITHOUT_TRUTH,
)
from multisa.training.stage_cache import Results, Stage, StageCache
from multisa.training.stage_functions import (
    SegmenterTraining,
    compute_cams,
    evaluate_segmenter,
    make_affinity_labels,
    make_pseudo_masks,
    measure_maps,
    measure_masks,
    relabel,
    train_affinity,
    train_cam,
    train_segmenter,
    walk_cams,
)
from multisa.training.start import start_files
from multisa.training.thresholds import around, choose_background, yen_scores
from multisa.training.transforms import augment_identity
from multisa.training.watch import RunWatch
from multisa.training.weights import weights_identity

# Stage names: the network of the run, and networks with other taps, or none, that are measured or shown
# beside it.
CAM = "cam"
BASELINE = "cam-baseline"


@dataclass(frozen=True)
class RunStages:
    """The stages of a run. Each method returns finished stages, and runs those that are not in the cache."""

    cache: StageCache
    config: TrainConfig
    dataset: Dataset
    watch: RunWatch | None = None  # is told of every epoch

    @cached_property
    def images_digest(self) -> str:
        """Digest of what the networks train on."""
        return self.dataset.train_images_digest()

    @cached_property
    def masks_digest(self) -> str:
        """Digest of the train list with its masks, which maps and pseudo-masks are measured on."""
        return self.dataset.masks_digest(self.dataset.train)

    def network_identity(self, network: ModelConfig) -> dict[str, Any]:
        """What a network is in the digest of its stage, and the bundle that the run starts from, if any."""
        start = {"init_from": next(iter(start_files(self.config).values()))} if self.config.init_from else {}
        return {**_identity(network), **start}

    def cam_network(self, cam: CamConfig, name: str) -> Stage:
        """Train a CAM network; name: CAM or BASELINE."""
        cam = with_taps(cam)
        inputs = {
            "data": self.images_digest,
            "cam": {key: value for key, value in self.network_identity(cam).items() if key != "scales"},
            "seed": self.config.seed,
            "long_side": self.config.long_side,
            **self.config.execution.identity(has_trained_norms=not cam.schedule.freeze_batch_norm),
        }
        return self.cache.stage(name, inputs, [], partial(train_cam, cam, self.config, self.dataset, watch=self.watch))

    def cam_maps(self, cam: CamConfig, name: str) -> tuple[Stage, Stage]:
        """Train a CAM network and compute its maps; returns both stages."""
        cam = with_taps(cam)
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

    def yen_scores(self, maps: Stage) -> Stage:
        """Background scores of maps without ground truth: results as of `yen_scores`; writes no file."""

        def work(folder: Path) -> Results:
            return yen_scores(maps.folder, self.dataset.train_images, len(self.dataset.class_names))

        return self.cache.stage(f"{maps.name}-yen", {}, [maps], work)

    def walked_maps(self, cams: Stage) -> Stage:
        """Train AffinityNet on labels from the maps and spread the maps along its affinities."""
        config, dataset, cache = self.config, self.dataset, self.cache
        chosen = config.affinity_labels
        if chosen.foreground is None:
            chosen = around(self.yen_scores(cams).results["background"], chosen)
        work = partial(make_affinity_labels, replace(config, affinity_labels=chosen), dataset, cams)
        inputs = {**record_to_dict(chosen), **dataset.corrections_input(dataset.train_images)}
        labels = cache.stage("affinity-labels", inputs, [cams], work)
        work = partial(train_affinity, config, dataset, labels, watch=self.watch)
        execution = config.execution.identity(has_trained_norms=not config.affinity.schedule.freeze_batch_norm)
        affinity = cache.stage("affinity", {**self.network_identity(config.affinity), **execution}, [labels], work)
        walk = {key: value for key, value in record_to_dict(config.label).items() if key.startswith("walk_")}
        work = partial(walk_cams, config, dataset, cams, affinity)
        return cache.stage("walk", walk, [cams, affinity], work)

    def label_parameters(self, walked: Stage, measured_walk: Stage | None, name: str) -> LabelParameters:
        """Parameters of the walk's pseudo-masks: as configured, or chosen as `background_from` says."""
        config = self.config
        if config.background_from == "yen":
            found = self.yen_scores(walked).results
            gains = (1.0 if score is None else round(found["background"] / score, 3) for score in found["classes"])
            return replace(config.label, background=found["background"], class_gain=tuple(gains))
        if config.background_from == "config" or measured_walk is None:
            return config.label
        background = measured_walk.results["best"]["background"]
        work = partial(choose_background, config, config.label, self.dataset, walked, background)
        inputs = {"label": record_to_dict(config.label)}
        chosen = self.cache.stage(name, inputs, [walked, measured_walk], work).results
        return replace(config.label, background=chosen["background"])

    def pseudo_masks(self, label: LabelParameters, items: tuple[Item, ...], walked: Stage, name: str) -> Stage:
        """Make the masks of `items` from the walked maps."""
        # The walked maps depend on the train images already; any other list is an input of its own.
        others = {} if items == self.dataset.train_images else {"items": [item.id for item in items]}
        work = partial(make_pseudo_masks, self.config, label, self.dataset, items, walked)
        inputs = {**others, **record_to_dict(label), **self.dataset.corrections_input(items)}
        return self.cache.stage(name, inputs, [walked], work)

    def measured_masks(self, masks: Stage) -> Stage:
        """Score masks on the train list: results "miou" and "iou", in percent."""
        work = partial(measure_masks, self.dataset, masks)
        return self.cache.stage(f"{masks.name}-measured", {"truth": self.masks_digest}, [masks], work)

    def relabelled(self, labels: "PseudoLabels") -> "tuple[Stage, tuple[Measurement, ...]]":
        """Train the teacher of every round and label the train images with it.

        Returns the labels of the last round, or the pseudo-masks of the walk if there is none, and the scores of
        each round's masks.
        """
        config, dataset = self.config, self.dataset
        options = config.relabel
        targets, measured = labels.masks, []
        for number in range(1, options.rounds + 1):
            title = f"DeepLabV3+, round {number}"
            training = self._training(options.teacher, title, targets, labels.cam, soft=number > 1)
            teacher = self._trained(options.teacher, training, f"teacher-{number}", [targets, labels.cam])
            parameters = self.segmenter_label(targets, soft=number > 1)
            work = partial(relabel, options.teacher, parameters, config, dataset, teacher)
            settings = {k: v for k, v in record_to_dict(options).items() if k not in ("rounds", "teacher")}
            label = {k: v for k, v in record_to_dict(parameters).items() if k != "mirror"}
            inputs = {"relabel": settings, "label": label, **dataset.corrections_input(dataset.train_images)}
            targets = self.cache.stage(f"relabelled-{number}", inputs, [teacher], work)
            if dataset.train:
                measured.append(Measurement(f"{ROUND} {number}", None, self.measured_masks(targets).results))
        return targets, tuple(measured)

    def segmenter_label(self, labels: Stage, *, soft: bool) -> SegmenterLabelParameters:
        """Parameters of the labels that a segmenter makes which was trained on `labels`; soft: on soft targets."""
        parameters = self.config.segmenter_label
        if not self.config.balance_background:
            return parameters

        def work(folder: Path) -> Results:
            return {"background_ratio": background_ratio(labels.folder, self.dataset.train_images, soft=soft)}

        found = self.cache.stage(f"{labels.name}-balance", {}, [labels], work).results
        return replace(parameters, background_ratio=found["background_ratio"])

    def segmenter(self, targets: Stage, cam: Stage, seed: int) -> Stage:
        """Train the segmenter that is deployed on what `relabelled` returned."""
        segmenter, soft = self.config.segmenter, self.config.relabel.rounds > 0
        training = self._training(segmenter, "DeepLabV3+", targets, cam, soft=soft)
        return self._trained(segmenter, training, "segmenter", [targets, cam], seed=seed)

    def supervised_segmenter(self, cam: Stage, seed: int) -> Stage:
        """Train the segmenter with the same recipe on the masks of the train list: the upper bound."""
        segmenter, items = self.config.segmenter, self.dataset.train
        # As many steps as on the pseudo-masks, which are of more images.
        epochs = round(segmenter.schedule.epochs * len(self.dataset.train_images) / len(items))
        segmenter = replace(segmenter, schedule=replace(segmenter.schedule, epochs=epochs))
        start = cam.folder / CHECKPOINT if segmenter.start_from_cam else None
        training = SegmenterTraining("DeepLabV3+, supervised", items, start, truth=True)
        return self._trained(segmenter, training, "supervised", [cam], {"truth": self.masks_digest}, seed=seed)

    def measured_segmenter(self, trained: Stage) -> Stage:
        """Score a segmenter on the val list: results "miou" and "iou", in percent."""
        truth = {"truth": self.dataset.masks_digest(self.dataset.val)}
        work = partial(evaluate_segmenter, self.config.segmenter, self.config, self.dataset, trained)
        return self.cache.stage(f"{trained.name}-val", truth, [trained], work)

    def _training(
        self, segmenter: SegmenterConfig, title: str, targets: Stage, cam: Stage, *, soft: bool
    ) -> SegmenterTraining:
        start = cam.folder / CHECKPOINT if segmenter.start_from_cam else None
        masks, probabilities = (None, targets.folder) if soft else (targets.folder, None)
        return SegmenterTraining(title, self.dataset.train_images, start, masks, probabilities)

    def _trained(
        self,
        segmenter: SegmenterConfig,
        training: SegmenterTraining,
        name: str,
        after: list[Stage],
        inputs: Mapping[str, Any] | None = None,
        *,
        seed: int | None = None,
    ) -> Stage:
        """Train a segmenter in the stage `name`; with a seed of its own if one is given."""
        config = self.config if seed is None else replace(self.config, seed=seed, more_seeds=())
        name = name if config.seed == self.config.seed else f"{name}-seed-{seed}"
        own: dict[str, Any] = {} if seed is None else {"seed": seed}
        own |= config.execution.identity(has_trained_norms=True)  # its decoder's
        work = partial(train_segmenter, segmenter, training, config, self.dataset, watch=self.watch)
        return self.cache.stage(name, {**self.network_identity(segmenter), **(inputs or {}), **own}, after, work)


@dataclass(frozen=True)
class Measurement:
    """Scores of one stage on the train list."""

    name: str  # of the row
    background: float | None  # score of the background class; None where a segmenter made the masks
    scores: Mapping[str, Any]  # "miou" and "iou" of each class, in percent

    @property
    def figures(self) -> tuple[float, tuple[float | None, ...]]:
        """mIoU, and the IoU of each class."""
        return self.scores["miou"], tuple(self.scores["iou"])


@dataclass(frozen=True)
class PseudoLabels:
    """Pseudo-masks of the train images, and everything they were made with."""

    cam: Stage
    cams: Stage  # the maps of `cam`
    walked: Stage
    label: LabelParameters  # as used for the masks
    masks: Stage
    measured: tuple[Measurement, ...]  # empty when the data set has no masks


def make_pseudo_labels(stages: RunStages) -> PseudoLabels:
    """Run every stage up to the walk's pseudo-masks that is not finished yet.

    When the data set has no masks, nothing is measured, and what is only measured is left out: the plain CAM, and
    the paper's pseudo-masks, which `paper_rows` asks for where the run's own masks are made in another way.
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

    if config.paper_rows and dataset.train:
        _, plain = stages.cam_maps(replace(config.cam, taps=()), BASELINE)
        measure(PLAIN_CAM, plain)
    cam, cams = stages.cam_maps(config.cam, CAM)
    measure(MULTI_SA_CAM, cams)
    walked = stages.walked_maps(cams)
    measured_walk = measure(RANDOM_WALK, walked)
    as_paper = config.with_paper_masks()
    if config.paper_rows and config != as_paper and dataset.train:
        paper_stages = replace(stages, config=as_paper)
        paper_label = paper_stages.label_parameters(walked, measured_walk, "calibration-paper")
        paper_masks = stages.pseudo_masks(paper_label, dataset.train, walked, "pseudo-masks-paper")
        scores = stages.measured_masks(paper_masks).results
        measured.append(Measurement(DENSE_CRF, paper_label.background, scores))
    label = stages.label_parameters(walked, measured_walk, "calibration")
    masks = stages.pseudo_masks(label, dataset.train_images, walked, "pseudo-masks")
    if dataset.train:
        scores = stages.measured_masks(masks).results
        measured.append(Measurement(name_of_masks(config), label.background, scores))
    return PseudoLabels(cam, cams, walked, label, masks, tuple(measured))


def planned_stages(config: TrainConfig, dataset: Dataset) -> tuple[str, ...]:
    """Names of all stages of a run, each once, in their order."""
    train, val = bool(dataset.train), bool(dataset.val)
    names: list[str] = []

    def add(name: str, *, when: bool = True, measured: bool = False) -> None:
        names.extend([name] * when + [f"{name}-measured"] * (when and measured))

    add(BASELINE, when=config.paper_rows and train)
    add(f"{BASELINE}-maps", when=config.paper_rows and train, measured=True)
    add(CAM)
    add("cam-maps", measured=train)
    add("cam-maps-yen", when=config.affinity_labels.foreground is None)
    names += ["affinity-labels", "affinity"]
    add("walk", measured=train)
    as_paper = config.paper_rows and config != config.with_paper_masks() and train
    add("calibration-paper", when=as_paper)
    add("pseudo-masks-paper", when=as_paper, measured=True)
    add("walk-yen", when=config.background_from == "yen")
    add("calibration", when=config.background_from == "train-masks" and train)
    add("pseudo-masks", measured=train)
    add("pseudo-masks-balance", when=config.balance_background)
    for number in range(1, config.relabel.rounds + 1):
        add(f"teacher-{number}")
        add(f"relabelled-{number}", measured=train)
        add(f"relabelled-{number}-balance", when=config.balance_background)
    for seed in (config.seed, *config.more_seeds):
        for name in ("segmenter", *["supervised"] * (config.supervised and train and val)):
            name = name if seed == config.seed else f"{name}-seed-{seed}"
            names += [name, f"{name}-val"] if val else [name]
    return tuple(names)


def name_of_masks(config: TrainConfig) -> str:
    """Name of the row of the walk's pseudo-masks; DENSE_CRF only if they are made as in the paper."""
    if not config.label.use_crf:
        return WITHOUT_CRF
    on_masks = WITH_GAINS if config.label.class_gain else DENSE_CRF
    return {"yen": WITHOUT_TRUTH, "config": AS_CONFIGURED, "train-masks": on_masks}[config.background_from]


def _identity(network: ModelConfig) -> dict[str, Any]:
    """The settings of a network for the digest of its stage.

    A file of weights counts by its content; augmentations only if there are some, with their code.
    """
    values = {**record_to_dict(network), "weights": weights_identity(network.weights)}
    augment = augment_identity(tuple(values["schedule"].pop("augment")))
    values["schedule"] |= {"augment": augment} if augment else {}
    return values
