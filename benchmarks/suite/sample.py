"""Which photographs of a data set are measured on: always the same ones, spread over its lists."""

import shutil
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from multisa.runtime.evaluation import confusion_matrix
from multisa.runtime.imaging.decode import read_image, read_mask, resize_image, resize_mask, working_size

UInt8 = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Photograph:
    """One of the data set: its file, the file of its truth, and the classes that it shows."""

    id: str
    image: Path
    mask: Path
    classes: tuple[str, ...] = ()


def spread(photographs: Sequence[Photograph], count: int) -> list[Photograph]:
    """`count` of them (or all) at equal distances: a list is sorted by year and place."""
    count = min(count, len(photographs))
    return [photographs[index * len(photographs) // count] for index in range(count)]


def read_working(path: Path, long_side: int) -> UInt8:
    """A photograph as uint8 [1, h, w, 3], reduced to the long side of the bundle."""
    rgb = read_image(path).rgb
    size = working_size(rgb.shape[0], rgb.shape[1], long_side)
    return np.ascontiguousarray(rgb if size == rgb.shape[:2] else resize_image(rgb, size))[np.newaxis]


def scaled_to(path: Path, long_side: int) -> UInt8:
    """A photograph as uint8 [1, h, w, 3] whose long side is `long_side`, enlarged if need be."""
    rgb = read_image(path).rgb
    factor = long_side / max(rgb.shape[:2])
    size = (max(round(rgb.shape[0] * factor), 1), max(round(rgb.shape[1] * factor), 1))
    return np.ascontiguousarray(resize_image(rgb, size))[np.newaxis]


def of_one_size(photographs: Sequence[Photograph], long_side: int) -> list[Path]:
    """The files of those whose working size is the most frequent one."""
    sizes = {p.image: read_working(p.image, long_side).shape[1:3] for p in photographs}
    most = Counter(sizes.values()).most_common(1)[0][0]
    return [path for path, size in sizes.items() if size == most]


def count_confusion(labels: UInt8, mask: Path, n_classes: int) -> npt.NDArray[np.int64]:
    """Confusion with the truth at the truth's size, int64 [n, n]; labels uint8 [h, w] are enlarged."""
    truth = read_mask(mask)
    return confusion_matrix(resize_mask(labels, (truth.shape[0], truth.shape[1])), truth, n_classes)


def copy_images(photographs: Sequence[Photograph], folder: Path) -> Path:
    """Copy their files to a new folder, ID.suffix each, for a command to run on."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for photograph in photographs:
        shutil.copyfile(photograph.image, folder / f"{photograph.id}{photograph.image.suffix}")
    return folder


def settle(seconds: float = 0.3) -> None:
    """Wait until the threads of whoever was measured last have gone to sleep: pools spin for a while."""
    time.sleep(seconds)
