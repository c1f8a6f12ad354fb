"""Labelling from file to file: both methods of `multisa label` on every backend, and each in PyTorch.

    multisa bench --data VOC_LAYOUT --stages label -o DIR

The literature's walk runs once with a sparse transition matrix, everything else equal, and once squaring the
dense one as psa and irn do. All label the same images alternately, given their image-level labels.
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
from multisa.benchmarks.suite.context import BenchContext, Roofline, mean_roofline
from multisa.benchmarks.suite.images import LabelledImage, count_confusion, read_plainly, read_working
from multisa.runtime.backends.base import CAM, SEGMENTER, GraphContract
from multisa.runtime.backends.gpus import probe_gpus
from multisa.runtime.bundle import LabelMethod
from multisa.runtime.evaluation import mean_iou
from multisa.runtime.imaging.decode import read_image, read_mask
from multisa.runtime.progress import Progress
from multisa.training.data import spread

OURS = "multisa label"
COPIES = 24  # of the image that the dense recipe gets: a run of ours on one image would be all start-up
DENSE_REPEATS = 3
WARM_UP_SIDE = 128  # pixels
# The graph that stands for each method, and its recipes in PyTorch: key of `BaselineLabelling` -> name.
METHODS: dict[LabelMethod, tuple[GraphContract, dict[str, str]]] = {
    "segmenter": (SEGMENTER, {"segmenter": "PyTorch eager, segmenter, pydensecrf"}),
    "walk": (CAM, {walk: f"PyTorch eager, {walk} walk, pydensecrf" for walk in ("sparse", "dense")}),
}


@dataclass(eq=False, kw_only=True)
class _Measured(Measured):
    """A way to label and its measurements so far."""

    method: LabelMethod
    is_auto: bool  # whether "auto" chooses this backend for the method
    recipe: str = ""  # in PyTorch; empty for ours
    stages: dict[str, float] = field(default_factory=dict)  # seconds


def measure(context: BenchContext) -> list[Row]:
    """One row per method, backend and precision of ours, and per recipe where torch is installed."""
    gpu = bool(probe_gpus().gpus)
    measured = []
    with ExitStack() as stack:
        for method, (contract, recipes) in METHODS.items():
            auto = auto_candidate(context.bundle.path, contract.name, context.engine_cache)
            for candidate in list_candidates(context.bundle, contract, context.backends, gpu=gpu):
                is_auto = candidate == auto
                is_default = is_auto and method == context.bundle.manifest.parameters.label_method
                row = candidate.row(is_default=is_default)
                if candidate.is_ours:
                    row |= {"recipe": f"{OURS} --method {method}"}
                    measured.append(_Measured(candidate, row, method=method, is_auto=is_auto))
                for recipe, name in recipes.items() if candidate.backend == EAGER else ():
                    named = row | {"recipe": name}
                    each = _Measured(candidate, named, method=method, is_auto=False, recipe=recipe)
                    opened = (context.bundle.path, recipe, candidate.device, context.weights)
                    each.start(stack, context.pytorch_problem, _open_baseline, *opened)
                    measured.append(each)
        _Steps(context, measured).measure()
    return [each.row for each in measured]


def _open_baseline(bundle: Path, recipe: str, device: str, weights: Path) -> object:
    from multisa.benchmarks.suite.baselines import BaselineLabelling

    return BaselineLabelling(bundle, recipe, device, weights)


class _Steps:
    """The steps of the measurement; in each step the ways run alternately."""

    def __init__(self, context: BenchContext, measured: list[_Measured]) -> None:
        self._context = context
        self._measured = measured
        self._images = spread(context.train, context.effort.labelled)
        self._rounds = min(context.effort.end_to_end_rounds, len(self._images))

    def measure(self) -> None:
        """Fill the rows. One that fails has the reason as "problem" and is not measured further."""
        many = [each for each in self._measured if each.recipe != "dense"]
        one = [each for each in self._measured if each.recipe == "dense"]
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
        words = ("--labels", str(labels), "--method", each.method)
        record = self._context.run_on_images("label", each.candidate, images, out, *words)
        known = each.row.get("peak_mib", {}).get("host") or 0
        each.row["peak_mib"] = {"host": max(known, record["peak_mib"] or 0) or None, "device": None}
        return record["images_per_second"], record["stage_seconds"]

    def _masks_of(self, each: _Measured) -> Path:
        return self._context.scratch / "labelled" / "-".join((*astuple(each.candidate), each.method, each.recipe))

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
                "by": "loop" if each.recipe else OURS,
                "images": len(images),
                # The rounds have different images; the dense recipe repeats one.
                **({} if each.recipe == "dense" else {"rounds": self._rounds}),
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
        rooflines = self._rooflines()
        for each in ran:
            beside = self._ours(each.method)
            baseline = self._baseline(each, ran)
            ratio = median_ratio(ours.rates, each.rates) if ours else None
            each.row |= {
                "baseline": each is baseline,
                **self._figures(each, self._images, ratio),
                "times_baseline": median_ratio(each.rates, baseline.rates) if baseline else None,
                "limit": rooflines[each.method].limit(each.candidate, 1 / statistics.median(each.rates)),
                **self._compare_masks(each, beside),
            }

    def _rooflines(self) -> dict[LabelMethod, Roofline]:
        sizes = [read_working(image.path, self._context.long_side).shape[1:3] for image in self._images]
        walks = [(size, len(image.classes)) for size, image in zip(sizes, self._images, strict=True)]
        return {
            "segmenter": mean_roofline(self._context, "segmenter_labels", sizes),
            "walk": mean_roofline(self._context, "walk_labels", walks),
        }

    def _baseline(self, each: _Measured, ran: Sequence[_Measured]) -> _Measured | None:
        """The method in PyTorch, on the same device if it ran there; without PyTorch, ours."""
        same = [other for other in ran if other.recipe and other.method == each.method]
        same.sort(key=lambda other: other.candidate.device != each.candidate.device)
        return next(iter(same), self._ours(each.method))

    def _ours(self, method: LabelMethod | None = None) -> _Measured | None:
        """The backend that "auto" chooses for a method, else the first of ours that ran; None: the bundle's method."""
        method = method or self._context.bundle.manifest.parameters.label_method
        ran = [each for each in self._measured if not each.recipe and each.row["problem"] is None]
        ran = [each for each in ran if each.method == method]
        return next((each for each in ran if each.is_auto), ran[0] if ran else None)

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
