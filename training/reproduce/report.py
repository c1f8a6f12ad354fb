"""A table of ours beside the paper's: as text, Markdown and JSON, with the conditions of both."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from multisa.runtime.files import write_bytes_atomically, write_json_atomically
from multisa.runtime.records import record_to_dict
from multisa.training.config import TrainConfig
from multisa.training.data import DataSet
from multisa.training.reproduce import paper

FOLDER = "reproduce"  # below the run's folder


@dataclass(frozen=True)
class TableRow:
    """One line, in percent; None where there is no such figure."""

    name: str
    ours: float | None
    paper: float | None
    rivals: tuple[float | None, ...] = ()  # of the paper's table, in the order of the table's `rivals`
    background: float | None = None  # score of the background class that ours is measured at
    iou: tuple[float | None, ...] = ()  # of each class of the data set
    comparable: bool = True  # False where the two are of different things

    @property
    def difference(self) -> float | None:
        """Ours less the paper's."""
        if self.ours is None or self.paper is None or not self.comparable:
            return None
        return round(self.ours - self.paper, 2)


@dataclass(frozen=True)
class Table:
    """A table of the paper and ours."""

    name: str  # "table1"
    title: str
    heading: str  # of the first column
    rows: tuple[TableRow, ...]
    notes: tuple[str, ...]
    rivals: tuple[str, ...] = ()


def protocol(config: TrainConfig, dataset: DataSet, measured: str, paper_backbone: str) -> tuple[str, ...]:
    """What ours and the paper's figures were measured with, and whether the two can be compared.

    measured: the list, "train" or "val"; paper_backbone: as the paper names it.
    """
    backbone = config.segmenter.backbone if measured == "val" else config.cam.backbone
    items, paper_items = (dataset.val, paper.VAL) if measured == "val" else (dataset.train, paper.TRAIN)
    names = [paper.paper_class(name) for name in dataset.class_names]
    differing = [
        aspect
        for aspect, alike in (
            ("backbone", backbone.partition(".")[0] == paper.BACKBONES[paper_backbone]),
            ("classes", len(names) == paper.CLASSES and set(names) == set(paper.TABLE3_CLASSES)),
            ("photographs", (len(dataset.weak), len(items)) == (paper.TRAINED_ON, paper_items)),
        )
        if not alike
    ]
    epochs = f"{config.cam.schedule.epochs} epochs for a CAM network"
    if measured == "val":
        epochs += f", {config.segmenter.schedule.epochs} for DeepLabV3+"
    notes = [
        f"Ours: {backbone}, {len(names) - 1} classes and background, {len(dataset.weak):,} photographs with "
        f"image-level labels to train on, {len(items):,} of {measured} with masks to measure on, {epochs}.",
        f"Paper: {paper_backbone}, {paper.CLASSES - 1} classes of VOC 2012 and background, "
        f"{paper.TRAINED_ON:,} photographs trained on, {paper_items:,} of {measured} measured on.",
    ]
    if differing:
        listed = " and ".join(filter(None, (", ".join(differing[:-1]), differing[-1])))
        notes.append(
            "The paper's figures stand beside for their order, not for comparison: its "
            f"{listed} {'is another' if differing == ['backbone'] else 'are others'}."
        )
    return tuple(notes)


def format_text(table: Table) -> str:
    """The table in columns for a terminal, its notes below."""
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


def write_table(
    table: Table, config: TrainConfig, dataset: DataSet, digests: Mapping[str, str], root: Path
) -> Path:
    """Write NAME.json and NAME.md below `root`/reproduce; returns the path of the JSON file.

    digests: of what was trained on and measured on, and of the stages, by name.
    """
    folder = root / FOLDER
    rows = [
        {
            "name": row.name,
            "ours": row.ours,
            "paper": row.paper,
            "difference": row.difference,
            **({"rivals": dict(zip(table.rivals, row.rivals, strict=True))} if row.rivals else {}),
            **({"background": row.background} if row.background is not None else {}),
            **({"iou": dict(zip(dataset.class_names, row.iou, strict=True))} if row.iou else {}),
        }
        for row in table.rows
    ]
    record = {"what": table.name, "title": table.title, "rows": rows, "notes": table.notes}
    write_json_atomically(folder / f"{table.name}.json", {**record, **provenance(config, dataset, digests)})
    write_bytes_atomically(folder / f"{table.name}.md", format_markdown(table).encode())
    return folder / f"{table.name}.json"


def provenance(config: TrainConfig, dataset: DataSet, digests: Mapping[str, str]) -> dict[str, Any]:
    """What a table or a figure was made from, as JSON holds it."""
    return {
        "classes": dataset.class_names,
        "photographs": {"weak": len(dataset.weak), "train": len(dataset.train), "val": len(dataset.val)},
        "digests": dict(digests),
        "config": record_to_dict(config),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }


def _cells(table: Table) -> list[list[str]]:
    """Rows of text, the heading first; columns that no row fills are left out."""
    columns: list[tuple[str, Sequence[float | None], str]] = [
        ("background", [row.background for row in table.rows], ".2f"),
        ("ours", [row.ours for row in table.rows], ".2f"),
        (f"paper{f' ({paper.MULTI_SA})' if table.rivals else ''}", [row.paper for row in table.rows], ".2f"),
        ("difference", [row.difference for row in table.rows], "+.2f"),
        *((name, [row.rivals[i] for row in table.rows], ".1f") for i, name in enumerate(table.rivals)),
    ]
    filled = [column for column in columns if any(value is not None for value in column[1])]
    body = [
        [row.name, *("-" if v[i] is None else format(v[i], style) for _, v, style in filled)]
        for i, row in enumerate(table.rows)
    ]
    return [[table.heading, *(name for name, _, _ in filled)], *body]
