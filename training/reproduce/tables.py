"""Tables 1 to 3: number of self-attentions, stages, IoU of each class; ours beside the paper's.

Also what tables and figures share: the full run, and the record of what they were made from.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from multisa.runtime.errors import DatasetError, UsageError
from multisa.runtime.files import write_bytes_atomically, write_json_atomically
from multisa.runtime.records import record_to_dict
from multisa.training.config import TrainConfig
from multisa.training.data import Dataset
from multisa.training.models import with_taps
from multisa.training.pipeline import check_run, run_stages
from multisa.training.reproduce import paper
from multisa.training.run_record import RUN_RECORD, SEGMENTER, SUPERVISED, Row, RunRecord, count_images, load_run
from multisa.training.stage_cache import StageCache
from multisa.training.stages import BASELINE, CAM, Measurement, RunStages, make_pseudo_labels, name_of_masks

FOLDER = "reproduce"  # below the run's folder


@dataclass(frozen=True)
class TableRow:
    """One line, in percent; None where there is no such figure."""

    name: str
    ours: float | None
    paper: float | None
    other_methods: tuple[float | None, ...] = ()  # in the paper's table, as `Table.other_methods`
    supervised: float | None = None  # ours, trained on the masks of the train list
    background: float | None = None  # score of the background class that ours is measured with
    iou: tuple[float | None, ...] = ()  # of each class of the data set
    comparable: bool = True  # False when ours and the paper's measure different things

    @property
    def difference(self) -> float | None:
        """Ours minus the paper's."""
        if self.ours is None or self.paper is None or not self.comparable:
            return None
        return round(self.ours - self.paper, 2)


@dataclass(frozen=True)
class Table:
    """Our version of a table of the paper."""

    name: str  # "table1"
    title: str
    heading: str  # of the first column
    rows: tuple[TableRow, ...]
    notes: tuple[str, ...]
    digests: Mapping[str, str]  # of the data trained on and measured on, and of the stages, by name
    other_methods: tuple[str, ...] = ()  # names of the methods that the paper compares with


def reproduce_table(name: str, config: TrainConfig, dataset: Dataset, root: Path) -> Table:
    """Run the stages that `name` ("table1" to "table3") needs, and write the table below `root`/reproduce.

    Raises, before any training, DatasetError when the data set lacks the masks to measure on, UsageError for
    a configuration without self-attention, and whatever `check_run` raises.
    """
    measured = "val" if name == "table3" else "train"
    if not (dataset.val if measured == "val" else dataset.train):
        raise DatasetError(
            f"{dataset.root}: no image of the {measured} list has a mask, but {name} needs masks; expected "
            f"a VOC layout with ImageSets/Segmentation/{measured}.txt and SegmentationClass/ID.png "
            "(figure4 to figure6 need no masks)"
        )
    config = replace(config, cam=with_taps(config.cam))
    if not config.cam.taps:
        raise UsageError("cam.taps: got none, expected at least one level with self-attention")
    check_run(config, dataset, root)
    table = TABLES[name](config, dataset, root)
    write_table(table, config, dataset, root)
    return table


def attention_counts(taps: tuple[int, ...]) -> list[tuple[int, ...]]:
    """The taps of Table 1's rows: none, the deepest, the two deepest, and so on to all of them."""
    return [taps[len(taps) - k :] for k in range(len(taps) + 1)]


def per_class_rows(names: tuple[str, ...], val: Row, supervised: Row | None = None) -> list[TableRow]:
    """Table 3: a row for each of our classes, matched to the paper's by name, then the means.

    The paper's mean over our classes is computed from its row; its own mIoU, over all 21 classes, comes last.
    supervised: the segmenter trained on masks, if the run has one.
    """
    methods = list(paper.TABLE3)
    bounds = supervised.iou if supervised else (None,) * len(names)
    rows = [
        TableRow(name, ours, *_paper_figures([paper.table3_figure(method, name) for method in methods]), bound)
        for name, ours, bound in zip(names, val.iou, bounds, strict=True)
    ]
    both = [row for row in rows if row.ours is not None and row.paper is not None]
    printed = _paper_figures([paper.TABLE3_MIOU[method] for method in methods])
    bound = supervised.miou if supervised else None
    if len(both) == len(rows) == paper.CLASSES:
        return [*rows, TableRow("mIoU", val.miou, *printed, bound)]
    if both:
        columns = zip(*((row.paper, *row.other_methods) for row in both), strict=True)
        means = _paper_figures([_mean(column) for column in columns])
        ours = val.miou if len(both) == len(rows) else _mean([row.ours for row in both])
        shared = _mean([row.supervised for row in both]) if supervised else None
        rows.append(TableRow(f"mean of {len(both)} shared classes", ours, *means, shared))
    own = TableRow(f"mIoU (ours {len(names)}, paper {paper.CLASSES})", val.miou, *printed, bound, comparable=False)
    return [*rows, own]


def _table1(config: TrainConfig, dataset: Dataset, root: Path) -> Table:
    stages = RunStages(StageCache(root), config, dataset)
    rows = []
    for k, taps in enumerate(attention_counts(config.cam.taps or ())):
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
    stages = RunStages(StageCache(root), replace(config, paper_rows=True), dataset)
    labels = make_pseudo_labels(stages)
    measured = [*labels.measured, *stages.relabelled(labels)[1]]
    rows = []
    for one in measured:
        printed = paper.TABLE2.get(one.name)
        name = f"{one.name} (ours)" if printed is None else one.name
        rows.append(_measured_row(name, one.scores, printed, one.background))
    notes = (
        *protocol(config, dataset, "train", paper.TABLE2_BACKBONE),
        "mIoU on train. Maps are measured at the background score with the highest mIoU. For the dense CRF, the "
        "score is the one whose masks have the highest, on a sample of train if train is large.",
        *_notes_on_own_rows(config, measured),
    )
    return Table("table2", "Table 2: the stages", "stage", tuple(rows), notes, _digests(stages))


def _notes_on_own_rows(config: TrainConfig, measured: Sequence[Measurement]) -> list[str]:
    """Notes on the rows of Table 2 that the paper does not have."""
    notes = []
    own = name_of_masks(config)
    if own not in paper.TABLE2 and any(one.name == own for one in measured):
        sources = {
            "yen": "the background score and the gains of classes come from Yen's criterion",
            "config": "the background score and the gains of classes are those of the settings",
            "train-masks": "the background score is chosen on masks of train, the gains of classes are those of the "
            "settings",
        }
        notes.append(f'"{own}": {sources[config.background_from]}.')
    if config.relabel.rounds:
        notes.append("Rounds: a segmenter trained on the row before labels the train images again.")
    if notes:
        notes.append("The segmenter trains on the last row.")
    return notes


def _table3(config: TrainConfig, dataset: Dataset, root: Path) -> Table:
    run = full_run(config, dataset, root)
    by_name = {row.stage: row for row in run.rows}
    supervised = by_name.get(SUPERVISED)
    notes = [
        *protocol(config, dataset, "val", paper.TABLE3_BACKBONE),
        "IoU of each class on val, of the segmenter trained on the pseudo-masks, after its last epoch.",
    ]
    if supervised:
        notes.append(
            f"Supervised: the same network and recipe, trained on the masks of {len(dataset.train):,} train images."
        )
    if len(run.classes) < paper.CLASSES:
        notes.append("With fewer classes there are fewer to confuse one with.")
    others = tuple(method for method in paper.TABLE3 if method != paper.MULTI_SA)
    rows = tuple(per_class_rows(run.classes, by_name[SEGMENTER], supervised))
    digests = {"train_images": run.data_digest, "val": dataset.masks_digest(dataset.val)}
    digests |= {stage.name: stage.digest for stage in run.stages}
    return Table("table3", "Table 3: IoU of each class", "class", rows, tuple(notes), digests, others)


def _measured_row(name: str, scores: Mapping[str, Any], printed: float | None, background: float | None) -> TableRow:
    return TableRow(name, scores["miou"], printed, background=background, iou=tuple(scores["iou"]))


TABLES = {"table1": _table1, "table2": _table2, "table3": _table3}


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


def full_run(config: TrainConfig, dataset: Dataset, root: Path) -> RunRecord:
    """Run every stage that is not finished yet, as `multisa train` does, and write the record of the run.

    The record goes to `root/run.json`, or to `root/reproduce/run.json` when the one in `root` is of other
    settings or other data: that one stays, because the exporter reads it. Raises UsageError, before any
    training, when the record in `root` cannot be read.
    """
    existing = load_run(root) if (root / RUN_RECORD).is_file() else None
    run = run_stages(config, dataset, root)
    own = existing is None or (existing.config, existing.data_digest) == (run.config, run.data_digest)
    write_json_atomically((root if own else root / FOLDER) / RUN_RECORD, record_to_dict(run))
    return run


def protocol(config: TrainConfig, dataset: Dataset, measured: str, paper_backbone: str) -> tuple[str, ...]:
    """Notes on how our figures and the paper's were measured, and whether the two can be compared.

    measured: the list, "train" or "val"; paper_backbone: the paper's name for its backbone.
    """
    backbone = config.segmenter.backbone if measured == "val" else config.cam.backbone
    items, paper_items = (dataset.val, paper.VAL) if measured == "val" else (dataset.train, paper.TRAIN)
    names = [paper.paper_class(name) for name in dataset.class_names]
    differing = [
        aspect
        for aspect, alike in (
            ("backbone", backbone.partition(".")[0] == paper.BACKBONES[paper_backbone]),
            ("classes", len(names) == paper.CLASSES and set(names) == set(paper.TABLE3_CLASSES)),
            ("images", (len(dataset.train_images), len(items)) == (paper.TRAINED_ON, paper_items)),
        )
        if not alike
    ]
    epochs = f"{config.cam.schedule.epochs} epochs for a CAM network"
    if measured == "val":
        epochs += f", {config.segmenter.schedule.epochs} for DeepLabV3+"
    notes = [
        f"Ours: {backbone}, {len(names) - 1} classes and background, trained on "
        f"{len(dataset.train_images):,} images with image-level labels, measured on "
        f"{len(items):,} {measured} images, {epochs}.",
        f"Paper: {paper_backbone}, {paper.CLASSES - 1} classes of VOC 2012 and background, trained on "
        f"{paper.TRAINED_ON:,} images, measured on {paper_items:,} {measured} images.",
    ]
    if differing:
        listed = " and ".join(filter(None, (", ".join(differing[:-1]), differing[-1])))
        notes.append(
            f"The paper's figures are context, not a comparison: its {listed} "
            f"{'is' if differing == ['backbone'] else 'are'} different."
        )
    return tuple(notes)


def format_text(table: Table) -> str:
    """The table in columns for a terminal, with its notes below."""
    cells = _cells(table)
    widths = [max(len(row[column]) for row in cells) for column in range(len(cells[0]))]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))])
        for row in cells
    ]
    return "\n".join([table.title, "", *lines, "", *table.notes])


def format_markdown(table: Table) -> str:
    """The table as a Markdown document."""
    header, *rows = [f"| {' | '.join(row)} |" for row in _cells(table)]
    rule = "|---|" + "---:|" * (len(_cells(table)[0]) - 1)
    notes = "\n".join(f"- {note}" for note in table.notes)
    return "\n".join([f"# {table.title}", "", header, rule, *rows, "", notes, ""])


def write_table(table: Table, config: TrainConfig, dataset: Dataset, root: Path) -> None:
    """Write NAME.json and NAME.md below `root`/reproduce."""
    rows = []
    for row in table.rows:
        values: dict[str, Any] = {"name": row.name, "ours": row.ours, "paper": row.paper, "difference": row.difference}
        if row.supervised is not None:
            values["supervised"] = row.supervised
        if row.other_methods:
            values["other_methods"] = dict(zip(table.other_methods, row.other_methods, strict=True))
        if row.background is not None:
            values["background"] = row.background
        if row.iou:
            values["iou"] = dict(zip(dataset.class_names, row.iou, strict=True))
        rows.append(values)
    record = {"what": table.name, "title": table.title, "rows": rows, "notes": table.notes}
    path = root / FOLDER / f"{table.name}.json"
    write_json_atomically(path, {**record, **provenance(config, dataset, table.digests)})
    write_bytes_atomically(path.with_suffix(".md"), format_markdown(table).encode())


def provenance(config: TrainConfig, dataset: Dataset, digests: Mapping[str, str]) -> dict[str, Any]:
    """What a table or a figure was made from, as JSON values."""
    return {
        "classes": dataset.class_names,
        "images": record_to_dict(count_images(dataset)),
        "digests": dict(digests),
        "config": record_to_dict(config),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }


def _cells(table: Table) -> list[list[str]]:
    """Cells as text, the heading first; columns without any value are left out."""
    columns: list[tuple[str, Sequence[float | None], str]] = [
        ("background", [row.background for row in table.rows], ".2f"),
        ("ours", [row.ours for row in table.rows], ".2f"),
        ("supervised", [row.supervised for row in table.rows], ".2f"),
        (f"paper ({paper.MULTI_SA})" if table.other_methods else "paper", [row.paper for row in table.rows], ".2f"),
        ("difference", [row.difference for row in table.rows], "+.2f"),
    ]
    for i, name in enumerate(table.other_methods):
        columns.append((name, [row.other_methods[i] for row in table.rows], ".1f"))
    filled = [column for column in columns if any(value is not None for value in column[1])]
    body = [
        [row.name, *("-" if v[i] is None else format(v[i], style) for _, v, style in filled)]
        for i, row in enumerate(table.rows)
    ]
    return [[table.heading, *(name for name, _, _ in filled)], *body]
