"""Tables 1 to 3: number of self-attentions, stages, IoU of each class; ours beside the paper's."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from multisa.runtime.errors import DatasetError, UsageError
from multisa.training.checks import check_run
from multisa.training.config import TrainConfig
from multisa.training.data import Dataset
from multisa.training.pipeline import Row
from multisa.training.reproduce import paper
from multisa.training.reproduce.report import Table, TableRow, full_run, protocol, write_table
from multisa.training.stage_cache import StageCache
from multisa.training.stages import AS_CONFIGURED, BASELINE, CAM, CLASS_GAINS, RunStages, make_pseudo_labels

# Rows that the paper does not have, each with its note.
OWN_ROWS = {
    CLASS_GAINS: "Gains of classes are our own step; the paper does not have them.",
    AS_CONFIGURED: "The last row shows the masks that the segmenter trains on.",
}


def reproduce_table(name: str, config: TrainConfig, dataset: Dataset, root: Path) -> Table:
    """Run the stages that `name` ("table1" to "table3") needs, and write the table below `root`/reproduce.

    Raises, before any training, DatasetError when the data set lacks the masks to measure on, UsageError for
    a configuration without self-attention, and whatever `check_run` raises.
    """
    _check_masks(name, dataset)
    if not config.cam.taps:
        raise UsageError("cam.taps: got none, expected at least one level with self-attention")
    check_run(config, dataset)
    table = TABLES[name](config, dataset, root)
    write_table(table, config, dataset, root)
    return table


def attention_counts(taps: tuple[int, ...]) -> list[tuple[int, ...]]:
    """The taps of Table 1's rows: none, the deepest, the two deepest, and so on to all of them."""
    return [taps[len(taps) - k :] for k in range(len(taps) + 1)]


def per_class_rows(names: tuple[str, ...], val: Row) -> list[TableRow]:
    """Table 3: a row for each of our classes, matched to the paper's by name, then the means.

    The paper's mean over our classes is computed from its row; its own mIoU, over all 21 classes, comes last.
    """
    methods = list(paper.TABLE3)
    rows = [
        TableRow(name, ours, *_paper_figures([paper.table3_figure(method, name) for method in methods]))
        for name, ours in zip(names, val.iou, strict=True)
    ]
    both = [row for row in rows if row.ours is not None and row.paper is not None]
    printed = _paper_figures([paper.TABLE3_MIOU[method] for method in methods])
    if len(both) == len(rows) == paper.CLASSES:
        return [*rows, TableRow("mIoU", val.miou, *printed)]
    if both:
        columns = zip(*((row.paper, *row.other_methods) for row in both), strict=True)
        means = _paper_figures([_mean(column) for column in columns])
        ours = val.miou if len(both) == len(rows) else _mean([row.ours for row in both])
        rows.append(TableRow(f"mean of {len(both)} shared classes", ours, *means))
    own = TableRow(f"mIoU (ours {len(names)}, paper {paper.CLASSES})", val.miou, *printed, comparable=False)
    return [*rows, own]


def _table1(config: TrainConfig, dataset: Dataset, root: Path) -> Table:
    stages = RunStages(StageCache(root), config, dataset)
    rows = []
    for k, taps in enumerate(attention_counts(config.cam.taps)):
        # With all taps it is the run's own network; the others are only measured.
        name = CAM if taps == config.cam.taps else BASELINE
        _, maps = stages.cam_maps(replace(config.cam, taps=taps), name)
        best = stages.measured_maps(maps).results["best"]
        printed = paper.TABLE1[k] if k < len(paper.TABLE1) else None
        rows.append(_measured_row(_attentions(taps), best, printed, best["background"]))
    notes = (
        *protocol(config, dataset, "train", paper.TABLE1_BACKBONE),
        "mIoU of the class activation maps on train, each row at the background score with the highest mIoU.",
        f"One training per row, with seed {config.seed}: differences within the variation between seeds, "
        "which was not measured, mean nothing.",
    )
    title = "Table 1: number of self-attentions (k)"
    return Table("table1", title, "self-attentions", tuple(rows), notes, _digests(stages))


def _table2(config: TrainConfig, dataset: Dataset, root: Path) -> Table:
    stages = RunStages(StageCache(root), replace(config, cam_baseline=True), dataset)
    labels = make_pseudo_labels(stages, paper_protocol=True)
    rows = []
    for measured in labels.measured:
        name = f"{measured.name} (ours)" if measured.name in OWN_ROWS else measured.name
        printed = paper.TABLE2.get(measured.name)
        rows.append(_measured_row(name, measured.scores, printed, measured.background))
    notes = (
        *protocol(config, dataset, "train", paper.TABLE2_BACKBONE),
        "mIoU on train. Maps are measured at the background score with the highest mIoU. From the dense CRF "
        "on, the score is the one whose masks have the highest, on a sample of train if train is large.",
        *(note for name, note in OWN_ROWS.items() if name in {measured.name for measured in labels.measured}),
    )
    return Table("table2", "Table 2: the stages", "stage", tuple(rows), notes, _digests(stages))


def _table3(config: TrainConfig, dataset: Dataset, root: Path) -> Table:
    run = full_run(config, dataset, root)
    val = next(row for row in run.rows if row.measured_on == "val")
    notes = [
        *protocol(config, dataset, "val", paper.TABLE3_BACKBONE),
        "IoU of each class on val, of the segmenter trained on the pseudo-masks, after its last epoch.",
    ]
    if len(run.classes) < paper.CLASSES:
        notes.append("With fewer classes there are fewer to confuse one with.")
    if run.label.class_gain:
        notes.append("The pseudo-masks use gains of classes, our own step; the paper does not have them.")
    others = tuple(method for method in paper.TABLE3 if method != paper.MULTI_SA)
    rows = tuple(per_class_rows(run.classes, val))
    digests = {"train_images": run.data_digest, "val": dataset.masks_digest(dataset.val)}
    digests |= {stage.name: stage.digest for stage in run.stages}
    return Table("table3", "Table 3: IoU of each class", "class", rows, tuple(notes), digests, others)


def _measured_row(name: str, scores: Mapping[str, Any], printed: float | None, background: float) -> TableRow:
    return TableRow(name, scores["miou"], printed, background=background, iou=tuple(scores["iou"]))


TABLES: Mapping[str, Callable[[TrainConfig, Dataset, Path], Table]] = {
    "table1": _table1,
    "table2": _table2,
    "table3": _table3,
}


def _check_masks(name: str, dataset: Dataset) -> None:
    measured = "val" if name == "table3" else "train"
    if not (dataset.val if measured == "val" else dataset.train):
        raise DatasetError(
            f"{dataset.root}: no image of the {measured} list has a mask, but {name} needs masks; expected "
            f"a VOC layout with ImageSets/Segmentation/{measured}.txt and SegmentationClass/ID.png "
            "(figure4 to figure6 need no masks)"
        )


def _attentions(taps: tuple[int, ...]) -> str:
    if not taps:
        return "CAM without SA"
    levels = ", ".join(map(str, taps))
    return f"1 SA (level {levels})" if len(taps) == 1 else f"{len(taps)} SAs (levels {levels})"


def _paper_figures(figures: list[float | None]) -> tuple[float | None, tuple[float | None, ...]]:
    """The figure of the paper's method, the first, and those of the other methods."""
    return figures[0], tuple(figures[1:])


def _mean(values: Sequence[float | None]) -> float:
    known = [value for value in values if value is not None]
    return round(sum(known) / len(known), 2)


def _digests(stages: RunStages) -> dict[str, str]:
    """Digests of the data, and of the stages by folder: several stages may share a name."""
    data = {"train_images": stages.images_digest, "train": stages.masks_digest}
    return data | {stage.folder.name: stage.digest for stage in stages.cache.stages}
