"""Tables 1 to 3: how many self-attentions, the stages, the IoU of each class; ours beside the paper's."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from multisa.runtime.errors import DatasetError, UsageError
from multisa.training.checks import check_run
from multisa.training.config import TrainConfig
from multisa.training.data import DataSet
from multisa.training.labelling import AS_CONFIGURED, CLASS_GAINS, label_photographs
from multisa.training.pipeline import Row
from multisa.training.reproduce import paper
from multisa.training.reproduce.report import Table, TableRow, protocol, write_table
from multisa.training.reproduce.whole import whole_run
from multisa.training.stages import BASELINE, CAM, cam_stages, measured_maps
from multisa.training.workspace import Workspace

OWN_ROWS = {
    CLASS_GAINS: "A gain for each class is a step of ours that the paper has not.",
    AS_CONFIGURED: "The last row is of the masks that the segmenter learns from.",
}


@dataclass(frozen=True)
class Made:
    """A table, and the digests of what it was made from."""

    table: Table
    digests: Mapping[str, str]


def reproduce_table(name: str, config: TrainConfig, dataset: DataSet, root: Path) -> Table:
    """Run what `name` ("table1" to "table3") needs and is not made already, write it below `root`/reproduce.

    Raises, before any training, DatasetError without the masks that it measures on, UsageError for a
    configuration without self-attention; else as `check_run`.
    """
    _check_truth(name, dataset)
    if not config.cam.taps:
        raise UsageError("cam.taps: got none, expected at least one level with self-attention")
    check_run(config, dataset)
    made = TABLES[name](config, dataset, root)
    write_table(made.table, config, dataset, made.digests, root)
    return made.table


def attention_counts(taps: tuple[int, ...]) -> list[tuple[int, ...]]:
    """The taps of Table 1's rows: none, the deepest, the two deepest, and so on to all of them."""
    return [taps[len(taps) - k :] for k in range(len(taps) + 1)]


def per_class_rows(names: tuple[str, ...], val: Row) -> list[TableRow]:
    """Table 3: a row for each class of ours, matched to the paper's by name; then the means.

    The paper's mean over our classes is worked out of its row; its own mIoU, over all 21, stands below.
    """
    methods = list(paper.TABLE3)
    rows = [
        TableRow(name, ours, *_beside([paper.table3_figure(method, name) for method in methods]))
        for name, ours in zip(names, val.iou, strict=True)
    ]
    both = [row for row in rows if row.ours is not None and row.paper is not None]
    printed = _beside([paper.TABLE3_MIOU[method] for method in methods])
    if len(both) == len(rows) == paper.CLASSES:
        return [*rows, TableRow("mIoU", val.miou, *printed)]
    if both:
        columns = zip(*((row.paper, *row.rivals) for row in both), strict=True)
        means = _beside([_mean(column) for column in columns])
        ours = val.miou if len(both) == len(rows) else _mean([row.ours for row in both])
        rows.append(TableRow(f"mean of {len(both)} classes of both", ours, *means))
    own = TableRow(f"mIoU (ours {len(names)}, paper {paper.CLASSES})", val.miou, *printed, comparable=False)
    return [*rows, own]


def _table1(config: TrainConfig, dataset: DataSet, root: Path) -> Made:
    space, weak, truth = Workspace(root), dataset.weak_digest(), dataset.masks_digest(dataset.train)
    rows = []
    for k, taps in enumerate(attention_counts(config.cam.taps)):
        # With all taps it is the run's own network; the others are only measured.
        stage = CAM if taps == config.cam.taps else BASELINE
        cam = replace(config.cam, taps=taps)
        _, maps = cam_stages(space, cam, config, dataset, weak, stage)
        best = measured_maps(space, maps, config, dataset, truth).results["best"]
        rows.append(
            TableRow(
                _attentions(taps),
                best["miou"],
                paper.TABLE1[k] if k < len(paper.TABLE1) else None,
                background=best["background"],
                iou=tuple(best["iou"]),
            )
        )
    notes = (
        *protocol(config, dataset, "train", paper.TABLE1_BACKBONE),
        "mIoU of the class activation maps on train, each row at the one background score with the highest.",
        f"One training for each row, with seed {config.seed}: differences within the scatter over seeds, "
        "which was not measured, mean nothing.",
    )
    title = "Table 1: number of self-attentions (k)"
    table = Table("table1", title, "self-attentions", tuple(rows), notes)
    return Made(table, {"weak": weak, "train": truth, **_stage_digests(space)})


def _table2(config: TrainConfig, dataset: DataSet, root: Path) -> Made:
    space = Workspace(root)
    labelled = label_photographs(space, replace(config, cam_baseline=True), dataset, paper_protocol=True)
    rows = tuple(
        TableRow(
            f"{measured.name}{' (ours)' if measured.name in OWN_ROWS else ''}",
            measured.scores["miou"],
            paper.TABLE2.get(measured.name),
            background=measured.background,
            iou=tuple(measured.scores["iou"]),
        )
        for measured in labelled.measured
    )
    notes = (
        *protocol(config, dataset, "train", paper.TABLE2_BACKBONE),
        "mIoU on train. Maps are measured at the one background score with the highest; below the dense CRF "
        "the score is the one with the best masks, on a sample of train where it is large.",
        *(
            note
            for name, note in OWN_ROWS.items()
            if name in {measured.name for measured in labelled.measured}
        ),
    )
    table = Table("table2", "Table 2: the stages", "stage", rows, notes)
    truth = dataset.masks_digest(dataset.train)
    return Made(table, {"weak": labelled.data_digest, "train": truth, **_stage_digests(space)})


def _table3(config: TrainConfig, dataset: DataSet, root: Path) -> Made:
    run = whole_run(config, dataset, root)
    val = next(row for row in run.rows if row.measured_on == "val")
    notes = [
        *protocol(config, dataset, "val", paper.TABLE3_BACKBONE),
        "IoU of each class on val, of the segmenter that learnt from the pseudo-masks; the last epoch's.",
    ]
    if len(run.classes) < paper.CLASSES:
        notes.append("Among fewer classes there are fewer that one can be taken for.")
    if run.label.class_gain:
        notes.append("The pseudo-masks have a gain for each class, a step of ours that the paper has not.")
    rivals = tuple(method for method in paper.TABLE3 if method != paper.MULTI_SA)
    rows = tuple(per_class_rows(run.classes, val))
    table = Table("table3", "Table 3: IoU of each class", "class", rows, tuple(notes), rivals)
    digests = {stage.name: stage.digest for stage in run.stages}
    return Made(table, {"weak": run.data_digest, "val": dataset.masks_digest(dataset.val), **digests})


TABLES: Mapping[str, Callable[[TrainConfig, DataSet, Path], Made]] = {
    "table1": _table1,
    "table2": _table2,
    "table3": _table3,
}


def _check_truth(name: str, dataset: DataSet) -> None:
    measured = "val" if name == "table3" else "train"
    if not (dataset.val if measured == "val" else dataset.train):
        raise DatasetError(
            f"{dataset.root}: no photograph of the {measured} list has a mask, which {name} needs; "
            f"expected a VOC layout with ImageSets/Segmentation/{measured}.txt and SegmentationClass/ID.png "
            "(figure4 to figure6 need no masks)"
        )


def _attentions(taps: tuple[int, ...]) -> str:
    if not taps:
        return "CAM without SA"
    levels = ", ".join(map(str, taps))
    return f"1 SA (level {levels})" if len(taps) == 1 else f"{len(taps)} SAs (levels {levels})"


def _beside(figures: list[float | None]) -> tuple[float | None, tuple[float | None, ...]]:
    """The paper's own figure, which comes first in its table here, and those of its rivals."""
    return figures[0], tuple(figures[1:])


def _mean(values: "list[float | None] | tuple[float | None, ...]") -> float:
    known = [value for value in values if value is not None]
    return round(sum(known) / len(known), 2)


def _stage_digests(space: Workspace) -> dict[str, str]:
    """By the stages' folders: several may have one name."""
    return {stage.folder.name: stage.digest for stage in space.stages}
