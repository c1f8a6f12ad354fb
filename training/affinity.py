"""Stages 3 to 5: labels for AffinityNet from sure parts of the maps, its training, the random walk."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from multisa.kernels import DenseCRF
from multisa.runtime.imaging.decode import resize_mask, write_mask
from multisa.runtime.imaging.png import IGNORE_INDEX
from multisa.runtime.predict.postprocess import resize_maps, walk_scores
from multisa.training.affinity_net import AffinityNet, pair_targets
from multisa.training.augment import AugmentedPhotographs
from multisa.training.backbones import Backbone
from multisa.training.cams import CHECKPOINT
from multisa.training.checkpoint import load_checkpoint
from multisa.training.config import AffinityConfig, AffinityLabelConfig, TrainConfig
from multisa.training.data import DataSet, Item
from multisa.training.device import torch_device
from multisa.training.inference import as_batch, for_each_item, load_maps, read_working_image, save_maps
from multisa.training.loop import LoopOptions, train_network
from multisa.training.losses import affinity_loss
from multisa.training.workspace import Stage

UInt8 = npt.NDArray[np.uint8]
Float32 = npt.NDArray[np.float32]


def make_affinity_labels(run: TrainConfig, dataset: DataSet, cams: Stage, folder: Path) -> Mapping[str, Any]:
    """Write ID.png for each weak photograph: a class where it is sure, 255 elsewhere."""

    def work(item: Item) -> None:
        image = read_working_image(item, run.long_side)
        maps = load_maps(cams.folder / f"{item.id}.npy")
        write_mask(
            folder / f"{item.id}.png",
            affinity_labels(image, maps, item.classes, run.affinity_labels),
            palette,
        )

    palette = dataset.mask_palette
    for_each_item(
        work,
        dataset.weak,
        lambda item: (folder / f"{item.id}.png",),
        workers=run.workers,
        title="affinity labels",
    )
    return {}


def affinity_labels(
    image: UInt8, cam: Float32, class_ids: tuple[int, ...], config: AffinityLabelConfig
) -> UInt8:
    """Sure foreground, sure background, 255 between (irn).

    image: uint8 [H, W, 3]; cam: float32 [C, h, w] in [0, 1] for `class_ids`. Returns uint8 [H, W]. Twice the
    strongest class against a constant background, as hard labels through the dense CRF: with a high
    background what stays foreground is sure, with a low one what stays background is.
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

    sure_foreground, weak_foreground = refined(config.foreground), refined(config.background)
    labels = np.where(sure_foreground == 0, np.uint8(IGNORE_INDEX), sure_foreground)
    labels[(sure_foreground == 0) & (weak_foreground == 0)] = 0
    return labels


def build_affinity_net(config: AffinityConfig) -> AffinityNet:
    """Make the untrained network."""
    network = AffinityNet(Backbone(config.backbone, weights=config.weights), head=config.head)
    return network.to(memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]


def load_affinity_net(config: AffinityConfig, checkpoint: Path) -> AffinityNet:
    """Load a trained network, in evaluation mode."""
    network = build_affinity_net(replace(config, weights="none"))
    load_checkpoint(checkpoint, network)
    return network.eval()


def train_affinity(run: TrainConfig, dataset: DataSet, labels: Stage, folder: Path) -> Mapping[str, Any]:
    """Train AffinityNet on the weak set's affinity labels."""
    torch.manual_seed(run.seed)
    config = run.affinity
    device = torch_device(run)
    network = build_affinity_net(config).to(device)
    photographs = AugmentedPhotographs(
        dataset.weak, config.schedule, run, n_classes=len(dataset.class_names), masks=labels.folder
    )
    radius = config.training_radius

    def step(batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        image, mask = batch
        affinity = network(network.backbone.normalise(image.to(device)), radius)
        grid = (affinity.shape[-2], affinity.shape[-1])
        small = torch.from_numpy(np.stack([resize_mask(m, grid) for m in mask.numpy()])).to(device)
        return affinity_loss(affinity, *pair_targets(small, radius))

    losses = train_network(
        network,
        [(config.schedule.new_layers_factor, network.head.parameters())],
        photographs,
        step,
        config.schedule,
        LoopOptions(folder / CHECKPOINT, run.seed, run.workers, f"AffinityNet ({config.head})"),
    )
    return {"losses": losses}


def walk_cams(
    run: TrainConfig, dataset: DataSet, cams: Stage, trained: Stage, folder: Path
) -> Mapping[str, Any]:
    """Write ID.npy, the maps after the random walk, for each weak photograph."""
    device = torch_device(run)
    network = load_affinity_net(run.affinity, trained.folder / CHECKPOINT).to(device)

    def work(item: Item) -> None:
        with torch.inference_mode():
            image = network.backbone.normalise(as_batch(read_working_image(item, run.long_side)).to(device))
            affinity = network(image, run.label.walk_radius)[0].cpu().numpy()
        save_maps(
            folder / f"{item.id}.npy",
            walk_scores(load_maps(cams.folder / f"{item.id}.npy"), affinity, run.label),
        )

    for_each_item(
        work,
        dataset.weak,
        lambda item: (folder / f"{item.id}.npy",),
        workers=run.workers,
        title="random walk",
    )
    return {}
