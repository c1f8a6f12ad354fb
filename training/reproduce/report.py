"""The record of a full run, and tables of our figures beside the paper's: text, Markdown and JSON."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from multisa.runtime.files import write_bytes_atomically, write_json_atomically
from multisa.runtime.records import record_to_dict
from multisa.training.config import TrainConfig
from multisa.training.data import Dataset
from multisa.training.pipeline import RUN_RECORD, RunRecord, count_images, load_run, run_stages
from multisa.training.reproduce import paper

FOLDER = "reproduce"  # below the run's folder


@dataclass(frozen=True)
class TableRow:
    """One line, in percent; None where there is no such figure."""

    name: str
    ours: float | None
    paper: float | None
    other_methods: tuple[float | None, ...] = ()  # in the paper's table, as `Table.other_methods`
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
        values: dict[str, Any] = {
            "name": row.name,
            "ours": row.ours,
            "paper": row.paper,
            "difference": row.difference,
        }
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
        (
            f"paper ({paper.MULTI_SA})" if table.other_methods else "paper",
            [row.paper for row in table.rows],
            ".2f",
        ),
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
