"""`multisa tune`: a page that shows how the background score of a run was chosen, and masks at every other score.

The page is one file that loads nothing. Each image has the score of its strongest class in 8 bits and the class, on the
grid of the walked maps; a script makes the mask of any background score from them, before the dense CRF.
"""

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from html import escape
from importlib import resources
from pathlib import Path
from string import Template

import numpy as np
from PIL import Image

from multisa.runtime.errors import MultisaError, UsageError
from multisa.runtime.files import write_bytes_atomically
from multisa.runtime.imaging.decode import read_mask, resize_image, resize_mask, working_size
from multisa.runtime.imaging.png import display_palette
from multisa.runtime.predict.postprocess import Float32, UInt8, with_gains
from multisa.runtime.progress import Progress, pluralize
from multisa.runtime.report.page import (
    Colours,
    join_sections,
    json_for_script,
    render_chip,
    render_section,
    script_hash,
)
from multisa.training.data import Dataset, Item, read_working_image, spread
from multisa.training.inference import load_maps
from multisa.training.run_record import RunRecord, load_run
from multisa.training.stage_cache import load_stage
from multisa.training.thresholds import BINS, SCORE_BINS, Counts, ThresholdSweep, strongest_scores, yen_threshold

LONG_SIDE = 320  # pixels of the images on the page
JPEG_QUALITY = 80
SCORES = tuple(step / BINS for step in range(1, BINS))  # background scores that are compared
REACH = 0.025  # below and above a score, between which the page says how much of the foreground is lost
STAGES = ("cam-maps", "affinity-labels", "walk", "pseudo-masks")

GENERATOR = "multisa tune"  # in the head of every page, which may be replaced by a new one
HEAD_BYTES = 500  # of a page, with that name in them

_NOT_USED = "for comparison; not used"


@dataclass(frozen=True)
class Curves:
    """What follows from each of SCORES, in percent."""

    foreground: tuple[float, ...]  # share of the pixels of all train images
    # Share of the foreground at a score lower by REACH that is lost up to a score higher by REACH; None where one of
    # them is outside 0..1 or there is no foreground.
    change: tuple[float | None, ...]
    miou: tuple[float, ...] = ()  # on the masks of the train list; empty if they are not read


@dataclass(frozen=True)
class Tuning:
    """What the page shows of all images."""

    run: RunRecord
    is_chosen_on_masks: bool
    yen_score: float  # of the walked maps
    class_scores: tuple[float | None, ...]  # the same for each foreground class
    histograms: Mapping[str, Counts]  # [SCORE_BINS] of "cam-maps", of "walk", and of "gains", the walk with gains
    affinity_scores: tuple[float, float]  # of certain background and certain foreground
    curves: Curves


def write_tune_page(root: Path, dataset: Dataset, path: Path, *, num_images: int, with_masks: bool = False) -> str:
    """Write the page of the finished run in the folder `root` to `path`; returns a description to print.

    dataset: the one the run was trained on. num_images: images shown, evenly spaced in the train list. with_masks:
    also measure the mIoU of every score on the masks of the train list, for comparison. Raises UsageError for a
    `path` that is not .html, is inside the data set or is another file than such a page; for a folder without a
    finished run or one of its stages; for another data set; and for `with_masks` without masks. Raises MultisaError
    for a stage that lacks one of its files.
    """
    _check_output(path, dataset)
    run = load_run(root)
    folders = {name: run.folder(root, name) for name in STAGES}
    stored = {name: load_stage(folder) for name, folder in folders.items()}
    for name, folder in folders.items():
        missing = next((file for file in stored[name]["files"] if not (folder / file).is_file()), None)
        if missing:
            raise MultisaError(f"{folder / missing}: missing, expected a file of the run; run `multisa train` again")
    if dataset.train_images_digest() != run.data_digest:
        raise UsageError(
            f"{dataset.root}: got other images, classes or labels than {root} was trained on; give the data set of "
            "the training, with the same --labels, --val and --corrections"
        )
    if with_masks and not dataset.train:
        raise UsageError(f"{dataset.root}: got --masks, but no image of the train list has a mask; leave it out")
    used = stored["affinity-labels"]["inputs"]
    tuning = _tuning(run, dataset, folders, (used["background"], used["foreground"]), with_masks=with_masks)
    items = spread(dataset.train_images, num_images)
    colours = dict(zip(run.classes, display_palette(len(run.classes)).tolist(), strict=True))
    with Progress(len(items), "images", "image") as bar:
        cards = []
        for item in items:
            cards.append(_card(item, run, folders, colours))
            bar.advance()
    script = _asset("tune.js")
    sections = (_scores_section(tuning), _curves_section(tuning), _gains_section(tuning, colours))
    page = Template(_asset("tune.html")).substitute(
        title=escape(f"Background score of {run.config.name}"),
        subtitle=escape(f"{pluralize(len(items), 'image')} of {len(dataset.train_images):,} trained on"),
        style=resources.files("multisa.runtime.report").joinpath("page.css").read_text(encoding="utf-8"),
        script=script,
        script_hash=script_hash(script),
        legend="".join(render_chip(name, colours) for name in run.classes[1:]),
        chosen=escape(_choice(tuning)),
        score=f"{run.label.background:.3f}",
        generator=GENERATOR,
        sections=join_sections((*sections, _affinity_section(tuning))),
        gallery="Masks at the slider's score, before the dense CRF, and the pseudo-masks of the run, after it",
        cards="\n".join(cards),
        facts=json_for_script([list(colours.values()), asdict(tuning.curves), REACH]),
    )
    write_bytes_atomically(path, page.encode(errors="replace"))
    regret = f"{_regret(tuning)}\n" if with_masks else ""
    return f"{_choice(tuning)}\n{regret}written: {path}, {pluralize(len(items), 'image')}, {len(page) / 1e6:.1f} MB"


def _check_output(path: Path, dataset: Dataset) -> None:
    if path.suffix != ".html":
        raise UsageError(f"{path}: got a name without .html, expected one that ends in it; choose another with -o")
    if path.resolve().is_relative_to(dataset.root.resolve()):
        raise UsageError(
            f"{path}: is inside the data set {dataset.root}, expected a file outside it; choose another with -o"
        )
    if not path.exists():
        return
    if path.is_file():
        with path.open("rb") as file:
            if f'content="{GENERATOR}"'.encode() in file.read(HEAD_BYTES):
                return
    raise UsageError(
        f"{path}: exists and is no page of `{GENERATOR}`, expected a new file or such a page to replace; "
        "choose another with -o"
    )


def _tuning(
    run: RunRecord,
    dataset: Dataset,
    folders: Mapping[str, Path],
    affinity_scores: tuple[float, float],
    *,
    with_masks: bool,
) -> Tuning:
    items, n_classes, gains = dataset.train_images, len(run.classes), run.label.class_gain
    walked = strongest_scores(folders["walk"], items, n_classes)
    gained = strongest_scores(folders["walk"], items, n_classes, gains).sum(0)
    miou = _miou_curve(run, dataset, folders["walk"]) if with_masks else ()
    return Tuning(
        run=run,
        is_chosen_on_masks=run.config.background_from == "train-masks" and run.images.train > 0,
        yen_score=yen_threshold(walked.sum(0)),
        class_scores=tuple(yen_threshold(row) if row.any() else None for row in walked[1:]),
        histograms={
            "cam-maps": strongest_scores(folders["cam-maps"], items, n_classes).sum(0),
            "walk": walked.sum(0),
            "gains": gained,
        },
        affinity_scores=affinity_scores,
        curves=Curves(*_foreground_and_change(gained), miou),
    )


def _foreground_and_change(counts: Counts) -> tuple[tuple[float, ...], tuple[float | None, ...]]:
    """The first two of `Curves`, from the histogram of the scores that are compared with the background score."""
    above = np.append(counts[::-1].cumsum()[::-1], 0)  # pixels from each of the bins on
    places = [round(score * SCORE_BINS) for score in SCORES]
    reach = round(REACH * SCORE_BINS)

    def change(at: int) -> float | None:
        if not reach <= at <= SCORE_BINS - reach or not above[at - reach]:
            return None
        return round(100 * (1 - float(above[at + reach] / above[at - reach])), 2)

    return tuple(round(100 * float(above[at] / above[0]), 2) for at in places), tuple(map(change, places))


def _miou_curve(run: RunRecord, dataset: Dataset, walked: Path) -> tuple[float, ...]:
    """mIoU of the masks before the dense CRF on the train list, in percent."""
    sweep = ThresholdSweep(len(run.classes))
    with Progress(len(dataset.train), "mIoU", "image") as bar:
        for item in dataset.train:
            assert item.mask is not None
            maps = with_gains(load_maps(walked / f"{item.id}.npy"), item.classes, run.label.class_gain)
            sweep.add(maps, item.classes, item.mask.read())
            bar.advance()
    return tuple(sweep.results(run.label.background)["curve"].values())


def _choice(tuning: Tuning) -> str:
    """How the background score was chosen, in words."""
    score, found = f"{tuning.run.label.background:.3f}", f"{tuning.yen_score:.3f}"
    if tuning.is_chosen_on_masks:
        return (
            f"The background score is {score}: its masks have the highest mIoU on the train list, as in the paper. "
            f"Yen's criterion, which needs no masks, finds {found}."
        )
    if tuning.run.config.background_from == "yen":
        return (
            f"The background score is {score}. Yen's criterion found it, from the histogram of the scores of all "
            f"pixels of the {tuning.run.images.train_images:,} images trained on. No mask was used."
        )
    return f"The background score is {score}, from the settings. Yen's criterion finds {found}. No mask was used."


def _regret(tuning: Tuning) -> str:
    """How far the chosen score is from the best, in words."""
    curve = tuning.curves.miou
    chosen, best = float(np.interp(tuning.run.label.background, SCORES, curve)), max(curve)
    return (
        f"On the train list, masks at the chosen score have an mIoU of {chosen:.1f} %, those at the best score, "
        f"{SCORES[curve.index(best)]:.2f}, {best:.1f} %: the regret is {best - chosen:.1f} points."
    )


def _scores_section(tuning: Tuning) -> str:
    plain, gained = tuning.histograms["walk"], tuning.histograms["gains"]
    has_gains = bool(tuning.run.label.class_gain)
    lines = [_area(plain), *([_line(_heights(gained))] if has_gains else [])]
    key = [("", "scores of the maps after the random walk")]
    key += [("", "line: with the gains of classes")] if has_gains else []
    key += [("--colour: var(--yen)", f"Yen's score {tuning.yen_score:.3f}"), ("dotted", "the slider's score")]
    chart = _chart(lines, [(tuning.yen_score, "--yen")], "histogram of the scores after the random walk")
    text = "Pixels of all train images by the score of their strongest class; heights are square roots of the counts."
    return render_section("Scores", f"<p>{text}</p>{chart}{_key(key)}")


def _affinity_section(tuning: Tuning) -> str:
    background, foreground = tuning.affinity_scores
    marks = [(background, "--low"), (foreground, "--high")]
    chart = _chart(
        [_area(tuning.histograms["cam-maps"])], marks, "histogram of the scores before the random walk", now=False
    )
    key = [
        ("--colour: var(--low)", f"certain background below {background:.3f}"),
        ("--colour: var(--high)", f"certain foreground above {foreground:.3f}"),
    ]
    text = "The maps before the random walk. AffinityNet learns from pixels that are certain, after the dense CRF."
    return render_section("Affinity labels", f"<p>{text}</p>{chart}{_key(key)}")


def _curves_section(tuning: Tuning) -> str:
    curves = tuning.curves
    lines = [_line([None if value is None else value / 100 for value in curves.change])]
    lost = f"foreground lost from {REACH:g} below to {REACH:g} above the score"
    key = [("", lost), ("dotted", "the slider's score")]
    text = "Where the solid line is low, masks hardly depend on the score."
    if curves.miou:
        lines.append(_line([value / 100 for value in curves.miou], "dashed"))
        note = "the score was chosen on these masks" if tuning.is_chosen_on_masks else _NOT_USED
        key.insert(1, ("dashed", f"mIoU on the train list ({note})"))
        text = f"{text} {_regret(tuning)}"
    chart = _chart(lines, [(tuning.run.label.background, "--yen")], "change of the masks with the background score")
    key.insert(1, ("--colour: var(--yen)", f"the run's score {tuning.run.label.background:.3f}"))
    return render_section("Stability", f"<p>{escape(text)} The axis goes from 0 to 100 %.</p>{chart}{_key(key)}")


def _gains_section(tuning: Tuning, colours: Colours) -> str:
    gains = tuning.run.label.class_gain or (1.0,) * len(tuning.class_scores)
    rows = "".join(
        f'<tr><th scope="row">{render_chip(name, colours)}</th>'
        f'<td class="number">{"-" if score is None else f"{score:.3f}"}</td><td class="number">{gain:.2f}</td></tr>'
        for name, score, gain in zip(tuning.run.classes[1:], tuning.class_scores, gains, strict=True)
    )
    head = "".join(f'<th scope="col">{name}</th>' for name in ("class", "Yen's score", "gain"))
    text = "A class wins a pixel where its score, multiplied by its gain, is above the background score."
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"
    return render_section("Gains of classes", f"<p>{text}</p>{table}")


def _heights(counts: Counts) -> list[float | None]:
    return [*np.sqrt(counts / max(int(counts.max()), 1)).tolist()]


def _area(counts: Counts) -> str:
    steps = "".join(f"V{100 * (1 - (height or 0)):.1f}h{100 / len(counts):g}" for height in _heights(counts))
    return f'<path class="area" d="M0 100{steps}V100Z"/>'


def _line(values: Sequence[float | None], style: str = "line") -> str:
    """A path through values in 0..1 at evenly spaced scores, with gaps at None."""
    pen, parts = "M", []
    for place, value in enumerate(values, 1):
        if value is None:
            pen = "M"
            continue
        parts.append(f"{pen}{100 * place / (len(values) + 1):.2f} {100 * (1 - value):.1f}")
        pen = "L"
    return f'<path class="{style}" d="{"".join(parts)}"/>'


def _chart(paths: Sequence[str], marks: Sequence[tuple[float, str]], label: str, *, now: bool = True) -> str:
    lines = "".join(f'<i style="left:{100 * at:.2f}%;--colour:var({colour})"></i>' for at, colour in marks)
    slider = '<i class="now"></i>' if now else ""
    return (
        f'<div class="chart"><svg viewBox="0 0 100 100" preserveAspectRatio="none" role="img" aria-label="{label}">'
        f'{"".join(paths)}</svg>{lines}{slider}</div><p class="scale"><span>0</span><span>0.5</span><span>1</span></p>'
    )


def _key(entries: Sequence[tuple[str, str]]) -> str:
    def swatch(style: str) -> str:
        return f'style="{style}"' if style.startswith("--") else f'class="{style}"'

    return "".join(
        ['<ul class="key">', *(f"<li><i {swatch(style)}></i>{escape(text)}</li>" for style, text in entries), "</ul>"]
    )


def _card(item: Item, run: RunRecord, folders: Mapping[str, Path], colours: Colours) -> str:
    """Image, heat map, mask at the slider's score, and pseudo-mask of the run."""
    image = read_working_image(item.image, run.config.long_side)
    size = working_size(image.shape[0], image.shape[1], LONG_SIDE, enlarge=1)
    maps = with_gains(load_maps(folders["walk"] / f"{item.id}.npy"), item.classes, run.label.class_gain)
    mask = resize_mask(read_mask(folders["pseudo-masks"] / f"{item.id}.png"), size)
    name, canvas = escape(item.id), f'width="{size[1]}" height="{size[0]}"'
    panels = (
        ("image", f'<span role="img" aria-label="{name}"></span>'),
        ("strongest class", f'<canvas class="heat" {canvas}></canvas>'),
        ("mask at this score", f'<canvas class="mask" {canvas}></canvas>'),
        ("mask of the run", f'<img class="run" alt="pseudo-mask of {name}" src="{_mask_url(mask, colours)}">'),
    )
    figures = "".join(f"<figure>{content}<figcaption>{caption}</figcaption></figure>" for caption, content in panels)
    chips = "".join(render_chip(run.classes[class_id], colours) for class_id in item.classes)
    return (
        f'<article aria-label="{name}"><div class="panels" '
        f'style="--ratio:{size[1]}/{size[0]};--image:url({jpeg_url(resize_image(image, size))})">{figures}</div>'
        f'<img class="scores" alt="" hidden src="{_scores_url(maps, item.classes)}">'
        f'<h3 title="{name}">{name}</h3><p class="chips">{chips or "<span>no class</span>"}</p></article>'
    )


def _scores_url(maps: Float32, class_ids: tuple[int, ...]) -> str:
    """The strongest class of each cell as one grey PNG: its score in 0..1 as 0..255, and its id below."""
    packed = np.zeros((2, *maps.shape[1:]), np.uint8)
    if class_ids:
        packed[0] = np.rint(255 * maps.max(0).clip(0, 1))
        packed[1] = np.array(class_ids, np.uint8)[maps.argmax(0)]
    return _data_url(Image.fromarray(packed.reshape(-1, packed.shape[2])), "PNG", optimize=True)


def _mask_url(mask: UInt8, colours: Colours) -> str:
    picture = Image.fromarray(mask)
    picture.putpalette(np.array(list(colours.values()), np.uint8).tobytes())
    return _data_url(picture, "PNG", optimize=True, transparency=0)


def jpeg_url(image: UInt8) -> str:
    """A data URL of an image, uint8 [H, W, 3]."""
    return _data_url(Image.fromarray(image), "JPEG", quality=JPEG_QUALITY, optimize=True)


def _data_url(picture: Image.Image, kind: str, **options: int) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _asset(name: str) -> str:
    return resources.files("multisa.training").joinpath(name).read_text(encoding="utf-8")
