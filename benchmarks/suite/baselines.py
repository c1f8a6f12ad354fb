"""Labelling as the literature's code does it: PyTorch eager, one image after the other, pydensecrf.

Runs in its own process. The networks are the bundle's, not folded; each scale passes through the network with
its mirror image. psa and irn square the dense transition matrix; "sparse" multiplies 256 times by the sparse
one instead, which computes the same walk. "segmenter" restricts the segmenter's probabilities to the labels.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

from multisa.benchmarks.kernels import dense_squaring, sparse_steps
from multisa.benchmarks.suite.images import LabelledImage, read_plainly, write_plainly
from multisa.benchmarks.suite.pytorch import load_affinity, load_cam, load_segmenter, plain_batch
from multisa.kernels import dense_crf
from multisa.kernels.common.walk import WalkSettings
from multisa.runtime.bundle import load_bundle
from multisa.runtime.predict.postprocess import Float32, UInt8, background_and_foreground, resize_maps
from multisa.runtime.system import usable_cpus
from multisa.training.backbones import resize_bilinear
from multisa.training.multi_sa import MultiScaleCAM
from multisa.training.segmenter import SegmentImages


class BaselineLabelling:
    """The recipe with its networks loaded."""

    def __init__(self, bundle: Path, recipe: str, device: str, weights: Path) -> None:
        """recipe: "sparse", "dense" or "segmenter"; device: of the networks and the dense walk, "cpu" or "cuda";
        weights: where `write_weights` wrote."""
        # Squares of small weights are denormal numbers, which CPUs multiply slowly. The literature's code
        # does not flush them, but the comparison would not be fair. Threads inherit it when they start.
        torch.set_flush_denormal(True)
        torch.set_num_threads(usable_cpus())
        opened = load_bundle(bundle)
        self._manifest = opened.manifest
        self._recipe = recipe
        self._device = torch.device(device)
        if recipe == "segmenter":
            self._segmenter = SegmentImages(load_segmenter(opened, weights)).to(self._device)
        else:
            scales = self._manifest.parameters.cam_scales
            self._maps = MultiScaleCAM(load_cam(opened, weights), scales=scales).to(self._device)
            self._affinity = load_affinity(opened, weights).to(self._device)
        self._seconds: dict[str, float] = {}

    def label(self, images: Sequence[LabelledImage], out: Path) -> dict[str, float]:
        """Label images by their classes, from file to file; returns the seconds of each stage."""
        out.mkdir(parents=True, exist_ok=True)
        self._seconds = {}
        for image in images:
            with self._stage("decode"):
                rgb, size = read_plainly(image.path, self._manifest.parameters.long_side)
            mask = self._mask(rgb, image.classes, size)
            with self._stage("encode"):
                write_plainly(mask, out / f"{image.id}.png")
        return self._seconds

    def _mask(self, image: UInt8, classes: Sequence[str], size: tuple[int, int]) -> UInt8:
        """The mask of an image, uint8 [h, w, 3], at its own size."""
        ids = [self._manifest.classes.index(name) for name in classes]
        parameters = self._manifest.parameters
        batch = plain_batch(image[np.newaxis]).to(self._device)
        if self._recipe == "segmenter":
            settings = parameters.segmenter_label
            probabilities, crf = self._from_segmenter(batch, ids), settings.crf if settings.use_crf else None
        else:
            probabilities, crf = self._from_walk(batch, ids), parameters.label.crf if parameters.label.use_crf else None
        with self._stage("crf"):
            refined = dense_crf(image, probabilities, crf, backend="pydensecrf") if crf else probabilities
            winners = resize_maps(refined, size).argmax(axis=0)
            return np.asarray(np.array((0, *ids), np.uint8)[winners])

    @torch.inference_mode()
    def _from_segmenter(self, batch: torch.Tensor, ids: Sequence[int]) -> Float32:
        """Probabilities of the background and `ids`, [1 + len(ids), h, w] at the size of the batch of one."""
        with self._stage("segmenter"):
            found = self._segmenter(batch)
            if self._manifest.parameters.segmenter_label.mirror:
                found = (found + self._segmenter(batch.flip(2)).flip(3)) / 2
        with self._stage("crf"):
            kept = found[:, [0, *ids]]
            kept[:, 0] /= self._manifest.parameters.segmenter_label.background_ratio
            kept = kept / kept.sum(1, keepdim=True).clamp_min(1e-12)
            enlarged: Float32 = resize_bilinear(kept, tuple(batch.shape[1:3]))[0].cpu().numpy()
            return enlarged

    def _from_walk(self, batch: torch.Tensor, ids: Sequence[int]) -> Float32:
        """As `_from_segmenter`, from class activation maps, affinities and the walk."""
        parameters = self._manifest.parameters.label
        with torch.inference_mode():
            with self._stage("cam"):
                maps = self._maps(batch)[0][0].cpu().numpy()[[i - 1 for i in ids]]
            with self._stage("affinity"):
                normalised = self._affinity.backbone.normalise(batch)
                affinity = self._affinity(normalised, parameters.walk_radius)[0].cpu().numpy()
        with self._stage("walk"):
            walked = self._walked(affinity, resize_maps(maps, affinity.shape[1:]))
        with self._stage("crf"):
            scores = resize_maps(walked, (batch.shape[1], batch.shape[2]))
            gains = np.array([parameters.class_gain[i - 1] for i in ids] if parameters.class_gain else 1.0)
            scores = scores * gains.astype(np.float32).reshape(-1, 1, 1)
            return background_and_foreground(scores, parameters.background)

    def _walked(self, affinity: Float32, maps: Float32) -> Float32:
        label = self._manifest.parameters.label
        settings = WalkSettings(label.walk_radius, label.walk_beta, label.walk_steps)
        if self._recipe == "dense":
            walked = dense_squaring(affinity, maps, settings, device=self._device.type)
        else:
            walked = sparse_steps(affinity, maps, settings)
        return walked / max(float(walked.max()), 1e-5) if label.walk_to_peak else walked

    @contextmanager
    def _stage(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        if self._device.type == "cuda":
            torch.cuda.synchronize()
        self._seconds[name] = self._seconds.get(name, 0.0) + time.perf_counter() - start
