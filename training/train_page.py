"""The page of a training: loss curves, IoU of classes, sample images with maps and masks. One file, loads nothing."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from html import escape
from importlib import resources
from pathlib import Path
from string import Template
from typing import NamedTuple

import numpy as np

from multisa.runtime.files import write_bytes_atomically
from multisa.runtime.imaging.decode import read_mask, resize_image, resize_mask, working_size
from multisa.runtime.imaging.png import display_palette, overlay_mask
from multisa.runtime.predict.postprocess import Float32, UInt8, resize_maps
from multisa.runtime.report.page import Colours, join_sections, render_chip, render_section
from multisa.runtime.report.summary import describe_duration
from multisa.training.config import TrainConfig
from multisa.training.data import Item, read_working_image
from multisa.training.inference import load_maps
from multisa.training.tune import jpeg_url

PAGE = "train.html"  # in the run folder
LONG_SIDE = 280  # pixels of the images on the page
REFRESH_SECONDS = 20
ROUND_STAGE = re.compile(r"relabelled-\d+")
OPACITY = 0.85  # of a map where its score is 1


class Metric(NamedTuple):
    """One row of `metrics.csv`."""

    time: str  # UTC, ISO 8601
    stage: str  # folder of the stage, which differs where settings or data do
    epoch: int | None  # from 1; None for what belongs to a whole stage
    step: int | None  # optimisation steps of the stage so far
    metric: str
    value: float

    @classmethod
    def of_row(cls, row: Mapping[str, str]) -> "Metric":
        """The row as read from the file."""
        epoch, step = (int(row[name]) if row[name] else None for name in ("epoch", "step"))
        return cls(row["time"], row["stage"], epoch, step, row["metric"], float(row["value"]))

    @property
    def name(self) -> str:
        """The stage without its digest."""
        return self.stage.rpartition("-")[0]


Panels = tuple[tuple[str, UInt8], ...]  # captions, and RGB images uint8 [h, w, 3]


@dataclass(frozen=True)
class TrainPage:
    """The content of the page."""

    name: str
    state: str  # "running", "finished" or "stopped"
    reason: str  # why it stopped
    seconds_left: float | None
    classes: tuple[str, ...]  # background first
    facts: Mapping[str, str]
    planned: tuple[str, ...]  # stages in their order
    done: tuple[str, ...]
    running: str  # the stage that runs, or ""
    metrics: tuple[Metric, ...]  # of the stages of this run
    warnings: tuple[str, ...]
    samples: tuple[tuple[Item, Panels], ...]


def write_train_page(path: Path, page: TrainPage) -> None:
    """Write the page to `path`, atomically."""
    colours = dict(zip(page.classes, display_palette(len(page.classes)).tolist(), strict=True))
    shown = sorted({class_id for item, _ in page.samples for class_id in item.classes})
    refresh = f'<meta http-equiv="refresh" content="{REFRESH_SECONDS}">' if page.state == "running" else ""
    text = Template(resources.files("multisa.training").joinpath("train.html").read_text(encoding="utf-8")).substitute(
        refresh=refresh,
        title=escape(f"Training of {page.name}"),
        style=resources.files("multisa.runtime.report").joinpath("page.css").read_text(encoding="utf-8"),
        panels=max((len(panels) for _, panels in page.samples), default=1),
        state=page.state,
        subtitle=escape(_subtitle(page)),
        totals="".join(f"<div><dt>{escape(k)}</dt><dd>{escape(v)}</dd></div>" for k, v in _totals(page).items()),
        sections=join_sections([_warnings(page), *_curves(page), _stages(page), _scores(page, colours)]),
        legend="".join(render_chip(page.classes[class_id], colours) for class_id in shown),
        cards="\n".join(_card(*sample, page.classes, colours) for sample in page.samples),
    )
    write_bytes_atomically(path, text.encode(errors="replace"))


def sample_panels(
    item: Item, config: TrainConfig, folders: Mapping[str, Path], segmented: tuple[Path, str] | None
) -> Panels:
    """What the finished stages made of an image.

    folders: of the finished stages by name. segmented: a folder of ID.png and the network that made them, if there is
    one.
    """
    image = read_working_image(item.image, config.long_side)
    image = resize_image(image, working_size(image.shape[0], image.shape[1], LONG_SIDE, enlarge=1))
    panels = [("image", image)]
    for stage, caption in (("cam-maps", "CAM"), ("walk", "after the walk")):
        if stage in folders:
            panels.append((caption, overlay_maps(image, load_maps(folders[stage] / f"{item.id}.npy"), item.classes)))
    rounds = [name for name in folders if ROUND_STAGE.fullmatch(name)]  # in their order
    masks = [(folders[n], n) for n in ("pseudo-masks", *rounds[-1:]) if n in folders]
    for folder, caption in [*masks, *([segmented] if segmented else [])]:
        path = folder / f"{item.id}.png"
        if path.is_file():
            mask = resize_mask(read_mask(path), (image.shape[0], image.shape[1]))
            panels.append((caption, overlay_mask(image, mask, display_palette(max(item.classes) + 1), opacity=0.6)))
    return tuple(panels)


def overlay_maps(rgb: UInt8, maps: Float32, class_ids: Sequence[int]) -> UInt8:
    """Blend the colour of the strongest class into an image, as much as its score.

    rgb: uint8 [H, W, 3]; maps: float32 [C, h, w] in [0, 1] for `class_ids`. Returns uint8 [H, W, 3].
    """
    if not class_ids:
        return rgb
    scores = resize_maps(maps, (rgb.shape[0], rgb.shape[1])).clip(0, 1)
    colours = display_palette(max(class_ids) + 1)[np.asarray(class_ids)[scores.argmax(0)]]
    share = OPACITY * scores.max(0)[..., np.newaxis]
    return np.asarray(rgb * (1 - share) + colours * share, dtype=np.uint8)


def _subtitle(page: TrainPage) -> str:
    if page.state == "stopped":
        return f"Stopped: {page.reason}. Run the same command again to resume."
    if page.state == "finished":
        return "Finished."
    running = f"Running: {page.running}." if page.running else "Running."
    return f"{running} Written {datetime.now(UTC):%Y-%m-%d %H:%M} UTC; reloads itself every {REFRESH_SECONDS} seconds."


def _totals(page: TrainPage) -> dict[str, str]:
    left = {} if page.seconds_left is None else {"time left, about": describe_duration(page.seconds_left)}
    spent = sum(row.value for row in page.metrics if row.metric == "seconds" and row.epoch is None)
    stages = f"{len(set(page.planned) & set(page.done))} of {len(page.planned)}"
    return {"stages done": stages, **left, "in finished stages": describe_duration(spent), **page.facts}


def _warnings(page: TrainPage) -> str:
    rows = "".join(f"<li>{escape(text)}</li>" for text in page.warnings)
    return _wide(render_section("Warnings", f'<ul class="warnings">{rows}</ul>')) if rows else ""


def _wide(section: str) -> str:
    return section.replace("<section>", '<section class="wide">', 1)


def _series(page: TrainPage, stage: str, metric: str) -> list[tuple[int, float]]:
    """(epoch, value) of a metric, by epoch."""
    return sorted((r.epoch, r.value) for r in page.metrics if (r.stage, r.metric) == (stage, metric) and r.epoch)


def _curves(page: TrainPage) -> list[str]:
    """One chart for each network: its loss and, where it was measured, its mIoU on val."""
    sections = []
    for stage in dict.fromkeys(row.stage for row in page.metrics if row.metric == "loss"):
        loss, miou = _series(page, stage, "loss"), _series(page, stage, "val_miou")
        last, top = loss[-1][0], max(value for _, value in loss)
        lines = [_line([(epoch, value / top if top else 0.0) for epoch, value in loss], last, "loss")]
        key = [f"<li><i></i>loss <b>{loss[-1][1]:.4g}</b>, axis 0 to {top:.3g}</li>"]
        if miou:
            lines.append(_line([(epoch, value / 100) for epoch, value in miou], last, "dashed"))
            key.append(f'<li><i class="dashed"></i>mIoU on val <b>{miou[-1][1]:.1f}</b>, axis 0 to 100</li>')
        name = escape(stage.rpartition("-")[0])
        content = (
            f'<div class="chart"><svg viewBox="0 0 100 100" preserveAspectRatio="none" role="img" '
            f'aria-label="{name}: loss by epoch">{"".join(lines)}</svg></div>'
            f'<p class="scale"><span>epoch 1</span><span>epoch {last}</span></p><ul class="key">{"".join(key)}</ul>'
        )
        sections.append(render_section(name, content))
    return sections


def _line(points: Sequence[tuple[int, float]], last: int, kind: str) -> str:
    """A path through (epoch, height in 0..1), with a dot for each point."""
    places = [(100 * (epoch - 1) / max(last - 1, 1), 100 - 96 * height) for epoch, height in points]
    path = "L".join(f"{x:.2f} {y:.2f}" for x, y in places)
    dots = "".join(f"M{x:.2f} {y:.2f}h0" for x, y in places)  # round ends of lines without a length
    return f'<path class="{kind}" d="M{path}"/><path class="{kind} dots" d="{dots}"/>'


def _scores(page: TrainPage, colours: Colours) -> str:
    """IoU of each class for everything that was measured."""
    columns: dict[str, dict[str, float]] = {}
    titles: dict[str, str] = {}
    for row in page.metrics:  # a later epoch replaces an earlier one
        _, mark, name = row.metric.partition("iou/")
        if mark:
            columns.setdefault(row.name, {})[name] = row.value
            titles[row.name] = row.name.removesuffix("-measured") + (f", epoch {row.epoch}" if row.epoch else "")
    rows = [
        [render_chip(name, colours), *(_cell(values.get(name)) for values in columns.values())] for name in page.classes
    ]
    return _wide(_table("IoU of the classes, in percent", ["class", *titles.values()], rows)) if columns else ""


def _table(title: str, head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A section with a table; the first cell of a row is its heading, and the others are <td> elements."""
    names = "".join(f'<th scope="col">{escape(name)}</th>' for name in head)
    body = "".join(f'<tr><th scope="row">{first}</th>{"".join(cells)}</tr>' for first, *cells in rows)
    table = f'<div class="tall"><table><thead><tr>{names}</tr></thead><tbody>{body}</tbody></table></div>'
    return render_section(title, table)


def _cell(value: float | None) -> str:
    if value is None:
        return '<td class="amount">-</td>'
    return f'<td class="amount"><i style="width:{value:.1f}%"></i><b>{value:.1f}</b></td>'


def _stages(page: TrainPage) -> str:
    whole = {(row.name, row.metric): row.value for row in page.metrics if row.epoch is None}
    rows = []
    for name in dict.fromkeys((*page.planned, *page.done)):
        seconds, miou = whole.get((name, "seconds")), whole.get((name, "miou"))
        taken = describe_duration(seconds) if seconds is not None else "running" if name == page.running else ""
        cells = (taken, "" if miou is None else f"{miou:.1f}")
        rows.append([escape(name), *(f'<td class="number">{cell}</td>' for cell in cells)])
    return _table("Stages", ("stage", "time", "mIoU"), rows)


def _card(item: Item, panels: Panels, classes: Sequence[str], colours: Colours) -> str:
    name = escape(item.id)
    height, width = panels[0][1].shape[:2]
    figures = "".join(
        f'<figure><img alt="{caption} of {name}" src="{jpeg_url(rgb)}"><figcaption>{caption}</figcaption></figure>'
        for caption, rgb in ((escape(caption), rgb) for caption, rgb in panels)
    )
    chips = "".join(render_chip(classes[class_id], colours) for class_id in item.classes)
    return (
        f'<article aria-label="{name}"><div class="panels" style="--ratio:{width}/{height}">{figures}</div>'
        f'<h3 title="{name}">{name}</h3><p class="chips">{chips}</p></article>'
    )
