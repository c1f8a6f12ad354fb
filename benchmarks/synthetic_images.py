"""Inputs of the kernel benchmarks: a packaged image, and class maps that look like a network's."""

from importlib.resources import files

import numpy as np
from PIL import Image

from multisa.kernels.common.checks import Float32, UInt8


def image_bytes(height: int, width: int) -> UInt8:
    """A packaged image resized to uint8 [height, width, 3]."""
    with files("multisa.runtime.demo_images").joinpath("astronaut.jpg").open("rb") as file:
        image = Image.open(file).convert("RGB").resize((width, height), Image.Resampling.BICUBIC)
    return np.array(image)


def image_features(height: int, width: int) -> Float32:
    """The image as float32 [3, height, width], scaled so that exp(-mean |f_i - f_j|) is 1/e at a tenth of
    the range."""
    return np.ascontiguousarray(image_bytes(height, width).transpose(2, 0, 1), dtype=np.float32) / 25.5


def smooth_scores(channels: int, height: int, width: int, seed: int = 0) -> Float32:
    """Class maps in [0, 1] with four blobs each, float32 [channels, height, width]."""
    rng = np.random.default_rng(seed)
    maps = np.zeros((channels, height, width), dtype=np.float32)
    y, x = np.mgrid[:height, :width] / max(height, width)
    for plane in maps:
        for _ in range(4):
            centre_y, centre_x = rng.random(2)
            size = rng.uniform(0.05, 0.2)
            plane += np.exp(-((y - centre_y) ** 2 + (x - centre_x) ** 2) / (2 * size**2)).astype(np.float32)
        plane /= plane.max()
    return maps


def class_probabilities(labels: int, height: int, width: int, present: int | None = None) -> Float32:
    """Softmax of smooth maps, float32 [labels, height, width]; only the first `present` labels occur."""
    maps = smooth_scores(present or labels, height, width, seed=1)
    powers = np.exp(6 * maps)
    probabilities = np.zeros((labels, height, width), dtype=np.float32)
    probabilities[: len(maps)] = powers / powers.sum(axis=0)
    return probabilities
