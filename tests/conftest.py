"""Shared by all tests: versions in the header, a small synthetic data set in VOC layout."""

import json
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from multisa.runtime.progress import console

CLASSES = ("background", "square", "disc")
COLOURS = {1: (210, 40, 40), 2: (40, 60, 210)}


def pytest_report_header() -> str:
    names = ("numpy", "scipy", "onnxruntime", "torch", "timm", "onnx")
    installed = {dist.metadata["Name"].lower() for dist in metadata.distributions()}
    return "versions: " + ", ".join(f"{n} {metadata.version(n)}" for n in names if n in installed)


@pytest.fixture(autouse=True)
def messages_on_stderr() -> Iterator[None]:
    """Show messages as the command line does, so that tests can read them."""
    with console():
        yield


def draw(class_ids: tuple[int, ...], seed: int, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """A noisy grey image with a red square and / or a blue disc, and its mask."""
    random = np.random.default_rng(seed)
    height, width = size
    image = random.integers(90, 150, (height, width, 3)).astype(np.uint8)
    mask = np.zeros((height, width), np.uint8)
    rows, columns = np.mgrid[:height, :width]
    for place, class_id in enumerate(class_ids):
        radius = height // 5
        y, x = height // 2, int(width * (place + 1) / (len(class_ids) + 1))
        if class_id == 1:
            inside = (abs(rows - y) < radius) & (abs(columns - x) < radius)
        else:
            inside = (rows - y) ** 2 + (columns - x) ** 2 < radius**2
        image[inside] = np.clip(np.array(COLOURS[class_id]) + random.integers(-20, 20, (int(inside.sum()), 3)), 0, 255)
        mask[inside] = class_id
    return image, mask


@pytest.fixture(scope="session")
def voc_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve images in VOC layout: eight to train on, all with masks, labels in labels.json."""
    root = tmp_path_factory.mktemp("voc")
    for name in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (root / name).mkdir(parents=True)
    labels, names = {}, []
    for index in range(12):
        class_ids = ((1,), (2,), (1, 2))[index % 3]
        image, mask = draw(class_ids, index, (96, 96 + 8 * (index % 4)))
        name = f"photo_{index:02d}"
        Image.fromarray(image).save(root / "JPEGImages" / f"{name}.jpg", quality=95)
        Image.fromarray(mask).save(root / "SegmentationClass" / f"{name}.png")
        labels[name] = [CLASSES[class_id] for class_id in class_ids]
        names.append(name)
    (root / "classes.txt").write_text("\n".join(CLASSES) + "\n")
    (root / "labels.json").write_text(json.dumps(labels))
    lists = {"train_aug": names[:8], "train": names[:6], "val": names[8:]}
    for list_name, members in lists.items():
        (root / "ImageSets" / "Segmentation" / f"{list_name}.txt").write_text("\n".join(members) + "\n")
    return root
