"""Stages 1 and 2: train the class activation network on image-level labels; compute the maps."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from multisa.runtime.imaging.decode import read_mask
from multisa.training.augment import AugmentedPhotographs
from multisa.training.backbones import Backbone
from multisa.training.checkpoint import load_checkpoint
from multisa.training.config import CamConfig, TrainConfig
from multisa.training.data import DataSet, Item
from multisa.training.device import torch_device
from multisa.training.evaluation import ThresholdSweep
from multisa.training.inference import as_batch, for_each_item, load_maps, read_working_image, save_maps
from multisa.training.loop import LoopOptions, train_network
from multisa.training.losses import multilabel_soft_margin
from multisa.training.multi_sa import MultiSACAM, MultiScaleCAM
from multisa.training.workspace import Stage

CHECKPOINT = "checkpoint.safetensors"
CALIBRATION_SIZE = 16  # photographs that the levels' sizes are measured on


def build_cam_network(config: CamConfig, n_classes: int) -> MultiSACAM:
    """Make the untrained network; n_classes counts the background."""
    backbone = Backbone(config.backbone, weights=config.weights)
    network = MultiSACAM(backbone, taps=config.taps, n_classes=n_classes - 1)
    return network.to(memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]


def load_cam_network(config: CamConfig, n_classes: int, checkpoint: Path) -> MultiSACAM:
    """Load a trained network, in evaluation mode."""
    network = build_cam_network(replace(config, weights="none"), n_classes)
    load_checkpoint(checkpoint, network)
    return network.eval()


def train_cam(config: CamConfig, run: TrainConfig, dataset: DataSet, folder: Path) -> Mapping[str, Any]:
    """Train Multi-SA (or, without taps, the plain CAM) on the weak set."""
    torch.manual_seed(run.seed)
    n_classes = len(dataset.class_names)
    device = torch_device(run)
    network = build_cam_network(config, n_classes).to(device)
    photographs = AugmentedPhotographs(dataset.weak, config.schedule, run, n_classes=n_classes)
    first = torch.stack([photographs[i][0] for i in range(min(CALIBRATION_SIZE, len(photographs)))])
    network.eval().calibrate(network.backbone.normalise(first.to(device)))

    def step(batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        image, labels = (part.to(device) for part in batch)
        return multilabel_soft_margin(network(network.backbone.normalise(image)), labels)

    losses = train_network(
        network,
        [
            (config.schedule.new_layers_factor, network.new_parameters()),
            (config.beta_factor, network.beta_parameters()),
        ],
        photographs,
        step,
        config.schedule,
        LoopOptions(folder / CHECKPOINT, run.seed, run.workers, f"CAM network, k = {len(config.taps)}"),
    )
    return {"losses": losses, "betas": network.betas()}


def compute_cams(
    config: CamConfig,
    run: TrainConfig,
    dataset: DataSet,
    items: tuple[Item, ...],
    trained: Stage,
    folder: Path,
) -> Mapping[str, Any]:
    """Write ID.npy (maps of the present classes) and ID.scores.npy; score them on the train masks."""
    device = torch_device(run)
    network = load_cam_network(config, len(dataset.class_names), trained.folder / CHECKPOINT)
    inference = MultiScaleCAM(network, scales=config.scales).to(device)

    def work(item: Item) -> None:
        with torch.inference_mode():
            cam, scores = inference(as_batch(read_working_image(item, run.long_side)).to(device))
        maps = cam[0].cpu().numpy()[[class_id - 1 for class_id in item.classes]]
        for path, values in zip(made(item), (maps, scores[0].cpu().numpy()), strict=True):
            save_maps(path, values)

    def made(item: Item) -> tuple[Path, Path]:
        return folder / f"{item.id}.npy", folder / f"{item.id}.scores.npy"

    for_each_item(work, items, made, workers=run.workers, title=f"CAMs, k = {len(config.taps)}")
    return {"score_thresholds": score_thresholds(folder, items, dataset)}


def measure_maps(folder: Path, run: TrainConfig, dataset: DataSet) -> Mapping[str, Any]:
    """Score the maps ID.npy of `folder` against the train masks, for every background score."""
    sweep = ThresholdSweep(len(dataset.class_names))
    for item in dataset.train:
        assert item.mask is not None
        sweep.add(load_maps(folder / f"{item.id}.npy"), item.classes, read_mask(item.mask))
    return sweep.results(run.label.background)


def score_thresholds(folder: Path, items: tuple[Item, ...], dataset: DataSet) -> list[float]:
    """Per foreground class, the score with the best F1 on the weak labels: used where no label is given."""
    scores = np.stack([load_maps(folder / f"{item.id}.scores.npy") for item in items])
    truth = np.zeros(scores.shape, bool)
    for row, item in enumerate(items):
        truth[row, [class_id - 1 for class_id in item.classes]] = True
    candidates = np.arange(1, 100) / 100
    chosen = scores[None] >= candidates[:, None, None]
    hits = (chosen & truth).sum(1)
    f1 = 2 * hits / np.maximum(chosen.sum(1) + truth.sum(0), 1)
    # The middle of the best stretch: training scores leave a wide gap, and its edges carry no meaning.
    return [
        float(np.median(candidates[f1[:, column] == f1[:, column].max()]).round(2))
        for column in range(f1.shape[1])
    ]
