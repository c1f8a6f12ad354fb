"""Training samples: resize, mirror, crop; uint8 until the network normalises."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from multisa.runtime.imaging.decode import UInt8, read_mask, resize_mask
from multisa.runtime.imaging.png import IGNORE_INDEX
from multisa.training.config import Schedule, TrainConfig
from multisa.training.data import Item, read_working_image

# Grey level around images smaller than the crop: about zero after normalisation (PuzzleCAM pads with zero).
PADDING = 128


class AugmentedImages(Dataset[tuple[Tensor, Tensor]]):
    """Images resized, mirrored and cropped at random, with a target: (image, target).

    The image is uint8 RGB [crop, crop, 3]. Without masks the target is the multi-hot image-level label,
    float32 [n_classes - 1]; with masks it is the mask after the same transforms, uint8 [g, g] with g =
    ceil(crop / mask_stride), 255 where the image does not reach. The random draws depend only on the seed,
    the epoch and the index, not on the process that loads the sample.

    masks: a folder of ID.png of the working size; mask_stride: pixels per cell of the returned mask;
    n_classes counts the background.
    """

    def __init__(
        self,
        items: Sequence[Item],
        schedule: Schedule,
        config: TrainConfig,
        *,
        n_classes: int,
        masks: Path | None = None,
        mask_stride: int = 1,
    ) -> None:
        self.items = items
        self.schedule = schedule
        self.n_classes = n_classes
        self.long_side = config.long_side
        self.seed = config.seed
        self.masks = masks
        self.mask_stride = mask_stride
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the random draws. Call it before the loader starts its processes."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        item = self.items[index]
        random = np.random.default_rng((self.seed, self.epoch, index))
        image = read_working_image(item.image, self.long_side)
        mask = None if self.masks is None else read_mask(self.masks / f"{item.id}.png")
        image, mask = random_resize(image, mask, self.schedule.resize, random)
        if random.random() < 0.5:
            image, mask = image[:, ::-1], None if mask is None else mask[:, ::-1]
        image, mask = random_crop(image, mask, self.schedule.crop, random)
        if mask is not None:
            side = -(-self.schedule.crop // self.mask_stride)
            return torch.from_numpy(image), torch.from_numpy(resize_mask(mask, (side, side)))
        target = torch.zeros(self.n_classes - 1)
        target[[class_id - 1 for class_id in item.classes]] = 1.0
        return torch.from_numpy(image), target


def random_resize(
    image: UInt8, mask: UInt8 | None, long_side: tuple[int, int], random: np.random.Generator
) -> tuple[UInt8, UInt8 | None]:
    """Resize so that the long side is drawn uniformly from the range; bicubic, masks nearest."""
    height, width = image.shape[:2]
    factor = int(random.integers(long_side[0], long_side[1] + 1)) / max(height, width)
    size = (max(round(width * factor), 1), max(round(height * factor), 1))
    resized = np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BICUBIC))
    if mask is None:
        return resized, None
    return resized, np.asarray(Image.fromarray(mask).resize(size, Image.Resampling.NEAREST))


def random_crop(image: UInt8, mask: UInt8 | None, crop: int, random: np.random.Generator) -> tuple[UInt8, UInt8 | None]:
    """Cut out a square of `crop` pixels, or place a smaller image in it; both at a random position."""
    height, width = image.shape[:2]
    top, left = (int(random.integers(0, abs(side - crop) + 1)) for side in (height, width))
    source: tuple[slice, ...] = ()
    target: tuple[slice, ...] = ()
    for start, side in ((top, height), (left, width)):
        fixed, moved = slice(0, min(side, crop)), slice(start, start + min(side, crop))
        source += (moved if side > crop else fixed,)
        target += (fixed if side > crop else moved,)

    def placed(values: UInt8, padding: int) -> UInt8:
        square = np.full((crop, crop, *values.shape[2:]), padding, np.uint8)
        square[target] = values[source]
        return square

    return placed(image, PADDING), None if mask is None else placed(mask, IGNORE_INDEX)
