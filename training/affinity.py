"""Stages 3 to 5: labels for AffinityNet from the certain parts of the maps, its training, the random walk."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from multisa.kernels import DenseCRF
from multisa.runtime.imaging.decode import write_mask
from multisa.runtime.imaging.png import IGNORE_INDEX
from multisa.runtime.predict.postprocess import resize_maps, walk_scores
from multisa.training.affinity_net import affinity_loss, pair_targets
from multisa.training.augment import AugmentedImages
from multisa.training.config import AffinityLabelConfig, TrainConfig
from multisa.training.data import Dataset, Item
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
from multisa.training.stage_cache import Stage

UInt8 = npt.NDArray[np.uint8]
Float32 = npt.NDArray[np.float32]


def make_affinity_labels(
    config: TrainConfig, dataset: Dataset, cams: Stage, folder: Path
) -> Mapping[str, Any]:
    """Write ID.png for each train image: class ids where they are certain, 255 elsewhere."""
    palette = dataset.mask_palette

    def work(item: Item) -> None:
        image = read_working_image(item, config.long_side)
        maps = load_maps(cams.folder / f"{item.id}.npy")
        labels = affinity_labels(image, maps, item.classes, config.affinity_labels)
        write_mask(folder / f"{item.id}.png", labels, palette)

    for_each_item(
        work,
        dataset.train_images,
        lambda item: (folder / f"{item.id}.png",),
        workers=config.workers,
        title="affinity labels",
    )
    return {}


def affinity_labels(
    image: UInt8, cam: Float32, class_ids: tuple[int, ...], config: AffinityLabelConfig
) -> UInt8:
    """Certain foreground, certain background, and 255 in between (irn).

    image: uint8 [H, W, 3]; cam: float32 [C, h, w] in [0, 1] for `class_ids`. Returns uint8 [H, W]. The
    strongest class competes twice with a constant background score, and the hard labels pass the dense CRF:
    what is foreground against the high score is certain foreground, what is background against the low score
    is certain background.
    """
    size = (image.shape[0], image.shape[1])
    if not class_ids:
        return np.zeros(size, np.uint8)
    scores = resize_maps(cam, size)
    crf = DenseCRF(image, config.crf)

    def refined(background: float) -> UInt8:
        stacked = np.concatenate([np.full((1, *size), background, np.float32), scores])
        hard = stacked.argmax(0).astype(np.uint8)
        q = crf.infer_labels(hard, len(stacked), confidence=config.confidence)
        return np.asarray(np.array((0, *class_ids), np.uint8)[q.argmax(0)])

    certain_foreground = refined(config.foreground)
    possible_foreground = refined(config.background)
    labels = np.where(certain_foreground == 0, np.uint8(IGNORE_INDEX), certain_foreground)
    labels[(certain_foreground == 0) & (possible_foreground == 0)] = 0
    return labels


def train_affinity(config: TrainConfig, dataset: Dataset, labels: Stage, folder: Path) -> Mapping[str, Any]:
    """Train AffinityNet on the affinity labels of the train images."""
    torch.manual_seed(config.seed)
    schedule = config.affinity.schedule
    radius = config.affinity.training_radius
    device = torch_device(config)
    network = create_model(config.affinity).to(device)
    samples = AugmentedImages(
        dataset.train_images,
        schedule,
        config,
        n_classes=len(dataset.class_names),
        masks=labels.folder,
        mask_stride=network.stride,
    )

    def step(batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        image, mask = (part.to(device) for part in batch)
        affinity = network(network.backbone.normalise(image), radius)
        return affinity_loss(affinity, *pair_targets(mask, radius))

    losses = train_network(
        network,
        [(schedule.new_layers_factor, network.head.parameters())],
        samples,
        step,
        schedule,
        LoopOptions(
            folder / CHECKPOINT, config.seed, config.workers, f"AffinityNet ({config.affinity.head})"
        ),
    )
    return {"losses": losses}


def walk_cams(
    config: TrainConfig, dataset: Dataset, cams: Stage, trained: Stage, folder: Path
) -> Mapping[str, Any]:
    """Write ID.npy, the maps after the random walk, for each train image."""
    device = torch_device(config)
    network = create_model(config.affinity, checkpoint=trained.folder / CHECKPOINT).to(device)

    def work(item: Item) -> None:
        with torch.inference_mode():
            batch = as_batch(read_working_image(item, config.long_side)).to(device)
            affinity = network(network.backbone.normalise(batch), config.label.walk_radius)
        maps = load_maps(cams.folder / f"{item.id}.npy")
        walked = walk_scores(maps, affinity[0].cpu().numpy(), config.label)
        save_maps(folder / f"{item.id}.npy", walked)

    for_each_item(
        work,
        dataset.train_images,
        lambda item: (folder / f"{item.id}.npy",),
        workers=config.workers,
        title="random walk",
    )
    return {}
