"""Class balance of labels that a segmenter makes: background must not win because it is frequent.

Image-level labels give pseudo-masks that leave parts of objects out, and a segmenter that learns from them leaves out
more: wherever it is unsure, the background is the safer guess. Other methods train with a loss in which background and
foreground weigh the same (DSRG, Huang et al. 2018). Dividing the probability of the background by its ratio to the
foreground in the labels approximates that after training (logit adjustment, Menon et al. 2021). This is done where the
image-level labels are given, so that the classes are known to be there; without them the network may find classes that
are not.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from multisa.runtime.imaging.decode import read_mask
from multisa.runtime.imaging.png import IGNORE_INDEX
from multisa.training.data import Item
from multisa.training.inference import load_maps

BACKGROUND = 0  # class id


def background_ratio(labels: Path, items: Sequence[Item], *, soft: bool) -> float:
    """Background over foreground in the labels of those `items` that show a class, within 0.001..1000.

    Counted in pixels or, of soft targets, in probability.

    labels: folder of ID.png or, with `soft`, ID.npy, [1 + classes of the image, h, w]. Returns 1 if the labels have
    only one of the two, because nothing can be weighed then.
    """
    background = foreground = 0.0
    for item in items:
        if not item.classes:  # all background, and no label to give more room to
            continue
        if soft:
            shares = load_maps(labels / f"{item.id}.npy").sum((1, 2), dtype=np.float64)
            behind, total = shares[BACKGROUND], shares.sum()
        else:
            mask = read_mask(labels / f"{item.id}.png")
            behind, total = (mask == BACKGROUND).sum(), (mask != IGNORE_INDEX).sum()
        background += float(behind)
        foreground += float(total - behind)
    return min(max(background / foreground, 1e-3), 1e3) if background and foreground else 1.0
