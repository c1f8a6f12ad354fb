"""Class balance of trained segmenters: background must not win because it is frequent.

Image-level labels give pseudo-masks that leave parts of objects out, and every segmenter that learns from them leaves
out more: wherever it is unsure, the background is the safer guess. Peers train with a loss in which background and
foreground weigh the same (DSRG, Huang et al. 2018; CLIP-ES). The same decision follows from the trained network when
the logarithm of how frequent background is among the labels is subtracted (logit adjustment after training, Menon et
al. 2021), which leaves the training itself as it is.
"""

import math
from pathlib import Path

import numpy as np
import torch

from multisa.runtime.imaging.decode import read_mask
from multisa.runtime.imaging.png import IGNORE_INDEX
from multisa.runtime.progress import log
from multisa.training.config import SegmenterConfig
from multisa.training.data import Dataset
from multisa.training.inference import load_maps
from multisa.training.loop import CHECKPOINT, save_checkpoint
from multisa.training.models import create_model
from multisa.training.stage_cache import Results, Stage
from multisa.training.stage_functions import SegmenterTraining

BACKGROUND = 0  # class id


def balance_segmenter(
    segmenter: SegmenterConfig, training: SegmenterTraining, dataset: Dataset, trained: Stage, folder: Path
) -> Results:
    """Write the checkpoint of a trained segmenter whose decision weighs background and foreground the same.

    The bias of the background's logit is reduced by log(background / foreground), both counted in the labels that
    the segmenter was trained on.
    """
    network = create_model(segmenter, len(dataset.class_names), checkpoint=trained.folder / CHECKPOINT)
    ratio = background_ratio(training)
    with torch.no_grad():
        network.classifier.bias[BACKGROUND] -= math.log(ratio)
    save_checkpoint(folder / CHECKPOINT, network, None, {"losses": trained.results["losses"]})
    log.info(f"{training.title}: {ratio:.2f} times as much background as foreground in its labels, balanced")
    return {"losses": trained.results["losses"], "background_ratio": ratio}


def background_ratio(training: SegmenterTraining) -> float:
    """Background over foreground in the labels of a training, in pixels or, of soft targets, in probability.

    1 if the labels have only one of the two, because nothing can be weighed then.
    """
    background = foreground = 0.0
    for item in training.items:
        if training.probabilities is not None:
            maps = load_maps(training.probabilities / f"{item.id}.npy")
            shares = maps.sum((1, 2), dtype=np.float64)
            behind, total = shares[BACKGROUND], shares.sum()
        else:
            path = item.mask if training.masks is None else training.masks / f"{item.id}.png"
            assert path is not None
            mask = read_mask(path)
            behind, total = (mask == BACKGROUND).sum(), (mask != IGNORE_INDEX).sum()
        background += float(behind)
        foreground += float(total - behind)
    return background / foreground if background and foreground else 1.0
