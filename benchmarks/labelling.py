"""Labelling from file to file: `multisa label` on every engine against the literature's recipe in PyTorch.

    python benchmarks/labelling.py --data VOC_LAYOUT [--quick] [--engines onnxruntime-cpu,pytorch-eager]

The recipe once with a sparse matrix of transitions, everything else equal, and once squaring the dense one,
as psa and irn do. All label the same photographs by turns, by the classes they are said to show. Writes
benchmarks/results/labelling.json; `multisa bench --stages label` is the same.
"""

import csv
import io
import statistics
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from multisa.benchmarks.suite.command import run_on_photographs
from multisa.benchmarks.suite.contender import EAGER, Contender, auto_contender, contenders
from multisa.benchmarks.suite.guest import Guest, GuestFailedError
from multisa.benchmarks.suite.limits import labelling_floor
from multisa.benchmarks.suite.sample import (
    Photograph,
    count_confusion,
    read_working,
    settle,
    spread,
)
from multisa.benchmarks.suite.setting import Setting
from multisa.benchmarks.suite.subject import subject_main
from multisa.benchmarks.suite.turns import ratio_of_turns
from multisa.runtime.backends.base import CAM
from multisa.runtime.backends.gpus import probe_gpus
from multisa.runtime.evaluation import mean_iou
from multisa.runtime.files import write_bytes_atomically
from multisa.runtime.imaging.decode import read_image, read_mask, resize_image, working_size
from multisa.runtime.progress import Progress, log

Row = dict[str, Any]
OURS = "multisa label"
OF_ONE = 24  # copies of one photograph
DENSE_REPEATS = 3
WARM_UP_SIDE = 128  # pixels
RECIPES = {walk: f"PyTorch eager, {walk} walk, pydensecrf" for walk in ("sparse", "dense")}


@dataclass(eq=False)
class _Member:
    """A way to label, and what is known of it so far."""

    contender: Contender
    walk: str  # of the recipe; empty for ours
    row: Row
    rates: list[float] = field(default_factory=list)  # images a second, of each turn
    stages: dict[str, float] = field(default_factory=dict)  # seconds
    guest: Guest | None = None

    @property
    def folder(self) -> str:
        return f"{self.contender.backend}-{self.contender.precision}-{self.contender.device}-{self.walk}"


def measure(setting: Setting) -> list[Row]:
    """One row for each engine and precision of ours, and for the recipes where torch is."""
    gpu = bool(probe_gpus().gpus)
    default = auto_contender(setting.bundle.path, CAM.name, setting.plans)
    members = []
    with ExitStack() as stack:
        for contender in contenders(setting.bundle, CAM, setting.engines, gpu=gpu):
            if contender.is_ours:
                members.append(_member(contender, "", contender == default))
            elif contender.backend == EAGER:
                members += [_recipe(setting, contender, walk, stack) for walk in RECIPES]
        PseudoLabeler(setting, members).measure()
    return [member.row for member in members]


def _member(contender: Contender, walk: str, is_default: bool) -> _Member:
    recipe = RECIPES.get(walk, OURS)
    return _Member(contender, walk, contender.row(is_default=is_default) | {"recipe": recipe})


def _recipe(setting: Setting, contender: Contender, walk: str, stack: ExitStack) -> _Member:
    member = _member(contender, walk, is_default=False)
    try:
        if setting.pytorch_problem:
            raise GuestFailedError(setting.pytorch_problem)
        opened = (setting.bundle.path, walk, contender.device, setting.states)
        member.guest = stack.enter_context(Guest.started_twice(_open_recipe, *opened))
        member.row["startup_seconds"] = round(member.guest.start_seconds, 3)
    except GuestFailedError as error:
        member.row["problem"] = str(error)
        log.info(f"{member.row['recipe']}: left out: {error}")
    return member


def _open_recipe(bundle: Path, walk: str, device: str, states: Path) -> object:
    from multisa.benchmarks.suite.peers import PeersLabelling

    return PeersLabelling(bundle, walk, device, states)


class PseudoLabeler:
    """The steps of the measurement; in each of them the ways take turns."""

    def __init__(self, setting: Setting, members: list[_Member]) -> None:
        self._setting, self._members = setting, members
        self._photographs = spread(setting.train, setting.effort.labelled)
        self._turns = min(setting.effort.turns, len(self._photographs))

    def measure(self) -> None:
        """Fill the rows. One that fails on the way has its reason as "problem", and takes no further turn."""
        many = [member for member in self._members if member.walk != "dense"]
        one = [member for member in self._members if member.walk == "dense"]
        with Progress((self._turns + 1) * len(many) + 2 * len(one), "labelling", "step") as bar:
            self._all([*many, *one], bar, self._warm_up)
            for turn in range(self._turns):
                part = self._photographs[turn :: self._turns]
                self._all(many, bar, partial(self._label, part, turn))
            self._all(one, bar, self._against_dense)
        self._summarise(many)

    def _all(self, members: Sequence[_Member], bar: Progress, step: Callable[[_Member], object]) -> None:
        for member in members:
            if member.row["problem"] is None:
                settle()
                try:
                    step(member)
                except GuestFailedError as error:
                    member.row["problem"] = str(error)
                    log.info(
                        f"{member.row['recipe']} on {member.contender.title}: left out from here on: {error}"
                    )
            bar.advance()

    def _warm_up(self, member: _Member) -> None:
        small = _reduced(self._photographs[0], self._setting, WARM_UP_SIDE)
        self._rate(member, [small], self._masks_of(member) / "warm-up")

    def _label(self, part: Sequence[Photograph], turn: int, member: _Member) -> None:
        rate, stages = self._rate(member, part, self._masks_of(member) / str(turn))
        member.rates.append(rate)
        for name, seconds in stages.items():
            member.stages[name] = member.stages.get(name, 0.0) + seconds

    def _rate(
        self, member: _Member, photographs: Sequence[Photograph], out: Path
    ) -> tuple[float, dict[str, float]]:
        """Images a second from file to file, and seconds of work in each stage."""
        if member.guest is not None:
            stages: dict[str, float] = member.guest.call("label", photographs, out / "masks")
            member.row["peak_mib"] = {"host": member.guest.peak_mib, "device": None}
            return len(photographs) / sum(stages.values()), stages
        labels = self._setting.scratch / "labels.csv"
        _write_labels(labels, photographs)
        given = ("--labels", str(labels))
        record = run_on_photographs("label", self._setting, member.contender, photographs, out, *given)
        known = member.row.get("peak_mib", {}).get("host") or 0
        member.row["peak_mib"] = {"host": max(known, record["peak_mib"] or 0) or None, "device": None}
        return record["images_per_second"], record["stage_seconds"]

    def _masks_of(self, member: _Member) -> Path:
        return self._setting.scratch / "labelled" / member.folder

    def _against_dense(self, member: _Member) -> None:
        """The dense recipe on one photograph, as large as can be waited for, and ours on the same."""
        photograph = _reduced(self._photographs[0], self._setting, self._setting.effort.dense_side)
        ours = self._ours()
        # A run of one photograph would be all start: of many of the same, what one takes.
        many = [replace(photograph, id=f"{photograph.id}-{number}") for number in range(OF_ONE)]
        rates, faster, stages = [], [], dict[str, float]()
        for _ in range(DENSE_REPEATS):
            rate, stages = self._rate(member, [photograph], self._masks_of(member))
            rates.append(rate)
            if ours is not None:
                faster.append(self._rate(ours, many, self._masks_of(member) / "ours")[0])
        rate = statistics.median(rates)
        member.row |= {
            "images_per_second": round(rate, 5),
            "end_to_end": {
                "by": "loop",
                "photographs": 1,
                "images_per_second": [round(rate, 5) for rate in rates],
            },
            "default_times_as_fast": ratio_of_turns(faster, rates) if faster else None,
            "photographs": 1,
            "mean_pixels": _pixels([photograph]),
            "stages_ms": {name: round(1000 * seconds, 1) for name, seconds in stages.items()},
        }

    def _summarise(self, members: Sequence[_Member]) -> None:
        ran = [member for member in members if member.row["problem"] is None]
        ours = self._ours()
        recipes = [member for member in ran if member.walk]
        device = ours.contender.device if ours else ""
        alike = [member for member in recipes if member.contender.device == device]
        baseline = next(iter([*alike, *recipes]), ours)
        images = [(read_working(p.image, self._long_side), p) for p in self._photographs]
        shapes = [((image.shape[1], image.shape[2]), len(p.classes)) for image, p in images]
        floor = labelling_floor(self._setting, shapes)
        for member in ran:
            count = len(self._photographs)
            member.row |= {
                "baseline": member is baseline,
                "images_per_second": round(statistics.median(member.rates), 3),
                "end_to_end": {
                    "by": "loop" if member.walk else OURS,
                    "photographs": count,
                    "turns": self._turns,
                    "images_per_second": [round(rate, 3) for rate in member.rates],
                },
                "times_baseline": ratio_of_turns(member.rates, baseline.rates) if baseline else None,
                "default_times_as_fast": ratio_of_turns(ours.rates, member.rates) if ours else None,
                "photographs": count,
                "mean_pixels": _pixels(self._photographs),
                "stages_ms": {k: round(1000 * s / count, 2) for k, s in member.stages.items()},
                "limit": floor.limit(member.contender, 1 / statistics.median(member.rates)),
                **self._compare_masks(member, ours),
            }

    @property
    def _long_side(self) -> int:
        return self._setting.bundle.manifest.parameters.long_side

    def _ours(self) -> _Member | None:
        """The engine that "auto" takes, else the first of ours that ran."""
        ran = [member for member in self._members if not member.walk and member.row["problem"] is None]
        return next((member for member in ran if member.row["default"]), ran[0] if ran else None)

    def _compare_masks(self, member: _Member, ours: _Member | None) -> Row:
        """mIoU in percent, and the share of pixels at the photographs' size that are as `ours` has them."""
        n_classes = len(self._setting.bundle.manifest.classes)
        confusion, same, pixels = np.zeros((n_classes, n_classes), np.int64), 0, 0
        for turn in range(self._turns):
            for photograph in self._photographs[turn :: self._turns]:
                name = Path(str(turn), "masks", f"{photograph.id}.png")
                mask = read_mask(self._masks_of(member) / name)
                confusion += count_confusion(mask, photograph.mask, n_classes)
                if ours is not None:
                    same += int((mask == read_mask(self._masks_of(ours) / name)).sum())
                    pixels += mask.size
        return {
            "miou": round(100 * mean_iou(confusion), 3),
            "label_agreement": round(same / pixels, 6) if pixels else None,
        }


def _pixels(photographs: Sequence[Photograph]) -> int:
    images = [read_image(photograph.image).rgb for photograph in photographs]
    return round(float(np.mean([rgb.shape[0] * rgb.shape[1] for rgb in images])))


def _reduced(photograph: Photograph, setting: Setting, long_side: int) -> Photograph:
    rgb = read_image(photograph.image).rgb
    size = working_size(rgb.shape[0], rgb.shape[1], long_side)
    buffer = io.BytesIO()
    Image.fromarray(resize_image(rgb, size)).save(buffer, "PNG")
    path = setting.scratch / f"reduced-{long_side}-{photograph.id}.png"
    write_bytes_atomically(path, buffer.getvalue())
    return Photograph(photograph.id, path, photograph.mask, photograph.classes)


def _write_labels(path: Path, photographs: Sequence[Photograph]) -> None:
    text = io.StringIO()
    rows = csv.writer(text)
    rows.writerow(("image", "labels"))
    rows.writerows((f"{p.id}{p.image.suffix}", ";".join(p.classes)) for p in photographs)
    write_bytes_atomically(path, text.getvalue().encode())


if __name__ == "__main__":
    subject_main("labelling", __doc__, "label", measure)
