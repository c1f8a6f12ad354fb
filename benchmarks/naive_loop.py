"""Labelling and segmenting as the literature's code does it: one photograph after the other, PyTorch eager.

Pillow reads and writes; labelling multiplies a transition matrix of all pixels by itself (psa, irn) and hands
the result to pydensecrf, where that is installed.
"""

import io
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from multisa.benchmarks.random_walk import dense_squaring
from multisa.kernels import dense_crf
from multisa.runtime.images import read_image, resize_image, working_size
from multisa.runtime.palette import voc_palette
from multisa.runtime.postprocess import background_and_foreground, resize_maps
from multisa.training.affinity import load_affinity_net
from multisa.training.cams import CHECKPOINT, load_cam_network
from multisa.training.inference import as_batch
from multisa.training.multi_sa import MultiScaleCAM
from multisa.training.pipeline import RunRecord, load_run
from multisa.training.segmentation import load_segmenter
from multisa.training.segmenter import SegmentPhotographs

UInt8 = npt.NDArray[np.uint8]
Labels = tuple[str, ...]


def naive_seconds(command: str, root: Path, files: Sequence[Path], given: Sequence[Labels | None]) -> float:
    """Seconds for one photograph, on all cores, after one that does not count."""
    run = load_run(root)
    work = _segmenting(run, root) if command == "segment" else _labelling(run, root)
    if command == "segment":
        work(files[0], given[0])
    start = time.perf_counter()
    for file, labels in zip(files, given, strict=False):
        work(file, labels)
    return (time.perf_counter() - start) / len(files)


def _segmenting(run: RunRecord, root: Path) -> Callable[[Path, Labels | None], None]:
    network = load_segmenter(
        run.config.segmenter, len(run.classes), run.folder(root, "segmenter") / CHECKPOINT
    )
    eager = SegmentPhotographs(network)

    def work(file: Path, _: Labels | None) -> None:
        rgb, image = _read(file, run.config.long_side)
        with torch.inference_mode():
            labels = eager(as_batch(image))[0]
        _write(labels[0].numpy(), rgb.shape[:2])

    return work


def _labelling(run: RunRecord, root: Path) -> Callable[[Path, Labels | None], None]:
    config, classes, parameters = run.config, run.classes, run.label
    cam = load_cam_network(config.cam, len(classes), run.folder(root, "cam") / CHECKPOINT)
    maps_of = MultiScaleCAM(cam, scales=config.cam.scales)
    affinity_of = load_affinity_net(config.affinity, run.folder(root, "affinity") / CHECKPOINT)

    def work(file: Path, labels: Labels | None) -> None:
        rgb, image = _read(file, config.long_side)
        ids = tuple(classes.index(name) for name in labels or ())
        with torch.inference_mode():
            maps = maps_of(as_batch(image))[0][0].numpy()[[i - 1 for i in ids]]
            normalised = affinity_of.backbone.normalise(as_batch(image))
            affinity = affinity_of(normalised, parameters.walk_radius)[0].numpy()
        walked = dense_squaring(affinity, resize_maps(maps, affinity.shape[1:]))
        scores = resize_maps(walked / walked.max(), image.shape[:2])
        probabilities = background_and_foreground(scores, parameters.background)
        refined = dense_crf(image, probabilities, **asdict(parameters.crf), backend="pydensecrf")
        _write(np.array((0, *ids), np.uint8)[refined.argmax(axis=0)], rgb.shape[:2])

    return work


def _read(file: Path, long_side: int) -> tuple[UInt8, UInt8]:
    rgb = read_image(file).rgb
    return rgb, resize_image(rgb, working_size(rgb.shape[0], rgb.shape[1], long_side))


def _write(mask: UInt8, size: tuple[int, int]) -> None:
    """Enlarge and encode as everyone does, at Pillow's default compression."""
    image = Image.fromarray(mask).resize((size[1], size[0]), Image.Resampling.NEAREST)
    image.putpalette(voc_palette().tobytes())
    image.save(io.BytesIO(), "PNG")
