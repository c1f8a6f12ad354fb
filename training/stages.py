"""The stages of a run that several commands ask for: each with its name and the inputs that identify it.

A stage made by one command is found by the others, because it is asked for here and nowhere else.
"""

from dataclasses import replace

from multisa.runtime.bundle import LabelParameters
from multisa.runtime.records import record_to_dict
from multisa.training.calibration import calibrate
from multisa.training.cams import compute_cams, measure_maps, train_cam
from multisa.training.config import CamConfig, TrainConfig
from multisa.training.data import DataSet, Item
from multisa.training.evaluation import score_masks
from multisa.training.segmentation import make_pseudo_masks
from multisa.training.workspace import Stage, Workspace

# The network of the run, and those that are trained to be measured or shown beside it (other taps, or none).
CAM, BASELINE = "cam", "cam-baseline"


def cam_network(
    space: Workspace, cam: CamConfig, config: TrainConfig, dataset: DataSet, weak: str, name: str
) -> Stage:
    """Train a CAM network; `weak` is the digest of what it is trained on, `name` CAM or BASELINE."""
    inputs = {
        "data": weak,
        "cam": {key: value for key, value in record_to_dict(cam).items() if key != "scales"},
        "seed": config.seed,
        "long_side": config.long_side,
    }
    return space.stage(name, inputs, [], lambda folder: train_cam(cam, config, dataset, folder))


def cam_stages(
    space: Workspace, cam: CamConfig, config: TrainConfig, dataset: DataSet, weak: str, name: str
) -> tuple[Stage, Stage]:
    """Train a CAM network as `cam_network` does, and compute its maps; returns both stages."""
    trained = cam_network(space, cam, config, dataset, weak, name)
    # The baseline is only measured; it has no other use for maps of photographs without masks.
    items = dataset.train if name == BASELINE else dataset.weak
    maps = space.stage(
        f"{name}-maps",
        {"scales": list(cam.scales), "items": [item.id for item in items]},
        [trained],
        lambda folder: compute_cams(cam, config, dataset, items, trained, folder),
    )
    return trained, maps


def measured_maps(space: Workspace, maps: Stage, config: TrainConfig, dataset: DataSet, truth: str) -> Stage:
    """Score maps on the train list, whose digest is `truth`: results "best", "configured" and "curve"."""
    return space.stage(
        f"{maps.name}-measured",
        {"truth": truth, "background": config.label.background},
        [maps],
        lambda folder: measure_maps(maps.folder, config, dataset),
    )


def label_parameters(
    space: Workspace,
    config: TrainConfig,
    dataset: DataSet,
    walked: Stage,
    measured_walk: Stage | None,
    name: str,
) -> LabelParameters:
    """The numbers of a pseudo-mask: those of the configuration, or as `background_from` has them chosen."""
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


def pseudo_masks_stage(
    space: Workspace,
    config: TrainConfig,
    label: LabelParameters,
    dataset: DataSet,
    items: tuple[Item, ...],
    walked: Stage,
    name: str,
) -> Stage:
    """Make the masks of `items` from the walked maps."""
    # The weak list is part of what the walked maps were made from; any other list is not.
    chosen = {} if items == dataset.weak else {"items": [item.id for item in items]}
    return space.stage(
        name,
        {**chosen, **record_to_dict(label)},
        [walked],
        lambda folder: make_pseudo_masks(config, label, dataset, items, walked, folder),
    )


def measured_masks(space: Workspace, masks: Stage, dataset: DataSet, truth: str) -> Stage:
    """Score masks on the train list, whose digest is `truth`: results "miou" and "iou", in percent."""
    return space.stage(
        f"{masks.name}-measured",
        {"truth": truth},
        [masks],
        lambda folder: score_masks(masks.folder, dataset.train, len(dataset.class_names)),
    )
