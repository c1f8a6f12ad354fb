"""Stages 7 to 9: pseudo-masks from the walked maps, DeepLabV3+ trained on them, measured once on val."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from multisa.runtime.bundle import LabelParameters
from multisa.runtime.errors import DatasetError
from multisa.runtime.imaging.decode import write_mask
from multisa.runtime.predict.postprocess import pseudo_mask
from multisa.training.augment import AugmentedPhotographs
from multisa.training.backbones import Backbone
from multisa.training.cams import CHECKPOINT, load_cam_network
from multisa.training.checkpoint import load_checkpoint
from multisa.training.config import SegmenterConfig, TrainConfig
from multisa.training.data import DataSet, Item
from multisa.training.device import torch_device
from multisa.training.evaluation import score_masks
from multisa.training.inference import as_batch, for_each_item, load_maps, read_working_image
from multisa.training.loop import LoopOptions, train_network
from multisa.training.losses import segmentation_loss
from multisa.training.segmenter import DeepLabV3Plus, SegmentPhotographs
from multisa.training.workspace import Stage


def make_pseudo_masks(
    run: TrainConfig,
    parameters: LabelParameters,
    dataset: DataSet,
    items: tuple[Item, ...],
    walked: Stage,
    folder: Path,
) -> Mapping[str, Any]:
    """Write ID.png for each photograph of `items`."""
    palette = dataset.mask_palette

    def work(item: Item) -> None:
        image = read_working_image(item, run.long_side)
        made = pseudo_mask(image, load_maps(walked.folder / f"{item.id}.npy"), item.classes, parameters)
        write_mask(folder / f"{item.id}.png", made.mask, palette)

    for_each_item(
        work, items, lambda item: (folder / f"{item.id}.png",), workers=run.workers, title="pseudo-masks"
    )
    return {}


def build_segmenter(config: SegmenterConfig, n_classes: int) -> DeepLabV3Plus:
    """Make the untrained network; n_classes counts the background."""
    network = DeepLabV3Plus(
        Backbone(config.backbone, weights=config.weights),
        n_classes=n_classes,
        channels=config.decoder_channels,
        atrous_rates=config.atrous_rates,
        dropout=config.dropout,
    )
    return network.to(memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]


def load_segmenter(config: SegmenterConfig, n_classes: int, checkpoint: Path) -> DeepLabV3Plus:
    """Load a trained network, in evaluation mode."""
    network = build_segmenter(replace(config, weights="none"), n_classes)
    load_checkpoint(checkpoint, network)
    return network.eval()


def train_segmenter(
    run: TrainConfig, dataset: DataSet, masks: Stage, cam: Stage, folder: Path
) -> Mapping[str, Any]:
    """Train DeepLabV3+ on the pseudo-masks of the weak set."""
    if masks.folder.resolve() == (dataset.root / "SegmentationClass").resolve():
        raise DatasetError(
            f"{masks.folder}: the pseudo-masks would be the ground truth; choose another run folder"
        )
    torch.manual_seed(run.seed)
    config, n_classes = run.segmenter, len(dataset.class_names)
    device = torch_device(run)
    network = build_segmenter(config, n_classes).to(device)
    if config.start_from_cam:
        trained = load_cam_network(run.cam, n_classes, cam.folder / CHECKPOINT)
        network.backbone.load_state_dict(trained.backbone.state_dict())
    photographs = AugmentedPhotographs(
        dataset.weak, config.schedule, run, n_classes=n_classes, masks=masks.folder
    )

    def step(batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        image, mask = (part.to(device) for part in batch)
        return segmentation_loss(network(network.backbone.normalise(image)), mask)

    losses = train_network(
        network,
        [(config.schedule.new_layers_factor, network.new_parameters())],
        photographs,
        step,
        config.schedule,
        LoopOptions(folder / CHECKPOINT, run.seed, run.workers, "DeepLabV3+"),
    )
    return {"losses": losses}


def evaluate_segmenter(run: TrainConfig, dataset: DataSet, trained: Stage, folder: Path) -> Mapping[str, Any]:
    """Segment the val list with the PyTorch network, write ID.png and score them."""
    n_classes, palette = len(dataset.class_names), dataset.mask_palette
    device = torch_device(run)
    network = load_segmenter(run.segmenter, n_classes, trained.folder / CHECKPOINT)
    inference = SegmentPhotographs(network).to(device)

    def work(item: Item) -> None:
        with torch.inference_mode():
            labels, _ = inference(as_batch(read_working_image(item, run.long_side)).to(device))
        write_mask(folder / f"{item.id}.png", labels[0].cpu().numpy(), palette)

    for_each_item(
        work, dataset.val, lambda item: (folder / f"{item.id}.png",), workers=run.workers, title="val"
    )
    return score_masks(folder, dataset.val, n_classes)
