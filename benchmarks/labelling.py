"""Labelling from file to file: `multisa label` on every backend against the literature's recipe in PyTorch.

    multisa bench --data VOC_LAYOUT --stages label -o DIR

The recipe runs once with a sparse transition matrix, everything else equal, and once squaring the dense one
as psa and irn do. All label the same images alternately, given their image-level labels.
Its bench.json is benchmarks/results/labelling.json.
"""

import csv
import statistics
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import astuple, dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from multisa.benchmarks.harness import median_ratio
from multisa.benchmarks.suite.candidates import EAGER, Measured, Row, auto_candidate, list_candidates, run_alternately
from multisa.benchmarks.suite.context import BenchContext, mean_roofline
from multisa.benchmarks.suite.images import LabelledImage, count_confusion, read_plainly, read_working
from multisa.runtime.backends.base import CAM
from multisa.runtime.backends.gpus import probe_gpus
from multisa.runtime.evaluation import mean_iou
from multisa.runtime.imaging.decode import read_image, read_mask
from multisa.runtime.progress import Progress
from multisa.training.data import spread

OURS = "multisa label"
COPIES = 24  # of the image that the dense recipe gets: a run of ours on one image would be all start-up
DENSE_REPEATS = 3
WARM_UP_SIDE = 128  # pixels
RECIPES = {walk: f"PyTorch eager, {walk} walk, pydensecrf" for walk in ("sparse", "dense")}


@dataclass(eq=False)
class _Measured(Measured):
    """A way to label and its measurements so far."""

    walk: str = ""  # of the recipe; empty for ours
    stages: dict[str, float] = field(default_factory=dict)  # seconds


def measure(context: BenchContext) -> list[Row]:
    """One row per backend and precision of ours, and per recipe where torch is installed."""
    gpu = bool(probe_gpus().gpus)
    default = auto_candidate(context.bundle.path, CAM.name, context.engine_cache)
    measured = []
    with ExitStack() as stack:
        for candidate in list_candidates(context.bundle, CAM, context.backends, gpu=gpu):
            row = candidate.row(is_default=candidate == default)
            if candidate.is_ours:
                measured.append(_Measured(candidate, row | {"recipe": OURS}))
            for walk, recipe in RECIPES.items() if candidate.backend == EAGER else ():
                each = _Measured(candidate, row | {"recipe": recipe}, walk=walk)
                opened = (context.bundle.path, walk, candidate.device, context.weights)
                each.start(stack, context.pytorch_problem, _open_baseline, *opened)
                measured.append(each)
        _Steps(context, measured).measure()
    return [each.row for each in measured]


def _open_baseline(bundle: Path, walk: str, device: str, weights: Path) -> object:
    from multisa.benchmarks.suite.baselines import BaselineLabelling

    return BaselineLabelling(bundle, walk, device, weights)


class _Steps:
    """The steps of the measurement; in each step the ways run alternately."""

    def __init__(self, context: BenchContext, measured: list[_Measured]) -> None:
        self._context = context
        self._measured = measured
        self._images = spread(context.train, context.effort.labelled)
        self._rounds = min(context.effort.end_to_end_rounds, len(self._images))

    def measure(self) -> None:
        """Fill the rows. One that fails has the reason as "problem" and is not measured further."""
        many = [each for each in self._measured if each.walk != "dense"]
        one = [each for each in self._measured if each.walk == "dense"]
        with Progress((self._rounds + 1) * len(many) + 2 * len(one), "labelling", "step") as bar:
            run_alternately([*many, *one], self._warm_up, bar)
            for index in range(self._rounds):
                run_alternately(many, partial(self._label, index), bar)
            run_alternately(one, self._against_dense, bar)
        self._summarise(many)

    def _warm_up(self, each: _Measured) -> None:
        small = _reduced(self._images[0], self._context, WARM_UP_SIDE)
        self._rate(each, [small], self._masks_of(each) / "warm-up")

    def _label(self, index: int, each: _Measured) -> None:
        part = self._images[index :: self._rounds]
        rate, stages = self._rate(each, part, self._masks_of(each) / str(index))
        each.rates.append(rate)
        for name, seconds in stages.items():
            each.stages[name] = each.stages.get(name, 0.0) + seconds

    def _rate(self, each: _Measured, images: Sequence[LabelledImage], out: Path) -> tuple[float, dict[str, float]]:
        """Images per second from file to file, and the seconds of work in each stage."""
        if each.worker is not None:
            stages: dict[str, float] = each.worker.call("label", images, out / "masks")
            each.row["peak_mib"] = {"host": each.worker.peak_mib, "device": None}
            return len(images) / sum(stages.values()), stages
        labels = self._context.scratch / "labels.csv"
        with labels.open("w", encoding="utf-8", newline="") as file:
            rows = csv.writer(file)
            rows.writerow(("image", "labels"))
            rows.writerows((f"{image.id}{image.path.suffix}", ";".join(image.classes)) for image in images)
        record = self._context.run_on_images("label", each.candidate, images, out, "--labels", str(labels))
        known = each.row.get("peak_mib", {}).get("host") or 0
        each.row["peak_mib"] = {"host": max(known, record["peak_mib"] or 0) or None, "device": None}
        return record["images_per_second"], record["stage_seconds"]

    def _masks_of(self, each: _Measured) -> Path:
        return self._context.scratch / "labelled" / "-".join((*astuple(each.candidate), each.walk))

    def _against_dense(self, each: _Measured) -> None:
        """The dense recipe on one image, reduced to a bearable size, and ours on copies of the same image."""
        image = _reduced(self._images[0], self._context, self._context.effort.dense_side)
        ours = self._ours()
        copies = [replace(image, id=f"{image.id}-{number}") for number in range(COPIES)]
        our_rates: list[float] = []
        for _ in range(DENSE_REPEATS):
            rate, each.stages = self._rate(each, [image], self._masks_of(each))
            each.rates.append(rate)
            if ours is not None:
                our_rates.append(self._rate(ours, copies, self._masks_of(each) / "ours")[0])
        each.row |= self._figures(each, [image], median_ratio(our_rates, each.rates) if ours else None)

    def _figures(self, each: _Measured, images: Sequence[LabelledImage], ratio: float | None) -> Row:
        """ratio: how many times as fast the default is on the same images."""
        shapes = [read_image(image.path).rgb.shape for image in images]
        return {
            "images_per_second": float(f"{statistics.median(each.rates):.5g}"),
            "end_to_end": {
                "by": "loop" if each.walk else OURS,
                "images": len(images),
                # The rounds have different images; the dense recipe repeats one.
                **({} if each.walk == "dense" else {"rounds": self._rounds}),
                "images_per_second": [float(f"{rate:.5g}") for rate in each.rates],
            },
            "default_times_as_fast": ratio,
            "images": len(images),
            "mean_pixels": round(float(np.mean([shape[0] * shape[1] for shape in shapes]))),
            "stages_ms": {name: round(1000 * s / len(images), 2) for name, s in each.stages.items()},
        }

    def _summarise(self, measured: Sequence[_Measured]) -> None:
        ran = [each for each in measured if each.row["problem"] is None]
        ours = self._ours()
        recipes = [each for each in ran if each.walk]
        recipes.sort(key=lambda each: not ours or each.candidate.device != ours.candidate.device)
        baseline = next(iter(recipes), ours)
        shapes = [
            (read_working(image.path, self._context.long_side).shape[1:3], len(image.classes)) for image in self._images
        ]
        roofline = mean_roofline(self._context, "labelling", shapes)
        for each in ran:
            ratio = median_ratio(ours.rates, each.rates) if ours else None
            each.row |= {
                "baseline": each is baseline,
                **self._figures(each, self._images, ratio),
                "times_baseline": median_ratio(each.rates, baseline.rates) if baseline else None,
                "limit": roofline.limit(each.candidate, 1 / statistics.median(each.rates)),
                **self._compare_masks(each, ours),
            }

    def _ours(self) -> _Measured | None:
        """The backend that "auto" chooses, else the first of ours that ran."""
        ran = [each for each in self._measured if not each.walk and each.row["problem"] is None]
        return next((each for each in ran if each.row["default"]), ran[0] if ran else None)

    def _compare_masks(self, each: _Measured, ours: _Measured | None) -> Row:
        """mIoU in percent, and the share of pixels at the images' own size that equal those of `ours`."""
        n_classes = len(self._context.bundle.manifest.classes)
        confusion = np.zeros((n_classes, n_classes), np.int64)
        same = 0
        pixels = 0
        for index in range(self._rounds):
            for image in self._images[index :: self._rounds]:
                name = Path(str(index), "masks", f"{image.id}.png")
                mask = read_mask(self._masks_of(each) / name)
                confusion += count_confusion(mask, image.mask, n_classes)
                if ours is not None:
                    same += int((mask == read_mask(self._masks_of(ours) / name)).sum())
                    pixels += mask.size
        return {
            "miou": round(100 * mean_iou(confusion), 3),
            "label_agreement": round(same / pixels, 6) if pixels else None,
        }


def _reduced(image: LabelledImage, context: BenchContext, long_side: int) -> LabelledImage:
    path = context.scratch / f"reduced-{long_side}-{image.id}.png"
    Image.fromarray(read_plainly(image.path, long_side)[0]).save(path)
    return replace(image, path=path)
