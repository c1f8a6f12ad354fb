"""Labelling as the literature's code does it: PyTorch eager, one photograph after the other, pydensecrf.

Inside its own process. The networks are the bundle's, not folded; each scale passes the network with its
mirror image. psa and irn square the dense matrix of transitions; "sparse" multiplies 256 times by the
sparse one instead, which is the same walk.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from multisa.benchmarks.random_walk import dense_squaring, sparse_steps
from multisa.benchmarks.suite.eager_state import fed_plainly, load_affinity, load_cam
from multisa.benchmarks.suite.plain import read_plainly, write_plainly
from multisa.benchmarks.suite.sample import Photograph
from multisa.kernels import dense_crf
from multisa.runtime.bundle import load_bundle
from multisa.runtime.predict.postprocess import background_and_foreground, resize_maps
from multisa.runtime.system import usable_cpus
from multisa.training.multi_sa import MultiScaleCAM

UInt8 = npt.NDArray[np.uint8]
Float32 = npt.NDArray[np.float32]


class PeersLabelling:
    """The recipe, its networks loaded."""

    def __init__(self, bundle: Path, walk: str, device: str, states: Path) -> None:
        """walk: "sparse" or "dense"; device: of the networks and of the dense walk, "cpu" or "cuda"; states:
        where `States` wrote."""
        # Squares of small weights are denormal numbers, which this processor multiplies by microcode: their
        # code does not ask for it, but it would be no fair race. Before the threads start: they inherit it.
        torch.set_flush_denormal(True)
        torch.set_num_threads(usable_cpus())
        opened = load_bundle(bundle)
        self._manifest, self._walk = opened.manifest, walk
        self._device = torch.device(device)
        cam = load_cam(opened, states)
        self._maps = MultiScaleCAM(cam, scales=self._manifest.parameters.cam_scales).to(self._device)
        self._affinity = load_affinity(opened, states).to(self._device)
        self._seconds: dict[str, float] = {}

    def label(self, photographs: Sequence[Photograph], out: Path) -> dict[str, float]:
        """Label them by their classes, from file to file; seconds of each stage."""
        out.mkdir(parents=True, exist_ok=True)
        self._seconds = {}
        for photograph in photographs:
            with self._stage("decode"):
                image, size = read_plainly(photograph.image, self._manifest.parameters.long_side)
            mask = self._mask(image, photograph.classes)
            with self._stage("encode"):
                write_plainly(mask, size, out / f"{photograph.id}.png")
        return self._seconds

    def _mask(self, image: UInt8, classes: Sequence[str]) -> UInt8:
        parameters = self._manifest.parameters.label
        ids = [self._manifest.classes.index(name) for name in classes]
        batch = fed_plainly(image[np.newaxis]).to(self._device)
        with torch.inference_mode():
            with self._stage("cam"):
                maps = self._maps(batch)[0][0].cpu().numpy()[[i - 1 for i in ids]]
            with self._stage("affinity"):
                normalised = self._affinity.backbone.normalise(batch)
                affinity = self._affinity(normalised, parameters.walk_radius)[0].cpu().numpy()
        with self._stage("walk"):
            walked = self._walked(affinity, resize_maps(maps, affinity.shape[1:]))
        with self._stage("crf"):
            scores = resize_maps(walked, (image.shape[0], image.shape[1]))
            gains = np.array([parameters.class_gain[i - 1] for i in ids] if parameters.class_gain else 1.0)
            scores = scores * gains.astype(np.float32).reshape(-1, 1, 1)
            probabilities = background_and_foreground(scores, parameters.background)
            refined = dense_crf(image, probabilities, parameters.crf, backend="pydensecrf")
            ids_of_rows: UInt8 = np.array((0, *ids), np.uint8)
            return np.asarray(ids_of_rows[refined.argmax(axis=0)], np.uint8)

    def _walked(self, affinity: Float32, maps: Float32) -> Float32:
        label = self._manifest.parameters.label
        settings = (label.walk_beta, label.walk_steps, label.walk_radius)
        if self._walk == "dense":
            walked = dense_squaring(affinity, maps, *settings, device=self._device.type)
        else:
            walked = sparse_steps(affinity, maps, *settings)
        return walked / max(float(walked.max()), 1e-5) if label.walk_to_peak else walked

    @contextmanager
    def _stage(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        if self._device.type == "cuda":
            torch.cuda.synchronize()
        self._seconds[name] = self._seconds.get(name, 0.0) + time.perf_counter() - start
