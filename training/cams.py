"""Stages 1 and 2: train the class activation network on image-level labels; compute the maps."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from multisa.runtime.imaging.decode import read_mask
from multisa.training.augment import AugmentedImages
from multisa.training.config import CamConfig, TrainConfig
from multisa.training.data import Dataset, Item
from multisa.training.evaluation import ThresholdSweep
from multisa.training.inference import (
    as_batch,
    for_each_item,
    load_maps,
    read_working_image,
    save_maps,
    torch_device,
)
from multisa.training.loop import CHECKPOINT, LoopOptions, train_network
from multisa.training.models import create_model
from multisa.training.multi_sa import MultiScaleCAM, multilabel_soft_margin
from multisa.training.stage_cache import Stage
from multisa.training.thresholds import score_thresholds

LEVEL_GAIN_IMAGES = 16  # images that the levels' magnitudes are measured on


def train_cam(cam: CamConfig, config: TrainConfig, dataset: Dataset, folder: Path) -> Mapping[str, Any]:
    """Train Multi-SA (or, without taps, the plain CAM) on the train images."""
    torch.manual_seed(config.seed)
    n_classes = len(dataset.class_names)
    device = torch_device(config)
    network = create_model(cam, n_classes).to(device)
    samples = AugmentedImages(dataset.train_images, cam.schedule, config, n_classes=n_classes)
    first = torch.stack([samples[i][0] for i in range(min(LEVEL_GAIN_IMAGES, len(samples)))])
    network.eval().fit_level_gain(network.backbone.normalise(first.to(device)))

    def step(batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        image, labels = (part.to(device) for part in batch)
        return multilabel_soft_margin(network(network.backbone.normalise(image)), labels)

    losses = train_network(
        network,
        [
            (cam.schedule.new_layers_factor, network.new_parameters()),
            (cam.beta_factor, network.beta_parameters()),
        ],
        samples,
        step,
        cam.schedule,
        LoopOptions(folder / CHECKPOINT, config.seed, config.workers, f"CAM network, k = {len(cam.taps)}"),
    )
    return {"losses": losses, "betas": network.betas()}


def compute_cams(
    cam: CamConfig,
    config: TrainConfig,
    dataset: Dataset,
    items: tuple[Item, ...],
    trained: Stage,
    folder: Path,
) -> Mapping[str, Any]:
    """Write ID.npy (maps of the image's classes) and ID.scores.npy; choose the score thresholds."""
    device = torch_device(config)
    network = create_model(cam, len(dataset.class_names), checkpoint=trained.folder / CHECKPOINT)
    inference = MultiScaleCAM(network, scales=cam.scales).to(device)

    def work(item: Item) -> None:
        with torch.inference_mode():
            maps, scores = inference(as_batch(read_working_image(item, config.long_side)).to(device))
        present = maps[0].cpu().numpy()[[class_id - 1 for class_id in item.classes]]
        for path, values in zip(outputs(item), (present, scores[0].cpu().numpy()), strict=True):
            save_maps(path, values)

    def outputs(item: Item) -> tuple[Path, Path]:
        return folder / f"{item.id}.npy", folder / f"{item.id}.scores.npy"

    for_each_item(work, items, outputs, workers=config.workers, title=f"CAMs, k = {len(cam.taps)}")
    return {"score_thresholds": score_thresholds(folder, items, dataset)}


def measure_maps(folder: Path, config: TrainConfig, dataset: Dataset) -> Mapping[str, Any]:
    """Score the maps ID.npy of `folder` against the train masks, for every background score."""
    sweep = ThresholdSweep(len(dataset.class_names))
    for item in dataset.train:
        assert item.mask is not None
        sweep.add(load_maps(folder / f"{item.id}.npy"), item.classes, read_mask(item.mask))
    return sweep.results(config.label.background)
