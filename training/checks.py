"""Checks before the first stage of a run, where a mistake costs seconds instead of hours."""

from collections.abc import Iterable
from dataclasses import replace

import torch

from multisa.runtime.errors import DatasetError, ImageError, UsageError
from multisa.runtime.imaging.decode import read_mask
from multisa.runtime.imaging.png import IGNORE_INDEX
from multisa.runtime.progress import log
from multisa.training.backbones import check_weights
from multisa.training.config import TrainConfig
from multisa.training.data import Dataset, Item
from multisa.training.models import create_model


def check_run(config: TrainConfig, dataset: Dataset) -> None:
    """Check a configuration against the networks it names and against the data set.

    Raises UsageError for the configuration, DatasetError for the ground truth.
    """
    _check_label(config, dataset)
    check_networks(config, len(dataset.class_names))
    check_ground_truth((*dataset.train, *dataset.val), len(dataset.class_names))


def check_networks(config: TrainConfig, n_classes: int) -> None:
    """Build the three networks without memory for weights; n_classes counts the background.

    Raises UsageError for a backbone, weights, taps or a head that do not exist or do not fit together.
    """
    for part in (config.cam, config.affinity, config.segmenter):
        check_weights(part.backbone, part.weights)
    with torch.device("meta"):
        create_model(replace(config.cam, weights="none"), n_classes)
        create_model(replace(config.affinity, weights="none"))
        create_model(replace(config.segmenter, weights="none"), n_classes)


def check_ground_truth(items: Iterable[Item], n_classes: int) -> None:
    """Raise DatasetError, naming the file, for a mask that cannot be read or holds an id without a class."""
    for item in items:
        if item.mask is None:
            continue
        try:
            mask = read_mask(item.mask)
        except ImageError as error:
            raise DatasetError(str(error)) from error
        highest = int(mask[mask != IGNORE_INDEX].max(initial=0))
        if highest >= n_classes:
            raise DatasetError(
                f"{item.mask}: got class id {highest}, expected 0..{n_classes - 1} or {IGNORE_INDEX}; name "
                f"every class in classes.txt, or write {IGNORE_INDEX} (ignored) for the others"
            )


def _check_label(config: TrainConfig, dataset: Dataset) -> None:
    gains = config.label.class_gain
    foreground = len(dataset.class_names) - 1
    if len(gains) not in (0, foreground):
        raise UsageError(
            f"label.class_gain: got {len(gains)} numbers, expected {foreground}, one for each foreground "
            "class, or none"
        )
    if gains and config.background_from == "train-masks-per-class":
        raise UsageError(
            f"label.class_gain: got {list(gains)}, expected none with background_from=train-masks-per-class, "
            "which chooses them: leave out one of the two"
        )
    if config.background_from != "config" and not dataset.train:
        log.info(
            f"background_from={config.background_from}: the train list has no masks to choose on, "
            f"so label.background {config.label.background:g} is used"
        )
