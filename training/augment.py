"""Training samples: resize, mirror, crop, recolour; uint8 until the network normalises."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageEnhance
from torch import Tensor
from torch.nn import functional
from torch.utils.data import Dataset

from multisa.runtime.imaging.decode import UInt8, resize_mask
from multisa.runtime.imaging.png import IGNORE_INDEX
from multisa.training.annotations.base import MaskFile
from multisa.training.config import Schedule, TrainConfig
from multisa.training.data import Item, read_working_image
from multisa.training.inference import load_maps
from multisa.training.transforms import PADDING, apply_transforms

Float32 = npt.NDArray[np.float32]


class AugmentedImages(Dataset[tuple[Tensor, Tensor]]):
    """Images resized, mirrored, cropped and recoloured at random, with a target: (image, target).

    The image is uint8 RGB [crop, crop, 3]. The target is one of

    - the multi-hot image-level label, float32 [n_classes - 1];
    - with `masks`, a folder of ID.png, or with `truth`, the masks of the items: the mask after the same transforms,
      uint8 [g, g] with g = ceil(crop / stride), 255 where the image does not reach;
    - with `probabilities`, a folder of ID.npy, [1 + classes of the image, h, w], background first: probabilities
      of all classes after the same transforms, float32 [n_classes, g, g], 0 where the image does not reach.

    The random draws depend only on the seed, the epoch and the index, not on the process that loads the sample.
    stride: pixels per cell of the target. n_classes counts the background.
    """

    # more than six parameters: each kind of target needs its own
    def __init__(
        self,
        items: Sequence[Item],
        schedule: Schedule,
        config: TrainConfig,
        *,
        n_classes: int,
        masks: Path | None = None,
        truth: bool = False,
        probabilities: Path | None = None,
        stride: int = 1,
    ) -> None:
        # Drawn masks hold all of their shapes, which the processes that load samples would get.
        self.items = items if truth else [replace(item, mask=None) for item in items]
        self.schedule = schedule
        self.n_classes = n_classes
        self.long_side = config.long_side
        self.seed = config.seed
        self.masks = masks
        self.truth = truth
        self.probabilities = probabilities
        self.stride = stride
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the random draws. Call it before the loader starts its processes."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        item = self.items[index]
        random = np.random.default_rng((self.seed, self.epoch, index))
        image = read_working_image(item.image, self.long_side, enlarge=1)
        crop = random_view(image.shape[:2], self.schedule, random)
        recolour = partial(jitter_colours, strength=self.schedule.colour_jitter, random=random)
        view = crop.of_image(image, recolour)
        side = -(-self.schedule.crop // self.stride)
        path = self.masks / f"{item.id}.png" if self.masks else None
        source = item.mask if self.truth else MaskFile(path) if path else None
        if source is not None:
            mask = crop.of_mask(resize_mask(source.read(), (image.shape[0], image.shape[1])))
            view, mask = self._augmented(view, mask, random)
            return torch.from_numpy(view), torch.from_numpy(resize_mask(mask, (side, side)))
        if self.probabilities is not None:
            maps = crop.of_maps(load_maps(self.probabilities / f"{item.id}.npy"))
            view, maps = self._augmented(view, maps, random)
            target = torch.zeros(self.n_classes, side, side)
            target[[0, *item.classes]] = functional.adaptive_avg_pool2d(torch.from_numpy(maps), side)
            return torch.from_numpy(view), target
        view, _ = self._augmented(view, None, random)
        target = torch.zeros(self.n_classes - 1)
        target[[class_id - 1 for class_id in item.classes]] = 1.0
        return torch.from_numpy(view), target

    def _augmented(self, view: UInt8, target: Any, random: np.random.Generator) -> tuple[UInt8, Any]:
        """Apply what `schedule.augment` names."""
        entries = tuple(self.schedule.augment)
        return apply_transforms(entries, view, target, int(random.integers(2**32))) if entries else (view, target)


@dataclass(frozen=True)
class View:
    """One random resize, mirror image and crop, applied in the same way to an image and its target."""

    size: tuple[int, int]  # (height, width) that the image is resized to
    mirrored: bool
    corner: tuple[int, int]  # (top, left) of the crop in the image or, along a shorter side, of the image in it
    side: int  # of the square crop

    def of_image(self, image: UInt8, recolour: Callable[[UInt8], UInt8]) -> UInt8:
        """uint8 [H, W, 3] -> [side, side, 3], bicubic, recoloured; PADDING where the image does not reach."""
        return self._cut(recolour(self._resized(image, Image.Resampling.BICUBIC)), PADDING)

    def of_mask(self, mask: UInt8) -> UInt8:
        """uint8 [H, W] -> [side, side], nearest; IGNORE_INDEX where the image does not reach."""
        return self._cut(self._resized(mask, Image.Resampling.NEAREST), IGNORE_INDEX)

    def of_maps(self, maps: Float32) -> Float32:
        """float32 [K, h, w] on any grid over the image -> [K, side, side], bilinear; 0 around the image."""
        return np.stack([self._cut(self._resized(each, Image.Resampling.BILINEAR), 0) for each in maps])

    def _resized(self, values: npt.NDArray[Any], filter: Image.Resampling) -> npt.NDArray[Any]:
        resized = np.asarray(Image.fromarray(values).resize(self.size[::-1], filter))
        return resized[:, ::-1] if self.mirrored else resized

    def _cut(self, values: npt.NDArray[Any], padding: int) -> npt.NDArray[Any]:
        source: tuple[slice, ...] = ()
        target: tuple[slice, ...] = ()
        for start, extent in zip(self.corner, values.shape, strict=False):
            fixed = slice(0, min(extent, self.side))
            moved = slice(start, start + min(extent, self.side))
            source += (moved if extent > self.side else fixed,)
            target += (fixed if extent > self.side else moved,)
        square = np.full((self.side, self.side, *values.shape[2:]), padding, values.dtype)
        square[target] = values[source]
        return square


def random_view(size: tuple[int, ...], schedule: Schedule, random: np.random.Generator) -> View:
    """Draw a view of an image of `size` (height, width): its long side uniformly from `schedule.resize`."""
    height, width = size
    factor = int(random.integers(schedule.resize[0], schedule.resize[1] + 1)) / max(height, width)
    resized = (max(round(height * factor), 1), max(round(width * factor), 1))
    mirrored = bool(random.random() < 0.5)
    top, left = (int(random.integers(0, abs(side - schedule.crop) + 1)) for side in resized)
    return View(resized, mirrored, (top, left), schedule.crop)


def jitter_colours(image: UInt8, strength: float, random: np.random.Generator) -> UInt8:
    """Multiply brightness, contrast and saturation by three factors within 1 +- strength, in that order."""
    if strength == 0:
        return image
    picture = Image.fromarray(image)
    for kind in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
        picture = kind(picture).enhance(float(random.uniform(1 - strength, 1 + strength)))
    return np.array(picture)
