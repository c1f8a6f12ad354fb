"""Follow a training: a head line, the time left, `metrics.csv`, `train.html`, trackers, warnings.

Nothing here changes what is trained. What fails here is logged once and does not stop the training.
"""

import csv
import io
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, Self

from multisa.runtime.files import read_json_object, write_json_atomically
from multisa.runtime.imaging.decode import read_mask, write_mask
from multisa.runtime.predict.postprocess import UInt8
from multisa.runtime.progress import format_examples, log, pluralize
from multisa.training.config import TrainConfig
from multisa.training.data import Dataset, Item, spread
from multisa.training.data_check import rough_duration
from multisa.training.loop import Epoch
from multisa.training.stage_cache import Results, Stage
from multisa.training.trackers import Tracker, open_tracker
from multisa.training.train_page import PAGE, ROUND_STAGE, Metric, TrainPage, sample_panels, write_train_page

METRICS = "metrics.csv"  # in the run folder, like the page
SAMPLES = "train-samples"  # folder of the newest segmentations of the images on the page
NUM_SAMPLES = 4  # images on the page
WORTH_A_LINE = 1.0  # seconds of a stage, after which the time left is logged
# Share of the estimate that must be measured before the rest is scaled by how fast that went.
MEASURED_SHARE = 0.05
CHECK_LABELS = "check its image-level labels (multisa data check), train for more epochs, or give it more images"


@dataclass(frozen=True)
class Plan:
    """The stages of a run, and what is known of them before it starts."""

    machine: str  # device, in words
    seconds: Mapping[str, float]  # estimate for every stage, in their order; all 0 if there is none
    done: frozenset[str] = frozenset()  # finished by an earlier run with the same settings and data
    identity: str = ""  # digest of settings and data


class MetricsFile:
    """`metrics.csv`: one row for each value. Rows are appended, and never twice for one stage, epoch and metric."""

    def __init__(self, path: Path) -> None:
        self.path = path
        whole = path.read_bytes() if path.exists() else b""
        if not whole.endswith(b"\n") and whole:  # a machine that stops can leave half a row
            whole = whole[: whole.rfind(b"\n") + 1]
            os.truncate(path, len(whole))
        self.rows = [Metric.of_row(row) for row in csv.DictReader(io.StringIO(whole.decode(), newline=""))]
        self._known = {row[1:5] for row in self.rows}

    def add(self, stage: str, values: Mapping[str, float], epoch: int | None, step: int | None) -> list[Metric]:
        """Append the values that are not there yet and return them."""
        now = datetime.now(UTC).isoformat(timespec="seconds")
        rows = [Metric(now, stage, epoch, step, name, float(f"{value:.6g}")) for name, value in values.items()]
        rows = [row for row in rows if row[1:5] not in self._known]
        text = io.StringIO(newline="")
        header = [] if self.rows else [Metric._fields]
        csv.writer(text, lineterminator="\n").writerows([*header, *rows])
        if rows:
            with self.path.open("ab", buffering=0) as file:  # one write: a killed process leaves no half row
                file.write(text.getvalue().encode())
        self.rows += rows
        self._known |= {row[1:5] for row in rows}
        return rows


class RunWatch:
    """Watches one run; a context manager, which marks the page as finished or stopped at its end."""

    def __init__(self, config: TrainConfig, dataset: Dataset, output: Path, plan: Plan) -> None:
        self._config, self._dataset, self._output, self._plan = config, dataset, output, plan
        self._names = dataset.class_names
        self._samples = spread([item for item in dataset.train_images if item.classes], NUM_SAMPLES)
        self._trackers: dict[str, Tracker] = {}
        self._metrics: MetricsFile | None = None
        self._failed: set[str] = set()
        self._warnings: dict[str, None] = {}  # in their order, each once
        self._done: dict[str, Stage] = {}
        self._done_before = set(plan.done)
        self._name, self._folder = "", output  # of the stage that runs
        self._started = 0.0  # monotonic time of its start
        self._epoch: Epoch | None = None  # its newest
        self._at_zero: tuple[str, ...] = ()  # classes whose IoU was 0 when val was measured last
        self._state, self._reason = "running", ""

    def __enter__(self) -> Self:
        log.info(self.head_line())
        self._attempt(METRICS, self._open_metrics)
        for name in self._config.trackers:
            self._attempt(f"tracker {name}", partial(self._open_tracker, name))
        self._attempt(PAGE, self._write_page)
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        self._state = "finished" if error is None else "stopped"
        self._reason = "interrupted" if isinstance(error, KeyboardInterrupt) else str(error or "")
        self._attempt(PAGE, self._write_page)
        for name, (_, close) in self._trackers.items():
            self._attempt(f"tracker {name}", partial(close, error is None))

    def head_line(self) -> str:
        """Settings, machine, data, classes, stages and time left, in one line."""
        data, names = self._dataset, self._names[1:]
        return (
            f"{self._config.name} on {self._plan.machine}, {self._config.execution.precision}: "
            f"{pluralize(len(data.train_images), 'image')} to train on, "
            f"{len(data.val)} in val, foreground classes: {len(names)} ({format_examples(names)}); {self._left()}"
        )

    def started(self, name: str, folder: Path) -> None:
        """Note the stage that runs now."""
        self._name, self._folder, self._started, self._epoch, self._at_zero = name, folder, time.monotonic(), None, ()
        self._done_before.discard(name)  # one of its files was missing or changed
        self._attempt(PAGE, self._write_page)

    def finished(self, stage: Stage, *, skipped: bool) -> None:
        """Note a finished stage, its seconds and its scores."""
        self._name, self._done[stage.name] = "", stage
        scores = stage.results.get("best", stage.results)
        values = {"seconds": stage.seconds} | ({"miou": scores["miou"], **self._iou(scores)} if "iou" in scores else {})
        self._attempt(METRICS, partial(self._log, stage.folder.name, values))
        if zero := self._classes_at_zero(scores):
            self._warn(f"{stage.name}: the IoU of {format_examples(zero)} is 0")
        if stage.name == "pseudo-masks" or ROUND_STAGE.fullmatch(stage.name):
            self._attempt("check of the pseudo-masks", partial(self._find_empty_classes, stage))
        if not skipped:
            if stage.seconds >= WORTH_A_LINE:
                log.info(self._left())
            self._attempt(PAGE, self._write_page)

    def epoch(
        self, epoch: Epoch, segment: Callable[[Item], UInt8] | None = None, measure: Callable[[], Results] | None = None
    ) -> None:
        """Note a finished epoch of the stage that runs.

        segment: class ids of an image as the network sees it now; measure: scores of the network on the val list,
        called as `val_every` says. Both only for segmenters.
        """
        self._epoch = epoch
        values = {"loss": epoch.loss, "learning_rate": epoch.learning_rate, "seconds": epoch.seconds}
        self._attempt(METRICS, partial(self._log, self._folder.name, values, epoch))
        every = self._config.val_every
        if measure is not None and every and epoch.number % every == 0 and self._dataset.val:
            self._attempt("val while training", partial(self._measure, epoch, measure))
        if segment is not None:
            self._attempt("segmentations of the page", partial(self._segment, epoch, segment))
        self._attempt(PAGE, self._write_page)

    def seconds_left(self) -> float | None:
        """Estimate of all that is left, scaled by how fast the finished stages were; None without an estimate."""
        planned = self._plan.seconds
        if not any(planned.values()):
            return None
        known = self._done.keys() & planned.keys()
        estimated, taken = sum(planned[name] for name in known), sum(self._done[name].seconds for name in known)
        scale = taken / estimated if estimated > MEASURED_SHARE * sum(planned.values()) else 1.0
        left = scale * sum(planned[name] for name in planned.keys() - self._finished_names() - {self._name})
        if self._name and self._epoch:
            return left + self._epoch.seconds * (self._epoch.of - self._epoch.number)
        now = scale * planned.get(self._name, 0.0) - (time.monotonic() - self._started)
        return left + max(now, 0.0)

    def _left(self) -> str:
        left, seconds = len(self._plan.seconds.keys() - self._finished_names()), self.seconds_left()
        time_left = "" if seconds is None else f", {rough_duration(seconds)} in all"
        return f"{left} of {pluralize(len(self._plan.seconds), 'stage')} left{time_left}"

    def _finished_names(self) -> set[str]:
        return self._done.keys() | self._done_before

    def _measure(self, epoch: Epoch, measure: Callable[[], Results]) -> None:
        scores = measure()
        log.info(f"{self._name}: epoch {epoch.number}/{epoch.of}, {scores['miou']:.2f} mIoU on val")
        values = {"miou": scores["miou"], **self._iou(scores)}
        self._log(self._folder.name, {f"val_{name}": value for name, value in values.items()}, epoch)
        zero = self._classes_at_zero(scores)
        if stay := [name for name in zero if name in self._at_zero]:
            self._warn(f"{self._name}: the IoU of {format_examples(stay)} on val stays at 0")
        self._at_zero = zero

    def _segment(self, epoch: Epoch, segment: Callable[[Item], UInt8]) -> None:
        folder = self._output / SAMPLES
        for item in self._samples:
            write_mask(folder / f"{item.id}.png", segment(item), self._dataset.mask_palette)
        about = {"stage": self._folder.name, "caption": f"{self._name}, epoch {epoch.number}"}
        write_json_atomically(folder / "about.json", about)

    def _find_empty_classes(self, masks: Stage) -> None:
        """Warn of classes that no mask has, although image-level labels do. Most need one image to be found."""
        items = self._dataset.train_images
        missing = {class_id for item in items for class_id in item.classes}
        for item in items:
            if missing.intersection(item.classes):
                missing -= set(read_mask(masks.folder / f"{item.id}.png").ravel().tolist())
        for class_id in sorted(missing):
            images = pluralize(sum(class_id in item.classes for item in items), "image")
            self._warn(f"{masks.name}: no pixel of {self._names[class_id]} in the {images} that show it")

    def _iou(self, scores: Results) -> dict[str, float]:
        named = zip(self._names, scores["iou"], strict=True)
        return {f"iou/{name}": value for name, value in named if value is not None}

    def _classes_at_zero(self, scores: Results) -> tuple[str, ...]:
        named = zip(self._names[1:], scores.get("iou", ())[1:], strict=False)
        return tuple(name for name, value in named if value == 0)

    def _warn(self, text: str) -> None:
        if text not in self._warnings:
            self._warnings[text] = None
            log.warning(f"{text}: {CHECK_LABELS}")

    def _open_metrics(self) -> None:
        self._metrics = MetricsFile(self._output / METRICS)

    def _open_tracker(self, name: str) -> None:
        self._trackers[name] = open_tracker(name, self._config, self._output, self._plan.identity)

    def _log(self, stage: str, values: Mapping[str, float], epoch: Epoch | None = None) -> None:
        if self._metrics is None:
            return
        number, step = (epoch.number, epoch.step) if epoch else (None, None)
        rows = self._metrics.add(stage, values, number, step)
        for name, (send, _) in [*self._trackers.items()]:
            for row in rows:
                work = partial(send, stage.rpartition("-")[0], row.metric, row.value, row.step or 0)
                if not self._attempt(f"tracker {name}", work):
                    del self._trackers[name]  # one that waits for a server would do so at every epoch
                    break

    def _attempt(self, what: str, work: Callable[[], Any]) -> bool:
        """Call `work`; an error is logged, once for each `what`, and never raised."""
        try:
            work()
        except Exception as error:  # noqa: BLE001  # whatever a tracker or a full disk raises: the training goes on
            if what not in self._failed:
                self._failed.add(what)
                log.warning(f"{what}: failed ({type(error).__name__}: {error}); the training goes on without it")
            return False
        return True

    def _write_page(self) -> None:
        folders = {name: stage.folder for name, stage in self._done.items()}
        names = [folder.name for folder in (*folders.values(), self._folder)]
        about = read_json_object(self._output / SAMPLES / "about.json")
        segmented = (self._output / SAMPLES, str(about["caption"])) if about.get("stage") in names else None
        page = TrainPage(
            name=self._config.name,
            state=self._state,
            reason=self._reason,
            seconds_left=self.seconds_left() if self._state == "running" else None,
            classes=self._names,
            facts={"machine": self._plan.machine, "images": f"{len(self._dataset.train_images):,}"},
            planned=tuple(self._plan.seconds),
            done=tuple(self._done),
            running=self._name,
            metrics=tuple(row for row in (self._metrics.rows if self._metrics else ()) if row.stage in names),
            warnings=tuple(self._warnings),
            samples=tuple((item, sample_panels(item, self._config, folders, segmented)) for item in self._samples),
        )
        write_train_page(self._output / PAGE, page)
