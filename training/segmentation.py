"""Stages 7 to 9: pseudo-masks from the walked maps, DeepLabV3+ trained on them, evaluated once on val."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from multisa.runtime.bundle import LabelParameters
from multisa.runtime.errors import DatasetError
from multisa.runtime.imaging.decode import write_mask
from multisa.runtime.predict.postprocess import pseudo_mask
from multisa.training.augment import AugmentedImages
from multisa.training.config import TrainConfig
from multisa.training.data import Dataset, Item
from multisa.training.evaluation import score_masks
from multisa.training.inference import as_batch, for_each_item, load_maps, read_working_image, torch_device
from multisa.training.loop import CHECKPOINT, LoopOptions, train_network
from multisa.training.models import create_model
from multisa.training.segmenter import SegmentImages, segmentation_loss
from multisa.training.stage_cache import Stage


def make_pseudo_masks(
    config: TrainConfig,
    parameters: LabelParameters,
    dataset: Dataset,
    items: tuple[Item, ...],
    walked: Stage,
    folder: Path,
) -> Mapping[str, Any]:
    """Write ID.png for each image of `items`."""
    palette = dataset.mask_palette

    def work(item: Item) -> None:
        image = read_working_image(item, config.long_side)
        result = pseudo_mask(image, load_maps(walked.folder / f"{item.id}.npy"), item.classes, parameters)
        write_mask(folder / f"{item.id}.png", result.mask, palette)

    for_each_item(
        work, items, lambda item: (folder / f"{item.id}.png",), workers=config.workers, title="pseudo-masks"
    )
    return {}


def train_segmenter(
    config: TrainConfig, dataset: Dataset, masks: Stage, cam: Stage, folder: Path
) -> Mapping[str, Any]:
    """Train DeepLabV3+ on the pseudo-masks of the train images."""
    if masks.folder.resolve() == (dataset.root / "SegmentationClass").resolve():
        raise DatasetError(
            f"{masks.folder}: the pseudo-masks would be the ground truth; choose another run folder"
        )
    torch.manual_seed(config.seed)
    n_classes = len(dataset.class_names)
    schedule = config.segmenter.schedule
    device = torch_device(config)
    network = create_model(config.segmenter, n_classes).to(device)
    if config.segmenter.start_from_cam:
        trained = create_model(config.cam, n_classes, checkpoint=cam.folder / CHECKPOINT)
        network.backbone.load_state_dict(trained.backbone.state_dict())
    samples = AugmentedImages(dataset.train_images, schedule, config, n_classes=n_classes, masks=masks.folder)

    def step(batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        image, mask = (part.to(device) for part in batch)
        return segmentation_loss(network(network.backbone.normalise(image)), mask)

    losses = train_network(
        network,
        [(schedule.new_layers_factor, network.new_parameters())],
        samples,
        step,
        schedule,
        LoopOptions(folder / CHECKPOINT, config.seed, config.workers, "DeepLabV3+"),
    )
    return {"losses": losses}


def evaluate_segmenter(
    config: TrainConfig, dataset: Dataset, trained: Stage, folder: Path
) -> Mapping[str, Any]:
    """Segment the val list with the PyTorch network, write ID.png and score them."""
    n_classes = len(dataset.class_names)
    palette = dataset.mask_palette
    device = torch_device(config)
    network = create_model(config.segmenter, n_classes, checkpoint=trained.folder / CHECKPOINT)
    inference = SegmentImages(network).to(device)

    def work(item: Item) -> None:
        with torch.inference_mode():
            labels, _ = inference(as_batch(read_working_image(item, config.long_side)).to(device))
        write_mask(folder / f"{item.id}.png", labels[0].cpu().numpy(), palette)

    for_each_item(
        work, dataset.val, lambda item: (folder / f"{item.id}.png",), workers=config.workers, title="val"
    )
    return score_masks(folder, dataset.val, n_classes)
